"""The steps of a planned replica, and of one whose rates its owner has measured."""

from waterline import catalog
from waterline.catalog.engines import find_engine
from waterline.cost.step import AttentionCost, StepCost, step_cost
from waterline.fleet import Fleet, Measured
from waterline.plan import Replica
from waterline.units import PICOSECONDS_PER_S

MOST_BATCH = 1024  # requests a replica of which only rates are known decodes together …
STEP_TOKENS = 8192  # … and the tokens it puts into one step


def measured_step(measured: Measured) -> StepCost:
    """Return steps in which every prompt token takes the same time, and every decode.

    Rates say how much is done, not how soon: a request that is alone comes out far quicker than it would be.
    """
    decode_ps = round(PICOSECONDS_PER_S / measured.output_tokens_per_s)
    attention = AttentionCost(
        window_tokens=0,
        decode_ps=tuple(range(0, decode_ps * (MOST_BATCH + 1), decode_ps)),
        decode_ps_per_token=(0,) * (MOST_BATCH + 1),
        prefill_ps=0,
        prefill_ps_per_token=round(PICOSECONDS_PER_S / measured.prompt_tokens_per_s),
        prefill_ps_per_pair=0,
    )
    return StepCost(tokens_ps=(0,), more_ps_per_token=0, head_ps=(0,), attention=(attention,), step_tokens=STEP_TOKENS)


def replica_step_cost(fleet: Fleet, replica: Replica) -> StepCost:
    """Return the steps of a planned replica: as its owner measured them on such cards, or else as they are priced."""
    gpu = catalog.find_gpu(fleet.pool(replica.pool).gpu)
    model = fleet.model(replica.model)
    for measured in model.measured:
        if measured.gpu == gpu.id:
            return measured_step(measured)
    engine = find_engine(replica.engine).on(gpu)
    return step_cost(fleet.llm_of(model), gpu, replica.layout, replica.precision, engine)

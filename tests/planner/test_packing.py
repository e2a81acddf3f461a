from msgspec.structs import replace

from examples import small_plan
from waterline.plan import Layout
from waterline.planner.packing import FreeGpus


def free(nodes: int, per_node: int) -> FreeGpus:
    fleet = small_plan().fleet
    return FreeGpus(replace(fleet, pools=(replace(fleet.pools[0], nodes=nodes, gpus_per_node=per_node),)))


def test_small_replicas_fill_a_node_before_they_open_the_next() -> None:
    gpus = free(2, 4)
    taken = [gpus.take("box", Layout(tp=2))[0] for _ in range(3)]
    assert [(place.node, place.gpus) for place in taken] == [(0, (0, 1)), (0, (2, 3)), (1, (0, 1))]


def test_a_tensor_parallel_group_never_leaves_its_node() -> None:
    gpus = free(2, 3)
    assert gpus.room("box", Layout(tp=2)) == 2
    gpus.take("box", Layout(tp=2))
    gpus.take("box", Layout(tp=2))
    assert gpus.free("box") == 2
    assert gpus.room("box", Layout(tp=2)) == 0


def test_the_stages_of_a_pipeline_take_a_group_each() -> None:
    gpus = free(3, 4)
    places = gpus.take("box", Layout(tp=4, pp=2))
    assert [place.node for place in places] == [0, 1]
    assert gpus.room("box", Layout(tp=4, pp=2)) == 0

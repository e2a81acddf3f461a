"""What the table and the page tell of a plan's day: who is served by how many GPUs, who lends to whom, what moves."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from waterline.fleet import HOURS
from waterline.plan import EVERY_HOUR, HourPlan, Plan, Replica
from waterline.units import KILO

PUBLIC = "public"  # the tenant whose GPUs are the waterline
SPARE = " spare"  # GPUs of replicas that run without being asked; no tenant's name begins with a blank
IDLE = " idle"  # GPUs that serve nobody
STARTS = " starts"  # what it costs to load replicas
MOST_NAMED = 4  # models in a sentence
LEAST_GPUS = 0.05  # less than this of a share or a loan is shown as nothing


@dataclass(frozen=True, slots=True)
class Borrowing:
    """A loan as people tell it: the hours it lasts, and how many GPUs at least and at most."""

    borrower: str
    lender: str  # "": deserved by nobody
    hours: tuple[int, ...]
    least_gpus: float
    most_gpus: float

    def __str__(self) -> str:
        least, most = gpus_text(self.least_gpus), gpus_text(self.most_gpus)
        gpus = most if least == most else f"{least} to {most}"
        return f"{self.borrower} borrows {gpus} from {self.lender or 'what nobody deserves'} {span(self.hours)}"


@dataclass(frozen=True, slots=True)
class Unserved:
    """What a tenant asks of a model and does not get, because the fleet is too small."""

    tenant: str
    model: str
    served_fraction: float  # of the day's requests
    worst_hour: int
    asked_requests_per_s: float  # at that hour
    served_requests_per_s: float

    def __str__(self) -> str:
        rates = f"{self.served_requests_per_s:.3g} of {self.asked_requests_per_s:.3g} req/s"
        return (
            f"Not served: {1 - self.served_fraction:.1%} of what {self.tenant} asks of {self.model} in a day; at "
            f"{clock(self.worst_hour)} it gets {rates}"
        )


def tenants_of(plan: Plan) -> tuple[str, ...]:
    """Return the public first, then who uses most at their peak."""
    peaks = {tenant.tenant: tenant.gpus for tenant in plan.tenants}
    for hour in plan.hours:
        for tenant, gpus in gpus_by_tenant(hour).items():
            peaks[tenant] = max(peaks.get(tenant, 0.0), gpus)
    return tuple(sorted(peaks, key=lambda tenant: (tenant != PUBLIC, -peaks[tenant])))


def gpus_by_tenant(hour: HourPlan) -> dict[str, float]:
    gpus: defaultdict[str, float] = defaultdict(float)
    for share in hour.shares:
        gpus[share.tenant] += share.gpus
    return dict(gpus)


def gpus_at(plan: Plan, hour: HourPlan) -> dict[str, float]:
    """Return what every GPU of the fleet does at that hour: by tenant, `SPARE` and `IDLE`; the sum is the fleet."""
    serving = dict.fromkeys(tenants_of(plan), 0.0) | gpus_by_tenant(hour)
    spare = max(0.0, hour.gpus - math.fsum(serving.values()))
    return {**serving, SPARE: spare, IDLE: max(0.0, plan.fleet.gpus - math.fsum(serving.values()) - spare)}


def differs_by_hour(plan: Plan) -> bool:
    """Tell whether there is more to say of a plan than what runs all day."""
    first = next(iter(plan.hours), None)
    return any(hour.starts or hour.loans or hour.shares != first.shares for hour in plan.hours if first)


def borrowings(plan: Plan) -> list[Borrowing]:
    """Return every loan of the day once, a line for each run of hours; the run that holds midnight is not cut."""
    by_pair: defaultdict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for hour in plan.hours:
        for loan in hour.loans:
            if loan.gpus >= LEAST_GPUS:
                by_pair[loan.borrower, loan.lender][hour.hour] = loan.gpus
    return [
        Borrowing(borrower, lender, run, min(gpus[hour] for hour in run), max(gpus[hour] for hour in run))
        for (borrower, lender), gpus in by_pair.items()
        for run in runs(gpus)
    ]


def runs(hours: Collection[int]) -> list[tuple[int, ...]]:
    """Return hours that follow each other together; midnight follows 23."""
    if len(hours) == HOURS:
        return [EVERY_HOUR]
    first = [hour for hour in sorted(hours) if (hour - 1) % HOURS not in hours]
    found = []
    for begin in first:
        run = [begin]
        while (run[-1] + 1) % HOURS in hours:
            run.append((run[-1] + 1) % HOURS)
        found.append(tuple(run))
    return found


def span(hours: Collection[int]) -> str:
    """Say hours of the day: ``19:00-23:00``, ``all day``, ``09:00-12:00 and 22:00-02:00``."""
    if len(hours) == HOURS:
        return "all day"
    return " and ".join(f"{clock(run[0])}-{clock(run[-1] + 1)}" for run in runs(hours))


def clock(hour: int) -> str:
    return f"{hour % HOURS or (HOURS if hour else 0):02d}:00"


def moves(plan: Plan) -> list[tuple[int, Counter[str], Counter[str]]]:
    """Return for each hour at which something moves how many replicas of which model start, and how many stop."""
    models = {replica.id: replica.model for replica in plan.replicas}
    counted = (
        (hour.hour, Counter(models[id_] for id_ in hour.starts), Counter(models[id_] for id_ in hour.stops))
        for hour in plan.hours
    )
    return [(hour, starts, stops) for hour, starts, stops in counted if starts or stops]


def moves_text(starts: Mapping[str, int], stops: Mapping[str, int]) -> str:
    """Say ``starts 3 r1, 1 small; stops 2 coder``; of many models only the most moved."""
    return "; ".join(f"{verb} {_named(counts)}" for verb, counts in (("starts", starts), ("stops", stops)) if counts)


def _named(counts: Mapping[str, int]) -> str:
    most_first = sorted(counts.items(), key=lambda item: -item[1])
    others = most_first[MOST_NAMED:]
    rest = f" and {sum(count for _, count in others):,} of {len(others)} other models" if others else ""
    return ", ".join(f"{count:,} {model}" for model, count in most_first[:MOST_NAMED]) + rest


def unserved(plan: Plan) -> list[Unserved]:
    """Return who gets less than they ask for, the worst off first."""
    found = []
    by_demand: defaultdict[tuple[str, str], list[tuple[int, float, float]]] = defaultdict(list)
    for hour in plan.hours:
        for share in hour.shares:
            rates = (hour.hour, share.asked_requests_per_s, share.served_requests_per_s)
            by_demand[share.tenant, share.model].append(rates)
    for (tenant, model), rates_by_hour in by_demand.items():
        asked, served = (math.fsum(rates[index] for rates in rates_by_hour) for index in (1, 2))
        if served < asked * (1 - 1e-6):
            worst = max(rates_by_hour, key=lambda rates: rates[1] - rates[2])
            found.append(Unserved(tenant, model, served / asked, *worst))
    return sorted(found, key=lambda one: one.served_fraction)


# --- Money ----------------------------------------------------------------------------------------------------------


def usd_per_day(plan: Plan) -> float:
    return math.fsum(hour.usd for hour in plan.hours) if plan.hours else HOURS * plan.usd_per_hour


def kwh_text(plan: Plan) -> str:
    """Say what the GPUs that serve take in a day: ``9.6 kWh``, ``1,240 kWh``."""
    kwh = math.fsum(hour.watts for hour in plan.hours) / KILO
    return f"{kwh:,.0f} kWh" if kwh >= 100 else f"{kwh:.3g} kWh"


def usd_by(plan: Plan, key: Callable[[Replica], str]) -> dict[str, float]:
    """Return what a day costs by what `key` says of a replica, dearest first; what starts add is apart."""
    usd: defaultdict[str, float] = defaultdict(float)
    for replica in plan.replicas:
        usd[key(replica)] += replica.usd_per_hour * len(replica.hours)
    return _with_starts(plan, usd)


def usd_by_tenant(plan: Plan) -> dict[str, float]:
    """Return what a day costs by who uses the GPUs, at each hour and of each model by its share."""
    usd: defaultdict[str, float] = defaultdict(float)
    for hour in plan.hours:
        of_model: defaultdict[str, float] = defaultdict(float)
        for replica in plan.replicas_at(hour.hour):
            of_model[replica.model] += replica.usd_per_hour
        for model, fractions in tenant_fractions(plan, hour).items():
            for tenant, fraction in fractions.items():
                usd[tenant] += fraction * of_model[model]
    return _with_starts(plan, usd)


def _with_starts(plan: Plan, usd: Mapping[str, float]) -> dict[str, float]:
    ordered = dict(sorted(usd.items(), key=lambda item: -item[1]))
    starts = usd_per_day(plan) - math.fsum(usd.values())
    worth_a_word = {key: cost for key, cost in ordered.items() if cost > 1e-6 * usd_per_day(plan)}
    return worth_a_word | ({STARTS: starts} if starts > 1e-6 * usd_per_day(plan) else {})


def tenant_fractions(plan: Plan, hour: HourPlan) -> dict[str, dict[str, float]]:
    """Return by model how the GPUs that serve it at that hour are divided, `SPARE` included; each adds up to 1."""
    gpus: Counter[str] = Counter()
    for replica in plan.replicas_at(hour.hour):
        gpus[replica.model] += replica.layout.gpus
    fractions: dict[str, dict[str, float]] = {model: {} for model in gpus}
    for share in hour.shares:
        if share.model in fractions and share.gpus > 0:
            of_model = fractions[share.model]
            of_model[share.tenant] = of_model.get(share.tenant, 0.0) + share.gpus / gpus[share.model]
    for of_model in fractions.values():
        taken = math.fsum(of_model.values())
        if taken > 1:  # rounding
            of_model.update({tenant: fraction / taken for tenant, fraction in of_model.items()})
        elif taken < 1:
            of_model[SPARE] = 1 - taken
    return fractions


def gpus_by_pool(plan: Plan, hour: HourPlan) -> dict[str, dict[str, float]]:
    """Return for each pool how many GPUs serve whom at that hour, with `SPARE` and `IDLE`; each adds up to the pool."""
    fractions = tenant_fractions(plan, hour)
    table: dict[str, dict[str, float]] = {pool.name: {} for pool in plan.fleet.pools}
    for replica in plan.replicas_at(hour.hour):
        row = table[replica.pool]
        for tenant, fraction in fractions[replica.model].items():
            row[tenant] = row.get(tenant, 0.0) + fraction * replica.layout.gpus
    for pool in plan.fleet.pools:
        table[pool.name][IDLE] = max(0.0, pool.gpus - math.fsum(table[pool.name].values()))
    return table


# --- Replicas that are alike ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Group:
    """Replicas that differ in their place and their hours only; the first speaks for all."""

    replicas: tuple[Replica, ...]

    @property
    def first(self) -> Replica:
        return self.replicas[0]

    @property
    def layout(self) -> str:
        role = "" if self.first.role == "both" else f" {self.first.role}"
        return f"{self.first.layout}{role}"

    @property
    def count(self) -> str:
        """How many serve at once: ``3``, or ``2-14`` where that differs by hour."""
        by_hour = Counter(hour for replica in self.replicas for hour in replica.hours)
        least, most = min(by_hour[hour] for hour in EVERY_HOUR), max(by_hour.values())
        return f"{most:,}" if least == most else f"{least:,}-{most:,}"

    @property
    def hours(self) -> tuple[int, ...]:
        """At which any of them serves."""
        return tuple(sorted({hour for replica in self.replicas for hour in replica.hours}))

    def usd_per_hour(self, hour: int) -> float:
        return math.fsum(replica.usd_per_hour for replica in self.replicas if hour in replica.hours)


def groups_of(replicas: Iterable[Replica]) -> list[Group]:
    """Return replicas of one model, precision, layout and role in one pool together, in the order of the plan."""
    alike: defaultdict[tuple[str, ...], list[Replica]] = defaultdict(list)
    for one in replicas:
        alike[one.model, one.pool, one.precision, str(one.layout), one.role, one.engine].append(one)
    return [Group(tuple(group)) for group in alike.values()]


def gpus_text(gpus: float) -> str:
    """Say a number of GPUs: ``0.4``, ``6.4``, ``12``, ``1,240``."""
    return f"{gpus:,.0f}" if gpus >= 100 or abs(gpus - round(gpus)) < LEAST_GPUS else f"{gpus:.1f}"

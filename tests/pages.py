"""What the tests of the pages share: a reader that is strict, and a plan whose every name is nasty."""

from collections.abc import Sequence
from html.parser import HTMLParser

from msgspec.structs import replace

from waterline.fleet import Tenant
from waterline.plan import Plan

VOID = {"meta", "input", "br"}
NASTY = "</script><img src=x onerror=alert(1)>&\"' ${why} $name"


class Reader(HTMLParser):
    """Collects tags, attributes and text, and refuses tags that are not closed in their order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def named(plan: Plan, name: str) -> Plan:
    """Return the plan with that name for its fleet, model, pool and tenants."""
    fleet = plan.fleet
    return replace(
        plan,
        fleet=replace(
            fleet,
            name=name,
            pools=tuple(replace(pool, name=name) for pool in fleet.pools),
            models=tuple(replace(model, name=name) for model in fleet.models),
            tenants=(Tenant(name=name, deserved=1.0),),
        ),
        models=tuple(replace(model, model=name, reason=name) for model in plan.models),
        tenants=(replace(plan.tenants[0], tenant=name),),
        replicas=tuple(replace(one, model=name, pool=name, id=f"{name}{i}") for i, one in enumerate(plan.replicas)),
        hours=tuple(
            replace(
                hour,
                shares=tuple(replace(share, tenant=name, model=name) for share in hour.shares[:1]),
                loans=tuple(replace(loan, lender=name, borrower=name) for loan in hour.loans),
                starts=(),
                stops=(),
            )
            for hour in plan.hours
        ),
    )

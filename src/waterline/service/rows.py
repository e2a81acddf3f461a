"""The numbers the policy goes by, and who has which row of them: tenants, clients, models and replicas come and go.

An array of the policy's never grows by itself, and a row of it means nobody in particular. Here rows are given out and
taken back, and the arrays are made longer when they are all taken.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from waterline.fleet import Tenant
from waterline.plan import Plan
from waterline.policy import admission, dispatch
from waterline.service.errors import RejectedError

SPARE_SHARE = 1e-3  # beside which nobody's share of what it deserves is much
SPARE_ROWS = 8  # for models and tenants that a new plan brings
FIRST_CLIENTS = 8  # rows of each tenant; there are twice as many whenever they are all taken
MOST_CLIENTS = 10_000  # rows of one tenant, from when on those who have nothing under way are forgotten


@dataclass(slots=True)
class Clients:
    """The rows of one tenant's clients; those who take only what is spare have another account."""

    tenant: int
    rows: dict[str, int] = field(default_factory=dict)  # by line, who has been here longest first
    under_way: dict[int, int] = field(default_factory=dict)  # requests by row, where there are any
    spare: list[int] = field(default_factory=list)

    def come(self, client: int) -> None:
        self.under_way[client] = self.under_way.get(client, 0) + 1

    def go(self, client: int) -> None:
        self.under_way[client] -= 1
        if not self.under_way[client]:
            del self.under_way[client]

    def idle(self) -> Iterator[str]:
        return (line for line, row in self.rows.items() if row not in self.under_way)


class Rows:
    """The desk's numbers, with rows for everybody in a plan.

    Args:
        plan: whose tenants, models and replicas there are.
    """

    def __init__(self, plan: Plan) -> None:
        self.tenants = {tenant.name: Clients(row) for row, tenant in enumerate(plan.fleet.tenants)}
        self.models = list(range(len(plan.models) + SPARE_ROWS))[::-1]  # that nobody has
        self.replicas = list(range(max(len(plan.replicas), 1)))[::-1]  # likewise
        self._spare: dict[str, Clients] = {}  # by tenant, once they ask
        self._tenant_of_client = [0]  # nobody's row: there must be one
        no_share = [0.0] * (2 * len(self.tenants) + SPARE_ROWS)  # `use_tenants` writes them
        self._arrays = dispatch.new_desk(
            no_share,
            no_share,
            no_share,
            self._tenant_of_client,
            models=len(self.models),
            rows=len(self.replicas),
            gpus=float(plan.fleet.gpus),
        )
        self.desk = dispatch.plain(self._arrays)  # another one when an array has grown

    def take_replica(self) -> int:
        """Return a row for one more replica."""
        if not self.replicas:
            known = len(self._arrays.models.role)
            self._arrays = dispatch.with_rows(self._arrays, 2 * known)
            self.desk = dispatch.plain(self._arrays)
            self.replicas = list(range(known, 2 * known))[::-1]
        return self.replicas.pop()

    def set_serving(self, rows: Iterable[int], serves: int) -> None:
        """Leave replicas out of one decision, and put them back."""
        for row in rows:
            self.desk.replicas.serves[row] = serves

    def use_tenants(self, tenants: Iterable[Tenant]) -> None:
        """Go by the shares of these tenants from now on; those who are gone keep their rows."""
        for tenant in tenants:
            if tenant.name not in self.tenants:
                self.tenants[tenant.name] = Clients(self._spare_tenant())
            row, accounts = self.tenants[tenant.name].tenant, self.desk.accounts
            accounts.guarantee[row], accounts.deserved[row], accounts.limit[row] = _entitled(tenant)
        self.limit_spare()

    def client(self, clients: Clients, line: str) -> int:
        """Return the row of a client, which may be new, or have been forgotten."""
        row = clients.rows.get(line)
        if row is None:
            if len(clients.rows) >= MOST_CLIENTS and (idle := next(clients.idle(), None)):
                clients.spare.append(clients.rows.pop(idle))
            if not clients.spare:
                self._more_clients(clients)
            row = clients.rows[line] = clients.spare.pop()
            first = row * len(self.desk.models.gpus)
            for place in range(first, first + len(self.desk.models.gpus)):
                self.desk.queue.counter_gpu_s[place] = 0.0
        return row

    def spare_of(self, tenant: str) -> Clients:
        """Return those of a tenant who take what is spare: nothing is guaranteed to them, and nothing deserved."""
        if tenant not in self.tenants:
            raise RejectedError(f"No tenant '{tenant}' is in this fleet.", status=403, code="tenant_not_served")
        if tenant not in self._spare:
            self._spare[tenant] = Clients(self._spare_tenant())
            self.limit_spare()
        return self._spare[tenant]

    def limit_spare(self) -> None:
        """Leave to those who take what is spare what their tenant has left of its limit.

        Something is always on their account: of those who borrow, who has used nothing would go first.
        """
        accounts = self.desk.accounts
        least_gpu_s = SPARE_SHARE * accounts.gpus[0] * accounts.memory_s[0]
        for tenant, clients in self._spare.items():
            row = self.tenants[tenant].tenant
            has_limit = accounts.limit[row] < 1.0
            left = max(0.0, accounts.limit[row] - admission.share_of(accounts, row)) if has_limit else 1.0
            accounts.limit[clients.tenant] = left
            accounts.used_gpu_s[clients.tenant] = max(accounts.used_gpu_s[clients.tenant], least_gpu_s)

    @property
    def tenant_names(self) -> dict[int, str]:
        """Return whose each account is."""
        names = {clients.tenant: name for name, clients in self.tenants.items()}
        return names | {clients.tenant: f"{name}, spare" for name, clients in self._spare.items()}

    def under_way(self, tenant: str) -> int:
        """Return how many requests of a tenant wait or run."""
        known = (self.tenants.get(tenant), self._spare.get(tenant))
        return sum(sum(clients.under_way.values()) for clients in known if clients)

    def _more_clients(self, clients: Clients) -> None:
        known, more = len(self._tenant_of_client), max(FIRST_CLIENTS, len(clients.rows))
        self._tenant_of_client += [clients.tenant] * more
        self._arrays = dispatch.with_clients(self._arrays, self._tenant_of_client)
        self.desk = dispatch.plain(self._arrays)
        clients.spare = list(range(known, known + more))[::-1]

    def _spare_tenant(self) -> int:
        taken = {clients.tenant for clients in (*self.tenants.values(), *self._spare.values())}
        for row in range(len(self.desk.accounts.limit)):
            if row not in taken:
                return row
        raise RejectedError("There is no room for another tenant. Restart the service with the new plan.", status=409)


def _entitled(tenant: Tenant) -> tuple[float, float, float]:
    """Return guarantee, deserved and limit as fractions; the fleet file has been checked."""
    deserved = tenant.guarantee if tenant.deserved is None else tenant.deserved
    return float(tenant.guarantee), float(deserved), float(tenant.limit)

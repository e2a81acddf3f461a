"""`waterline launch`: the command that starts each engine of a plan, node by node."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from waterline.plan import Plan, Replica
    from waterline.service.engines.seat import Seat

EVERY_ADDRESS = "0.0.0.0"  # noqa: S104 - the gateway asks from another node


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One process to start on one node, or the reason why there is none."""

    replica: "Replica"
    seat: "Seat"
    node: str  # "pool/0"
    command: tuple[str, ...] = ()
    environment: dict[str, str]
    problem: str = ""  # it cannot be started as planned
    remark: str = ""  # there is nothing to start

    @property
    def url(self) -> str:
        """Of its API; empty for the processes behind the first of a replica."""
        return f"http://{self.seat.address}:{self.seat.port}/v1" if self.command and self.seat.rank == 0 else ""


@click.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--hour", type=click.IntRange(0, 23), help="Of the day; the busiest one if left out.")
@click.option("--node", "nodes", multiple=True, metavar="POOL/N", help="Only this node; may be given again.")
@click.option(
    "--address",
    default="{pool}-{node}",
    show_default=True,
    metavar="PATTERN",
    help="What nodes are called on your network.",
)
@click.option("--json", "as_json", is_flag=True, help="Print arguments and environment as JSON.")
def launch(plan: Path, hour: int | None, nodes: tuple[str, ...], address: str, *, as_json: bool) -> None:
    """Print the commands that start the replicas of PLAN (plan.json or fleet.toml) at an hour, node by node.

    What is printed for one node is a script for its shell. vLLM, SGLang and llama.cpp are to be installed there.

    \b
    waterline launch plan.json
    waterline launch plan.json --hour 20 --node h100/0 | ssh h100-0 bash
    waterline launch plan.json --address 'gpu-{pool}-{node:03d}.lan' --json
    """  # noqa: D301 - click wants the character, not its name
    from waterline.cli.plan import read_or_make
    from waterline.errors import EngineError

    made = read_or_make(plan)
    at = made.busiest_hour if hour is None else hour
    _check_nodes(made, nodes)
    starts = list(_starts(made, at, nodes, address))
    if as_json:
        click.echo(json.dumps([_as_json(start) for start in starts], indent=2))
    else:
        click.echo("\n".join(_script(made, at, starts)))
    problems = dict.fromkeys(start.problem for start in starts if start.problem)
    if problems:
        raise EngineError("\n".join(problems))


def _check_nodes(plan: "Plan", nodes: tuple[str, ...]) -> None:
    from waterline.errors import UnknownNameError, nearest

    for node in nodes:
        name, _, number = node.rpartition("/")
        pools = {pool.name: pool for pool in plan.fleet.pools}
        if name not in pools:
            raise UnknownNameError(
                f"no pool is called '{name or node}'. {nearest(name or node, pools)} Write --node POOL/N, as in "
                f"{plan.fleet.pools[0].name}/0."
            )
        if not number.isdecimal() or int(number) >= pools[name].nodes:
            raise UnknownNameError(
                f"pool '{name}' has no node '{number}': it has {pools[name].nodes}, counted from 0. Write --node "
                f"{name}/0."
            )


def _starts(plan: "Plan", hour: int, nodes: tuple[str, ...], pattern: str) -> Iterator[Start]:
    """Yield what to start at that hour, ordered by pool and node; on each as the plan lists its replicas."""
    order = {pool.name: index for index, pool in enumerate(plan.fleet.pools)}
    wanted = {(name, int(number)) for name, _, number in (node.rpartition("/") for node in nodes)}
    seated = [
        (order[replica.pool], place.node, replica, rank)
        for replica in plan.replicas_at(hour)
        for rank, place in enumerate(replica.places)
        if not wanted or (replica.pool, place.node) in wanted
    ]
    seated.sort(key=lambda one: one[:2])
    for _, _, replica, rank in seated:
        yield _start(plan, replica, rank, pattern)


def _start(plan: "Plan", replica: "Replica", rank: int, pattern: str) -> Start:
    from waterline.errors import EngineError
    from waterline.service.engines import COMMANDED, command_of
    from waterline.service.engines.seat import Seat, api_port

    seat = Seat(
        rank=rank,
        host=EVERY_ADDRESS,
        port=api_port(replica),
        address=_address(pattern, replica, rank),
        head_address=_address(pattern, replica, 0),
    )
    node = f"{replica.pool}/{replica.places[rank].node}"
    if replica.engine not in COMMANDED:
        url = plan.fleet.model(replica.model).url
        remark = f"attached to at {url}" if url else f"played by waterline up: '{replica.engine}' is no server"
        return Start(replica=replica, seat=seat, node=node, environment={}, remark=remark)
    try:
        command, environment = command_of(plan, replica, seat)
    except EngineError as error:
        return Start(replica=replica, seat=seat, node=node, environment={}, problem=str(error))
    return Start(replica=replica, seat=seat, node=node, command=command, environment=environment)


def _address(pattern: str, replica: "Replica", rank: int) -> str:
    from waterline.errors import InputError

    try:
        return pattern.format(pool=replica.pool, node=replica.places[rank].node)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise InputError(
            f"--address '{pattern}' is no pattern: {error}. Write {{pool}} and {{node}} where the pool's name and the "
            "node's number belong, as in 'gpu-{pool}-{node:03d}.lan'."
        ) from error


def _as_json(start: Start) -> dict[str, Any]:
    replica, seat = start.replica, start.seat
    return {
        "node": start.node,
        "address": seat.address,
        "replica": replica.id,
        "model": replica.model,
        "engine": replica.engine,
        "role": replica.role,
        "hours": replica.hours,
        "rank": seat.rank,
        "ranks": len(replica.places),
        "gpus": replica.places[seat.rank].gpus,
        "url": start.url,
        "command": start.command,
        "environment": start.environment,
        "remark": start.problem or start.remark,
    }


def _script(plan: "Plan", hour: int, starts: list[Start]) -> Iterator[str]:
    """Yield the lines of a shell script for each node: everything in the background, then a wait for it."""
    by_node: dict[str, list[Start]] = {}
    for start in starts:
        by_node.setdefault(start.node, []).append(start)
    replicas = _count(len({start.replica.id for start in starts}), "replica")
    yield f"# {_plain(plan.fleet.name)}, hour {hour}: {replicas} on {_count(len(by_node), 'node')}"
    for name, here in by_node.items():
        pool = plan.fleet.pool(here[0].replica.pool)
        cards = sum(len(start.replica.places[start.seat.rank].gpus) for start in here)
        yield ""
        yield f"# {_plain(name)} ({_plain(here[0].seat.address)}): {cards} of its {pool.gpus_per_node} {pool.gpu}"
        for start in here:
            yield from _lines(start)
        if any(start.command for start in here):
            yield "wait"


def _lines(start: Start) -> Iterator[str]:
    replica, seat = start.replica, start.seat
    part = f", part {seat.rank + 1} of {len(replica.places)}" if len(replica.places) > 1 else ""
    role = "" if replica.role == "both" else f", {replica.role}"
    said = "".join(f"; {text}" for text in (_when(replica), start.problem or start.remark) if text)
    yield _plain(f"# {replica.id}: {replica.precision} {replica.layout}{role}{part}{said}")
    if start.command:
        variables = [f"{name}={shlex.quote(value)}" for name, value in start.environment.items()]
        yield " \\\n  ".join([" ".join([*variables, *_program(start.command)]), *_options(start.command)]) + " &"


def _when(replica: "Replica") -> str:
    """Say when a replica serves that does not serve all day, and how long before it has to be started."""
    from waterline.cli.day import span
    from waterline.fleet import HOURS
    from waterline.units import seconds_text

    if len(replica.hours) == HOURS:
        return ""
    return f"serves {span(replica.hours)}" + (f", loads in {seconds_text(replica.load_s)}" if replica.load_s else "")


def _program(command: tuple[str, ...]) -> list[str]:
    """Return what comes before the first option: the program and what it serves; a module of Python's included."""
    end = next(index for index, word in enumerate(command) if word.startswith("--"))
    return [shlex.quote(word) for word in command[:end]]


def _options(command: tuple[str, ...]) -> Iterator[str]:
    """Yield each option with its values, quoted for a shell."""
    words = [shlex.quote(word) for word in command[len(_program(command)) :]]
    option: list[str] = []
    for word in words:
        if word.startswith("--") and option:
            yield " ".join(option)
            option = []
        option.append(word)
    yield " ".join(option)


def _plain(text: str) -> str:
    """Keep a comment on its line: a name may hold anything."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" + ("" if number == 1 else "s")

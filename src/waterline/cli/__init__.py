"""The command line: one file per command, and the only place where the parts are wired together.

`main` turns the tree of errors into one message and an exit code; whatever else escapes is our bug and shows its
traceback.
"""

import os
import sys
from importlib import import_module

import click

import waterline
from waterline.errors import WaterlineError

# name -> (module, one line of help). The module is imported when its command runs, so that --help stays quick.
COMMANDS = {
    "fit": ("waterline.cli.fit", "Which cards run a model, and how fast."),
    "estimate": ("waterline.cli.estimate", "What if: TTFT, TPOT and throughput for a table of points."),
    "size": ("waterline.cli.size", "How many GPUs a load takes, and which."),
    "plan": ("waterline.cli.plan", "Choose layouts and replicas for a fleet file."),
    "buy": ("waterline.cli.buy", "What to buy for a demand, a budget or a tender, and what it costs."),
    "rehearse": ("waterline.cli.rehearse", "Replay traffic against a plan: who waits, and what it costs."),
    "launch": ("waterline.cli.launch", "The command that starts each engine of a plan, node by node."),
    "up": ("waterline.cli.up", "Start the engines and serve an OpenAI-compatible API."),
    "status": ("waterline.cli.status", "How a running service is: the waterline, queues, latencies, moves."),
    "keys": ("waterline.cli.keys", "Who may use the API, and how much: make, list and revoke keys."),
    "usage": ("waterline.cli.usage", "What was used and what it costs, from the ledger."),
    "model": ("waterline.cli.model", "What one model weighs, keeps and is made of."),
    "catalog": ("waterline.cli.catalog", "Show the GPUs, models and prices Waterline knows."),
}


class Commands(click.Group):
    """Lists every command without importing any."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - as above
        if cmd_name not in COMMANDS:
            return None
        if cmd_name != "up":  # whose engines would inherit it; our arrays are small, and threads take time to start
            os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        command: click.Command = getattr(import_module(COMMANDS[cmd_name][0]), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - as above
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(waterline.__version__, prog_name="waterline")
def waterline_command() -> None:
    """Plan, rehearse and run LLM fleets on mixed GPUs with one file and one policy.

    \b
    waterline up                              a model answering on this machine
    waterline fit deepseek-r1                 what runs it
    waterline plan examples/mixed.toml        what goes where
    waterline rehearse examples/mixed.toml    what will happen
    """  # noqa: D301 - click reads the backspace as: leave these lines alone


def main() -> None:
    """Run the command line and leave with the exit code of the error's class."""
    try:
        waterline_command(prog_name="waterline")
    except WaterlineError as error:
        click.echo(f"waterline: {error}", err=True)
        sys.exit(error.exit_code)

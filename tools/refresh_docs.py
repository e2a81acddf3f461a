"""Run the console blocks of the documentation again and write what they print into the pages.

Blocks with a line ``...`` or with the server's address are somebody's choice of what to show, and are left alone.
Read the difference before you commit it: the page says what the reader will see.

    .venv/bin/python tools/refresh_docs.py [PAGE ...]
"""

import re
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from conftest import ADDRESS, COMMAND, run_command  # type: ignore[attr-defined]  # noqa: E402 - beside this folder, not installed

MACHINE = re.compile(r"^(Rehearsed in ).*$", re.MULTILINE)  # what depends on the machine
BLOCK = re.compile(r"(?<=^```console\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)


def refresh(page: Path, folder: Path) -> None:
    def fresh(block: re.Match[str]) -> str:
        if "\n...\n" in block[0] or ADDRESS in block[0]:
            return block[0]
        commands = [command for command, _ in COMMAND.findall(block[0])]
        shown = "\n".join(f"$ {command}\n{run_command(command, folder, str)}" for command in commands)
        return MACHINE.sub(r"\1…", shown)

    page.write_text(BLOCK.sub(fresh, page.read_text()))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(ROOT / "examples", Path(place) / "examples")
        for page in [Path(name) for name in sys.argv[1:]] or [
            ROOT / "README.md",
            *sorted((ROOT / "docs").glob("*.md")),
        ]:
            refresh(page, Path(place))

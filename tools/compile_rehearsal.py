"""Compile forms of the rehearsal, a minute of CPU each, for all processes that need one from now on.

    .venv/bin/python tools/compile_rehearsal.py alone shared logged

*alone*: no prompt begins like another. *shared*: prompts come with the keys of their blocks. *logged*: each decision is
kept. `make check` does so once, beside the types: two tests that want the same form would compile it twice.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from waterline import load_fleet, make_plan, open_trace, rehearse

FLEET = Path(__file__).parents[1] / "examples" / "box.toml"
SHARED = '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}\n'


def main() -> None:
    plan = make_plan(load_fleet(FLEET))
    for form in sys.argv[1:]:
        if form == "shared":
            with TemporaryDirectory() as folder:
                path = Path(folder) / "shared.jsonl"
                path.write_text(SHARED)
                rehearse(plan, open_trace(path))
        else:
            rehearse(plan, duration_s=1.0, decisions=form == "logged")


if __name__ == "__main__":
    main()

"""Train, export and evaluate abacus: ``python -m waterline.training --help``."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from waterline.errors import WaterlineError
from waterline.training import embedded, evaluate


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    chosen = _parser().parse_args(arguments)
    try:
        chosen.run(chosen)
    except WaterlineError as error:
        print(f"waterline.training: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _train(chosen: argparse.Namespace) -> None:
    from waterline.training import network, train  # noqa: PLC0415  # torch is an extra

    train.train(chosen.folder, network.ABACUS, steps=chosen.steps, seed=chosen.seed)


def _export(chosen: argparse.Namespace) -> None:
    from waterline.training import export, network, train  # noqa: PLC0415  # torch is an extra

    trained = train.read_checkpoint(chosen.folder, network.ABACUS)
    export.write_gguf(trained, chosen.folder / evaluate.SHIPPED_WEIGHTS.name)
    export.write_hugging_face(trained, chosen.folder / "hugging-face")


def _evaluate(chosen: argparse.Namespace) -> None:
    engine = nullcontext(chosen.base_url) if chosen.base_url else embedded.serve(chosen.weights)
    with engine as base_url:
        print("| digits | problems | thinking | direct |\n| --- | --- | --- | --- |")
        for larger_digits, smaller_digits in evaluate.SIZES:
            questions = evaluate.draw_questions(larger_digits, smaller_digits, chosen.problems, chosen.seed)
            thinking, direct = (
                evaluate.score(base_url, chosen.model, questions, thinking=thinks, votes=chosen.votes)
                for thinks in (True, False)
            )
            print(
                f"| {larger_digits} × {smaller_digits} | {len(questions)} "
                f"| {thinking.accuracy:.1%} | {direct.accuracy:.1%} |",
                flush=True,
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m waterline.training", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    train = commands.add_parser("train", help="train for a number of steps, carrying on where FOLDER stopped")
    train.add_argument("folder", type=Path, help="where the checkpoint is kept")
    train.add_argument("--steps", type=int, default=1300, help="steps in all (default: %(default)s)")
    train.add_argument("--seed", type=int, default=1, help="decides first weights and problems (default: %(default)s)")
    train.set_defaults(run=_train)

    export = commands.add_parser("export", help="write the GGUF file and the Hugging Face folder into FOLDER")
    export.add_argument("folder", type=Path, help="where `train` left its checkpoint")
    export.set_defaults(run=_export)

    grade = commands.add_parser("evaluate", help="print accuracy on held-out problems, in the embedded engine")
    grade.add_argument("--weights", type=Path, default=evaluate.SHIPPED_WEIGHTS, help="a GGUF (default: the shipped)")
    grade.add_argument("--base-url", help="ask this OpenAI-compatible server instead, as in http://127.0.0.1:8000/v1")
    grade.add_argument("--model", default="abacus", help="the model's name there (default: %(default)s)")
    grade.add_argument("--problems", type=int, default=1000, help="at most, of each size (default: %(default)s)")
    grade.add_argument("--seed", type=int, default=0, help="decides which problems (default: %(default)s)")
    grade.add_argument("--votes", type=int, default=1, help="answers sampled per problem; the majority counts")
    grade.set_defaults(run=_evaluate)
    return parser


if __name__ == "__main__":
    sys.exit(main())

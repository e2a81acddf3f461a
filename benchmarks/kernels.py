"""How far kernel times are off: on shapes left out, on a card left out, and those of the fit that ships.

    .venv/bin/python benchmarks/kernels.py [FOLDER]              # five folds by shape, then each card left out
    .venv/bin/python benchmarks/kernels.py FOLDER --shipped      # the fit that ships, on points it may not have seen

FOLDER holds measured points as `../shared/data/kernels` does. An error is |predicted / measured - 1|; a point is never
predicted by a fit that saw its shape on any card or in any form, but with --shipped, where that is up to the folder.
The peer's figures are those aiconfigurator prints of itself, each point left out in turn (one point, not its shape).
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from fit_kernels import GPUS, Numbers, Points, fit_all, fold_of, points_of

from waterline import catalog
from waterline.catalog.measurements import measured_kernels
from waterline.cost.kernels import FULLEST, Kernels, find_kernels

FOLDS = 5
LEAST_CACHED = 2048
LAUNCH_S = 8e-6
GROUPS = {  # row of the table: kinds, goal, the peer
    "gemm": (("gemm",), "8 / 25", "4.9 / 15.6; unseen (n, k) 3.6 / 14.7"),
    "prefill attention": (("prefill", "prefill_window"), "8 / 25", "2.0 / 9.7"),
    "prefill behind cached tokens": (("behind",), "8 / 25", ""),
    "decode attention": (("decode", "decode_window"), "8 / 25", "1.1"),
    "MLA module": (("latent_prefill", "latent_decode"), "8 / 25", "2.2"),
    "experts": (("experts",), "15 / 40", ""),
    "experts, balanced": (("experts_balanced",), "15 / 40", ""),
    "all-reduce, NCCL": (("all_reduce",), "10 / 30", ""),
    "all-reduce, vLLM's own": (("custom_all_reduce",), "10 / 30", ""),
    "gather, scatter, all-to-all": (("all_gather", "reduce_scatter", "all_to_all"), "10 / 30", ""),
}
Errors = dict[str, dict[str, list[Numbers]]]  # [row of the table][card]: errors


def predict(kernels: Kernels, points: Points, keep: np.ndarray) -> Numbers:
    """Return seconds for the points in `keep`, asked for as the cost model does."""
    given = {name: values[keep] for name, values in points.arguments.items()}
    form, cache = {"form": points.form}, {"cache": points.cache}
    methods = {
        "gemm": (kernels.gemm_s, form),
        "prefill": (kernels.prefill_attention_s, cache),
        "behind": (kernels.prefill_attention_s, cache),
        "prefill_window": (kernels.prefill_attention_s, cache),
        "decode": (kernels.decode_attention_s, cache),
        "decode_window": (kernels.decode_attention_s, cache),
        "latent_prefill": (kernels.latent_prefill_s, {**form, **cache}),
        "latent_decode": (kernels.latent_decode_s, {**form, **cache}),
        "experts": (kernels.experts_s, form),
        "experts_balanced": (kernels.experts_s, {**form, "balanced": True}),
        "custom_all_reduce": (kernels.collective_s, {"kind": "all_reduce", "implementation": "custom"}),
    }
    method, more = methods.get(points.kind, (kernels.collective_s, {"kind": points.kind, "implementation": "nccl"}))
    return method(**given, **more)


def behind(points: Points, keep: np.ndarray) -> Points:
    """Return the rest of prompts behind their first part, as whole prompts less those parts; both are left out.

    No prompt was measured with cached tokens. A prompt of twice or four times the length takes longer by just that.
    """
    part = {name: values[keep] for name, values in points.arguments.items()}
    new, took_s = part.pop("new_tokens"), points.took_s[keep]
    part.pop("cached_tokens")
    where = {key: index for index, key in enumerate(zip(new, *part.values(), strict=True))}
    pairs = [
        (index, where[new[index] * times, *key[1:]])
        for key, index in where.items()
        for times in (2, 4)
        if new[index] >= LEAST_CACHED and (new[index] * times, *key[1:]) in where
    ]
    first, whole = np.array(pairs, dtype=int).reshape(-1, 2).T
    arguments = {name: values[first] for name, values in part.items()}
    arguments |= {"new_tokens": new[whole] - new[first], "cached_tokens": new[first]}
    rest_s = LAUNCH_S + took_s[whole] - took_s[first]
    grew = rest_s > LAUNCH_S
    arguments = {name: values[grew] for name, values in arguments.items()}
    return replace(points, kind="behind", arguments=arguments, took_s=rest_s[grew])


def note(errors: Errors, points: Points, predicted: Numbers, keep: np.ndarray, card: str) -> None:
    group = next(name for name, (kinds, *_) in GROUPS.items() if points.kind in kinds)
    off = np.abs(predicted / points.took_s[keep] - 1)
    if points.form == "fp8_block" and points.kind == "gemm":
        trusted = points.trusted[keep]
        errors.setdefault("gemm, fp8_block, host-bound (not aimed at)", {}).setdefault(card, []).append(off[~trusted])
        off = off[trusted]
    errors.setdefault(group, {}).setdefault(card, []).append(off)


def left_out_shapes(folder: Path) -> Errors:
    errors: Errors = {}
    for system, gpu in GPUS.items():
        for fold in range(FOLDS):
            fits = fit_all(folder, system, lambda points, fold=fold: fold_of(points, FOLDS) != fold)
            kernels = Kernels(catalog.find_gpu(gpu), (gpu,), (fits,))
            for points in points_of(folder, system):
                keep = fold_of(points, FOLDS) == fold
                if keep.any():
                    note(errors, points, predict(kernels, points, keep), keep, gpu)
                if points.kind == "prefill":
                    note_behind(errors, kernels, behind(points, keep), gpu)
    return errors


def note_behind(errors: Errors, kernels: Kernels, points: Points, card: str) -> None:
    everything = np.ones(len(points.took_s), dtype=bool)
    note(errors, points, predict(kernels, points, everything), everything, card)


def left_out_cards(folder: Path) -> Errors:
    """Predict each card as if nobody had measured it: by the fit of the nearest other, with its own peaks."""
    errors: Errors = {}
    for system, gpu in GPUS.items():
        card = catalog.find_gpu(gpu)
        nearest = NEAREST[gpu]
        sources = (nearest, *(other for other in FULLEST if other not in {nearest, gpu}))
        kernels = Kernels(card, sources, [measured_kernels(source) for source in sources])
        for points in points_of(folder, system):
            keep = np.ones(len(points.took_s), dtype=bool)
            if keep.any():
                note(errors, points, predict(kernels, points, keep), keep, f"{gpu} by {nearest}")
    return errors


NEAREST = {
    "a100-sxm-80g": "h100-sxm-80g",
    "h100-sxm-80g": "h200-sxm-141g",
    "h200-sxm-141g": "h100-sxm-80g",
    "b200-sxm-180g": "h200-sxm-141g",
    "l40s": "rtx-pro-6000-server",
    "rtx-pro-6000-server": "l40s",
}


def shipped(folder: Path) -> Errors:
    errors: Errors = {}
    for system, gpu in GPUS.items():
        for points in points_of(folder, system):
            keep = np.ones(len(points.took_s), dtype=bool)
            if keep.any():
                note(errors, points, predict(find_kernels(catalog.find_gpu(gpu)), points, keep), keep, gpu)
            if points.kind == "prefill":
                note_behind(errors, find_kernels(catalog.find_gpu(gpu)), behind(points, keep), gpu)
    return errors


def show(title: str, errors: Errors) -> None:
    print(f"\n{title}: error in %, median / 90th percentile\n")
    cards = sorted({card for by_card in errors.values() for card in by_card}, key=[*errors["gemm"]].index)
    print("| kernel | points | all | goal | peer | " + " | ".join(cards) + " |")
    print("| --- | ---: | --- | --- | --- |" + " --- |" * len(cards))
    for group in [*GROUPS, *(name for name in errors if name not in GROUPS)]:
        by_card = {card: np.concatenate(off) for card, off in errors.get(group, {}).items()}
        everything = np.concatenate([*by_card.values(), np.zeros(0)])
        if len(everything) == 0:
            continue
        _, goal, peer = GROUPS.get(group, ((), "", ""))
        cells = [_cell(by_card[card]) if card in by_card else "" for card in cards]
        print(f"| {group} | {len(everything):,} | {_cell(everything)} | {goal} | {peer} | " + " | ".join(cells) + " |")


def _cell(off: Numbers) -> str:
    return f"{100 * np.median(off):.1f} / {100 * np.percentile(off, 90):.1f}" if len(off) else ""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, nargs="?", default=Path("../shared/data/kernels"))
    options.add_argument("--shipped", action="store_true", help="score the fit that ships")
    asked = options.parse_args()
    if asked.shipped:
        show(f"The fit that ships on {asked.folder}", shipped(asked.folder))
        return
    show(f"Shapes left out, {FOLDS} folds by shape", left_out_shapes(asked.folder))
    show("A card left out: another card's fit with its own peaks", left_out_cards(asked.folder))


if __name__ == "__main__":
    main()

"""Train a network until it multiplies, on CPU, and stop.

The batch of a step depends only on the seed and the step, and a checkpoint holds everything else, so that a run which
was stopped and started again gives the same weights as one that was not. Another CPU, another version of torch or
another number of threads adds in another order and gives slightly different weights.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from waterline.errors import InputError, MissingExtraError
from waterline.training import problems, tokens
from waterline.training.network import Network, Shape

try:
    import torch
    from torch import Tensor
    from torch.nn import functional
except ImportError as error:
    raise MissingExtraError("training the small model", extra="training") from error

BATCH: Final = 32  # problems per step
DIRECT_SHARE: Final = 0.15  # of the problems are answered without a thought
CUT_SHARE: Final = 0.10  # … and so many after a part of one, as when a thinking budget runs out
MATRIX_RATE: Final = 0.02
VECTOR_RATE: Final = 0.003
WARM_UP_STEPS: Final = 50
COOL_DOWN_FRACTION: Final = 0.7
IGNORED: Final = -100  # the target of a token that is given, not predicted
REPORT_STEPS: Final = 25
CHECKPOINT_STEPS: Final = 100
EXAM_PROBLEMS: Final = 64
CHECKPOINT: Final = "checkpoint.pt"

Sample: TypeAlias = tuple[list[int], list[int]]  # a prompt and its completion


@dataclass(frozen=True, slots=True)
class Batch:
    """Problems side by side, padded on the right."""

    tokens: Tensor  # [batch, position]
    targets: Tensor  # [batch, position] the token that should follow, or IGNORED


def make_batch(samples: list[Sample]) -> Batch:
    """Lay samples side by side."""
    longest = max(len(prompt) + len(completion) for prompt, completion in samples) - 1
    inputs = np.full((len(samples), longest), tokens.END)
    targets = np.full((len(samples), longest), IGNORED)
    for row, (prompt, completion) in enumerate(samples):
        inputs[row, : len(prompt) + len(completion) - 1] = (prompt + completion)[:-1]
        targets[row, len(prompt) - 1 : len(prompt) + len(completion) - 1] = completion
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))


def training_batch(seed: int, step: int) -> Batch:
    dice = np.random.default_rng((seed, step))
    return make_batch([training_sample(problems.draw(dice), dice) for _ in range(BATCH)])


def training_sample(problem: problems.Problem, dice: np.random.Generator) -> Sample:
    """Show how to think a problem through, how to answer it at once, or how to answer when the thought is cut short."""
    kind = dice.choice(3, p=[1 - DIRECT_SHARE - CUT_SHARE, DIRECT_SHARE, CUT_SHARE])
    question = problems.phrase(problem, dice)
    if kind == 0:
        return tokens.prompt(question, thinking=True), tokens.completion(problem, thinking=True)
    thought = problems.think(problem).encode() if kind == 2 else b""
    heard = thought[: dice.integers(len(thought) + 1)]  # given, not predicted: nobody should learn to break off
    prompt = [*tokens.prompt(question, thinking=True), *heard, tokens.THINK_END]
    return prompt, tokens.completion(problem, thinking=False)


def exam_batch(seed: int) -> Batch:
    """Return held-out problems of the largest kind, to be thought through."""
    dice = np.random.default_rng(seed)
    largest = problems.held_out(problems.MAX_DIGITS, problems.MAX_DIGITS)
    chosen = [largest[index] for index in dice.choice(len(largest), EXAM_PROBLEMS, replace=False)]
    return make_batch(
        [
            (tokens.prompt(problems.phrase(problem, dice), thinking=True), tokens.completion(problem, thinking=True))
            for problem in chosen
        ]
    )


def loss_of(network: Network, batch: Batch) -> Tensor:
    """Return the mean cross-entropy, in nats per predicted token."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(batch.tokens)
    return functional.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORED)


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is Any to mypy
def share_solved(network: Network, batch: Batch) -> float:
    """Return the fraction of problems whose whole completion the network would write, taking its likeliest token.

    One pass is enough: a greedy writer stays on the only right path exactly when each next token of it is likeliest.
    """
    likeliest = network(batch.tokens).argmax(-1)  # [batch, position]
    right = (likeliest == batch.targets) | (batch.targets == IGNORED)
    return float(right.all(dim=-1).float().mean())


def rate_factor(step: int, steps: int) -> float:
    """Return the share of the full learning rate at a step: a short rise, a plateau, a straight line down to 0."""
    return min((step + 1) / WARM_UP_STEPS, 1.0, (steps - step) / (COOL_DOWN_FRACTION * steps))


def make_optimizers(network: Network) -> list[Any]:
    """Muon for the matrices inside the blocks, AdamW for the embedding and the norms."""
    matrices = [parameter for parameter in network.blocks.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in network.blocks.parameters() if parameter.ndim == 1]
    vectors += [network.embedding.weight, network.norm.weight]
    return [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.01),
        torch.optim.AdamW(vectors, lr=VECTOR_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(folder: Path, shape: Shape, *, steps: int, seed: int) -> Network:
    """Train for so many steps, carrying on from the checkpoint in `folder` when there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / CHECKPOINT
    torch.manual_seed(seed)
    network = Network(shape)
    optimizers = make_optimizers(network)
    full_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    first_step, spent_wall_s, spent_cpu_s = 0, 0.0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        network.load_state_dict(saved["network"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first_step, spent_wall_s, spent_cpu_s = saved["step"], saved["wall_s"], saved["cpu_s"]
    exam = exam_batch(seed)
    wall_start_s, cpu_start_s = time.perf_counter() - spent_wall_s, time.process_time() - spent_cpu_s

    for step in range(first_step, steps):
        loss = loss_of(network, training_batch(seed, step))
        loss.backward()
        for optimizer, full_rate in zip(optimizers, full_rates, strict=True):
            optimizer.param_groups[0]["lr"] = full_rate * rate_factor(step, steps)
            optimizer.step()
            optimizer.zero_grad()

        done = step + 1
        wall_s, cpu_s = time.perf_counter() - wall_start_s, time.process_time() - cpu_start_s
        if done % REPORT_STEPS == 0 or done == steps:
            print(
                f"step {done}/{steps}  loss {loss.item():.4f}  held-out solved {share_solved(network, exam):.3f}  "
                f"{wall_s:.0f} s, {cpu_s:.0f} core-s",
                file=sys.stderr,
                flush=True,
            )
        if done % CHECKPOINT_STEPS == 0 or done == steps:
            state = {
                "network": network.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": done,
                "wall_s": wall_s,
                "cpu_s": cpu_s,
            }
            write_atomically(checkpoint, state)
    return network


def read_checkpoint(folder: Path, shape: Shape) -> Network:
    """Return the network that `train` left in `folder`."""
    checkpoint = folder / CHECKPOINT
    if not checkpoint.exists():
        raise InputError(f"{folder} holds no {CHECKPOINT}. Train first: python -m waterline.training train {folder}")
    network = Network(shape)
    network.load_state_dict(torch.load(checkpoint)["network"])
    return network


def write_atomically(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that a reader, or a crash, finds the old one or the new one and never a part."""
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)

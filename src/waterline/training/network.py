"""The network: a Llama, small enough to read and to train on a laptop.

Shapes: batch, position, channel; attention adds head. ``channels = heads * head_channels``.
"""

from dataclasses import dataclass
from typing import Any, Final

from waterline.errors import MissingExtraError
from waterline.training.tokens import CONTEXT, VOCABULARY

try:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional
except ImportError as error:
    raise MissingExtraError("training the small model", extra="training") from error

NORM_EPSILON: Final = 1e-5
ROPE_BASE: Final = 10_000.0


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a network; the widths must be multiples of 32, the block of GGUF's Q8_0."""

    channels: int
    layers: int
    heads: int
    hidden_channels: int

    @property
    def head_channels(self) -> int:
        return self.channels // self.heads


ABACUS: Final = Shape(channels=192, layers=5, heads=6, hidden_channels=512)


class Attention(nn.Module):  # type: ignore[misc]  # torch is Any to mypy
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.query = nn.Linear(shape.channels, shape.channels, bias=False)
        self.key = nn.Linear(shape.channels, shape.channels, bias=False)
        self.value = nn.Linear(shape.channels, shape.channels, bias=False)
        self.output = nn.Linear(shape.channels, shape.channels, bias=False)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [batch, head, position, head channel]
            for project in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(rotate(query, turns), rotate(key, turns), value, is_causal=True)
        return self.output(mixed.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):  # type: ignore[misc]  # torch is Any to mypy
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.channels, shape.hidden_channels, bias=False)
        self.up = nn.Linear(shape.channels, shape.hidden_channels, bias=False)
        self.down = nn.Linear(shape.hidden_channels, shape.channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):  # type: ignore[misc]  # torch is Any to mypy
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.channels, eps=NORM_EPSILON)
        self.attention = Attention(shape)
        self.feed_forward_norm = nn.RMSNorm(shape.channels, eps=NORM_EPSILON)
        self.feed_forward = FeedForward(shape)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turns)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Network(nn.Module):  # type: ignore[misc]  # torch is Any to mypy
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(VOCABULARY, shape.channels)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.channels, eps=NORM_EPSILON)
        self.register_buffer("turns", rotary_turns(shape.head_channels), persistent=False)
        self.apply(_initialise)

    def forward(self, tokens: Tensor) -> Tensor:
        """Turn tokens [batch, position] into logits [batch, position, vocabulary] for the token that follows each."""
        x = self.embedding(tokens)  # [batch, position, channel]
        turns = self.turns[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, turns)
        return functional.linear(self.norm(x), self.embedding.weight)  # tied: tokens are read and written alike

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def rotary_turns(head_channels: int) -> Tensor:
    """Return cosine and sine of the angle of each pair of channels: [position, pair, 2]."""
    frequency = ROPE_BASE ** (-torch.arange(0, head_channels, 2) / head_channels)
    angle = torch.arange(CONTEXT)[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels by its position (GGUF's convention; Hugging Face pairs the halves)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = turns.unbind(-1)
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(-2).type_as(x)


def _initialise(module: Any) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)

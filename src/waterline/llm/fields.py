"""The fields of a config, each read with the type it must have."""

import json
from collections.abc import Mapping
from types import MappingProxyType

from waterline.errors import ModelFormatError

LARGEST_COUNT = 2**31 - 1
MOST: Mapping[str, int] = {  # far beyond any model; more is a damaged file
    "hidden_size": 2**20,
    "vocab_size": 2**27,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
}
WHAT_NEXT = "Use a GGUF file of this model, which states its tensors itself, or a model of the catalogue."


class Fields:
    """The fields of one config, each with the type it must have; what is wrong is said with file, field and value."""

    def __init__(
        self,
        values: Mapping[str, object],
        where: str,
        *,
        outer: Mapping[str, object] = MappingProxyType({}),
        defaults: Mapping[str, object] = MappingProxyType({}),
        aliases: Mapping[str, str] = MappingProxyType({}),
        prefix: str = "",
    ) -> None:
        self.where, self.prefix = where, prefix
        self._values, self._outer, self._defaults, self._aliases = values, outer, defaults, aliases

    def get(self, key: str) -> object:
        """Return the value; None where it is null or absent and the family has no default for it."""
        if key not in self._values and self._aliases.get(key) in self._values:
            key = self._aliases[key]
        for values in (self._values, self._outer, self._defaults):
            if key in values:
                return values[key]
        return None

    def wrong(self, key: str, expected: str) -> ModelFormatError:
        value = self.get(key)
        if value is None:
            return ModelFormatError(f"{self.where} has no field '{self.prefix}{key}', which must be {expected}.")
        return ModelFormatError(f"{self.where}: {self.prefix}{key} = {short(value)}, which must be {expected}.")

    def count(self, key: str, default: int | None = None, *, least: int = 1, most: int = LARGEST_COUNT) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        most = min(most, MOST.get(key, most))
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.wrong(key, f"an integer from {least:,} to {most:,}")
        return value

    def flag(self, key: str, *, default: bool = False) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.wrong(key, "a text")
        return value

    def ratio(self, key: str, *, most: float = 1e6) -> float:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
            raise self.wrong(key, f"a number above 0, at most {most:,.0f}")
        return float(value)

    def numbers(self, key: str, first: int | None = None) -> list[int]:
        """Return a list of integers, of which there must be at least `first`; only those are returned."""
        value = self.get(key)
        fine = isinstance(value, list) and all(
            isinstance(item, int) and not isinstance(item, bool) and 0 <= item <= LARGEST_COUNT for item in value
        )
        if not isinstance(value, list) or not fine or len(value) < (first or 0):
            raise self.wrong(key, "a list of integers" + (f", at least {first}" if first is not None else ""))
        return value[:first]

    def marks(self, key: str, layers: int) -> list[bool]:
        """Return a list with 0 or 1 a layer."""
        marks = self.numbers(key, layers)
        if set(marks) - {0, 1}:
            raise self.wrong(key, f"a list of 0 and 1, one for each of {layers} layers")
        return [mark == 1 for mark in marks]

    def per_layer(self, key: str, layers: int, meanings: Mapping[str, str]) -> list[str] | None:
        """Return what a list with one name a layer says, in our words; None where the config has no such list."""
        value = self.get(key)
        if value is None:
            return None
        more = self.get("num_nextn_predict_layers")
        if isinstance(value, list) and isinstance(more, int) and len(value) == layers + more:
            value = value[:layers]  # some families list their multi-token-prediction layers after the others
        if not isinstance(value, list) or len(value) != layers:
            raise self.wrong(key, f"a list of {layers} names, one a layer")
        unknown = [item for item in value if not isinstance(item, str) or item not in meanings]
        if unknown:
            known = ", ".join(meanings)
            raise ModelFormatError(
                f"{self.where}: {self.prefix}{key} holds {short(unknown[0])}, which is not known ({known}). {WHAT_NEXT}"
            )
        return [meanings[item] for item in value]

    def mapping(self, key: str) -> dict[str, object]:
        value = self.get(key)
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return value

    def inner(self, key: str) -> "Fields":
        return Fields(self.mapping(key), self.where, prefix=f"{self.prefix}{key}.")

    def item(self, key: str, index: int) -> "Fields":
        """Return the fields of an object in a list."""
        value = self.get(key)
        name = f"{key}[{index}]"
        if not isinstance(value, list) or not isinstance(value[index], dict):
            raise ModelFormatError(f"{self.where}: {self.prefix}{name} must be an object.")
        return Fields(value[index], self.where, prefix=f"{self.prefix}{name}.")


def short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."

"""The fields of a config, each read with the type it must have."""

import json
from collections.abc import Mapping
from types import MappingProxyType

from waterline.errors import ModelFormatError

LARGEST_COUNT = 2**40
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
        prefix: str = "",
    ) -> None:
        self.where, self.prefix = where, prefix
        self._values, self._outer, self._defaults = values, outer, defaults

    def get(self, key: str) -> object:
        """Return the value; None where it is null or absent and the family has no default for it."""
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

    def per_layer(self, key: str, layers: int, meanings: Mapping[str, str]) -> list[str] | None:
        """Return what a list with one name a layer says, in our words; None where the config has no such list."""
        value = self.get(key)
        if value is None:
            return None
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


def short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."

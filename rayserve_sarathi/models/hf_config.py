"""Typed reading of a checkpoint's JSON files, with errors that name the file and the key."""

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from rayserve_sarathi.errors import ConfigError


class HfConfig:
    """The keys of a `config.json`. Nothing of it is ever executed: `auto_map` is not looked at.

    Args:
        values: What the file holds.
        source: Name of the file, for errors.
    """

    def __init__(self, values: Mapping[str, object], *, source: str) -> None:
        self._values = values
        self._source = source
        self._asked_for: set[str] = set()

    def __contains__(self, key: str) -> bool:
        self._asked_for.add(key)
        return self._values.get(key) is not None

    def error(self, problem: str) -> ConfigError:
        """Return the error for something wrong in this file."""
        return ConfigError(f"{self._source}: {problem}")

    def integer(self, key: str, default: int | None = None, *, low: int = 1) -> int:
        """Return a number that must be at least `low`; without a default the key must be there."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise self.error(f"{key} must be a whole number of at least {low}, got {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number that must be greater than 0; without a default the key must be there."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.error(f"{key} must be a number greater than 0, got {value!r}")
        return float(value)

    def boolean(self, key: str, *, default: bool) -> bool:
        """Return true or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.error(f"{key} must be true or false, got {value!r}")
        return value

    def string(self, key: str, default: str) -> str:
        """Return a text."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.error(f"{key} must be a string, got {value!r}")
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        """Return a list of texts; a missing one is empty."""
        value = self._value(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(f"{key} must be a list of strings, got {value!r}")
        return tuple(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Return one token id or a list of them; a missing one is empty."""
        value = self._value(key, [])
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids):
            raise self.error(f"{key} must be a token id or a list of them, got {value!r}")
        return tuple(ids)

    def is_null(self, key: str) -> bool:
        """Whether the key is there and says null."""
        self._asked_for.add(key)
        return key in self._values and self._values[key] is None

    def section(self, key: str) -> "HfConfig":
        """Return the mapping under a key; a missing one is empty."""
        value = self._value(key, {})
        if not isinstance(value, dict):
            raise self.error(f"{key} must be a mapping, got {value!r}")
        return HfConfig(value, source=f"{self._source}: {key}")

    def all_strings(self) -> dict[str, str]:
        """Return every key; the values must be texts."""
        return {key: self.string(key, "") for key in self._values}

    def overridden(self, overrides: Mapping[str, object]) -> "HfConfig":
        """Return a copy in which keys have other values."""
        source = f"{self._source} with hf_overrides" if overrides else self._source
        return HfConfig({**self._values, **overrides}, source=source)

    def check_known(self, keys: Iterable[str], known: "HfConfig") -> None:
        """Return if each of `keys` was asked for by now, or is one of `known`'s own.

        Raises:
            ConfigError: One was not, so that it changes nothing; the message names the nearest that would.
        """
        would_do = self._asked_for | known._values.keys()
        for key in keys:
            if key not in would_do:
                nearest = difflib.get_close_matches(key, would_do, n=1, cutoff=0.5)
                hint = f"did you mean {nearest[0]}?" if nearest else f"use one of {sorted(would_do)}"
                raise ConfigError(f"hf_overrides.{key} is nothing that {known._source} or its family knows; {hint}")

    def _value(self, key: str, default: object) -> object:
        self._asked_for.add(key)
        value = self._values.get(key)
        if value is not None:
            return value
        if default is None:
            raise self.error(f"{key} is missing")
        return default


def read_json(path: Path) -> HfConfig:
    """Read a JSON file that holds a mapping.

    Raises:
        ConfigError: The file cannot be read, or is something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; is the checkpoint complete?") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping, got {type(values).__name__}")
    return HfConfig(values, source=str(path))

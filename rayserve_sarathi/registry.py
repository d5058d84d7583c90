"""Look up an implementation by its short name, importing it only then."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from rayserve_sarathi.errors import ConfigError


def check_name(kind: str, name: str, table: Mapping[str, str]) -> None:
    """Return if `table` has `name`, without importing what it stands for.

    Raises:
        ConfigError: It has not; the message lists the names that it has.
    """
    if name not in table:
        raise ConfigError(f"unknown {kind} {name!r}; use one of {sorted(table)}")


def load(kind: str, name: str, table: Mapping[str, str]) -> Any:
    """Return the object that `table[name]` names; see `import_object`.

    Raises:
        ConfigError: `name` is not in the table; the message lists the names that are.
    """
    check_name(kind, name, table)
    return import_object(table[name])


def import_object(path: str) -> Any:
    """Return the object that `path` ("package.module:attribute") names, importing its module only now."""
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)

"""Short names of implementations."""

import pytest

from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.registry import load

TABLE = {"error": "rayserve_sarathi.errors:ConfigError", "broken": "rayserve_sarathi.nowhere:Nothing"}


def test_a_name_loads_what_it_stands_for_and_nothing_else():
    assert load("thing", "error", TABLE) is ConfigError


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown thing 'eror'; use one of \['broken', 'error'\]"):
        load("thing", "eror", TABLE)

"""JSON as it goes out."""

from pydantic_core import to_json


def encode_json(value: object) -> bytes:
    """Return the JSON of plain Python objects; a number that JSON does not know becomes null.

    Strings are whole characters: half a surrogate pair comes neither through HTTP nor from tokens.
    """
    return to_json(value, inf_nan_mode="null")

"""JSON as it goes out."""

import json

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def encode_json(value: object) -> bytes:
    """Return the JSON of plain Python objects; half a surrogate pair, which UTF-8 cannot hold, becomes `?`."""
    return _encode(value).encode(errors="replace")

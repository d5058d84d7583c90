"""Turn dataclasses into JSON and raw buffers, and back, by what their annotations say.

The decoder builds no type but those that a message's annotations name, and checks each value against its own: what
cannot be such a message is a `WireError`, whatever the bytes are.
"""

from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeAlias, Union, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt

from rayserve_sarathi.errors import WireError
from rayserve_sarathi.step import SAMPLING_DTYPE

ByteArray = npt.NDArray[np.uint8]
Tree: TypeAlias = Any
"""What JSON can hold: numbers, text, None, and lists or tuples of them."""

MAX_BUFFERS = 1 << 16
MAX_BODY_BYTES = 1 << 31
_ALIGNMENT = 16
_SMALL_BYTES = 1 << 14
"""Buffers below this are joined, as another piece costs the kernel more than copying them does."""


class BodyWriter:
    """Collects the arrays of a message, in order."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._pieces: list[bytearray | memoryview] = [bytearray()]
        self._num_buffers = 0

    def add(self, array: npt.NDArray[Any]) -> int:
        """Append an array of one dimension; return its size in bytes."""
        data = np.ascontiguousarray(array).view(np.uint8).data
        self._num_buffers += 1
        tail = self._pieces[-1]
        assert isinstance(tail, bytearray)
        padding = -self.num_bytes % _ALIGNMENT
        tail += bytes(padding)
        if data.nbytes < _SMALL_BYTES:
            tail += data
        else:
            self._pieces += [data, bytearray()]
        self.num_bytes += padding + data.nbytes
        if self._num_buffers > MAX_BUFFERS or self.num_bytes > MAX_BODY_BYTES:
            raise WireError(
                f"a message of {self._num_buffers} arrays and {self.num_bytes} bytes is too large; "
                f"the most are {MAX_BUFFERS} and {MAX_BODY_BYTES}"
            )
        return data.nbytes

    def pieces(self) -> list[bytearray | memoryview]:
        """Return the body; concatenated, it has `num_bytes`."""
        return [piece for piece in self._pieces if len(piece)]


class BodyReader:
    """Hands the arrays of a message out again, as views of the memory they were received into.

    Args:
        body: What `BodyWriter` made, writable.
    """

    def __init__(self, body: ByteArray) -> None:
        self._body = body
        self._offset = 0
        self._num_buffers = 0

    def take(self, num_bytes: int) -> ByteArray:
        """Return the next array's bytes."""
        start = self._offset + -self._offset % _ALIGNMENT
        end = start + num_bytes
        self._num_buffers += 1
        if end > len(self._body) or self._num_buffers > MAX_BUFFERS:
            raise WireError(
                f"array {self._num_buffers} of a message ends at byte {end} of {len(self._body)}; "
                f"the most arrays are {MAX_BUFFERS}"
            )
        self._offset = end
        return self._body[start:end]

    def check_end(self) -> None:
        """Raise unless everything was taken."""
        if self._offset != len(self._body):
            raise WireError(f"the arrays of a message end at byte {self._offset} of {len(self._body)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """How values of one annotation travel.

    Args:
        encode: Returns what stands for a value in the JSON; None where the value itself does.
        decode: Does the reverse.
    """

    encode: Callable[[Any, BodyWriter], Tree] | None
    decode: Callable[[Tree, BodyReader], Any]


def make_codec(hint: Any, *, where: str) -> Codec:
    """Build the codec of an annotation; `where` names it in errors."""
    origin = get_origin(hint)
    arguments = get_args(hint)
    if hint is int:
        return Codec(encode=None, decode=lambda tree, _: _checked_int(tree, where))
    if hint is bool:
        return Codec(encode=None, decode=lambda tree, _: _checked(tree, bool, where))
    if hint is float:
        return Codec(encode=None, decode=lambda tree, _: _checked(tree, float, where))
    if hint is str:
        return Codec(encode=None, decode=lambda tree, _: _checked(tree, str, where))
    if origin in (Union, UnionType) and len(arguments) == 2 and arguments[1] is NoneType:
        return _optional(make_codec(arguments[0], where=where))
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return _tuple(make_codec(arguments[0], where=where), where)
    if origin is dict and arguments[0] is int:
        return _dict(make_codec(arguments[1], where=where), where)
    if origin is np.ndarray:
        scalar = get_args(arguments[1])[0]
        return _array(SAMPLING_DTYPE if scalar is np.void else np.dtype(scalar), where)
    if is_dataclass(hint) and isinstance(hint, type):
        return _record(hint, is_plain=False)
    if isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields"):
        return _record(hint, is_plain=True)
    raise TypeError(f"{where} is annotated as {hint}, which has no encoding; see make_codec for those that have")


def _checked(tree: Tree, kind: type, where: str) -> Any:
    if type(tree) is not kind:
        raise WireError(f"{where} should hold a value of type {kind.__name__}, got {str(tree)[:50]!r}")
    return tree


def _checked_int(tree: Tree, where: str) -> int:
    value: int = _checked(tree, int, where)
    if not -(2**63) <= value < 2**63:
        raise WireError(f"{where} should hold an int of 64 bits, got one of {value.bit_length()} bits")
    return value


def _optional(item: Codec) -> Codec:
    encode_item, decode_item = item.encode, item.decode

    def encode(value: Any, body: BodyWriter) -> Tree:
        return None if value is None or encode_item is None else encode_item(value, body)

    return Codec(
        encode=None if encode_item is None else encode,
        decode=lambda tree, body: None if tree is None else decode_item(tree, body),
    )


def _tuple(item: Codec, where: str) -> Codec:
    encode_item, decode_item = item.encode, item.decode

    def encode(value: Any, body: BodyWriter) -> Tree:
        assert encode_item is not None
        return [encode_item(entry, body) for entry in value]

    return Codec(
        encode=None if encode_item is None else encode,
        decode=lambda tree, body: tuple([decode_item(entry, body) for entry in _checked(tree, list, where)]),
    )


def _dict(item: Codec, where: str) -> Codec:
    encode_item, decode_item = item.encode, item.decode

    def encode(value: Any, body: BodyWriter) -> Tree:
        if encode_item is None:
            return list(value.items())
        return [(key, encode_item(entry, body)) for key, entry in value.items()]

    def decode(tree: Tree, body: BodyReader) -> dict[int, Any]:
        entries: dict[int, Any] = {}
        for entry in _checked(tree, list, where):
            if len(_checked(entry, list, where)) != 2:
                raise WireError(f"{where} should hold pairs, got one of {len(entry)} values")
            entries[_checked_int(entry[0], where)] = decode_item(entry[1], body)
        return entries

    return Codec(encode=encode, decode=decode)


def _array(dtype: np.dtype[Any], where: str) -> Codec:
    def encode(value: npt.NDArray[Any], body: BodyWriter) -> Tree:
        if value.dtype != dtype or value.ndim != 1:
            raise WireError(f"{where} should be a vector of {dtype}, got shape {value.shape} of {value.dtype}")
        return body.add(value)

    def decode(tree: Tree, body: BodyReader) -> npt.NDArray[Any]:
        num_bytes = _checked_int(tree, where)
        if num_bytes < 0 or num_bytes % dtype.itemsize:
            raise WireError(f"{where} has {num_bytes} bytes, which is no multiple of {dtype.itemsize}")
        return body.take(num_bytes).view(dtype)

    return Codec(encode=encode, decode=decode)


def _record(cls: type, *, is_plain: bool) -> Codec:
    """Return the codec of a class with annotated fields; `is_plain` if JSON takes it, and its fields, as they are."""
    hints = get_type_hints(cls)
    codecs = {name: make_codec(hint, where=f"{cls.__name__}.{name}") for name, hint in hints.items()}
    encoders = [(name, codec.encode) for name, codec in codecs.items()]
    decoders = [codec.decode for codec in codecs.values()]
    assert not is_plain or all(encoder is None for _, encoder in encoders), f"{cls} holds what JSON cannot"

    def encode(value: Any, body: BodyWriter) -> Tree:
        return [
            getattr(value, name) if encoder is None else encoder(getattr(value, name), body)
            for name, encoder in encoders
        ]

    def decode(tree: Tree, body: BodyReader) -> Any:
        if len(_checked(tree, list, cls.__name__)) != len(decoders):
            raise WireError(f"{cls.__name__} has {len(decoders)} fields, got {len(tree)}")
        values = [decoder(entry, body) for decoder, entry in zip(decoders, tree, strict=True)]
        return cls(**dict(zip(hints, values, strict=True)))

    return Codec(encode=None if is_plain else encode, decode=decode)

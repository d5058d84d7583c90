"""Messages of a pipeline as frames of bytes: no pickle, and large arrays are neither copied to send nor to receive.

A frame is a prefix (magic, size of header, size of body), a header in JSON, and a body of raw arrays. It is received
into one block of memory, which the arrays of the message are views of. Nothing here loads torch: the scheduler's
process reads and writes frames too. Both ends of a connection run the same version of this package.
"""

import json
import struct
from dataclasses import dataclass

import numpy as np

from rayserve_sarathi.errors import WireError
from rayserve_sarathi.execution.codec import MAX_BODY_BYTES, BodyReader, BodyWriter, ByteArray, make_codec
from rayserve_sarathi.step import StageTiming, StepFault, StepInput, StepOutput

MAX_HEADER_BYTES = 1 << 24
PREFIX = struct.Struct("<4sIQ")
"""Magic, bytes of the header, bytes of the body."""
_MAGIC = b"SRTH"
_HEADER_MULTIPLE = 16
"""So that arrays are as aligned within the body as the body is within its block."""
_JSON = json.JSONEncoder(separators=(",", ":"), check_circular=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """Hidden states on their way from one stage to the next.

    Args:
        shape: That of the tensor.
        dtype: Name of its torch dtype, such as `bfloat16`.
        data: Its bytes; None if they travel by another way.
    """

    shape: tuple[int, ...]
    dtype: str
    data: ByteArray | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayedStep:
    """A `StageMessage` on its way, without torch.

    Args:
        step: The step.
        hidden: What the stage before made of it; None after an error.
        timings: See `StageMessage`; `fault` likewise.
    """

    step: StepInput
    hidden: Activation | None
    timings: tuple[StageTiming, ...]
    fault: StepFault | None


Message = StepInput | RelayedStep | StepOutput
_CODECS = {cls.__name__: make_codec(cls, where=cls.__name__) for cls in (StepInput, RelayedStep, StepOutput)}


Frame = tuple[bytes | bytearray | memoryview, ...]
"""A message, to be sent piece by piece. Large arrays are views, and must not change until they are sent."""


def encode(message: Message) -> Frame:
    """Make the frame of a message.

    Raises:
        WireError: It is too large, or holds what its annotations do not allow.
    """
    name = type(message).__name__
    body = BodyWriter()
    encode_message = _CODECS[name].encode
    assert encode_message is not None, name
    try:
        header = _JSON.encode((name, encode_message(message, body))).encode()
    except TypeError as error:
        raise WireError(f"a {name} holds what cannot be sent: {error}") from error
    header += b" " * (-len(header) % _HEADER_MULTIPLE)
    if len(header) > MAX_HEADER_BYTES:
        raise WireError(f"the header of a {name} has {len(header)} bytes; the most are {MAX_HEADER_BYTES}")
    pieces = body.pieces()
    head = PREFIX.pack(_MAGIC, len(header), body.num_bytes) + header
    if pieces and isinstance(pieces[0], bytearray):
        head += pieces.pop(0)
    return (head, *pieces)


class FrameReader:
    """Puts frames together from the bytes of a connection, however they arrive.

    Receive into `missing`, then say how much it was. After a `WireError` the connection is of no use any more.
    """

    def __init__(self) -> None:
        self._header_bytes = 0
        self._begin(PREFIX.size)

    def _begin(self, num_bytes: int) -> None:
        # Not zeroed, as a bytearray would be: that takes as long as receiving it.
        self._block = np.empty(num_bytes, dtype=np.uint8)
        self._missing = self._block.data

    @property
    def missing(self) -> memoryview:
        """Where the next bytes belong; at least one."""
        return self._missing

    @property
    def is_between_frames(self) -> bool:
        """Whether the connection may end here."""
        return not self._header_bytes and len(self._missing) == PREFIX.size

    def advance(self, num_bytes: int) -> Message | None:
        """Take the first bytes of `missing` as received; return the message that they complete, if they do.

        Raises:
            WireError: They are no message.
        """
        self._missing = self._missing[num_bytes:]
        if self._missing:
            return None
        block, header_bytes = self._block, self._header_bytes
        if header_bytes:
            self._header_bytes = 0
            self._begin(PREFIX.size)
            return decode(block, header_bytes)
        magic, header_bytes, body_bytes = PREFIX.unpack(block.data)
        if magic != _MAGIC:
            raise WireError(f"a frame begins with {_MAGIC!r}, got {magic!r}")
        if not 0 < header_bytes <= MAX_HEADER_BYTES or body_bytes > MAX_BODY_BYTES:
            raise WireError(
                f"a frame has a header of 1 to {MAX_HEADER_BYTES} bytes and a body of at most {MAX_BODY_BYTES}, "
                f"got {header_bytes} and {body_bytes}"
            )
        self._header_bytes = header_bytes
        self._begin(header_bytes + body_bytes)
        return None


def decode(block: ByteArray, header_bytes: int) -> Message:
    """Return the message of a frame; its arrays are views of `block`.

    Args:
        block: Header and body, writable.
        header_bytes: Size of the header.

    Raises:
        WireError: It is no message.
    """
    try:
        header = json.loads(block[:header_bytes].tobytes())
    except (ValueError, RecursionError) as error:
        raise WireError(f"the header of a frame is not JSON: {error}") from None
    if not (isinstance(header, list) and len(header) == 2 and isinstance(header[0], str) and header[0] in _CODECS):
        raise WireError(f"a frame holds one of {sorted(_CODECS)}, got {str(header)[:50]!r}")
    body = BodyReader(block[header_bytes:])
    message: Message = _CODECS[header[0]].decode(header[1], body)
    body.check_end()
    return message

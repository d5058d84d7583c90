"""Cached prefixes in few bytes, so that whoever routes a request can tell which pipeline has most of its prompt.

A mark is the beginning of a block's hash, and so stands for all tokens up to that block's end. Of a prompt's blocks the
first eight have marks, then four more each time the length doubles: a prompt of n blocks has about 4 * log2(n) of them,
and the length of a cached prefix is told to within a fifth. Marks only choose a pipeline; what is shared there, the
whole hashes decide.
"""

from array import array
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

from rayserve_sarathi.kv.prefix_cache import extend_hashes

_MARK_BYTES = 8
_MAX_BLOCKS = 1024
"""Blocks of a prompt that are looked at: hashing more would hold up every stream of an ingress for milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixMarks:
    """The marks of a prompt, from its beginning to its end."""

    marks: tuple[bytes, ...] = ()
    """None of a prompt that shares nothing."""
    block_size: int = 1
    """Tokens in a block."""

    def num_known_tokens(self, known: Container[bytes]) -> int:
        """Return how many of the prompt's tokens are cached where `known` is."""
        for num_blocks, mark in reversed(list(zip(_marked(_MAX_BLOCKS), self.marks, strict=False))):
            if mark in known:
                return num_blocks * self.block_size
        return 0


def marks_of_prompt(token_ids: "array[int]", *, block_size: int, cache_salt: str) -> PrefixMarks:
    """Return the marks of the blocks that a prompt can share: at least its last token is always computed."""
    num_blocks = min((len(token_ids) - 1) // block_size, _MAX_BLOCKS)
    hashes: list[bytes] = []
    extend_hashes(hashes, token_ids[: num_blocks * block_size], block_size=block_size, cache_salt=cache_salt)
    marks = tuple(hashes[count - 1][:_MARK_BYTES] for count in _marked(len(hashes)))
    return PrefixMarks(marks=marks, block_size=block_size)


def unpack_marks(packed: bytes) -> frozenset[bytes]:
    """Return the marks that `RecentPrefixes.pack` put together."""
    return frozenset(packed[start : start + _MARK_BYTES] for start in range(0, len(packed), _MARK_BYTES))


class RecentPrefixes:
    """The hashes with a mark of the requests that used the cache last.

    Args:
        limit: How many to keep.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._names: OrderedDict[bytes, None] = OrderedDict()

    def note(self, hashes: list[bytes]) -> None:
        """Hear which blocks a request has; `hashes` begins with its first."""
        # The first block last, as a prefix is worth nothing without its beginning.
        for count in reversed(list(_marked(min(len(hashes), _MAX_BLOCKS)))):
            name = hashes[count - 1]
            self._names[name] = None
            self._names.move_to_end(name)
        while len(self._names) > self._limit:
            self._names.popitem(last=False)

    def pack(self, is_cached: Callable[[bytes], bool]) -> bytes:
        """Return the marks of those that are cached, in an order that depends on nothing else."""
        return b"".join(sorted(name[:_MARK_BYTES] for name in self._names if is_cached(name)))


def _marked(num_blocks: int) -> Iterator[int]:
    """Yield how many blocks each mark of a prompt of `num_blocks` stands for: 1 to 8, 10, 12, 14, 16, 20, 24, ..."""
    count = 1
    while count <= num_blocks:
        yield count
        count += 1 << max(count.bit_length() - 3, 0)

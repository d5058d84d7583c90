"""Blocks of the KV pool: reference counts, free blocks, and free blocks whose content may still be reused."""

from collections import OrderedDict
from collections.abc import Iterable

from rayserve_sarathi.errors import ConfigError


class BlockPool:
    """A fixed number of blocks, named 0 to `num_blocks - 1`.

    A block is in exactly one of three states: referenced (by one or more requests), free and empty, or free with a
    name. A free block with a name comes back to life when a request matches it, and is the last to be taken otherwise,
    least recently used first.

    Raises:
        ConfigError: There is no block at all.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ConfigError(f"a KV pool needs at least 1 block, got {num_blocks}")
        self.num_blocks = num_blocks
        self._num_references = [0] * num_blocks
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._named_free: OrderedDict[int, None] = OrderedDict()
        self._name_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no request holds."""
        return len(self._empty) + len(self._named_free)

    def allocate(self) -> int:
        """Take a free block, forgetting its name; there must be one."""
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._named_free.popitem(last=False)
            del self._block_of[self._name_of.pop(block)]
        self._num_references[block] = 1
        return block

    def allocate_many(self, count: int) -> list[int]:
        """Take `count` free blocks, as `allocate` one after the other would; there must be as many."""
        num_empty = min(count, len(self._empty))
        blocks = self._empty[len(self._empty) - num_empty :]
        blocks.reverse()
        del self._empty[len(self._empty) - num_empty :]
        num_references = self._num_references
        for block in blocks:
            num_references[block] = 1
        return blocks + [self.allocate() for _ in range(count - num_empty)]

    def find(self, name: bytes) -> int | None:
        """Return the block of that name, or None."""
        return self._block_of.get(name)

    def is_free(self, block: int) -> bool:
        """Whether no request holds `block`."""
        return self._num_references[block] == 0

    def share(self, block: int) -> None:
        """Add a reference to a named block, which may be free."""
        assert block in self._name_of, f"block {block} has no name, so its content is not known"
        if self._num_references[block] == 0:
            del self._named_free[block]
        self._num_references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drop a reference of each, in this order."""
        num_references, name_of = self._num_references, self._name_of
        for block in blocks:
            count = num_references[block] - 1
            assert count >= 0, f"block {block} is free already"
            num_references[block] = count
            if count == 0:
                if block in name_of:
                    self._named_free[block] = None
                else:
                    self._empty.append(block)

    def name(self, block: int, name: bytes) -> None:
        """Let others find `block`, whose content is complete; the first block of a name keeps it."""
        if name not in self._block_of and block not in self._name_of:
            self._block_of[name] = block
            self._name_of[block] = name

    def forget_names(self) -> None:
        """Make every block empty; none may be held."""
        assert self.num_free_blocks == self.num_blocks, f"{self.num_blocks - self.num_free_blocks} blocks are held"
        self._empty += self._named_free
        self._named_free.clear()
        self._name_of.clear()
        self._block_of.clear()

    def check_integrity(self, held: dict[int, int]) -> None:
        """Raise AssertionError unless `held` (block -> number of holders) and the pool's books agree on every block."""
        free = [*self._empty, *self._named_free]
        assert len(set(free)) == len(free), "a block is free twice"
        for block in range(self.num_blocks):
            count = self._num_references[block]
            assert count == held.get(block, 0), f"block {block}: {count} references, {held.get(block, 0)} holders"
        assert len(free) + len(held) == self.num_blocks, f"{self.num_blocks - len(free) - len(held)} blocks are lost"
        assert all(block in self._name_of for block in self._named_free), "a named free block has no name"
        assert {name: block for block, name in self._name_of.items()} == self._block_of, "names and blocks disagree"

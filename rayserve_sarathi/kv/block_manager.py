"""KV blocks of requests: the prefix cache, allocation at admission, growth during decode."""

from collections import deque

from rayserve_sarathi.kv.block_pool import BlockPool
from rayserve_sarathi.kv.prefix_cache import extend_hashes
from rayserve_sarathi.kv.prefix_marks import RecentPrefixes
from rayserve_sarathi.request import Request

_NUM_MARKS = 2048
"""Marks of cached prefixes that are published: 16 KB, the beginnings of some 50 to 200 long prompts."""


class BlockManager:
    """Gives KV blocks to requests and takes them back; writes `block_table` and `block_hashes` of a request.

    Args:
        num_blocks: Blocks in the pool of every stage (block ids mean the same in all of them).
        block_size: Tokens in a block.
        watermark: Share of the blocks that `allocate` leaves free.
        enable_prefix_caching: Whether requests share the KV of equal prefixes.
    """

    def __init__(
        self, num_blocks: int, *, block_size: int, watermark: float = 0.0, enable_prefix_caching: bool = True
    ) -> None:
        self.block_size = block_size
        self._pool = BlockPool(num_blocks)
        self._num_watermark_blocks = int(watermark * num_blocks)
        self.enable_prefix_caching = enable_prefix_caching
        self._pending: deque[tuple[Request, int]] = deque()
        self._recent = RecentPrefixes(_NUM_MARKS)

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no request holds."""
        return self._pool.num_free_blocks

    @property
    def usage(self) -> float:
        """Share of the blocks that requests hold, 0 to 1."""
        return 1 - self._pool.num_free_blocks / self._pool.num_blocks

    def can_share(self, request: Request) -> bool:
        """Whether `find_prefix` looks for blocks of others at all."""
        wants_whole_prompt = request.sampling.prompt_logprobs is not None and request.num_output_tokens == 0
        return self.enable_prefix_caching and not wants_whole_prompt

    def find_prefix(self, request: Request) -> list[int]:
        """Return the blocks of the longest prefix of `request` whose KV exists.

        At least the last token is left out, as its logits are wanted; a block is shared only as a whole, so with it
        goes the block it is in. A request that asks for the log-probabilities of its prompt computes all of it.
        """
        if not self.can_share(request):
            return []
        self._hash_blocks(request)
        blocks = []
        for name in request.block_hashes[: (request.num_tokens - 1) // self.block_size]:
            block = self._pool.find(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def allocate(self, request: Request, prefix: list[int], *, num_tokens: int, keep_watermark: bool) -> bool:
        """Give `request` blocks for `num_tokens`, the first of which are `prefix`.

        At least for all it has, so that a prompt once begun is never stopped for want of blocks.

        Returns:
            Whether there were enough; if not, nothing has changed.
        """
        assert not request.block_table, f"{request} has blocks already"
        num_new = self._num_blocks_for(num_tokens) - len(prefix)
        num_revived = sum(map(self._pool.is_free, prefix))
        reserve = self._num_watermark_blocks if keep_watermark else 0
        if self._pool.num_free_blocks - num_revived - reserve < num_new:
            return False
        for block in prefix:
            self._pool.share(block)
        self._recent.note(request.block_hashes)
        request.block_table.extend(prefix)
        request.block_table.extend(self._pool.allocate_many(num_new))
        return True

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Make the block table of `request` long enough for `num_tokens`, if free blocks allow."""
        table, pool = request.block_table, self._pool
        num_new = self._num_blocks_for(num_tokens) - len(table)
        if num_new > pool.num_free_blocks:
            return False
        for _ in range(num_new):
            table.append(pool.allocate())
        return True

    def share_computed(self, request: Request, num_before: int) -> None:
        """Let other requests find the blocks that filled up as `num_computed_tokens` grew from `num_before`."""
        first, last = num_before // self.block_size, request.num_computed_tokens // self.block_size
        if first == last or not self.enable_prefix_caching:
            return
        self._hash_blocks(request)
        for index in range(first, last):
            self._pool.name(request.block_table[index], request.block_hashes[index])

    def share_later(self, request: Request, num_before: int) -> None:
        """Like `share_computed`, but by one of the next calls of `share_pending`."""
        if self.enable_prefix_caching:
            self._pending.append((request, num_before))

    def share_pending(self, limit: int) -> None:
        """Do what `share_later` put off, for at most `limit` requests.

        Requests that began together fill their blocks in the same steps, and naming 256 blocks takes a millisecond,
        which no single step should pay. A request that has given its blocks back meanwhile shares nothing.
        """
        while limit and self._pending:
            request, num_before = self._pending.popleft()
            if request.block_table:
                self.share_computed(request, num_before)
                limit -= 1

    def free(self, request: Request) -> None:
        """Take all blocks of `request` back; the end of its sequence will be evicted before the beginning."""
        self._recent.note(request.block_hashes)
        self._pool.release(reversed(request.block_table))
        del request.block_table[:]

    def pack_marks(self) -> bytes:
        """Return the marks of the prefixes that were used last and are cached; see `prefix_marks.unpack_marks`."""
        return self._recent.pack(lambda name: self._pool.find(name) is not None)

    def forget_content(self) -> None:
        """Forget which prefixes are cached, as the pools are new. No request may hold a block."""
        self._pending.clear()
        self._pool.forget_names()

    def check_integrity(self, requests: list[Request]) -> None:
        """Raise AssertionError unless the blocks of `requests` and the free ones are exactly the pool."""
        held: dict[int, int] = {}
        for request in requests:
            assert len(set(request.block_table)) == len(request.block_table), f"{request} holds a block twice"
            for block in request.block_table:
                held[block] = held.get(block, 0) + 1
        self._pool.check_integrity(held)

    def _hash_blocks(self, request: Request) -> None:
        extend_hashes(
            request.block_hashes, request.token_ids, block_size=self.block_size, cache_salt=request.cache_salt
        )

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

"""Names of full KV blocks: a hash of all tokens up to the block's end, so that equal names mean equal KV.

BLAKE2b, not Python's `hash`: a collision would hand one user's KV to another, so it must not be possible to make one.
"""

from array import array
from hashlib import blake2b

_DIGEST_BYTES = 16


def root_hash(cache_salt: str) -> bytes:
    """Return the parent of first blocks; requests of different salts share nothing."""
    return blake2b(cache_salt.encode("utf-8", "surrogatepass"), digest_size=_DIGEST_BYTES).digest()


def extend_hashes(hashes: list[bytes], token_ids: "array[int]", *, block_size: int, root: bytes) -> None:
    """Append the hashes of the full blocks of `token_ids` that `hashes` lacks, in place."""
    parent = hashes[-1] if hashes else root
    for start in range(len(hashes) * block_size, len(token_ids) - block_size + 1, block_size):
        parent = blake2b(parent + token_ids[start : start + block_size].tobytes(), digest_size=_DIGEST_BYTES).digest()
        hashes.append(parent)

"""Names of full KV blocks: a hash of all tokens up to the block's end, so that equal names mean equal KV.

BLAKE2b, not Python's `hash`: a collision would hand one user's KV to another, so it must not be possible to make one.
"""

from array import array
from hashlib import blake2b

_DIGEST_BYTES = 16


def extend_hashes(hashes: list[bytes], token_ids: "array[int]", *, block_size: int, cache_salt: str) -> None:
    """Append the hashes of the full blocks of `token_ids` that `hashes` lacks, in place.

    Args:
        hashes: Hash of each full block so far.
        token_ids: All tokens.
        block_size: Tokens in a block.
        cache_salt: Begins the chain, so that requests of different salts have no hash in common.
    """
    parent = hashes[-1] if hashes else _hash(cache_salt.encode("utf-8", "surrogatepass"), kind=b"salt")
    for start in range(len(hashes) * block_size, len(token_ids) - block_size + 1, block_size):
        parent = _hash(parent + token_ids[start : start + block_size].tobytes(), kind=b"block")
        hashes.append(parent)


def _hash(content: bytes, *, kind: bytes) -> bytes:
    # Different kinds, so that no salt can be made whose hash is that of a block.
    return blake2b(content, digest_size=_DIGEST_BYTES, person=kind).digest()

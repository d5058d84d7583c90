"""Attention by the packages flash-attn and vllm-flash-attn (FlashAttention-2 and -3; Dao, 2023; Shah et al., 2024).

Dimensions: T tokens in the step; R requests; N query and K KV heads; H head size; P blocks in the pool; S tokens per
block.
"""

from collections.abc import Callable
from importlib import import_module
from typing import ClassVar

import torch
from torch import Tensor

from rayserve_sarathi.kernels.attention.metadata import AttentionMetadata
from rayserve_sarathi.kernels.attention.token_major import TokenMajorCache


class FlashAttention(TokenMajorCache):
    """Attention by flash-attn 2. A block holds keys, and values, as [S, K, H].

    Raises:
        ImportError: The package is not installed.
    """

    # Of a block's tokens; what their kernels step by.
    _block_multiple: ClassVar[int] = 256
    _modules: ClassVar[tuple[str, ...]] = ("flash_attn",)

    def __init__(self) -> None:
        self._attend, self._module = _import_function(self._modules)

    def refuse(self, *, block_size: int, head_size: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """See `AttentionBackend`."""
        if device.type != "cuda":
            return f"it is for GPUs, not {device.type}"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"it computes in float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
        if block_size % self._block_multiple:
            return f"block_size must be a multiple of {self._block_multiple}, got {block_size}"
        if head_size % 8 or head_size > 256:
            return f"the head size must be a multiple of 8 and at most 256, got {head_size}"
        return None

    def attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        """Attend from each token to its request's tokens up to itself; see `AttentionBackend.attention`."""
        return self._attend(
            q,
            k_cache,
            v_cache,
            cu_seqlens_q=metadata.cu_query_lens,
            max_seqlen_q=int(metadata.layout.query_lens.max()),
            max_seqlen_k=int(metadata.layout.seq_lens.max()),
            softmax_scale=scale,
            causal=True,
            # Tokens to the left of itself and to the right that a token sees; -1 stands for all.
            window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
            block_table=metadata.block_tables,
            **self._key_lens(metadata),
        )

    def _key_lens(self, metadata: AttentionMetadata) -> dict[str, Tensor]:
        return {"cu_seqlens_k": metadata.cu_seq_lens}


class VllmFlashAttention(FlashAttention):
    """Attention by vLLM's fork, whose blocks may be smaller: as vLLM itself ships it, or by itself (up to 2.6)."""

    _block_multiple: ClassVar[int] = 16
    _modules: ClassVar[tuple[str, ...]] = ("vllm.vllm_flash_attn", "vllm_flash_attn")

    def _key_lens(self, metadata: AttentionMetadata) -> dict[str, Tensor]:
        if self._module.startswith("vllm."):
            return {"seqused_k": metadata.seq_lens}
        return super()._key_lens(metadata)


def _import_function(modules: tuple[str, ...]) -> tuple[Callable[..., Tensor], str]:
    """Return `flash_attn_varlen_func` of the first module that is installed, and the module's name.

    Raises:
        ImportError: None is.
    """
    reasons = []
    for module in modules:
        try:
            return import_module(module).flash_attn_varlen_func, module
        except ImportError as error:
            reasons.append(str(error))
    raise ImportError("; ".join(reasons))

"""Attention over a paged KV cache for steps that mix chunks and decodes; `torch` is the reference for the others."""

ATTENTION_BACKENDS = {
    "torch": "rayserve_sarathi.kernels.attention.reference:TorchAttention",
}

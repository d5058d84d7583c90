"""Attention over a paged KV cache for steps that mix chunks and decodes; `torch` is the reference for the others.

See `models.load.choose_attention_backend` for what `auto` takes.
"""

ATTENTION_BACKENDS = {
    "cpp": "rayserve_sarathi.kernels.attention.cpp:CppAttention",
    "triton": "rayserve_sarathi.kernels.attention.triton_paged:TritonAttention",
    "flash_attn": "rayserve_sarathi.kernels.attention.flash_attention:FlashAttention",
    "vllm_flash_attn": "rayserve_sarathi.kernels.attention.flash_attention:VllmFlashAttention",
    "flashinfer": "rayserve_sarathi.kernels.attention.flashinfer:FlashInferAttention",
    "torch": "rayserve_sarathi.kernels.attention.reference:TorchAttention",
}

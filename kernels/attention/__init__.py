"""Attention over a paged KV cache for steps that mix chunks and decodes; `torch` is the reference for the others.

The fastest first: `auto` takes the first that attends on the device, in the type, and with these sizes.
"""

ATTENTION_BACKENDS = {
    "cpp": "rayserve_sarathi.kernels.attention.cpp:CppAttention",
    "torch": "rayserve_sarathi.kernels.attention.reference:TorchAttention",
}

"""Whether the kernels compute on this GPU what the references do."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import torch

from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.execution.cuda_graphs import StepLimits
from rayserve_sarathi.execution.model_runner import ModelRunner
from rayserve_sarathi.kernels import fused
from rayserve_sarathi.kernels.attention.reference import TorchAttention
from rayserve_sarathi.kernels.attention.triton_paged import TritonAttention
from rayserve_sarathi.kernels.rotary import apply_rotary, inverse_frequencies, rotary_cos_sin
from rayserve_sarathi.llm import LLM
from rayserve_sarathi.models.load import load_decoder
from rayserve_sarathi.models.resolve import resolve_model
from rayserve_sarathi.profiling.grid import make_step
from rayserve_sarathi.request import SamplingParams
from tests.kernels.attention_cases import CASES, run

DEVICE = torch.device("cuda")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.004}


def check_attention() -> Iterator[tuple[str, float, float]]:
    """Yield a name, the largest error and what it may be, of each backend, case and type."""
    for backend in (TritonAttention(), TorchAttention()):
        for name, case in CASES.items():
            for dtype, tolerance in TOLERANCE.items():
                # Each kind of case compiles a kernel for each type, a second each.
                if dtype != torch.bfloat16 and name not in ("mixed", "one-long-decode", "window-across-blocks"):
                    continue
                ours, expected = run(backend, case, dtype, DEVICE)
                error = float((ours - expected).abs().max())
                yield f"{type(backend).__name__} {name} {dtype}", error, tolerance


def check_fused() -> Iterator[tuple[str, float, float]]:
    """Yield a name, the largest error and what it may be, of each kernel and type."""
    for dtype, tolerance in TOLERANCE.items():
        scale = 4 * tolerance
        x, residual = (torch.randn(37, 4096, device=DEVICE, dtype=dtype) for _ in range(2))
        weight = torch.randn(4096, device=DEVICE, dtype=dtype)
        total = x + residual
        expected = torch.nn.functional.rms_norm(total.double(), weight.shape, weight.double(), 1e-5)
        y, stored = fused.rms_norm(x, residual, weight, eps=1e-5)
        yield f"rms_norm {dtype}", float((y - expected).abs().max()), scale
        yield f"rms_norm's sum {dtype}", float((stored - total).abs().max()), 0.0
        gate, up = x.double(), residual.double()
        activated = fused.silu_mul(torch.cat((x, residual), dim=1))
        yield f"silu_mul {dtype}", float((activated - gate * gate.sigmoid() * up).abs().max()), scale

        qkv = torch.randn(5, 32 + 2 * 8, 128, device=DEVICE, dtype=dtype)
        frequencies = inverse_frequencies(128, theta=1e4).to(DEVICE)
        positions = torch.tensor([0, 7, 300, 4000, 9], device=DEVICE)
        cos, sin = rotary_cos_sin(positions, frequencies, attention_factor=1)
        q, k = apply_rotary(qkv[:, :32].double(), cos, sin), apply_rotary(qkv[:, 32:40].double(), cos, sin)
        values = qkv[:, 40:].clone()
        caches = [torch.zeros(3, 4, 8, 128, device=DEVICE, dtype=dtype) for _ in range(2)]
        slots = torch.tensor([3, 9, 0, 11, -1], dtype=torch.int32, device=DEVICE)
        rotated = fused.rotate_and_write(qkv, *caches, cos=cos, sin=sin, slot_mapping=slots)
        keys, stored_values = (cache.view(12, 8, 128)[slots[:4]] for cache in caches)
        yield f"rotary {dtype}", float((rotated - q).abs().max()), scale
        yield f"keys written {dtype}", float((keys - k[:4]).abs().max()), scale
        yield f"values written {dtype}", float((stored_values - values[:4]).abs().max()), 0.0


def check_graphs(config: EngineConfig) -> Iterator[tuple[str, float, float]]:
    """Yield how far hidden states of graphs are from those of kernels one by one, and how many tokens differ.

    Args:
        config: A small model on the GPU.
    """
    info = resolve_model(config)
    limits = StepLimits(num_tokens=512, num_seqs=24, model_len=2048)
    eager, graphs = (
        ModelRunner(
            load_decoder(config, info, stage=0),
            num_blocks=2048,
            block_size=config.block_size,
            graph_limits=graph_limits,
        )
        for graph_limits in (None, limits)
    )
    # The same keys and values in both.
    for runner, first_block in product((eager, graphs), range(0, 768, 32)):
        whole = make_step(
            num_decodes=0,
            decode_context=0,
            chunks=((512, 0),),
            block_size=config.block_size,
            vocab_size=info.vocab_size,
            first_block=first_block,
        )
        runner.forward(whole, None)
    shapes: dict[str, tuple[int, int, tuple[tuple[int, int], ...]]] = {
        "a chunk": (0, 0, ((512, 0),)),
        "a chunk and decodes": (5, 300, ((200, 0), (31, 64))),
        "decodes": (11, 300, ()),
        "as many decodes as a graph has": (16, 700, ()),
        "a decode": (1, 500, ()),
    }
    for name, (num_decodes, decode_context, chunks) in shapes.items():
        step = make_step(
            num_decodes=num_decodes,
            decode_context=decode_context,
            chunks=chunks,
            block_size=config.block_size,
            vocab_size=info.vocab_size,
        )
        greedy = step.sampling.copy()
        greedy["temperature"] = 0
        step = replace(step, sampling=greedy)
        one, other = eager.forward(step, None), graphs.forward(step, None)
        yield f"graph of {name}", float((one - other).abs().max() / one.abs().max()), 0.02
        tokens = [
            runner.sample(step, runner.logits(step, hidden)).wait()
            for runner, hidden in ((eager, one), (graphs, other))
        ]
        differing = np.mean(tokens[0].token_ids != tokens[1].token_ids)
        yield f"tokens of the graph of {name}", float(differing), 0.2


def check_tokens() -> Iterator[tuple[str, float, float]]:
    """Yield how many requests of the package's own model, in float32, get other tokens on the GPU than on the CPU."""
    texts = ["The stage", "A scheduler that never", "Chunks of a long prompt " * 20, "One"]
    sampling = [
        SamplingParams(max_tokens=40, temperature=0, ignore_eos=True),
        SamplingParams(max_tokens=40, seed=7, ignore_eos=True),
        SamplingParams(max_tokens=40, seed=8, top_p=0.8, top_k=20, ignore_eos=True),
        SamplingParams(max_tokens=40, temperature=0.6, seed=9, min_p=0.1, repetition_penalty=1.2, ignore_eos=True),
    ]
    tokens = {}
    for device in ("cpu", "cuda"):
        settings = {"device": device, "dtype": "float32", "num_gpu_blocks_override": 512}
        with LLM("sarathi-tiny", scheduler={"token_budget": 32}, **settings) as llm:
            generations = llm.generate(texts, sampling, has_progress_bar=False)
        tokens[device] = [generation.token_ids for generation in generations]
    differing = sum(one != other for one, other in zip(tokens["cpu"], tokens["cuda"], strict=True))
    yield "requests with other tokens than on the CPU", float(differing), 0.0

"""A checkpoint with random weights and a tokenizer, fit to be served, and what transformers makes of it."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.tokenizers_for_tests import byte_level_tokenizer

EOS_TOKEN = "<|im_end|>"


def save_servable(folder: Path, *, num_layers: int = 4, hidden_size: int = 64) -> Path:
    """Write a tiny random Llama with four layers, which any of the engine's tests can serve."""
    tokenizer = byte_level_tokenizer()
    eos_token_id = tokenizer.convert_tokens_to_ids(EOS_TOKEN)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,  # larger than is usual, so that the tokens depend on the whole context
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Reference:
    """`transformers.generate`, greedy, one prompt at a time."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def generate(self, prompt_token_ids: list[int], max_tokens: int) -> list[int]:
        """Return the generated tokens, the end-of-sequence token included."""
        ids = torch.tensor([prompt_token_ids])
        output = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
        )
        return output[0, len(prompt_token_ids) :].tolist()

"""Make a model with random weights and a tokenizer, in Hugging Face's format, that every peer can read."""

import json
import logging
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_TEXTS = Path(__file__).resolve().parents[2]
_EOS = "<|end|>"

SIZES: dict[str, dict[str, int]] = {
    "15m": {
        "hidden_size": 256,
        "intermediate_size": 1792,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
    },
    "125m": {
        "hidden_size": 768,
        "intermediate_size": 3456,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": 8192,
    },
}
MAX_MODEL_LEN = 4096


def make_checkpoint(size: str, folder: Path) -> None:
    """Write the model of a size, in float32, unless the folder has one.

    Its head gives the end and all bytes that are no text by themselves a logit of 0, so that no greedy text ends early
    or holds half a character, which some servers hold back.
    """
    if (folder / "tokenizer.json").is_file():
        return
    torch.manual_seed(0)
    shape = SIZES[size]
    tokenizer = _train_tokenizer(shape["vocab_size"])
    eos_token_id = tokenizer.token_to_id(_EOS)
    config = LlamaConfig(
        **shape,
        max_position_embeddings=MAX_MODEL_LEN,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
        initializer_range=0.05,
    )
    model = LlamaForCausalLM(config).float()
    is_text = torch.zeros(config.vocab_size, dtype=torch.bool)
    for token_id in range(tokenizer.get_vocab_size()):
        text = tokenizer.decode([token_id])
        is_text[token_id] = text.isascii() and text.isprintable() and bool(text) and token_id != eos_token_id
    with torch.no_grad():
        model.lm_head.weight[~is_text] = 0
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=_EOS, bos_token=_EOS, model_max_length=MAX_MODEL_LEN
    ).save_pretrained(folder)
    # Some servers take these in place of what a request says.
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_token_id, "do_sample": False}))
    logging.getLogger(__name__).info("made the %s model in %s", size, folder)


def _train_tokenizer(vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = sorted(_TEXTS.glob("rayserve_sarathi/**/*.py")) + sorted(_TEXTS.glob("*.md"))
    tokenizer.train_from_iterator((path.read_text() for path in texts), trainer)
    return tokenizer

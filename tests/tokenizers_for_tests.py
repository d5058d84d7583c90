"""Small tokenizers of the families in use, trained on the spot."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Stop here, or go on: one, two, three!",
    "user assistant system hello world, how are you today? I am fine, thank you.",
    "a chat about the model and the tokens of the model in the chat",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' and message['content'] == 'refuse me' %}"
    "{{ raise_exception('no such message') }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if thinking %}<think>{% endif %}{% endif %}"
)
SPECIAL_TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_level_tokenizer(*, template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2, Llama 3, Qwen and Falcon have, with ChatML control tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    # One that the template writes, one that is only odd: neither is marked as special.
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("<t\u00f6\u00f6l call>", normalized=False)])
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return _wrap(backend, template)


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece-like BPE with byte fallback, as Llama 2, Mistral and Yi have."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    # A trainer marks its tokens as special; byte tokens are not.
    return _wrap(_unmark(backend, byte_tokens), None)


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """One whose decoder is no concatenation of bytes that we know."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return _wrap(backend, None)


class CharacterTokenizer(PreTrainedTokenizer):
    """One in Python, as checkpoints with their own tokenizer code have: a token for each ASCII character."""

    @property
    def vocab_size(self) -> int:
        return 128

    def get_vocab(self) -> dict[str, int]:
        return {chr(place): place for place in range(128)} | self.added_tokens_encoder

    def _tokenize(self, text: str) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return min(ord(token), 127)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def python_tokenizer() -> CharacterTokenizer:
    """A tokenizer that is not of the `tokenizers` library."""
    hf = CharacterTokenizer(bos_token="<s>", eos_token="</s>")
    hf.chat_template = CHAT_TEMPLATE
    return hf


def _wrap(backend: Tokenizer, template: str | None) -> PreTrainedTokenizerFast:
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    hf.chat_template = template
    return hf


def _unmark(backend: Tokenizer, tokens: list[str]) -> Tokenizer:
    description = json.loads(backend.to_str())
    description["added_tokens"] = [entry for entry in description["added_tokens"] if entry["content"] not in tokens]
    return Tokenizer.from_str(json.dumps(description))


def save(hf: PreTrainedTokenizerFast, folder: Path) -> str:
    """Write a tokenizer as a checkpoint holds it."""
    hf.save_pretrained(folder)
    return str(folder)

"""Train the tiny model that rayserve_sarathi ships: ``python -m rayserve_sarathi.models.tiny.train``.

Everything is made here: the text (see ``corpus``), the tokenizer and the
weights. A fixed seed, one process and deterministic kernels give the same
files again on the same machine.
"""

import argparse
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rayserve_sarathi.models.tiny.corpus import Document, documents
from rayserve_sarathi.models.tiny.evaluate import PAIRS, score, stories_kept

logger = logging.getLogger(__name__)

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
END_OF_TEXT_ID, TURN_END_ID = SPECIAL_TOKENS.index(END_OF_TEXT), SPECIAL_TOKENS.index(TURN_END)
VOCABULARY = 1280
POSITIONS = 2048
ROPE_THETA = 10000.0
THREADS = 2
TOKENIZER_DOCUMENTS = 4000
PEAK_RATE = 3e-3
WARM_UP = 100
# About 1 / sqrt(width). With the usual 0.02 attention starts out flat at this width, and the model
# needs several times as many steps to discover that it can copy a word from the request.
INITIAL_SPREAD = 0.07
LONG_STEP = 8
REPORT_STEP = 200
PROBES = PAIRS[::9]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """The rows of one batch: how many, how long, and which share of their stories has several episodes."""

    rows: int
    length: int
    long_share: float


# Most of what there is to learn fits into short rows, which cost a CPU much less attention;
# every few steps one row as long as the whole context keeps the later positions in use.
SHORT, LONG = Shape(6, 192, 0.02), Shape(1, POSITIONS, 0.5)


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on a sample of the corpus; all 256 bytes are in it, so any text survives."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sample = islice(documents(Random(seed), long_share=0.1), TOKENIZER_DOCUMENTS)
    backend.train_from_iterator((document.raw() for document in sample), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def build_model() -> LlamaForCausalLM:
    """Return the untrained network: small enough to ship, with the grouped heads of a real Llama."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=704,
            num_hidden_layers=4,
            initializer_range=INITIAL_SPREAD,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=POSITIONS,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            tie_word_embeddings=True,
            bos_token_id=END_OF_TEXT_ID,
            eos_token_id=TURN_END_ID,
            pad_token_id=END_OF_TEXT_ID,
        )
    )
    # A conversation ends with one mark and a plain text with the other; generation stops at both.
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=END_OF_TEXT_ID, eos_token_id=[TURN_END_ID, END_OF_TEXT_ID], pad_token_id=END_OF_TEXT_ID
    )
    return model


def render(tokenizer: PreTrainedTokenizerFast, document: Document) -> str:
    """Return a document exactly as the engine will later present it, closed by the end-of-text mark."""
    if document.text:
        return document.text + END_OF_TEXT
    return str(tokenizer.apply_chat_template(list(document.messages), tokenize=False)) + END_OF_TEXT


def training_rows(tokenizer: PreTrainedTokenizerFast, rng: Random, shape: Shape) -> Iterator[list[int]]:
    """Yield rows of packed documents.

    A row always begins with the beginning of a document, since that is how
    every request begins; what does not fit at its end is dropped.
    """
    row: list[int] = []
    for document in documents(rng, shape.long_share):
        row += tokenizer.encode(render(tokenizer, document), add_special_tokens=False)
        if len(row) >= shape.length:
            yield row[: shape.length]
            row = []


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[torch.Tensor]:
    """Yield one batch of token ids per step, the long ones spread evenly over the training."""
    short = training_rows(tokenizer, Random(f"{seed} short"), SHORT)
    long = training_rows(tokenizer, Random(f"{seed} long"), LONG)
    for step in count(1):
        rows, shape = (long, LONG) if step % LONG_STEP == 0 else (short, SHORT)
        yield torch.tensor(list(islice(rows, shape.rows)))


def learning_rate(step: int, steps: int) -> float:
    """Return the factor on the peak rate: a linear warm-up, then a straight line down to zero."""
    warm_up = min(WARM_UP, max(1, steps // 4))
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return 1.0 - progress


def make_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """Return AdamW with weight decay on the matrices only: a norm's scale should be free to stay large."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    scales = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": scales, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95))


def fit(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int) -> float:
    """Train the model in place and return the mean loss of the last steps."""
    optimizer = make_optimizer(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    began, recent = time.monotonic(), 0.0
    model.train()
    for step, batch in enumerate(islice(batches(tokenizer, seed), steps), start=1):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent = loss.item() if step == 1 else 0.95 * recent + 0.05 * loss.item()
        if step % REPORT_STEP == 0:
            copied = stories_kept(model, tokenizer, PROBES)
            logger.info(
                "step %d of %d: loss %.3f, %d of %d requested pairs, %.0f s",
                step, steps, recent, copied, len(PROBES), time.monotonic() - began,
            )  # fmt: skip
            model.train()
    return recent


def _amend(path: Path, entries: dict[str, object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | entries
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write weights, configuration and tokenizer in the files that a Hugging Face reader looks for."""
    out.mkdir(parents=True, exist_ok=True)
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    # Older readers know neither of the newer spellings, and newer ones accept these.
    _amend(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    _amend(out / "config.json", {"rope_theta": ROPE_THETA})


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the tiny model of rayserve_sarathi.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder that the files are written to")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps of about 1,260 tokens each")
    parser.add_argument("--seed", type=int, default=1, help="seed of the corpus and of the first weights")
    return parser.parse_args()


def main() -> None:
    """Make the corpus, train tokenizer and model, and write the files."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    arguments = parse_arguments()
    torch.set_num_threads(THREADS)
    torch.manual_seed(arguments.seed)
    torch.use_deterministic_algorithms(True)
    torch.set_flush_denormal(True)
    tokenizer = train_tokenizer(arguments.seed)
    model = build_model()
    logger.info("%d parameters, %d tokens in the vocabulary", model.num_parameters(), len(tokenizer))
    loss = fit(model, tokenizer, arguments.seed, arguments.steps)
    save(model, tokenizer, arguments.out)
    logger.info("final loss %.3f, written to %s", loss, arguments.out)
    for subject, (right, total) in score(model, tokenizer).items():
        logger.info("%s: %d of %d", subject, right, total)


if __name__ == "__main__":
    main()

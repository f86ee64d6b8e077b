"""The embedded demo: a tiny random Qwen3 checkpoint, its tokenizer, and an addition task with a score.

Everything is generated from a seed, nothing is downloaded. The task is the sum of two numbers below 100.
The answer spells out the addition as done on paper, units first, so that each token depends on only a few others.
A model of under a million parameters learns it in a minute or two on two cores:

    user:       What is 37+45?
    assistant:  7+5=12, 3+4+1=8, 82

    >>> demo = make_demo("demo", seed=0)
    >>> score(demo.model, demo.val)
    Score(correct=0, total=300)

As a program: `python examples/arithmetic_demo.py DIR [--seed N]` creates the folder,
`python examples/arithmetic_demo.py --score MODEL VAL_JSONL` prints the accuracy of a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LARGEST = 99
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = ("system", "user", "assistant", "What", "Ġis", "Ġand")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


@dataclass(frozen=True)
class Demo:
    """Paths of the demo: a checkpoint folder and two JSONL files of messages."""

    model: Path
    train: Path
    val: Path


@dataclass(frozen=True)
class Score:
    """How many held-out questions were answered exactly right."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.total


def make_demo(folder: str | Path, *, seed: int = 0, num_val: int = 300) -> Demo:
    """Write `model/`, `train.jsonl` and `val.jsonl` into `folder`; equal arguments give equal bytes."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    demo = Demo(folder / "model", folder / "train.jsonl", folder / "val.jsonl")
    tokenizer = make_tokenizer()
    make_model(demo.model, tokenizer, seed=seed)
    tokenizer.save_pretrained(demo.model)
    train, val = split_pairs(seed, num_val)
    write_rows(demo.train, train)
    write_rows(demo.val, val)
    return demo


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: every digit is a token, a few words are one token each, and turns are in ChatML.

    Merges are fixed, not learned, so that the vocabulary never changes by itself. Any text can be encoded and is
    decoded unchanged.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for end in range(1, len(word)):
            pair = (word[:end], word[end])
            if pair not in merges:
                merges.append(pair)
                pieces.append("".join(pair))
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def make_model(folder: Path, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> None:
    """Save a random Qwen3 of about 0.8 million fp32 parameters; every kind of parallelism can divide it by 2."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        # 0.02 suits widths of thousands; about 1/sqrt(128) lets a narrow model start to learn at once
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    # not in the model's config, where it would fix that row of the embedding at zero
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)


def split_pairs(seed: int, num_val: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Shuffle all pairs (a, b) into (train, validation); a validation pair is not in train in either order."""
    numbers = range(LARGEST + 1)
    pairs = [(a, b) for a in numbers for b in numbers]
    random.Random(seed).shuffle(pairs)
    val = pairs[:num_val]
    held_out = {frozenset(pair) for pair in val}
    return [pair for pair in pairs if frozenset(pair) not in held_out], val


def question(a: int, b: int) -> str:
    return f"What is {a}+{b}?"


def answer(a: int, b: int) -> str:
    """The sum worked out on paper, units first: 37+45 -> '7+5=12, 3+4+1=8, 82'."""
    units = a % 10 + b % 10
    tens = a // 10 + b // 10 + units // 10
    return f"{a % 10}+{b % 10}={units}, {a // 10}+{b // 10}+{units // 10}={tens}, {a + b}"


def write_rows(path: Path, pairs: list[tuple[int, int]]) -> None:
    """Write one JSON object per line, in the `messages` format."""
    with path.open("w", encoding="utf-8") as file:
        for a, b in pairs:
            messages = [
                {"role": "user", "content": question(a, b)},
                {"role": "assistant", "content": answer(a, b)},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def last_number(text: str) -> str | None:
    """The last run of digits in `text`: the answer after the working."""
    numbers = re.findall(r"\d+", text)
    return numbers[-1] if numbers else None


def score(model_dir: str | Path, val_file: str | Path, *, batch_size: int = 100) -> Score:
    """Answer every question of `val_file` by greedy decoding; an answer is right if its last number is."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    rows = [json.loads(line)["messages"] for line in Path(val_file).read_text(encoding="utf-8").splitlines()]
    correct = 0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        inputs = tokenizer.apply_chat_template(
            [messages[:-1] for messages in batch],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=32,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        correct += sum(
            last_number(text) == last_number(messages[-1]["content"])
            for text, messages in zip(answers, batch, strict=True)
        )
    return Score(correct, len(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default="demo", help="where to write the demo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--score", nargs=2, metavar=("MODEL", "VAL_JSONL"), help="score a checkpoint instead")
    options = parser.parse_args()
    if options.score:
        result = score(*options.score)
        print(f"accuracy {result.accuracy:.1%} ({result.correct} of {result.total})")
        return
    demo = make_demo(options.folder, seed=options.seed)
    print(f"model {demo.model}\ntrain {demo.train}\nval   {demo.val}")


if __name__ == "__main__":
    main()

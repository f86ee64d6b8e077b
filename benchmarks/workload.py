"""Models and data for the benchmarks, generated from a seed: a random Qwen3, a tokenizer, and conversations.

    workload = make_workload(Path("/tmp/benchmark"), "small")

"small" has 17 million parameters and a vocabulary of 16384, so that matrix products dominate a step.
"tiny" has 1.5 million parameters; its steps are so short that the overhead of a loop shows.
"""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, int]] = {
    "tiny": {
        "vocab_size": 8192,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    "small": {
        "vocab_size": 16384,
        "hidden_size": 384,
        "intermediate_size": 1152,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
}

LONGEST_TURN = 900  # words; two turns and their special tokens fit into 2048 tokens
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


@dataclass(frozen=True)
class Workload:
    """model: folder with fp32 weights and a tokenizer. train: JSONL file of messages, or the file that was given."""

    model: Path
    train: Path


def make_workload(folder: Path, size: str, *, rows: int = 4000, train: Path | None = None) -> Workload:
    """Write a model of size `size` (a key of SIZES), and `rows` conversations unless a file `train` is given.

    The tokenizer is trained on the conversations, or on the lines of the file.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    if train is None:
        train = folder / "train.jsonl"
        write_conversations(train, rows)
    workload = Workload(folder / size, train)
    tokenizer = make_tokenizer(train, SIZES[size]["vocab_size"])
    tokenizer.save_pretrained(workload.model)
    make_model(workload.model, SIZES[size], tokenizer.eos_token_id)
    return workload


def write_conversations(path: Path, rows: int, seed: int = 0) -> None:
    """Write one question and answer per row, with log-normal lengths as in instruction data. Half of the tokens are
    learnt.

    The mean sample has 210 tokens, the median 150; one in fifty has more than 700.
    """
    draw = random.Random(seed)
    words = list(make_words(draw, 8000))
    frequencies = [1 / (rank + 3) for rank in range(len(words))]  # Zipf
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            counts = [draw.lognormvariate(math.log(median), 0.9) for median in (60, 72)]
            question, answer = (
                " ".join(draw.choices(words, frequencies, k=min(LONGEST_TURN, 1 + round(count))))
                for count in counts
            )
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")


def make_words(draw: random.Random, count: int) -> Iterator[str]:
    """Distinct words of one to four syllables, the short ones first."""
    known: set[str] = set()
    while len(known) < count:
        syllables = 1 + min(3, len(known) * 4 // count)
        word = "".join(draw.choice("bcdfghklmnprstvz") + draw.choice("aeiou") for _ in range(syllables))
        if syllables == 1 and len(known) >= 60:
            word += draw.choice("aeioulnrst") + draw.choice("aeioulnrst")
        if word not in known:
            known.add(word)
            yield word


def make_tokenizer(text: Path, vocab_size: int) -> Any:
    """A byte-level BPE trained on the lines of a file, with ChatML around the turns."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with text.open(encoding="utf-8") as lines:
        tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
    )


def make_model(folder: Path, size: dict[str, int], eos_token_id: int) -> None:
    """Save a random Qwen3 in fp32."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        **size,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        dtype="float32",
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)

"""What pre-training a mixture of experts from nothing needs: a config.json, a tokenizer, two small corpora.

    python examples/moe_demo.py DIR

writes DIR/model (config.json of a Qwen3-MoE of half a million parameters and a byte-level tokenizer, no weights),
DIR/stories.jsonl (rows of {"text": ...}) and DIR/sums.txt (one document per line). Everything is generated from a seed.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

import arithmetic_demo

STORIES, SUMS = 300, 400
_WHO = ("The baker", "A sailor", "My sister", "The old judge", "Nobody", "The clever fox")
_DID = ("found", "carried", "painted", "lost", "sold", "dreamt of")
_WHAT = ("a green lantern", "three letters", "the key", "a map of the coast", "some bread", "the silver bell")
_WHERE = ("in the harbour", "behind the mill", "on the hill", "near the station", "under the bridge")


@dataclass(frozen=True)
class MoEDemo:
    """model: a folder with config.json and tokenizer. stories, sums: the corpora."""

    model: Path
    stories: Path
    sums: Path


def make_demo(folder: str | Path, *, seed: int = 0) -> MoEDemo:
    """Write the demo into `folder`; equal arguments give equal bytes."""
    folder = Path(folder)
    demo = MoEDemo(folder / "model", folder / "stories.jsonl", folder / "sums.txt")
    demo.model.mkdir(parents=True, exist_ok=True)
    tokenizer = arithmetic_demo.make_tokenizer()
    tokenizer.save_pretrained(demo.model)
    config = model_config(len(tokenizer), tokenizer.eos_token_id)
    (demo.model / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    draw = random.Random(seed)
    rows = [json.dumps({"text": story(draw)}) for _ in range(STORIES)]
    demo.stories.write_text("\n".join(rows) + "\n")
    numbers = [(draw.randrange(100), draw.randrange(100)) for _ in range(SUMS)]
    demo.sums.write_text("".join(f"What is {a}+{b}? {arithmetic_demo.answer(a, b)}\n" for a, b in numbers))
    return demo


def model_config(vocab_size: int, eos_token_id: int) -> dict:
    """config.json of a Qwen3-MoE: four layers of eight experts, two per token."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "float32",
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,  # unused: there are no dense layers
        "moe_intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "initializer_range": 0.08,  # 0.02 suits widths of thousands
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
    }


def story(draw: random.Random) -> str:
    """Two to six sentences of the same pattern."""
    parts = (_WHO, _DID, _WHAT, _WHERE)
    count = draw.randrange(2, 7)
    return " ".join(" ".join(draw.choice(words) for words in parts) + "." for _ in range(count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default="moe_demo", help="where to write the demo")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    demo = make_demo(options.folder, seed=options.seed)
    print(f"model   {demo.model}\nstories {demo.stories}\nsums    {demo.sums}")


if __name__ == "__main__":
    main()

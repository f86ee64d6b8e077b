"""A model and data so small that a training step takes milliseconds, for tests of everything around the step."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import arithmetic_demo as demo  # noqa: E402

TRAIN_ROWS, VAL_ROWS = 90, 13
EXPERTS = {
    "architecture": "Qwen3Moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "mlp_only_layers": [2],
}
"""Config of a mixture of experts whose layer 2 is dense."""


@dataclass(frozen=True)
class Tiny:
    """model: a Qwen3 of four layers with random fp32 weights. train, val: JSONL of sums, answers of 1 to 4 lines."""

    model: Path
    train: Path
    val: Path


def make_tiny(folder: Path, **config) -> Tiny:
    """Write the model and the data. config: fields of config.json that differ from the defaults."""
    tokenizer = demo.make_tokenizer()
    tiny = Tiny(folder / "model", folder / "train.jsonl", folder / "val.jsonl")
    make_model(tiny.model, tokenizer, **config)
    write_rows(tiny.train, 0, TRAIN_ROWS)
    write_rows(tiny.val, TRAIN_ROWS, VAL_ROWS)
    return tiny


def make_model(folder: Path, tokenizer, architecture: str = "Qwen3", **config) -> None:
    import torch
    import transformers

    defaults = {
        "vocab_size": (len(tokenizer) + 1) | 1,  # odd: tensor-parallel ranks must pad it
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "dtype": "float32",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = getattr(transformers, f"{architecture}Config")(**(defaults | config))
        model = getattr(transformers, f"{architecture}ForCausalLM")(settings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(path: Path, first: int, count: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for i in range(first, first + count):
            a, b = i * 37 % 100, i * 61 % 100
            messages = [
                {"role": "user", "content": demo.question(a, b)},
                {"role": "assistant", "content": "\n".join([demo.answer(a, b)] * (1 + i % 4))},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def rows_of(run_dir: Path) -> list[dict]:
    """The training lines of a run's logging.jsonl."""
    lines = (run_dir / "logging.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def curve(run_dir: Path) -> dict[int, tuple[float, float]]:
    """Step -> (loss, gradient norm), with all digits."""
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows_of(run_dir)}


def eval_losses(run_dir: Path) -> dict[int, float]:
    """Step -> validation loss."""
    lines = (run_dir / "logging.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["step"]: row["eval_loss"] for row in map(json.loads, lines) if "eval_loss" in row}


def stored(checkpoint: Path) -> dict:
    """Every tensor of a torch_dist checkpoint, whole, as PyTorch's own distributed checkpointing reads it."""
    import torch
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(checkpoint / "mcore")
    tensors = {
        key: torch.empty(value.size, dtype=value.properties.dtype)
        for key, value in reader.read_metadata().state_dict_metadata.items()
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors

"""The example of MoE pre-training as it is typed: random weights, two corpora, experts on two processes."""

import json
from pathlib import Path

import torch
from commands import run_example

ROW = 256  # max_length of examples/pretrain_moe.yaml
SHORTER = ["--train_iters", "30", "--global_batch_size", "4", "--eval_steps", "15", "--save_steps", "30"]


def test_the_example_learns_and_its_export_is_the_model_that_was_evaluated(tmp_path):
    said = run_example("pretrain_moe.sh", tmp_path, "--add_version", "false", *SHORTER)
    run = tmp_path / "pretrain_moe"
    logged = [json.loads(line) for line in (run / "logging.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in logged if "loss" in row]
    evaluated = [row["eval_loss"] for row in logged if "eval_loss" in row]
    # letters drawn evenly cost ln(300) = 5.7 nats; the frequencies of letters alone bring that to about 3
    assert losses[0] > 4 and losses[-1] < 3.5 and evaluated[-1] < evaluated[0]
    assert "weight 0.7, " in said
    assert abs(transformers_loss(run / "checkpoint-30", run / "val_dataset.jsonl") - evaluated[-1]) < 1e-3


def transformers_loss(model_dir: Path, val_file: Path) -> float:
    """Mean loss of the held-back documents end to end, in rows that share a token, by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    stream = []
    for line in val_file.read_text().splitlines():
        stream += [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
    total, count = 0.0, 0
    for start in range(0, len(stream) - 1, ROW - 1):
        row = torch.tensor(stream[start : start + ROW])
        with torch.inference_mode():
            logits = model(input_ids=row[None]).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").item()
        count += len(row) - 1
    return total / count

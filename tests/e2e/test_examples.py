"""The shell examples as they are typed, with fewer steps, on the demo that they make for themselves.

Shared is one folder of outputs, so that the demo is made once. `pretrain_moe.sh` has a file of its own.
"""

import json
from pathlib import Path

import pytest
import torch
from commands import run_example
from safetensors.torch import load_file

FEW_STEPS = ["--save_steps", "2", "--eval_steps", "2", "--logging_steps", "1", "--report_to", "none"]


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("examples")


def losses(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "logging.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize(
    ("example", "steps"), [("lora.sh", "--train_iters"), ("lora_one_device.sh", "--max_steps")]
)
def test_an_adapter_is_trained_and_merged(output, example, steps):
    run_example(example, output, steps, "2", *FEW_STEPS)
    folder = output / example.removesuffix(".sh")
    assert len(losses(folder)) == 2
    base = load_file(output / "demo" / "model" / "model.safetensors")
    merged = load_file(next((folder / "merged").glob("*.safetensors")))
    adapter = load_file(folder / "latest" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"].float() for part in "AB")
    expected = base[f"{name}.weight"].float() + 32 / 8 * b @ a
    assert b.abs().max() > 0
    # eight products summed in another order, then one rounding where the weights are bf16 (2^-8)
    dtype = merged[f"{name}.weight"].dtype
    torch.testing.assert_close(
        merged[f"{name}.weight"].float(), expected.to(dtype).float(), rtol=1e-2, atol=1e-6
    )


def test_four_processes_train_and_plain_text_is_learnt(output):
    schedule = ["--lr_wsd_decay_iters", "1", "--lr_warmup_iters", "1"]
    for example, more in (("sft_tp_pp", []), ("pretrain", schedule)):
        run_example(f"{example}.sh", output, "--train_iters", "2", *more, *FEW_STEPS)
        (last,) = (output / example).glob("v*")
        assert list((last / "checkpoint-2").glob("model*.safetensors")) and len(losses(last)) == 2


def test_a_checkpoint_comes_back_bit_for_bit(output):
    assert "tensors are equal bit for bit" in run_example("convert.sh", output)

"""What is found in an adapter's folder before a process starts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mcore_swift.cli.main import megatron_main, swift_main
from mcore_swift.plan.adapter import folder_problems

HIDDEN, ROWS, RANK = 8, 12, 3
MODULES = [f"model.layers.{layer}.mlp.{name}_proj" for layer in (0, 1) for name in ("gate", "up")]


@pytest.fixture
def base(tmp_path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    save_file({f"{name}.weight": torch.zeros(ROWS, HIDDEN) for name in MODULES}, folder / "model.safetensors")
    return folder


def make(folder: Path, modules=MODULES, rank=RANK, rows=ROWS, **config) -> Path:
    folder.mkdir()
    told = {"peft_type": "LORA", "r": RANK, "base_model_name_or_path": "some/base"} | config
    (folder / "adapter_config.json").write_text(json.dumps(told))
    tensors = {}
    for module in modules:
        name = f"base_model.model.{module}"
        tensors[f"{name}.lora_A.weight"] = torch.zeros(rank, HIDDEN)
        tensors[f"{name}.lora_B.weight"] = torch.zeros(rows, rank)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def said(folder: Path, base: Path) -> str:
    return "\n".join(map(str, folder_problems(folder, base)))


def test_an_adapter_that_fits(tmp_path, base):
    assert said(make(tmp_path / "adapter"), base) == ""
    pattern = r"layers\.\d+\.mlp\.(gate|up)_proj"
    assert said(make(tmp_path / "patterns", r=8, rank_pattern={pattern: RANK}), base) == ""


def test_layers_that_the_base_lacks_are_told_with_the_nearest(tmp_path, base):
    adapter = make(tmp_path / "adapter", ["model.layers.0.mlp.gate_prj", *MODULES])
    text = said(adapter, base)
    assert "model.layers.0.mlp.gate_prj" in text and "nearest: model.layers.0.mlp.gate_proj" in text
    assert "some/base" in text and "--model" in text


def test_other_shapes_than_the_base_has(tmp_path, base):
    text = said(make(tmp_path / "adapter", rows=ROWS + 1), base)
    assert f"takes [{ROWS + 1}, {HIDDEN}] and is [{ROWS}, {HIDDEN}] there" in text


def test_another_rank_than_the_config_says(tmp_path, base):
    text = said(make(tmp_path / "adapter", rank=4), base)
    assert f"has rank 4 and not {RANK}, as adapter_config.json says, and 3 more like it" in text


def test_files_that_are_cut_missing_or_of_another_form(tmp_path, base):
    adapter = make(tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert f"{path}: it is truncated" in said(adapter, base)
    path.rename(adapter / "adapter_model.bin")
    assert "adapter_model.bin, and only safetensors are read" in said(adapter, base)
    (adapter / "adapter_model.bin").unlink()
    assert "holds no adapter_model.safetensors" in said(adapter, base)
    (adapter / "adapter_config.json").write_text("{")
    assert "adapter_config.json: cannot be read" in said(adapter, base)


def test_kinds_that_only_peft_knows(tmp_path, base):
    adapter = make(tmp_path / "adapter", peft_type="LOKR")
    assert said(adapter, base) == ""
    (problem,) = folder_problems(adapter, base, only_lora=True)
    assert "of the kind LOKR" in problem.message and "swift sft --backend fsdp" in problem.remedy


def test_experts_in_one_tensor_may_hold_the_matrices_of_each(tmp_path, base):
    layer = "model.layers.0.mlp.experts"
    save_file({f"{layer}.gate_up_proj": torch.zeros(2, ROWS, HIDDEN)}, base / "model.safetensors")
    assert said(make(tmp_path / "each", [f"{layer}.1.gate_proj"]), base) == ""
    assert said(make(tmp_path / "joined", [layer], rank=2 * RANK), base) == ""
    assert "model.layers.5" in said(make(tmp_path / "other", ["model.layers.5.mlp.experts.1.up_proj"]), base)


@pytest.mark.parametrize(
    ("program", "argv"),
    [
        (megatron_main, ["sft", "--tuner_type", "lora", "--dataset", "d"]),
        (megatron_main, ["export", "--to_hf", "true"]),
        (swift_main, ["sft", "--dataset", "d"]),
        (swift_main, ["export", "--merge_lora", "true"]),
    ],
)
def test_every_command_looks_before_it_starts(program, argv, tmp_path, base, capsys):
    adapter = make(tmp_path / "adapter", rank=4)
    assert program([*argv, "--model", str(base), "--adapters", str(adapter)]) == 2
    told = capsys.readouterr().err
    assert told.count("has rank 4 and not 3") == 1 and "Traceback" not in told

"""What is found in a model folder before a process starts."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from mcore_swift.plan import preflight
from mcore_swift.plan.preflight import preflight_notices

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 50,
    "max_position_embeddings": 64,
}  # fmt: skip


def args_of(model: Path | str | None, **values: object) -> SimpleNamespace:
    flags = {
        "model": str(model) if model else None,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "sequence_parallel": False,
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "max_length": 128,
    }
    return SimpleNamespace(**flags | values)


def texts(model: Path | str | None, world_size: int = 1, **values: object) -> list[str]:
    return [str(problem) for problem in preflight(args_of(model, **values), world_size)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two files and an index."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    weight_map = {}
    for number, names in enumerate((["a.weight", "b.weight"], ["c.weight"]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: torch.ones(4, 8) for name in names}, tmp_path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def test_a_whole_checkpoint(folder: Path) -> None:
    assert texts(folder) == []
    assert texts(None) == []
    assert "64 positions" in preflight_notices(args_of(folder))[0]


def test_multi_token_layers_count_where_the_checkpoint_has_them(folder: Path) -> None:
    """config.json tells of one; the plan goes by the weights, as the model that is built does."""
    tells = CONFIG | {"architectures": ["Glm4MoeForCausalLM"], "moe_intermediate_size": 8}
    tells |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(tells))

    def told(letters: str, **values: object) -> str:
        flags = {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": letters}
        return "\n".join(texts(folder, 2, **flags | values))

    assert told("Et|tL") == "" and "and the model has 0" in told("Et|tmL")
    assert "the model has no multi-token layers" in told("Et|tL", mtp_num_layers=1)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.2.enorm.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert told("Et|tmL", check_model=False) == ""
    assert "and the model has 1" in told("Et|tL", check_model=False)
    assert "use --mtp_num_layers 1, or 0" in told("Et|tmL", check_model=False, mtp_num_layers=2)


def test_no_folder(tmp_path: Path) -> None:
    assert "no such folder" in texts(tmp_path / "absent")[0]
    assert "hf download Qwen/Qwen3-0.6B" in texts("Qwen/Qwen3-0.6B")[0]
    (tmp_path / "file").touch()
    assert "is a file" in texts(tmp_path / "file")[0]


def test_config_that_is_missing_or_broken(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text('{\n "a": 1,\n oops }')
    assert f"{path}:3" in texts(folder)[0]
    path.write_text("[]")
    assert "no JSON object" in texts(folder)[0]
    path.unlink()
    assert f"--model {folder}: holds no config.json" in texts(folder)[0]


def test_truncated_file_is_named_with_its_sizes(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-5])
    (problem,) = texts(folder)
    assert str(path) in problem and f"truncated: {whole - 5} of {whole} bytes" in problem


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 8 + b"{}", (4).to_bytes(8, "little") + b"nope"])
def test_damaged_header(folder: Path, content: bytes) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(content)
    (problem,) = texts(folder)
    assert str(path) in problem and "header" in problem


def test_files_and_tensors_that_the_index_promises(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    promised = json.loads(index.read_text())["weight_map"]
    promised |= {
        "d.weight": "model-00002-of-00002.safetensors",
        "e.weight": "model-00003-of-00002.safetensors",
    }
    index.write_text(json.dumps({"weight_map": promised}))
    missing_file, missing_tensor = texts(folder)
    assert "model-00003-of-00002.safetensors" in missing_file
    assert "d.weight" in missing_tensor and "model-00002" in missing_tensor
    index.write_text("{}")
    assert "cannot be read as a safetensors index" in texts(folder)[0]


def test_no_weights(folder: Path) -> None:
    for path in folder.glob("*safetensors*"):
        path.unlink()
    assert "neither model.safetensors nor" in texts(folder)[0]
    (folder / "pytorch_model.bin").touch()
    assert "save_pretrained" in texts(folder)[0]
    # where nobody reads them, nobody misses them
    assert texts(folder, mcore_model="elsewhere") == []
    assert texts(folder, resume="run") == []
    assert texts(folder, check_model=False) == []


def test_weights_and_layout_are_told_together(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()
    problems = texts(folder, 4, tensor_model_parallel_size=4, global_batch_size=3)
    assert len(problems) == 2
    assert "num_key_value_heads 2" in problems[0] and "model-00002" in problems[1]


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import mcore_swift.plan, launch, sys; "
        "print([name for name in ('torch', 'transformers', 'numpy', 'megatron') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"

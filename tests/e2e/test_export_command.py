"""`megatron export` as a user runs it: there, back, and what it says of a checkpoint that is not whole."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import Command, flags, run
from safetensors.torch import load_file, save_file

from converters import stream
from converters.torch_dist_reader import MCoreReader
from mcore_swift.models.reading import read_model

PARTS = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture
def model(tiny, tmp_path) -> Path:
    """A copy of the tiny checkpoint that a test may break."""
    return Path(shutil.copytree(tiny.model, tmp_path / "model"))


def test_there_and_back_in_two_layouts_is_bit_identical_and_proved(model, tmp_path):
    there = run(
        ["export", *flags(model=model, to_mcore=True, test_convert_precision=True)],
        tmp_path / "there",
    ).check()
    mcore = tmp_path / "model-mcore"
    assert "logits in float32: largest difference" in there.out and "B/s" in there.out
    manifest = json.loads((mcore / "manifest.json").read_text())
    assert manifest["holds"] == ["weights"] and manifest["step"] == 0
    assert json.loads((mcore / "args.json").read_text())["to_mcore"] is True

    back = run(
        [
            "export",
            *flags(
                mcore_model=mcore,
                to_hf=True,
                tensor_model_parallel_size=2,
                test_convert_precision=True,
                max_shard_size="100KB",
            ),
        ],
        tmp_path / "back",
        processes=2,
    ).check()
    assert back.out.count("logits in float32: largest difference") == 1
    hf = tmp_path / "model-mcore-hf"
    assert (hf / "model.safetensors.index.json").is_file() and len(list(hf.glob("*.safetensors"))) > 1
    before, after = weights(model), weights(hf)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    there_is = {entry.name for entry in model.iterdir()} & (PARTS | {"chat_template.jinja"})
    assert there_is <= {entry.name for entry in hf.iterdir()} and "tokenizer.json" in there_is

    again = ["export", *flags(mcore_model=mcore, to_hf=True)]
    run(again, tmp_path / "again").refused("is not empty")
    run([*again, "--exist_ok", "true"], tmp_path / "again").check()
    assert [path.name for path in hf.glob("*.safetensors*")] == ["model.safetensors"], "no stale files"


def test_two_processes_killed_in_the_middle_go_on(model, tmp_path):
    """Pieces of 4 KB make it slow enough to be hit. A dry run before tells the work of both processes."""
    target, hidden = tmp_path / "out", tmp_path / ".out.writing"
    argv = ["export", *flags(model=model, to_mcore=True, output_dir=target, memory_budget="20KB")]
    told = run([*argv, "--dry_run", "true"], tmp_path / "dry", processes=2).check().out
    assert "process 1: reads " in told and "dry run: nothing was written" in told
    assert not target.exists() and not hidden.exists()

    def pieces() -> int:
        return min([path.read_bytes().count(b"\n") for path in hidden.rglob(".journal-*")] or [0])

    with Command(argv, tmp_path / "killed", processes=2) as command:
        command.wait_until(lambda: pieces() > 10, "the tenth piece was written")
        for worker in command.workers().values():
            worker.kill()
        assert command.wait().code != 0
    assert hidden.is_dir() and not target.exists()
    again = run(argv, tmp_path / "again", processes=2).check()
    assert again.out.count("that an earlier attempt wrote are kept") == 1
    assert not hidden.exists() and not list(target.rglob(".journal*"))
    table, back = read_model(str(model)).table, tmp_path / "back"
    back.mkdir()
    with MCoreReader(target) as reader:
        stream.write_hf(reader, stream.plan_hf(reader, table, 10**9), model, back)
    before, after = weights(model), weights(back)
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)


def test_a_checkpoint_that_does_not_fit_its_config_is_told_by_both_ranks_once(model, tmp_path):
    tensors = weights(model)
    gone, extra = "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"
    del tensors[gone]
    tensors[extra] = torch.zeros(4)
    for file in model.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, model / "model.safetensors")
    ended = run(["export", *flags(model=model, to_mcore=True)], tmp_path / "run", processes=2)
    ended.refused(f"lacks {gone}", f"holds {extra}")
    assert not (tmp_path / "model-mcore").exists() and not list(tmp_path.glob(".*"))


def test_a_truncated_file_is_told_before_anything_starts(model, tmp_path):
    file = next(iter(model.glob("*.safetensors")))
    with file.open("rb+") as stream:
        stream.truncate(file.stat().st_size - 100)
    run(["export", *flags(model=model, to_mcore=True)], tmp_path / "run").refused(file.name)
    assert not (tmp_path / "model-mcore").exists()


def test_a_truncated_megatron_checkpoint_is_told(model, tmp_path):
    run(["export", *flags(model=model, to_mcore=True)], tmp_path / "run").check()
    data = next((tmp_path / "model-mcore" / "mcore").glob("*.distcp"))
    with data.open("rb+") as stream:
        stream.truncate(data.stat().st_size // 2)
    ended = run(["export", *flags(mcore_model=tmp_path / "model-mcore", to_hf=True)], tmp_path / "run")
    ended.refused(f"{data.name} is truncated")
    assert not (tmp_path / "model-mcore-hf").exists()

"""What lies in a run's folder after saving: complete checkpoints, the link, nothing hidden."""

import json
import os

import pytest
from tiny import stored
from training_plan import MEGATRON_LOADS, SAVED, STEPS

LOADS = [name for cases in MEGATRON_LOADS.values() for name in cases]


@pytest.mark.parametrize("case", LOADS)
def test_megatron_core_reads_our_checkpoints_in_another_layout(trained, case):
    assert trained.results[case] == ""


@pytest.mark.parametrize("run", ["one", "one-async", "dp2"])
def test_the_link_and_the_limit(trained, run):
    """save_total_limit 2, in the background and not."""
    steps = [3, 6] if run == "dp2" else [4, 6]
    names = sorted(path.name for path in trained[run].iterdir() if "checkpoint" in path.name)
    assert names == [f"checkpoint-{step}" for step in steps], "and no leftovers"
    assert os.readlink(trained[run] / "latest") == f"checkpoint-{STEPS}"


def test_saving_in_the_background_writes_the_same_files(trained):
    now, later = (trained[name] / f"checkpoint-{STEPS}" for name in ("one", "one-async"))
    files = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (now, later)]
    assert files[0] == files[1]
    first, second = stored(now), stored(later)
    assert first.keys() == second.keys()
    assert [key for key in first if not first[key].equal(second[key])] == []
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (now, later)]
    times = [manifest.pop("written") for manifest in manifests]
    assert manifests[0] == manifests[1] and min(times) > 0


def test_the_manifest_tells_what_is_there(trained):
    folder = trained["tp2-pp2"] / f"checkpoint-{SAVED}"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["holds"] == ["weights", "optimizer", "rng", "data"]
    assert manifest["step"] == manifest["optimizer_step"] == SAVED
    assert manifest["consumed_samples"] == 4 * SAVED
    assert manifest["dtype"] == "float32" and manifest["family"] == "qwen3"
    layout = manifest["layout"]
    assert (layout["tp"], layout["pp"], layout["dp"]) == (2, 2, 1)
    assert json.loads((folder / manifest["args"]).read_text())["tensor_model_parallel_size"] == 2
    assert len(list((folder / "rng").iterdir())) == 4, "a generator for each model-parallel rank"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).is_file()
    assert not list(folder.glob("*.safetensors")), "save_safetensors was false"


def test_the_optimizer_is_left_out_on_request(trained):
    keys = stored(trained["weights-only"] / f"checkpoint-{SAVED}")
    assert keys and not any(key.startswith("optimizer.") for key in keys)

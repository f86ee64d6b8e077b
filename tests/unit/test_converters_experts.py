"""Expert tensors from file to file: one HF tensor a matrix, all experts in one, or in FP8; a slice at a time."""

import json

import pytest
import torch
from converter_cases import make_checkpoint
from safetensors.torch import load_file, save_file

from converters import stream
from converters.budget import UNBOUNDED, Budget
from converters.hf_reader import HFReader
from converters.torch_dist_reader import MCoreReader
from converters.views import HFView
from mcore_swift.models.reading import read_model
from mcore_swift.models.rules import full_region

FC1 = "decoder.layers.0.mlp.experts.experts.linear_fc1.weight"


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """The same model, as published checkpoints hold it, and as transformers holds it in memory."""
    folder = tmp_path_factory.mktemp("experts")
    model = make_checkpoint("qwen3moe", folder / "each", torch.bfloat16)
    (folder / "fused").mkdir()
    (folder / "fused" / "config.json").write_text((folder / "each" / "config.json").read_text())
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "fused" / "model.safetensors")
    return folder


def converted(source, target, budget=UNBOUNDED):
    """HF -> mcore -> HF; the megatron-core tensors, and the folder that came back."""
    table, back = read_model(str(source)).table, target / "back"
    (target / "mcore").mkdir(parents=True), back.mkdir()
    with HFReader(source, budget.staging) as reader:
        view = HFView(reader, table)
        stream.write_mcore(view, stream.plan_mcore(view, table, budget=budget), target / "mcore")
    with MCoreReader(target / "mcore", staging_bytes=budget.staging) as reader:
        stream.write_hf(reader, stream.plan_hf(reader, table, 10**9, budget=budget), source, back)
        tensors = {}
        for key, spec in reader.specs.items():
            tensors[key] = torch.empty(spec.shape, dtype=spec.dtype)
            reader.copy_into(key, full_region(spec.shape), tensors[key])
    return tensors, back


@pytest.mark.parametrize("budget", [UNBOUNDED, Budget(2000)], ids=["", "small"])
def test_both_forms_become_the_same_and_come_back_as_they_were(forms, budget, tmp_path):
    made = {}
    for form in ("each", "fused"):
        made[form], back = converted(forms / form, tmp_path / form, budget)
        before, after = (load_file(folder / "model.safetensors") for folder in (forms / form, back))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert ("model.layers.0.mlp.experts.gate_up_proj" in before) and made["each"].keys() == made[
        "fused"
    ].keys()
    assert all(torch.equal(tensor, made["fused"][key]) for key, tensor in made["each"].items())


@pytest.mark.parametrize("form", ["each", "fused"])
def test_experts_in_fp8_are_read_expert_by_expert(form, forms, tmp_path):
    tensors = load_file(forms / form / "model.safetensors")
    config = json.loads((forms / form / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [8, 16]}
    for name in [name for name in tensors if "experts." in name]:
        *lead, rows, columns = tensors[name].shape
        scale = torch.rand(*lead, -(-rows // 8), -(-columns // 16)) + 0.1
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = scale
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    made, back = converted(tmp_path / "hf", tmp_path / "out")
    after = load_file(back / "model.safetensors")
    for name in [name for name in tensors if "experts." in name and not name.endswith("_scale_inv")]:
        *_, rows, columns = tensors[name].shape
        scale = tensors[name + "_scale_inv"].repeat_interleave(8, -2)[..., :rows, :]
        whole = scale.repeat_interleave(16, -1)[..., :columns] * tensors[name].float()
        assert torch.equal(after[name], whole.to(torch.bfloat16)), name
    # An expert-parallel rank reads the blocks of its own experts: here the last of four, half of its columns.
    table = read_model(str(tmp_path / "hf")).table
    with HFReader(tmp_path / "hf") as reader:
        _, rows, columns = made[FC1].shape
        for block in table.by_mcore[FC1].blocks(((3, 4), (0, rows), (0, 16)), reader.shapes):
            out = torch.empty(1, rows, 16, dtype=torch.bfloat16)
            reader.copy_into(block.name, block.hf, block.of(out))
            assert torch.equal(block.of(out), block.of(made[FC1][3:, :, :16]))
        assert reader.bytes_read <= rows * columns + rows // 8 * 4 * 4  # whole rows: they are narrow

"""FP8 and MXFP4 checkpoints, read slice by slice, against transformers' own dequantization of the whole."""

import json
import random

import pytest
import torch
from converter_cases import make_checkpoint, rule_table
from safetensors.torch import load_file, save_file

from converters import stream
from converters.hf_reader import HFReader
from converters.torch_dist_reader import MCoreReader
from converters.views import HFView
from mcore_swift.errors import UserError, UserErrors
from mcore_swift.models.rules import as_slices, region_shape

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}


def write(folder, tensors, quantization=None, **config):
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    settings = config | ({"quantization_config": quantization} if quantization else {})
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def random_fp8(*shape):
    """Every bit pattern but the two NaNs."""
    bits = torch.randint(0, 256, shape, dtype=torch.uint8)
    bits[bits & 0x7F == 0x7F] = 0x7E
    return bits.view(torch.float8_e4m3fn)


def plain(weight, scale, block=128):
    """The definition, in fp32."""
    *_, rows, columns = weight.shape
    whole = scale.repeat_interleave(block, -2)[..., :rows, :].repeat_interleave(block, -1)[..., :columns]
    return weight.float() * whole.float()


def some_region(shape):
    starts = [random.randrange(size) for size in shape]
    return tuple((start, random.randint(start + 1, size)) for start, size in zip(starts, shape, strict=True))


def check_regions(reader, name, expected, dtypes=(torch.float32, torch.bfloat16)):
    """expected: fp32."""
    for _ in range(25):
        region = some_region(expected.shape)
        for dtype in dtypes:
            out = torch.full(region_shape(region), float("nan"), dtype=dtype)
            reader.copy_into(name, region, out)
            assert torch.equal(out, expected[as_slices(region)].to(dtype)), region


@pytest.mark.parametrize("staging", [None, 3000])
def test_fp8_blocks_are_what_transformers_makes_of_them(staging, tmp_path):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    random.seed(0), torch.manual_seed(0)
    tensors, expected = {}, {}
    for name, shape in (
        ("even", (256, 384)),
        ("odd", (300, 130)),
        ("small", (5, 7)),
        ("cube", (3, 130, 260)),
    ):
        *lead, rows, columns = shape
        weight, scale = random_fp8(*shape), torch.rand(*lead, -(-rows // 128), -(-columns // 128)) * 1e-3
        tensors |= {f"{name}.weight": weight, f"{name}.weight_scale_inv": scale}
        expected[f"{name}.weight"] = plain(weight, scale)
        if name == "even":
            for dtype in (torch.float32, torch.bfloat16):
                theirs = Fp8Dequantize(None)._dequantize_one(weight, scale, dtype)
                assert torch.equal(expected["even.weight"].to(dtype), theirs)
    tensors["norm.weight"] = expected["norm.weight"] = torch.rand(7)
    with HFReader(write(tmp_path / "hf", tensors, FP8), staging) as reader:
        assert set(reader.names) == set(expected) and reader.dtype("odd.weight") == torch.bfloat16
        for name, values in expected.items():
            assert reader.shape(name) == values.shape
            check_regions(reader, name, values)


def test_only_the_blocks_of_a_region_are_read(tmp_path):
    folder = write(tmp_path / "hf", {"w": random_fp8(1024, 5120), "w_scale_inv": torch.rand(8, 40)}, FP8)
    with HFReader(folder) as reader:
        reader.copy_into("w", ((200, 300), (0, 5120)), torch.empty(100, 5120, dtype=torch.bfloat16))
        assert reader.bytes_read == 100 * 5120 + 2 * 40 * 4  # rows 200..299 lie in two rows of blocks


def test_fp8_blocks_of_zeros_with_any_scale_are_zeros_and_nothing_else_is_lost(tmp_path):
    weight, scale = random_fp8(256, 512), torch.rand(2, 4)
    expected = plain(weight, scale)
    for column, bad in enumerate((0.0, float("inf"), float("nan"))):
        weight.view(torch.uint8)[:128, 128 * column : 128 * (column + 1)] = 0
        weight.view(torch.uint8)[5, 128 * column + 5] = 0x80  # minus zero
        scale[0, column] = bad
        expected[:128, 128 * column : 128 * (column + 1)] = 0
    with HFReader(write(tmp_path / "hf", {"w": weight, "w_scale_inv": scale}, FP8)) as reader:
        assert torch.equal(reader.read("w").float(), expected.to(torch.bfloat16).float())
    weight.view(torch.uint8)[130, 3] = 0xFF
    with HFReader(write(tmp_path / "nan", {"w": weight, "w_scale_inv": scale}, FP8)) as reader:
        reader.read("w", ((0, 130), (0, 512)))
        with pytest.raises(UserError, match="float8 weight that is no number"):
            reader.read("w", ((0, 131), (0, 512)))


@pytest.mark.parametrize("staging", [None, 3000])
def test_mxfp4_is_what_transformers_makes_of_it(staging, tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random.seed(1), torch.manual_seed(1)
    blocks = torch.randint(0, 256, (3, 20, 5, 16), dtype=torch.uint8)
    scales = torch.randint(100, 150, (3, 20, 5), dtype=torch.uint8)
    blocks[1, 4] = 0  # a row of zeros
    scales[0, 0] = 3  # values near the smallest that bfloat16 has
    theirs = convert_moe_packed_tensors(blocks, scales)
    name = "experts.gate_up_proj"
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": torch.rand(3, 20)}
    with HFReader(write(tmp_path / "hf", tensors, {"quant_method": "mxfp4"}), staging) as reader:
        assert set(reader.names) == {name, f"{name}_bias"}
        assert reader.shape(name) == (3, 160, 20) == tuple(theirs.shape)
        check_regions(reader, name, theirs.float())
        before = reader.bytes_read
        reader.read(name, ((2, 3), (0, 160), (4, 8)))
        assert reader.bytes_read - before == 4 * 5 * 17  # four rows of one expert


@pytest.mark.parametrize(
    ("tensors", "quantization", "told"),
    [
        ({"w": torch.zeros(4, 4, dtype=torch.float8_e4m3fn)}, FP8, "w_scale_inv are missing"),
        ({"w": random_fp8(4, 4)}, None, "no quantization_config that tells its blocks"),
        (
            {"w": random_fp8(300, 4), "w_scale_inv": torch.ones(2, 1)},
            FP8,
            "scales of shape [2, 1], not [3, 1]",
        ),
        ({"w_blocks": torch.zeros(2, 3, 16, dtype=torch.uint8)}, {"quant_method": "mxfp4"}, "no w_scales"),
        ({"w": torch.zeros(1)}, {"quant_method": "gptq", "bits": 4}, "quantized by 'gptq' cannot be read"),
        ({"w": torch.zeros(1)}, {"quant_method": "compressed-tensors"}, "by 'compressed-tensors' cannot"),
        ({"w": torch.zeros(1)}, FP8 | {"weight_block_size": None}, "weight_block_size None cannot be read"),
    ],
)
def test_what_cannot_be_dequantized_is_refused(tensors, quantization, told, tmp_path):
    with pytest.raises((UserError, UserErrors)) as caught:
        HFReader(write(tmp_path / "hf", tensors, quantization))
    assert told in str(caught.value)


def test_an_fp8_checkpoint_is_converted_and_comes_back_as_plain_bf16(tmp_path):
    from types import SimpleNamespace

    from mcore_swift.plan import preflight

    hf, mcore, back = (tmp_path / name for name in ("hf", "mcore", "back"))
    make_checkpoint("qwen3", hf, torch.bfloat16)
    tensors, expected = {}, {}
    for name, tensor in load_file(hf / "model.safetensors").items():
        expected[name] = tensor
        tensors[name] = tensor
        if "proj" in name:
            grid = tuple(-(-size // 16) for size in tensor.shape)
            tensors[name], tensors[name + "_scale_inv"] = random_fp8(*tensor.shape), torch.rand(grid)
            expected[name] = plain(tensors[name], tensors[name + "_scale_inv"], 16).to(torch.bfloat16)
    config = json.loads((hf / "config.json").read_text())
    write(hf, tensors, FP8 | {"weight_block_size": [16, 16]}, **config)
    args = SimpleNamespace(
        model=str(hf),
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        sequence_parallel=False,
    )
    assert preflight(args, 1) == []
    table = rule_table("qwen3")
    mcore.mkdir(), back.mkdir()
    with HFReader(hf) as reader:
        view = HFView(reader, table)
        stream.write_mcore(view, stream.plan_mcore(view, table), mcore)
    with MCoreReader(mcore) as reader:
        stream.write_hf(reader, stream.plan_hf(reader, table, 10**9), hf, back)
    after = load_file(back / "model.safetensors")
    assert after.keys() == expected.keys()
    assert all(torch.equal(after[name], values) for name, values in expected.items())
    told = json.loads((back / "config.json").read_text())
    assert "quantization_config" not in told and told["dtype"] == "bfloat16"

    (hf / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    assert "quantized by 'awq' cannot be read" in str(preflight(args, 1)[0])

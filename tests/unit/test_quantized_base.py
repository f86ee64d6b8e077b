"""transformers models with quantized weights: read in few bits, refused where they cannot be."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mcore_swift.errors import UserError
from mcore_swift.plan.quantization import problems_beside_adapters

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "parallel"))


def args(**flags):
    defaults = {
        "quant_method": None,
        "quant_bits": None,
        "tuner_type": "lora",
        "bnb_4bit_compute_dtype": None,
    }
    more = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": None}
    return SimpleNamespace(**(defaults | more | flags))


@pytest.mark.parametrize(
    ("stored", "flags", "told"),
    [
        ({"quant_method": "gptq", "bits": 4}, {}, "pip install gptqmodel optimum"),
        ({"quant_method": "awq"}, {"tuner_type": "full"}, "awq cannot be trained"),
        ({"quant_method": "awq"}, {"quant_method": "bnb"}, "are quantized by awq"),
        ({"quant_method": "vptq"}, {}, "'vptq' cannot be read"),
        (None, {"quant_method": "quanto"}, "pip install optimum-quanto"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(stored, flags, told):
    (problem,) = problems_beside_adapters(
        args(**flags), {"quantization_config": stored} if stored else {}, "config"
    )
    assert told in f"{problem.message} {problem.remedy}"


def test_weights_that_are_read_as_plain_ones_go_with_everything():
    fp8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    assert problems_beside_adapters(args(tuner_type="full"), fp8, "config") == []


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tiny import demo, make_model

    folder = tmp_path_factory.mktemp("model")
    make_model(folder, demo.make_tokenizer(), num_hidden_layers=1)
    return folder


def test_a_checkpoint_in_fp8_is_quantized_anew(model, tmp_path):
    """`--load_in_8bit true` of an FP8 checkpoint: int8 of the values that the FP8 weights stand for."""
    functional = pytest.importorskip("bitsandbytes.functional")
    from safetensors.torch import load_file, save_file

    from mcore_swift.engines.fsdp.model import read_plan
    from mcore_swift.engines.fsdp.quantized import is_quantized, load_quantized, number_of_values

    name = "model.layers.0.mlp.up_proj.weight"
    weights = load_file(model / "model.safetensors")
    coded = (weights[name] * 100).to(torch.float8_e4m3fn)
    scale = torch.full((2, 1), 0.01)
    save_file(weights | {name: coded, f"{name}_scale_inv": scale}, tmp_path / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    fp8 = {"quant_method": "fp8", "weight_block_size": [32, 32], "fmt": "e4m3"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": fp8}))
    given = args(model=str(tmp_path), quant_method="bnb", quant_bits=8)
    plan = read_plan(given.model)
    assert is_quantized(plan, given) and not is_quantized(plan, args())
    loaded, told = load_quantized(plan, given, None, torch.float32)
    layer = loaded.model.layers[0].mlp.up_proj
    # HFReader gives bfloat16 for what was dequantized
    expected, statistics, _ = functional.int8_vectorwise_quant((coded.float() * 0.01).bfloat16().half())
    assert layer.weight.dtype is torch.int8 and (layer.weight - expected).abs().max() <= 1, "rounded"
    assert torch.allclose(layer.weight.SCB, statistics, rtol=1e-2)
    assert loaded.lm_head.weight.dtype is torch.float32 and "8 bits by bnb" in told
    four, _ = load_quantized(
        plan, args(model=given.model, quant_method="bnb", quant_bits=4), None, torch.float32
    )
    packed = four.model.layers[0].mlp.up_proj.weight
    assert packed.numel() == number_of_values(packed) // 2 == 64 * 32 // 2


def test_what_transformers_refuses_is_told_in_words(model):
    pytest.importorskip("bitsandbytes")
    from mcore_swift.engines.fsdp.model import read_plan
    from mcore_swift.engines.fsdp.quantized import load_quantized

    given = args(model=str(model), quant_method="eetq", quant_bits=8)
    with pytest.raises(UserError, match="use --quant_method bnb"):  # it needs a GPU
        load_quantized(read_plan(given.model), given, None, torch.float32)


def test_a_defect_while_weights_are_read_is_not_told_as_the_users(model, monkeypatch):
    pytest.importorskip("bitsandbytes")
    from mcore_swift.engines.fsdp import quantized
    from mcore_swift.engines.fsdp.model import read_plan

    def broken(*_):
        raise TypeError("a defect")

    given = args(model=str(model), quant_method="bnb", quant_bits=4)
    monkeypatch.setattr(quantized, "_quantized_as_read", broken)
    with pytest.raises(TypeError, match="a defect"):
        quantized.load_quantized(read_plan(given.model), given, None, torch.float32)


def test_nothing_is_merged_into_weights_that_are_stored_quantized(model, tmp_path):
    from mcore_swift.tuners.merge import merge_adapter

    config = json.loads((model / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "gptq"}
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    with pytest.raises(UserError, match="quantized by gptq, and nothing can be added"):
        merge_adapter(str(tmp_path), str(tmp_path), str(tmp_path / "out"))

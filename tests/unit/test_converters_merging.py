"""Adapters of peft merged while weights stream by: the same weights as peft merges in memory."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from converter_cases import hf_config
from safetensors.torch import load_file

from converters.main import export
from converters.peft_config import settings_of_checkpoint
from converters.peft_files import PeftAdapter, save_peft
from converters.ranks import Ranks
from mcore_swift.config import MegatronExportArguments, parse
from mcore_swift.config.swift import SwiftExportArguments
from mcore_swift.errors import UserError
from mcore_swift.models.reading import read_model
from mcore_swift.plan.adapter import folder_problems
from mcore_swift.tuners.settings import LoraSettings
from mcore_swift.tuners.targets import adaptable_modules, chosen_modules

ATOL = 1e-6  # fp32: products of two small factors, summed in another order

ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "all-linear": (
        "llama",
        {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"o_proj": 5}},
    ),
    "dora": ("qwen2", {"target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"], "use_dora": True}),
    "whole": ("qwen2", {"target_modules": ["k_proj"], "modules_to_save": ["lm_head", "norm"], "bias": "all"}),
    "outer": ("llama", {"target_modules": ["embed_tokens", "lm_head", "up_proj"]}),
    "experts": (
        "qwen3moe",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Models by family, and adapters as peft saves them."""
    import peft
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("merging")
    torch.manual_seed(0)
    for family in {family for family, _ in ADAPTERS.values()}:
        AutoModelForCausalLM.from_config(hf_config(family)).float().save_pretrained(folder / family)
    for name, (family, settings) in ADAPTERS.items():
        base = AutoModelForCausalLM.from_pretrained(folder / family)
        adapted = peft.get_peft_model(
            base, peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **settings)
        )
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        adapted.save_pretrained(folder / name)
    return folder


def run(**flags: Any) -> None:
    argv = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    export(parse(MegatronExportArguments, argv, notify=lambda notice: None), Ranks())


def merged_by_peft(model: Path, adapter: Path) -> dict[str, torch.Tensor]:
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model)
    return peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_in_the_stream_as_in_memory(folders, tmp_path, name):
    """To Hugging Face's form at once, in pieces of a few rows; and by way of a megatron-core checkpoint."""
    from transformers import AutoModelForCausalLM

    family, _ = ADAPTERS[name]
    given = {"model": folders / family, "adapters": folders / name, "merge_lora": True}
    run(**given, to_hf=True, output_dir=tmp_path / "hf", memory_budget="60KB")
    run(**given, to_mcore=True, output_dir=tmp_path / "mcore")
    run(mcore_model=tmp_path / "mcore", to_hf=True, output_dir=tmp_path / "back")
    expected = merged_by_peft(folders / family, folders / name)
    plain = AutoModelForCausalLM.from_pretrained(folders / family).state_dict()
    for made in ("hf", "back"):
        found = AutoModelForCausalLM.from_pretrained(tmp_path / made).state_dict()
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(
                found[key], tensor, atol=ATOL, rtol=ATOL, msg=lambda text, k=key: f"{k}: {text}"
            )
    assert sum(not torch.equal(plain[key], expected[key]) for key in plain) >= 4


def test_an_adapter_of_another_model_is_refused(folders, tmp_path):
    with pytest.raises(UserError, match="adapter of another base model|takes no adapter"):
        run(model=folders / "qwen3moe", adapters=folders / "dora", to_hf=True, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_model_is_the_one_the_adapter_names(folders, tmp_path):
    for cls in (MegatronExportArguments, SwiftExportArguments):
        argv = ["--adapters", str(folders / "dora"), "--merge_lora", "true", "--output_dir", str(tmp_path)]
        argv += ["--to_hf", "true"] if cls is MegatronExportArguments else []
        args = parse(cls, argv, notify=lambda notice: None)
        assert os.path.samefile(args.model, folders / "qwen2")
    with pytest.raises(UserError, match="--model is missing"):
        parse(MegatronExportArguments, [*argv, "--to_hf", "true", "--load_args", "false"])


WIDE: dict[str, Any] = {"target_modules": ("all-linear", "all-router")}
SOME: dict[str, Any] = {"target_regex": r".*(q|down)_proj", "use_rslora": True}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen2moe", WIDE),
        ("qwen2moe", SOME),
        ("deepseekv3", WIDE),
        ("deepseekv3", SOME),
        ("mixtral", WIDE),
        ("gptoss", WIDE),
    ],
)
def test_peft_loads_experts_beside_layers_of_the_same_names(tmp_path, family, settings):
    """Written by us, of families whose settings peft rewrites and of others; and what peft writes again is read."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(hf_config(family)).float().save_pretrained(tmp_path / "model")
    table = read_model(str(tmp_path / "model")).table.matrices
    weights = load_file(tmp_path / "model/model.safetensors")
    asked = LoraSettings(rank=3, alpha=5, dropout=0.0, **settings)
    tensors = {}
    for module in sorted(chosen_modules(table, asked)):
        rows, columns = weights[f"{module}.weight"].shape
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(3, columns) * 0.1
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, 3) * 0.1
    (tmp_path / "adapter").mkdir()
    save_peft(tmp_path / "adapter", tensors, asked, str(tmp_path / "model"), adaptable_modules(table))
    run(model=tmp_path / "model", adapters=tmp_path / "adapter", to_hf=True, output_dir=tmp_path / "merged")
    assert chosen_modules(table, settings_of_checkpoint(tmp_path / "adapter", table)) == chosen_modules(
        table, asked
    )
    ids = torch.arange(24)[None]
    base, merged = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("model", "merged")
    )
    expected, before = merged(ids).logits, base(ids).logits
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    found = adapted(ids).logits
    adapted.save_pretrained(tmp_path / "again")
    assert PeftAdapter(tmp_path / "again", table).shapes.keys() == tensors.keys()
    assert not folder_problems(tmp_path / "again", tmp_path / "model", only_lora=True)
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)  # logits to the bound

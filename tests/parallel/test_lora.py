"""Adapters on parallel layers equal peft's on transformers: forward, gradients, one step, files, in every layout."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from jobs import assert_all_passed, run_job  # noqa: E402
from lora_models import make_adapter, make_whole_adapter  # noqa: E402
from parity_models import make_reference  # noqa: E402

EXPERTS = "qwen3-moe"
OTHERS = ("deepseek-v3-mtp",)
"""Families with linear layers that the others have not: latent attention, shared experts, multi-token layers."""
ADAPTERS = {
    "qwen3": {
        "all": {},
        "some": {"target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": True},
        "uneven": {
            "rank_pattern": {"model.layers.1.mlp.up_proj": 5},
            "alpha_pattern": {"model.layers.0.self_attn.k_proj": 9.0},
        },
        "saved": {
            "target_modules": ["q_proj", "down_proj"],
            "modules_to_save": ["embed_tokens", "lm_head", "norm"],
        },
        "outer": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        "dora": {"target_modules": ["q_proj", "o_proj", "up_proj", "down_proj", "lm_head"], "use_dora": True},
    },
    "qwen2": {
        "tied": {
            "target_modules": ["q_proj", "k_proj", "v_proj"],
            "bias": "lora_only",
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
        "mlp": {"target_modules": ["gate_proj", "up_proj", "o_proj"]},
        "dora": {"target_modules": ["k_proj", "v_proj", "down_proj"], "use_dora": True, "use_rslora": True},
        "one": {"target_modules": ["k_proj"], "bias": "all"},
    },
    EXPERTS: {
        "saved": {"target_modules": ["q_proj"], "modules_to_save": ["mlp.gate", "lm_head"]},
        "router": {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]},
    },
}


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    for variant, adapters in ADAPTERS.items():
        (folder / variant).mkdir()
        make_reference(variant, folder / variant)
        for name, settings in adapters.items():
            (folder / variant / name).mkdir()
            make_adapter(folder / variant / "model", folder / variant / name, **settings)
    (folder / EXPERTS / "all").mkdir()
    make_whole_adapter(folder / EXPERTS / "model", folder / EXPERTS / "all")
    names = {name: list(kinds) for name, kinds in ADAPTERS.items()}
    (folder / EXPERTS / "all-dora").mkdir()
    make_whole_adapter(folder / EXPERTS / "model", folder / EXPERTS / "all-dora", dora=True)
    names[EXPERTS] += ["all", "all-dora"]
    for variant in OTHERS:
        (folder / variant / "all").mkdir(parents=True)
        make_reference(variant, folder / variant)
        make_whole_adapter(folder / variant / "model", folder / variant / "all")
        names[variant] = ["all"]
    (folder / "adapters.json").write_text(json.dumps(names))
    return folder


@pytest.mark.parametrize("world_size", [2])
def test_adapters_equal_pefts(references, world_size):
    results = run_job(Path(__file__).with_name("lora_job.py"), world_size, references)
    assert len(results) >= sum(map(len, ADAPTERS.values()))
    assert_all_passed(results)

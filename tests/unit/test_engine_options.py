"""What the flags make of megatron-core's config, and which layer spec is chosen, without processes."""

import pytest
import torch

pytest.importorskip("megatron.core")

from mcore_swift.accelerator import get_accelerator  # noqa: E402

get_accelerator().install()

from test_models_families import hf_config  # noqa: E402

from mcore_swift.config import MegatronSftArguments  # noqa: E402
from mcore_swift.engines import processes  # noqa: E402
from mcore_swift.engines.megatron import moe  # noqa: E402
from mcore_swift.engines.megatron.moe import moe_options  # noqa: E402
from mcore_swift.engines.megatron.options import model_options  # noqa: E402
from mcore_swift.errors import UserError  # noqa: E402
from mcore_swift.models import specs  # noqa: E402
from mcore_swift.models.family import family_of  # noqa: E402
from mcore_swift.models.reading import ModelPlan  # noqa: E402


@pytest.mark.parametrize(
    ("flags", "implementation", "granularity", "modules"),
    [
        ({}, "local", "selective", ["core_attn"]),
        ({}, "transformer_engine", None, None),
        ({"recompute_modules": ["core_attn", "mlp"]}, "transformer_engine", "selective", ["mlp"]),
        ({"moe_layer_recompute": True}, "transformer_engine", "selective", ["moe"]),
        ({"recompute_granularity": "full"}, "transformer_engine", "full", None),
        ({"recompute_granularity": "none"}, "local", None, None),
    ],
)
def test_attention_is_not_recomputed_where_transformer_engine_keeps_no_scores(
    flags, implementation, granularity, modules
):
    options = model_options(MegatronSftArguments(**flags), implementation, experts=True)
    assert options.get("recompute_granularity") == granularity
    assert options.get("recompute_modules") == modules
    assert options["transformer_impl"] == implementation


def test_grouped_kernels_serve_where_transformer_engine_is(monkeypatch):
    args = MegatronSftArguments(moe_permute_fusion=True)
    act = MegatronSftArguments(recompute_modules=["moe_act"])
    options = moe_options(args)
    assert (options["moe_grouped_gemm"], options["moe_permute_fusion"]) == (False, False)
    with pytest.raises(UserError, match="--recompute_modules moe_act"):
        moe_options(act)
    monkeypatch.setattr(moe, "have_transformer_engine", lambda: True)
    options = moe_options(args)
    assert (options["moe_grouped_gemm"], options["moe_permute_fusion"]) == (True, True)
    assert moe_options(act)["moe_grouped_gemm"]
    assert not moe_options(MegatronSftArguments(moe_grouped_gemm=False))["moe_grouped_gemm"]


PLAIN = ("llama", "mistral-window", "qwen2", "qwen2-windows", "qwen3", "gemma", "qwen3-moe", "smollm3")
OTHER = {
    "gemma2": "norms, softcap",
    "cohere2": "LayerNormWithoutBias, parallel",
    "olmo2": "norms, qk norm",
    "llama-biases": "mlp bias, output bias, rotary angles that depend on the length of the text",
    "granite": "residual scale",
    "gemma3": "norms, rotary",
    "nemotron": "ZeroCentredLayerNorm",
}


def plan_of(variant: str) -> ModelPlan:
    hf = hf_config(variant)
    return ModelPlan(hf, family_of(hf), family_of(hf).rules(hf))


@pytest.mark.parametrize("variant", [*PLAIN, *OTHER])
def test_models_that_transformer_engines_spec_does_not_know_are_left_to_the_local_one(variant, monkeypatch):
    plan = plan_of(variant)
    assert specs.choose_implementation("auto", plan) == "local"  # no CUDA here
    monkeypatch.setattr(specs, "have_transformer_engine", lambda: True)
    assert specs.choose_implementation("local", plan) == "local"
    if variant in PLAIN:
        assert specs.choose_implementation("auto", plan) == "transformer_engine"
        assert specs.choose_implementation("transformer_engine", plan) == "transformer_engine"
        return
    assert specs.choose_implementation("auto", plan) == "local"
    with pytest.raises(UserError, match=OTHER[variant]):
        specs.choose_implementation("transformer_engine", plan)


def test_a_communication_library_that_is_not_there_is_refused_by_its_flag():
    if torch.cuda.is_available():
        pytest.skip("it is there")
    with pytest.raises(UserError, match="--ddp_backend nccl needs a GPU"):
        processes.join(timeout_s=1, backend="nccl")

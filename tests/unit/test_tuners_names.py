"""Which weights the flags of adapters mean, by Hugging Face names, and what is said where they mean nothing."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from converters.peft_config import settings_of_checkpoint
from converters.peft_files import write_config
from mcore_swift.errors import UserError
from mcore_swift.models.family import family_of
from mcore_swift.plan.adapter import option_problems
from mcore_swift.tuners.attach import adapter_names
from mcore_swift.tuners.beside import beside, settled
from mcore_swift.tuners.freezing import frozen_names
from mcore_swift.tuners.parts import Part
from mcore_swift.tuners.settings import LoraSettings
from mcore_swift.tuners.starts import draw
from mcore_swift.tuners.targets import adaptable_modules, chosen_modules
from mcore_swift.tuners.transformers_targets import check_other_names, peft_targets

SIZES = {
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "intermediate_size": 12,
    "vocab_size": 10,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"], tie_word_embeddings=False),
    "tied": Qwen2Config(**SIZES, architectures=["Qwen2ForCausalLM"], tie_word_embeddings=True),
    "experts": Qwen3MoeConfig(
        **SIZES, num_experts=2, architectures=["Qwen3MoeForCausalLM"], tie_word_embeddings=False
    ),
    "latent": DeepseekV3Config(
        **SIZES, n_routed_experts=2, first_k_dense_replace=1, architectures=["DeepseekV3ForCausalLM"]
    ),
    "neox": GPTNeoXConfig(**SIZES, architectures=["GPTNeoXForCausalLM"]),
}


def table(name):
    return family_of(CONFIGS[name]).rules(CONFIGS[name])


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        ("llama", {"modules_to_save": ("lm_heat",)}, ["--modules_to_save lm_heat", "lm_head"]),
        ("tied", {"modules_to_save": ("lm_head",)}, ["is its embedding", "--modules_to_save embed_tokens"]),
        ("experts", {"modules_to_save": ("experts",)}, ["experts", "--tuner_type full"]),
        ("llama", {"bias": "all"}, ["--lora_bias all", "no biases"]),
        (
            "tied",
            {"bias": "lora_only", "target_modules": ("o_proj",)},
            ["layers with adapters have no biases"],
        ),
        ("tied", {"modules_to_save": ("embed_tokens",), "ensure_weight_tying": False}, ["ties the two"]),
        ("tied", {"target_modules": ("embed_tokens",)}, ["--modules_to_save embed_tokens"]),
        (
            "tied",
            {"target_modules": ("lm_head",)},
            ["--target_modules lm_head", "--modules_to_save embed_tokens"],
        ),
        ("llama", {"target_modules": ("all-router",)}, ["all-router", "none"]),
        ("llama", {"target_modules": ("q_prj",)}, ["--target_modules q_prj", "q_proj"]),
        ("llama", {"target_modules": ("q_proj",), "modules_to_save": ("attn",)}, ["covers every module"]),
        ("experts", {"target_modules": ("all-router",), "use_dora": True}, ["--use_dora", "mlp.gate"]),
        ("llama", {"target_modules": ("embed_tokens",), "use_dora": True}, ["--use_dora", "embed_tokens"]),
    ],
)
def test_what_cannot_train_is_said_with_what_can(model, settings, words):
    with pytest.raises(UserError) as told:
        asked = LoraSettings(**settings)
        adapter_names(table(model), asked)
        beside(table(model), asked)
    assert all(word in str(told.value) for word in words), str(told.value)


@pytest.mark.parametrize(
    ("model", "layer", "ends"),
    [
        ("llama", "linear_qkv", {"q_proj", "k_proj", "v_proj"}),
        ("experts", "linear_fc2", {"down_proj"}),
        ("latent", "linear_kv_up_proj", {"kv_b_proj"}),
        ("neox", "linear_fc1", {"dense_h_to_4h"}),
    ],
)
def test_a_layer_of_megatrons_means_the_modules_it_is_made_of(model, layer, ends):
    chosen = chosen_modules(table(model), LoraSettings(target_modules=(layer,)))
    assert {name.rpartition(".")[2] for name in chosen} == ends


def test_all_linear_is_neither_output_layer_nor_router():
    every = chosen_modules(table("experts"), LoraSettings())
    assert {name.rpartition(".")[2] for name in every} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    more = LoraSettings(target_modules=("all-linear", "all-router", "all-embedding", "lm_head"))
    assert chosen_modules(table("experts"), more) - every == {
        *("model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "model.embed_tokens", "lm_head")
    }


def test_a_tied_embedding_that_trains_is_saved_twice_and_says_so():
    asked = LoraSettings(modules_to_save=("embed_tokens",))
    whole = beside(table("tied"), asked)
    assert whole.files == {"model.embed_tokens.weight": "base_model.model.model.embed_tokens.weight"}
    assert whole.copies == {"base_model.model.lm_head.weight": "base_model.model.model.embed_tokens.weight"}
    assert settled(table("tied"), asked).ensure_weight_tying
    assert not settled(table("llama"), asked).ensure_weight_tying


def test_a_module_that_trains_whole_has_no_adapter():
    asked = LoraSettings(target_modules=("q_proj", "v_proj"), modules_to_save=("layers.1.self_attn",))
    assert chosen_modules(table("llama"), asked) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
    }


@pytest.mark.parametrize(
    "option", [{"init_lora_weights": "pissa"}, {"alora_invocation_tokens": [7]}, {"use_qalora": True}]
)
def test_an_adapter_that_would_be_read_wrong_is_refused(option):
    """PiSSA's frozen weights are other ones; an activated LoRA is no part of the tokens before its invocation."""
    (problem,) = option_problems({"peft_type": "LORA"} | option, Path("adapter_config.json"))
    assert next(iter(option)) in str(problem)
    assert option_problems({"peft_type": "LORA", "init_lora_weights": "gaussian"}, Path("x")) == []


@pytest.mark.parametrize("model", ["llama", "experts"])
def test_a_checkpoint_describes_ranks_and_alphas_of_single_modules(tmp_path, model):
    every = sorted(chosen_modules(table(model), LoraSettings()))
    asked = LoraSettings(
        rank=4,
        rank_pattern={every[0]: 6, every[-1]: 2},
        alpha_pattern={every[1]: 5.0},
        target_modules=tuple(every),
    )
    write_config(tmp_path, asked, every, adaptable_modules(table(model)), "base")
    found = settings_of_checkpoint(tmp_path, table(model))
    assert (found.rank_pattern, found.alpha_pattern) == (asked.rank_pattern, asked.alpha_pattern)
    assert chosen_modules(table(model), found) == set(every)


@pytest.mark.parametrize("init", ["true", "gaussian", "orthogonal"])
def test_an_adapter_starts_as_nothing_and_alike_in_every_layout(init):
    settings = LoraSettings(rank=4, init=init)
    whole = Part("m.weight", (6, 10), ((0, 6),), ((0, 6),), (0, 10), (0, 0, 0))
    down, up = draw(whole, 4, settings)
    assert down.abs().max() > 0.02 and (up.abs().max() > 0.02) == (init == "orthogonal")
    assert (up @ down).abs().max() < 1e-7, "of entries near 0.1, in fp32"
    part = Part("m.weight", (6, 10), ((1, 3), (4, 6)), ((0, 4),), (5, 10), (0, 0, 0))
    some_down, some_up = draw(part, 4, settings)
    assert some_down.equal(down[:, 5:]) and some_up.equal(up[[1, 2, 4, 5]])


def test_orthogonal_halves_take_an_even_rank():
    whole = Part("m.weight", (6, 10), ((0, 6),), ((0, 6),), (0, 10), (0, 0, 0))
    with pytest.raises(UserError, match="even --lora_rank"):
        draw(whole, 3, LoraSettings(rank=3, init="orthogonal"))


FLAGS = {
    "freeze_parameters": [],
    "freeze_parameters_regex": None,
    "freeze_parameters_ratio": 0.0,
    "trainable_parameters": [],
    "trainable_parameters_regex": None,
}
PARAMETERS = {"embed.weight": 40, "layers.0.q": 20, "layers.0.k": 20, "layers.1.q": 20, "norm": 10}


@pytest.mark.parametrize(
    ("flags", "stays"),
    [
        ({"freeze_parameters": ["embed", "norm"]}, {"embed.weight", "norm"}),
        ({"freeze_parameters_regex": r"\d\.q"}, {"layers.0.q", "layers.1.q"}),
        ({"freeze_parameters_ratio": 0.6}, {"embed.weight"}),  # q and k are one tensor, too large
        ({"freeze_parameters_ratio": 0.75}, {"embed.weight", "layers.0.q", "layers.0.k"}),
        ({"freeze_parameters_ratio": 1.0, "trainable_parameters_regex": "norm"}, set(PARAMETERS) - {"norm"}),
    ],
)
def test_a_share_that_stays_ends_between_tensors(flags, stays):
    fused = [["embed.weight"], ["layers.0.q", "layers.0.k"], ["layers.1.q"], ["norm"]]
    assert frozen_names(PARAMETERS, SimpleNamespace(**(FLAGS | flags)), fused) == stays


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"freeze_parameters": ["layer.0"]}, ["--freeze_parameters layer.0", "layers.0.q"]),
        ({"freeze_parameters_regex": "("}, ["--freeze_parameters_regex (", "no regular expression"]),
        ({"freeze_parameters_regex": "mlp"}, ["--freeze_parameters_regex mlp", "matches no parameter"]),
        ({"freeze_parameters_ratio": 1.0}, ["nothing trains"]),
    ],
)
def test_a_name_that_is_none_is_told_the_nearest(flags, words):
    with pytest.raises(UserError) as told:
        frozen_names(PARAMETERS, SimpleNamespace(**(FLAGS | flags)))
    assert all(word in str(told.value) for word in words), str(told.value)


def on_transformers(**flags):
    """What peft is given for a model of transformers without memory."""
    args = {
        "target_modules": ["all-linear"],
        "target_regex": None,
        "modules_to_save": [],
        "target_parameters": [],
    }
    args = SimpleNamespace(**(args | flags))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["tied"])
    check_other_names(model, args)
    return peft_targets(model, args)


def test_targets_on_transformers_models_are_names_that_peft_knows():
    assert on_transformers() == "all-linear"
    assert on_transformers(target_modules=["q_proj", "mlp.up_proj"]) == ["q_proj", "mlp.up_proj"]
    assert "embed_tokens" in on_transformers(target_modules=["all-linear", "all-embedding"])
    assert on_transformers(target_regex=".*q_proj", modules_to_save=["norm"]) == ".*q_proj"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        # peft itself says nothing of a name that is none, as long as another is one
        ({"target_modules": ["q_proj", "vproj"]}, ["--target_modules vproj", "nearest names: v_proj"]),
        ({"target_regex": "model.layer.*qproj"}, ["--target_regex model.layer", "nearest names: q_proj"]),
        ({"modules_to_save": ["embed_token", "lm_haed"]}, ["--modules_to_save embed_token", "embed_tokens"]),
        ({"target_parameters": ["up_proj.wait"]}, ["--target_parameters up_proj.wait", "up_proj.weight"]),
        ({"target_modules": ["all-router"]}, ["all-router", "none"]),
    ],
)
def test_a_name_that_is_none_of_a_transformers_model_is_told_with_the_nearest(flags, words):
    with pytest.raises(UserError) as caught:
        on_transformers(**flags)
    assert all(word in str(caught.value) for word in words), str(caught.value)

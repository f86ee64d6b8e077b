"""Files of peft's adapters: peft loads them beside the base's own weights, whatever the adapters began with."""

from types import SimpleNamespace

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from mcore_swift.errors import UserError
from mcore_swift.tuners.residuals import TakenStarts, check_start, settle_start, takes_start
from mcore_swift.tuners.transformers_adapters import adapter_tensors, choose_parameters, save_adapter

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.tensor([[1, 5, 3, 2, 4]])


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=17, initializer_range=0.3, name_or_path="base", **SIZES)
    return LlamaForCausalLM(config).eval()


def args(**given) -> SimpleNamespace:
    nothing = {
        "adapters": [],
        "model": "base",
        "target_regex": None,
        "target_modules": [],
        "modules_to_save": [],
    }
    return SimpleNamespace(**({"tuner_type": "lora", "seed": 7} | nothing | given))


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa_niter_4", alpha_pattern={"q_proj": 3}),
        peft.LoraConfig(r=4, init_lora_weights="olora", use_rslora=True, rank_pattern={"v_proj": 2}),
        peft.VeraConfig(r=4, vera_dropout=0.0),
    ],
    ids=["pissa", "olora", "vera"],
)
@torch.no_grad()
def test_peft_loads_what_was_trained(config, tmp_path):
    """PiSSA and OLoRA are trained beside other weights than the base's; VeRA's matrices do not train."""
    config.task_type, config.target_modules = "CAUSAL_LM", ["q_proj", "v_proj"]
    model = choose_parameters(base(), args(), config).eval()
    starts = TakenStarts(model) if takes_start(getattr(config, "init_lora_weights", None)) else None
    before = model(IDS).logits
    assert torch.allclose(before, base()(IDS).logits, atol=1e-5), "it begins as the model"
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for parameter in trained.values():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    expected = model(IDS).logits
    assert not torch.allclose(before, expected, atol=1e-2)

    save_adapter(model, tmp_path, trained, starts)
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.allclose(loaded(IDS).logits, expected, atol=1e-5), "fp32 sums in another order"
    if starts is None:
        shapes = {name: tuple(parameter.shape) for name, parameter in trained.items()}
        found = adapter_tensors(str(tmp_path), model, shapes)
        assert all(found[name].equal(parameter) for name, parameter in trained.items())


def test_adapters_of_weights_that_nobody_can_tell_are_refused():
    """PiSSA by a randomized decomposition is another one each time; training goes on beside the base's weights."""
    for start in ("pissa_niter_4", "loftq"):
        with pytest.raises(UserError, match=f"--adapters folder.*{start}"):
            check_start(SimpleNamespace(init_lora_weights=start), "folder")
    repeatable = SimpleNamespace(init_lora_weights="pissa")
    check_start(repeatable, "folder")
    with pytest.raises(UserError, match="path_initial_model_for_weight_conversion"):
        settle_start(repeatable, "folder")
    drawn = SimpleNamespace(init_lora_weights="orthogonal")
    settle_start(drawn, "folder")
    assert drawn.init_lora_weights is True


def test_layers_that_peft_cannot_adapt_are_told_with_the_others():
    """peft's own error for Mamba: all linear layers are not possible, and which ones are."""
    config = MambaConfig(vocab_size=17, hidden_size=16, state_size=4, num_hidden_layers=1)
    model = MambaForCausalLM(config)
    with pytest.raises(UserError, match=r"out_proj(.|\n)*of: dt_proj, in_proj, lm_head, x_proj$"):
        given = args(target_modules=["all-linear"])
        choose_parameters(model, given, peft.LoraConfig(target_modules="all-linear"))

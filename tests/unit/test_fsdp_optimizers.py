"""Optimizers that need whole tensors: they learn, divide the parameters as they should, and go on from a checkpoint."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3Config

from mcore_swift.engines.fsdp.optimizer import build_optimizer, set_hyperparameters
from mcore_swift.engines.fsdp.shards import optimizer_shards, optimizer_step, set_optimizer_step
from mcore_swift.errors import UserError

NAMES = ("adafactor", "muon", "galore_adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
NEEDS = {"galore_adamw": "galore_torch"} | {name: "bitsandbytes" for name in NAMES if "adamw_" in name}


@pytest.fixture(scope="module", autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_model():
    torch.manual_seed(0)
    # 64 x 80 = 5120 values: bitsandbytes keeps less than 4096 in 32 bits
    return AutoModelForCausalLM.from_config(
        Qwen3Config(
            vocab_size=80, hidden_size=64, intermediate_size=80, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, head_dim=16, tie_word_embeddings=False, initializer_range=0.1, bos_token_id=None,
        )
    )  # fmt: skip


def make_optimizer(model, name, **changes):
    values = {"optimizer": name, "lr": 1e-3, "weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.95,
              "adam_eps": 1e-8, "galore_rank": 4, "galore_update_proj_gap": 3, "galore_scale": 1.0,
              "galore_proj_type": "std"}  # fmt: skip
    return build_optimizer(model, SimpleNamespace(**values), **changes)


def train(model, optimizer, steps):
    losses = []
    for step in steps:
        ids = torch.arange(step, step + 24)[None] * 7 % 80
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        set_hyperparameters(optimizer, lr=1e-2 / (1 + step), weight_decay=0.1)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_optimizer_takes_the_same_steps(name):
    pytest.importorskip(NEEDS.get(name, "torch"))
    model = make_model()
    optimizer = make_optimizer(model, name)
    first = train(model, optimizer, range(4))
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    saved = {shard.key: shard.data.clone() for shard in optimizer_shards(model, optimizer)}
    taken = optimizer_step(optimizer)
    expected = train(model, optimizer, range(4, 8))
    assert len(set(first)) == 4 and taken == 4

    again = make_model()
    again.load_state_dict(weights)
    resumed = make_optimizer(again, name)
    shards = optimizer_shards(again, resumed, for_loading=True)
    assert {shard.key for shard in shards} == saved.keys()
    for shard in shards:
        shard.data.copy_(saved[shard.key])
    set_optimizer_step(resumed, taken)
    assert all(weights[key].equal(value) for key, value in again.state_dict().items())
    assert train(again, resumed, range(4, 8)) == pytest.approx(expected, rel=1e-6)


def test_muon_takes_the_matrices_between_the_embeddings():
    model = make_model()
    optimizer = make_optimizer(model, "muon")
    train(model, optimizer, range(2))
    keys = {shard.key for shard in optimizer_shards(model, optimizer)}
    assert "optimizer.momentum_buffer.model.layers.0.mlp.up_proj.weight" in keys
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert f"optimizer.exp_avg.{name}" in keys
    reference = make_model()
    weight = reference.model.layers[0].mlp.up_proj.weight
    muon = torch.optim.Muon([weight], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    ids = torch.arange(24)[None] * 7 % 80
    reference(input_ids=ids, labels=ids).loss.backward()
    muon.step()
    one_step = make_model()
    train(one_step, make_optimizer(one_step, "muon"), range(1))
    assert weight.equal(one_step.model.layers[0].mlp.up_proj.weight)


def test_sharded_parameters_are_refused():
    with pytest.raises(UserError, match="--optim muon needs whole parameters"):
        make_optimizer(make_model(), "muon", is_sharded=True)

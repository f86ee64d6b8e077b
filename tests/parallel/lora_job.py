"""One process of the adapter grid: forward pass, gradients and one step equal peft's in every layout."""

import importlib.util
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import lora_merging
import pytest
import torch
import torch.distributed as dist
from four_bit_cases import four_bit_cases
from jobs import run_cases
from lora_models import LEARNING_RATE, AdapterReference
from parity_job import (
    ADAM_EPS,
    GRADIENT_RTOL,
    LOSS_RTOL,
    WEIGHT_ATOL,
    compare_logits,
    own_batches,
    possible,
    start,
)
from parity_models import Reference
from safetensors.torch import load_file

from converters.export import hf_weights
from converters.hf_reader import HFReader
from converters.load import load_hf
from converters.peft_files import PeftAdapter, read_adapter, write_adapter
from mcore_swift.accelerator import get_accelerator

get_accelerator().install()

from te_stand_ins import te_layers  # noqa: E402

from mcore_swift.config import MegatronSftArguments  # noqa: E402
from mcore_swift.engines.megatron.engine import MegatronEngine  # noqa: E402
from mcore_swift.errors import UserError  # noqa: E402
from mcore_swift.models.reading import read_model  # noqa: E402
from mcore_swift.models.shards import LiveShard, parameter_shards  # noqa: E402
from mcore_swift.objectives.sft import NextToken  # noqa: E402
from mcore_swift.plan import Layout  # noqa: E402
from mcore_swift.tuners.attach import adapter_names, trained_shards  # noqa: E402
from mcore_swift.tuners.freezing import frozen_names  # noqa: E402

LAYOUTS = {
    1: [Layout()],
    2: [
        Layout(tp=2),
        Layout(tp=2, sequence_parallel=True),
        Layout(pp=2, vpp=2),
        Layout(cp=2),
        Layout(dp=2, ep=2),
        Layout(tp=2, sequence_parallel=True, etp=2),
    ],
}
THOROUGH = ("all", "outer")
SOME = (
    [Layout(tp=2), Layout(pp=2, vpp=2), Layout(dp=2, ep=2)],
    [Layout(tp=2, sequence_parallel=True), Layout(cp=2), Layout(tp=2, sequence_parallel=True, etp=2)],
)
"""Adapters other than the thorough ones are tested in one half of the layouts or the other, in turn."""
ONE = {"all-dora": [Layout(tp=2, sequence_parallel=True, etp=2)]}
"""A layout that divides all that this adapter has; other adapters cover its parts separately."""
FEW = {"deepseek-v3-mtp": [Layout(tp=2, sequence_parallel=True, etp=2), Layout(pp=2, vpp=2)]}
"""The same for whole variants."""
FROZEN = {
    "half": {"freeze_parameters_ratio": 0.5, "trainable_parameters": ["model.norm"]},
    "names": {"freeze_parameters": ["model.embed_tokens"], "freeze_parameters_regex": r"layers\.[01]\.|norm"},
    "last": {"freeze_parameters_ratio": 1.0, "trainable_parameters_regex": r"layers\.3\.mlp"},
}
"""Under PP, the first stage of "last" has nothing to train."""


def plain_sgd(packed: bool, **flags: Any) -> MegatronSftArguments:
    """Arguments for Adam that amounts to plain SGD, as in the parity grid."""
    return MegatronSftArguments(
        optimizer="adam",
        adam_beta1=0.0,
        adam_beta2=0.0,
        adam_eps=ADAM_EPS,
        clip_grad=1e9,
        weight_decay=0.0,
        **{"recompute_granularity": "none" if packed else "selective"} | flags,
    )


def engine_with(folder: Path, adapter: Path, layout: Layout, packed: bool, **flags: Any) -> MegatronEngine:
    args = plain_sgd(packed, **flags)
    plan = read_model(str(folder / "model"))
    source = PeftAdapter(adapter, plan.table.matrices)
    engine = MegatronEngine(plan, layout, args, torch.float32, adapter=source.settings)
    with HFReader(folder / "model") as reader:
        load_hf(engine.chunks, reader, engine.plan.table)
    names = adapter_names(plan.table, engine.adapter)
    read_adapter(source, trained_shards(engine.chunks), names, plan.table, engine.adapter)
    engine.after_load(["weights"], optimizer_step=0)
    return engine


def agrees_with_peft(folder: Path, adapter: Path, layout: Layout, packed: bool) -> None:
    """Logits, loss, gradient norm, A and B after one SGD step; the saved adapter equals peft's; W is unchanged."""
    reference: AdapterReference = torch.load(adapter / "reference.pt", weights_only=False)
    start(layout)
    ratio = 3.0 if packed else None
    engine = engine_with(folder, adapter / "adapter", layout, packed, tuner_type="lora", lorap_lr_ratio=ratio)
    frozen = [(shard, shard.data.clone()) for shard in frozen_shards(engine)]
    written = adapter / f"written-{layout}-{packed}".replace("·", "-")
    if dist.get_rank() == 0:
        written.mkdir(exist_ok=True)
    dist.barrier()
    write_adapter(
        written, trained_shards(engine.chunks), engine.adapter, str(folder / "model"), engine.plan.table
    )
    if dist.get_rank() == 0:
        first, second = (
            load_file(place / "adapter_model.safetensors") for place in (adapter / "adapter", written)
        )
        # peft also saves the frozen weights of embedding and output layer if these have an adapter
        first = {name: tensor for name, tensor in first.items() if ".base_layer.weight" not in name}
        assert first.keys() == second.keys()
        assert [name for name in first if not torch.equal(first[name], second[name])] == []
    batches, begin = own_batches(reference.samples, packed, layout)
    compare_logits(engine, batches, reference, begin)
    result = engine.train_step(batches, NextToken(), lr=LEARNING_RATE * ADAM_EPS, weight_decay=0.0)
    assert abs(result.loss / reference.loss - 1) < LOSS_RTOL, (result.loss, reference.loss)
    assert abs(result.grad_norm / reference.grad_norm - 1) < GRADIENT_RTOL, (
        result.grad_norm,
        reference.grad_norm,
    )
    write_adapter(
        written, trained_shards(engine.chunks), engine.adapter, str(folder / "model"), engine.plan.table
    )
    dist.barrier()
    if dist.get_rank() == 0:
        stepped = load_file(written / "adapter_model.safetensors")
        assert stepped.keys() == reference.after.keys()
        for name, expected in reference.after.items():
            if ratio and ".lora_B." in name:  # LoRA+: the step is `ratio` times as large
                expected = first[name] + ratio * (expected - first[name])
            torch.testing.assert_close(
                stepped[name], expected, atol=WEIGHT_ATOL, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
            )
    stepped = load_file(written / "adapter_model.safetensors")
    lora_merging.equals_base_and_adapter(engine, folder / "model", stepped)
    for shard, before in frozen:
        assert torch.equal(before, shard.data), f"{shard.key} is frozen and has changed"


def frozen_shards(engine: MegatronEngine) -> list[LiveShard]:
    return [
        shard
        for chunk in engine.chunks
        for parameter, shard in parameter_shards(chunk)
        if not parameter.requires_grad
    ]


def layouts_of(variant: str, adapter: str, number: int) -> list[Layout]:
    if variant in FEW:
        return FEW[variant]
    if adapter in THOROUGH:
        return LAYOUTS[2]
    return ONE.get(adapter, SOME[number % 2])


def agrees_with_peft_on_te_layers(*case: Any) -> None:
    with te_layers():
        agrees_with_peft(*case)


def trains_a_part(folder: Path, layout: Layout, packed: bool, **flags: Any) -> None:
    """Unfrozen weights end where they do when everything trains; the gradient norm is of their gradients alone."""
    reference: Reference = torch.load(folder / "reference.pt", weights_only=False)
    before = load_file(folder / "model/model.safetensors")
    start(layout)
    args = plain_sgd(packed, recompute_granularity="none" if packed else "full", **flags)
    engine = MegatronEngine(read_model(str(folder / "model")), layout, args, torch.float32)
    stays = frozen_names({name: before[name].numel() for name in engine.plan.table.by_hf}, args)
    trains = [name for name in before if name not in stays]
    if args.freeze_parameters_ratio == 0.5:  # a fused tensor trains if the boundary falls inside it
        trains = [name for name in trains if ".layers.1." not in name and ".layers.2." not in name]
    assert trains and stays
    with HFReader(folder / "model") as reader:
        load_hf(engine.chunks, reader, engine.plan.table)
    engine.after_load(["weights"], optimizer_step=0)
    batches, _ = own_batches(reference.samples, packed, layout)
    result = engine.train_step(batches, NextToken(), lr=LEARNING_RATE * ADAM_EPS, weight_decay=0.0)
    assert abs(result.loss / reference.loss - 1) < LOSS_RTOL, (result.loss, reference.loss)
    if args.freeze_parameters_ratio != 0.5:
        moved = [(reference.weights[name] - before[name]).norm() / LEARNING_RATE for name in trains]
        norm = torch.stack(moved).norm().item()
        assert abs(result.grad_norm / norm - 1) < GRADIENT_RTOL, (result.grad_norm, norm)
    for bucket in hf_weights(engine.chunks, engine.plan.table):
        for name, tensor in bucket.tensors.items():
            if name in trains:
                torch.testing.assert_close(tensor, reference.weights[name], atol=WEIGHT_ATOL, rtol=0)
            elif name in stays:
                assert torch.equal(tensor, before[name]), f"{name} is frozen and has changed"


def divided_tensor_is_refused(folder: Path) -> None:
    start(Layout(dp=dist.get_world_size()))
    args = plain_sgd(True, freeze_parameters_regex="layers.3.*q_proj")
    with pytest.raises(
        UserError, match=r"k_proj\.weight would train and .*3\.self_attn\.q_proj\.weight would be frozen"
    ):
        MegatronEngine(read_model(str(folder / "model")), Layout(), args, torch.float32)


def base_stays(folder: Path, name: str, layout: Layout) -> None:
    reference: AdapterReference = torch.load(folder / name / "reference.pt", weights_only=False)
    start(layout)
    engine = engine_with(folder, folder / name / "adapter", layout, packed=True)
    batches, _ = own_batches(reference.samples, True, layout)
    lora_merging.base_stays_after_many_exports(engine, batches, lr=0.1 * LEARNING_RATE * ADAM_EPS)


def main(folder: Path) -> None:
    world_size = int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    cases = {}
    adapters: dict[str, list[str]] = json.loads((folder / "adapters.json").read_text())
    for layout in LAYOUTS[world_size]:
        for variant, names in adapters.items():
            if not possible(layout, folder / variant):
                continue
            for number, name in enumerate(names):
                if world_size > 1 and layout not in layouts_of(variant, name, number):
                    continue
                packed = bool(number % 2)
                cases[f"{variant} {name} {layout}"] = partial(
                    agrees_with_peft, folder / variant, folder / variant / name, layout, packed
                )
        variant = "qwen3-moe" if layout.ep > 1 or (layout.etp or 1) > 1 else "qwen3"
        if layout.cp == 1 and (layout.tp == 1 or layout.sequence_parallel):
            cases[f"{variant} on layers of Transformer Engine's form {layout}"] = partial(
                agrees_with_peft_on_te_layers,
                folder / variant,
                folder / variant / "all",
                layout,
                layout.pp > 1,
            )
        name = (
            "last" if layout.pp > 1 else "names" if layout.tp > 1 and not layout.sequence_parallel else "half"
        )
        experts = layout.ep > 1 or layout.etp > 1
        variant = "qwen2" if name == "names" else "qwen3-moe" if experts else "qwen3"
        cases[f"{name} frozen {layout}"] = partial(
            trains_a_part, folder / variant, layout, bool(len(cases) % 2), **FROZEN[name]
        )
    if world_size == 2:
        cases["base stays"] = partial(base_stays, folder / "qwen2", "mlp", Layout(tp=2))
    if importlib.util.find_spec("bitsandbytes"):
        cases |= four_bit_cases(folder, LAYOUTS[world_size], engine_with)
    cases["divided tensor"] = partial(divided_tensor_is_refused, folder / "qwen3")
    run_cases(cases, folder)

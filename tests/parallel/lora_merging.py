"""Cases of the adapters' job: weights merged on the way out are the base's plus the adapter's, which stays apart."""

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from converters.export import hf_tensors
from mcore_swift.models.shards import live_shards
from mcore_swift.objectives.sft import NextToken
from mcore_swift.tuners.attach import merged_shards

EXPORTS = 100
# A sum of `rank` products in fp32, added to a weight of order 1, in another order than peft's
MERGED_ATOL = 1e-6


def merged_weights(engine: Any, bucket_bytes: int = 1 << 14) -> dict[str, Tensor]:
    """The merged model on the first rank; {} on others. Collective. Buckets so small that layers are met again."""
    shards = merged_shards(engine.chunks)
    own = {
        name: tensor.clone()
        for bucket in hf_tensors(shards, engine.plan.table, bucket_bytes)
        for name, tensor in bucket.tensors.items()
    }
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(own, gathered if dist.get_rank() == 0 else None)
    return {name: tensor for part in gathered if part for name, tensor in part.items()}


def equals_base_and_adapter(engine: Any, model: Path, adapter: dict[str, Tensor]) -> None:
    """adapter: the matrices as they were written, by their PEFT names."""
    merged = merged_weights(engine)
    if dist.get_rank():
        return
    base, settings = load_file(model / "model.safetensors"), engine.adapter
    assert merged.keys() == base.keys()
    for name, weight in base.items():
        module = name.removesuffix(".weight")
        prefix = f"base_model.model.{module}"
        factor = adapter.get(f"{prefix}.lora_A.weight", adapter.get(f"{prefix}.lora_embedding_A"))
        if factor is None:
            whole = [adapter.get(f"base_model.model.{kind}") for kind in (name, _beside_matrices(name))]
            expected = next((tensor for tensor in whole if tensor is not None), weight)
            assert torch.equal(merged[name], expected), f"{name} has no adapter"
            continue
        if f"{prefix}.lora_embedding_B" in adapter:
            delta = settings.scaling_of(module) * (adapter[f"{prefix}.lora_embedding_B"] @ factor).t()
        else:
            delta = settings.scaling_of(module) * adapter[f"{prefix}.lora_B.weight"] @ factor
        assert delta.abs().max() > 1e-3, name
        expected = weight + delta
        if (magnitude := adapter.get(f"{prefix}.lora_magnitude_vector")) is not None:
            expected = expected * (magnitude / expected.norm(dim=1))[:, None]
        torch.testing.assert_close(
            merged[name], expected, atol=MERGED_ATOL, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )


def _beside_matrices(name: str) -> str:
    module, _, last = name.rpartition(".")
    return f"{module}.base_layer.{last}"


def base_stays_after_many_exports(engine: Any, batches: list[Any], lr: float) -> None:
    """Bit for bit, with steps of the adapter in between; and the adapter's last step is in the last export."""
    before, first = _hash(engine), merged_weights(engine)
    for number in range(EXPORTS):
        if number % 10 == 5:
            engine.train_step(batches, NextToken(), lr=lr, weight_decay=0.0)
        for _ in hf_tensors(merged_shards(engine.chunks), engine.plan.table):
            pass
    assert _hash(engine) == before
    last = merged_weights(engine)
    assert dist.get_rank() or any(not torch.equal(first[name], last[name]) for name in first)


def _hash(engine: Any) -> str:
    digest = hashlib.sha256()
    for shard in live_shards(engine.chunks):
        digest.update(shard.data.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()

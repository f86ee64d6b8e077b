"""Random initial weights that do not depend on the layout.

Every Hugging Face tensor is drawn whole from a generator seeded by (seed, its name), and each rank keeps its part. So
a run from scratch starts from the same weights under any TP and PP, and no two stages share a random stream.
"""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mcore_swift.models.rules import Norm, Rule, RuleTable, Shape, full_region
from mcore_swift.models.shards import live_shards


@torch.no_grad()
def initialize(chunks: Sequence[nn.Module], table: RuleTable, *, std: float, seed: int) -> None:
    """Matrices from N(0, std^2), norm weights 1 (0 if stored around 0), biases 0, as in transformers."""
    for shard in live_shards(chunks):
        rule = table.by_mcore[shard.key]
        shapes = rule.hf_shapes(shard.global_shape)
        drawn: dict[str, Tensor] = {}
        shard.data.zero_()
        for block in rule.blocks(shard.region, shapes):
            if block.name not in drawn:
                drawn[block.name] = draw(rule, block.name, shapes[block.name], std, seed)
            whole = drawn[block.name]
            block.of(shard.data).copy_(block.stored.view(whole, full_region(tuple(whole.shape)), block.hf))


def draw(rule: Rule, name: str, shape: Shape, std: float, seed: int) -> Tensor:
    """Initial values of the whole HF tensor `name` of the rule. Sinks (one logit per head) are drawn too."""
    if isinstance(rule, Norm):
        return torch.full(shape, rule.initial)
    if name.endswith("bias"):  # also those of experts, which are stacked into a matrix
        return torch.zeros(shape)
    if len(shape) == 1 and not name.endswith("sinks"):
        return torch.ones(shape)
    # torch's CPU generator uses only the lowest 32 bits of a seed
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.empty(shape).normal_(0.0, std, generator=generator)

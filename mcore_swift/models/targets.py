"""Where a model has a loss on a microbatch, and what its multi-token layers read and predict."""

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor


@dataclass
class Ahead:
    """Input and labels of the multi-token layer of depth k: index t holds what is k places further in its sample.

    input_ids, labels: int64 `[b, s]`, 0 past the end of the sample. loss_mask: fp32 `[b, s]`, 0 there.
    positions: int64 `[learnt]`, where loss_mask is not 0, as indices into the flattened labels.
    """

    input_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    positions: Tensor

    @classmethod
    def of(cls, input_ids: Tensor, labels: Tensor, loss_mask: Tensor) -> "Ahead":
        return cls(input_ids, labels, loss_mask, learnt_in(loss_mask))

    def part(self, places: Tensor) -> "Ahead":
        """The same for some of the tokens only: int64 indices along s."""
        return Ahead.of(*(x[:, places] for x in (self.input_ids, self.labels, self.loss_mask)))

    def to(self, device: torch.device) -> "Ahead":
        return Ahead(*(getattr(self, name.name).to(device, non_blocking=True) for name in fields(self)))


@dataclass
class Targets:
    """Where the model has a loss: positions int64 `[learnt]`, indices into the flattened labels.

    ahead: the same for each multi-token layer. padding_mask: bool, true at padding, for the tokens that this rank's
    layers see; the model sets it.
    """

    positions: Tensor
    ahead: list[Ahead] = field(default_factory=list)
    padding_mask: Tensor | None = None

    def to(self, device: torch.device) -> "Targets":
        return Targets(self.positions.to(device, non_blocking=True), [step.to(device) for step in self.ahead])


def learnt_in(loss_mask: Tensor) -> Tensor:
    """Indices into the flattened mask `[b, s]` where it is not 0: int64 `[learnt]`."""
    return loss_mask.reshape(-1).nonzero().squeeze(-1)


def look_ahead(
    input_ids: Tensor, labels: Tensor, loss_mask: Tensor, cu_seqlens: Tensor | None, depth: int
) -> list[Ahead]:
    """The Ahead of depths 1 to `depth`, on the host. Tensors `[b, s]`; cu_seqlens: sample bounds of a packed row."""
    s = input_ids.size(-1)
    if cu_seqlens is None:
        left = torch.arange(s, 0, -1)
    else:
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
        left = torch.repeat_interleave(cu_seqlens[1:].long(), lengths) - torch.arange(s)
    steps = []
    for k in range(1, depth + 1):
        inside = left > k  # `left` counts the tokens to the end of the sample, this one included
        ids, further, mask = (
            torch.where(inside, x.roll(-k, dims=-1), 0) for x in (input_ids, labels, loss_mask)
        )
        steps.append(Ahead.of(ids, further, mask))
    return steps

"""What a step with the router's losses should come to, from transformers' model and a few plain lines."""

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from parity_models import LENGTHS, PROMPT, SIZES, make_model
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

BALANCE, Z = 0.3, 0.01
ROWS = 2
"""Samples of a microbatch."""
PACKED = 50
"""Tokens of a packed microbatch, padding included."""
CAPACITY = 0.6


@dataclass
class ExpertReference:
    """weights: by kind of balance loss, then HF name: after one SGD step of rate 1 on loss + BALANCE * balance loss
    + Z * z-loss; "none": on the main loss alone; "means": with the mean of the microbatches' mean losses as main
    loss, and the balance loss over microbatches; "global_aux_loss 2": on two data-parallel ranks; "probs",
    "position": on the main loss alone, experts having a capacity of CAPACITY and dropping tokens by that policy.
    metrics: by kind, as they are logged. losses: main losses, by kind, where they are not `loss`.
    """

    samples: list[Tensor]
    loss: float = 0.0
    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)


def balance_loss(logits: Tensor, top_k: int, choosing: Tensor | None = None) -> Tensor:
    """logits `[tokens, experts]`. experts * sum of (share of the choices) * (mean probability).

    choosing: logits of the tokens whose choices count, where these are not the same.
    """
    choosing = logits if choosing is None else choosing
    share = functional.one_hot(choosing.topk(top_k).indices, logits.size(-1)).sum((0, 1)) / (
        len(choosing) * top_k
    )
    return logits.size(-1) * (share * logits.softmax(-1).mean(0)).sum()


def make_expert_reference(variant: str, folder: Path) -> None:
    """Write a checkpoint to `folder`/model and its ExpertReference to `folder`/experts.pt."""
    model = make_model(variant, folder / "model")
    top_k = model.config.num_experts_per_tok
    samples = [torch.randint(1, SIZES["vocab_size"], (length,)) for length in LENGTHS]
    reference = ExpertReference(samples)
    original = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for kind in ("none", "aux_loss", "seq_aux_loss", "means", "global_aux_loss", "global_aux_loss 2"):
        logits_of_layers = [[] for _ in range(model.config.num_hidden_layers)]
        hooks = [
            layer.mlp.gate.register_forward_hook(
                lambda gate, given, _, seen=seen: seen.append(
                    given[0].view(-1, gate.weight.size(1)) @ gate.weight.t()
                )
            )
            for layer, seen in zip(model.model.layers, logits_of_layers, strict=True)
            if hasattr(layer.mlp, "gate")
        ]
        logits = [model(input_ids=sample[None]).logits[0] for sample in samples]
        for hook in hooks:
            hook.remove()
        terms = [
            functional.cross_entropy(rows[PROMPT - 1 : -1], sample[PROMPT:], reduction="sum")
            for rows, sample in zip(logits, samples, strict=True)
        ]
        counts = torch.tensor([length - PROMPT for length in LENGTHS])
        loss = torch.stack(terms).sum() / counts.sum()
        reference.loss = loss.item()
        if kind == "means":
            loss = (torch.stack(terms).view(-1, ROWS).sum(1) / counts.view(-1, ROWS).sum(1)).mean()
        sparse = [seen for seen in logits_of_layers if seen]
        if kind != "none":
            loss = loss + _with_metrics(reference, kind, sparse, top_k)
        reference.weights[kind] = _stepped(model, loss, original, folder)
    for policy in ("probs", "position"):
        loss = _loss_with_capacity(model, samples, policy)
        reference.losses[policy] = loss.item()
        reference.weights[policy] = _stepped(model, loss, original, folder)
    torch.save(reference, folder / "experts.pt")


def _stepped(model: Any, loss: Tensor, original: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The checkpoint after one SGD step of rate 1; the model is left as it was."""
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(original[name] - parameter.grad)
    model.save_pretrained(folder / "stepped")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(original[name])
    return load_file(folder / "stepped" / "model.safetensors")


def _loss_with_capacity(model: Any, samples: list[Tensor], policy: str) -> Tensor:
    """Mean loss where an expert takes so many tokens of a microbatch of ROWS samples, packed into a row of PACKED.

    Samples are rows here, padded on the right, which a causal model does not see; tokens are counted row by row.
    """
    terms = []
    for first in range(0, len(samples), ROWS):
        rows = torch.nn.utils.rnn.pad_sequence(samples[first : first + ROWS], batch_first=True)
        real = (rows > 0).flatten()
        hooks = [
            layer.mlp.gate.register_forward_hook(partial(_dropped, real=real, policy=policy))
            for layer in model.model.layers
            if hasattr(layer.mlp, "gate")
        ]
        logits = model(input_ids=rows).logits
        for hook in hooks:
            hook.remove()
        targets = rows[:, PROMPT:].masked_fill(rows[:, PROMPT:] == 0, -100)
        terms.append(
            functional.cross_entropy(
                logits[:, PROMPT - 1 : -1].flatten(0, 1), targets.flatten(), reduction="sum"
            )
        )
    return torch.stack(terms).sum() / sum(length - PROMPT for length in LENGTHS)


def _dropped(
    gate: Any, given: Any, out: tuple[Tensor, Tensor, Tensor], *, real: Tensor, policy: str
) -> tuple[Tensor, Tensor, Tensor]:
    """What the router says, with a score of 0 where an expert has no room for a token."""
    logits, scores, experts = out
    kept = torch.zeros_like(scores)
    room = math.ceil(CAPACITY * PACKED * gate.top_k / gate.num_experts)
    for expert in range(gate.num_experts):
        places = ((experts == expert) & real[:, None]).nonzero().tolist()
        if policy == "probs":
            places.sort(key=lambda place: -scores[place[0], place[1]].item())
        for token, choice in places[:room]:
            kept[token, choice] = 1
    return logits, scores * kept, experts


def _so_far(samples: list[Tensor], first: int, ranks: int) -> Tensor:
    """What all data-parallel ranks have seen when one of them computes the microbatch that starts at sample `first`."""
    share = len(samples) // ranks
    done = first % share + ROWS
    return torch.cat([sample for rank in range(ranks) for sample in samples[rank * share :][:done]])


def _with_metrics(reference: ExpertReference, kind: str, layers: list[list[Tensor]], top_k: int) -> Tensor:
    """The weighted losses of all layers. layers: the router's logits, by layer and sample."""
    balance, z, busiest = [], [], []
    for samples in layers:
        for first in range(0, len(samples), ROWS):
            rows = samples[first : first + ROWS]
            parts = rows if kind == "seq_aux_loss" else [torch.cat(rows)]
            counted = _so_far(samples, first, ranks=1 + kind.endswith("2")) if "global" in kind else None
            balance.append(torch.stack([balance_loss(part, top_k, counted) for part in parts]).mean())
            z.append(torch.cat(rows).logsumexp(-1).square().mean())
        everything = torch.cat(samples)
        loads = functional.one_hot(everything.topk(top_k).indices, everything.size(-1)).sum((0, 1)).float()
        busiest.append(loads.max() / loads.mean())
    mean_balance, mean_z = torch.stack(balance).mean(), torch.stack(z).mean()
    reference.metrics[kind] = {
        "load_balancing_loss": mean_balance.item(),
        "router_z_loss": mean_z.item(),
        "expert_load_max": torch.stack(busiest).mean().item(),
        "expert_load_worst": torch.stack(busiest).max().item(),
    }
    return len(layers) * (BALANCE * mean_balance + Z * mean_z)


BIAS_RATE = 0.1


def make_bias_reference(folder: Path) -> None:
    """A model whose router has a bias: its checkpoint, samples, and the biases after one step, in `folder`/bias.pt."""
    model = make_model("glm4-moe", folder / "model")
    samples = [torch.randint(1, SIZES["vocab_size"], (length,)) for length in LENGTHS]
    expected = {}
    for number, layer in enumerate(model.model.layers):
        if not hasattr(layer.mlp, "gate"):
            continue
        chosen: list[Tensor] = []
        hook = layer.mlp.gate.register_forward_hook(lambda gate, given, out, seen=chosen: seen.append(out[2]))
        for sample in samples:
            model(input_ids=sample[None])
        hook.remove()
        bias = layer.mlp.gate.e_score_correction_bias
        loads = torch.cat(chosen).flatten().bincount(minlength=len(bias)).float()
        # arXiv:2412.19437, section 2.1.2: up where an expert had less than its share, down where more
        name = f"model.layers.{number}.mlp.gate.e_score_correction_bias"
        expected[name] = bias + BIAS_RATE * (loads.mean() - loads).sign()
    torch.save((samples, expected), folder / "bias.pt")

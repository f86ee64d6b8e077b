"""What a step with the router's losses should come to, from transformers' model and a few plain lines."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from parity_models import LENGTHS, PROMPT, SIZES, make_model
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

BALANCE, Z = 0.3, 0.01
ROWS = 2
"""Samples of a microbatch."""


@dataclass
class ExpertReference:
    """weights: by kind of balance loss, then HF name: after one SGD step of rate 1 on loss + BALANCE * balance loss
    + Z * z-loss; "none": on the main loss alone; "means": with the mean of the microbatches' mean losses as main
    loss, and the balance loss over microbatches. metrics: by kind, as they are logged.
    """

    samples: list[Tensor]
    loss: float = 0.0
    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)


def balance_loss(logits: Tensor, top_k: int) -> Tensor:
    """logits `[tokens, experts]`. experts * sum of (share of the choices) * (mean probability)."""
    scores = logits.softmax(-1)
    share = functional.one_hot(scores.topk(top_k).indices, logits.size(-1)).sum((0, 1)) / (
        len(logits) * top_k
    )
    return logits.size(-1) * (share * scores.mean(0)).sum()


def make_expert_reference(variant: str, folder: Path) -> None:
    """Write a checkpoint to `folder`/model and its ExpertReference to `folder`/experts.pt."""
    model = make_model(variant, folder / "model")
    top_k = model.config.num_experts_per_tok
    samples = [torch.randint(1, SIZES["vocab_size"], (length,)) for length in LENGTHS]
    reference = ExpertReference(samples)
    original = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for kind in ("none", "aux_loss", "seq_aux_loss", "means"):
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
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(original[name] - parameter.grad)
        model.save_pretrained(folder / "stepped")
        reference.weights[kind] = load_file(folder / "stepped" / "model.safetensors")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(original[name])
    torch.save(reference, folder / "experts.pt")


def _with_metrics(reference: ExpertReference, kind: str, layers: list[list[Tensor]], top_k: int) -> Tensor:
    """The weighted losses of all layers. layers: the router's logits, by layer and sample."""
    balance, z, busiest = [], [], []
    for samples in layers:
        for first in range(0, len(samples), ROWS):
            rows = samples[first : first + ROWS]
            parts = rows if kind == "seq_aux_loss" else [torch.cat(rows)]
            balance.append(torch.stack([balance_loss(part, top_k) for part in parts]).mean())
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

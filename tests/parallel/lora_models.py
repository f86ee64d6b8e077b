"""peft's results for adapters on the tiny checkpoints: the reference for the adapter grid."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from parity_models import LEARNING_RATE as REFERENCE_RATE
from parity_models import LENGTHS, PROMPT, Reference, reference_of
from parity_multi_token import multi_token_layers, names_of
from safetensors.torch import load_file, save_file
from torch import Tensor

LEARNING_RATE = 1.0
RANK, ALPHA = 3, 5.0
PREFIX = "base_model.model."


@dataclass
class AdapterReference:
    """samples: token ids; logits of each before the step; loss; after: adapter matrices after one plain SGD step."""

    samples: list[Tensor]
    logits: list[Tensor]
    loss: float
    grad_norm: float
    after: dict[str, Tensor]


def make_whole_adapter(model: Path, folder: Path, *, dora: bool = False) -> None:
    """An adapter on every linear layer, even those that peft cannot adapt in transformers' model: experts, which
    transformers keeps fused, and multi-token layers, which it leaves out.

    The reference is transformers' model with W' = W + s B A in place of each W (DoRA: times m / |W'|, with the norm
    excluded from the gradient), and the chain rule from the gradients of W'.
    """
    torch.manual_seed(7)
    weights = load_file(model / "model.safetensors")
    matrices: dict[str, Tensor] = {}
    merged, adapted = dict(weights), [name for name in weights if _is_linear(name)]
    for name in adapted:
        rows, columns = weights[name].shape
        module = PREFIX + name.removesuffix(".weight")
        down, up = torch.randn(RANK, columns) * 0.1, torch.randn(rows, RANK) * 0.1
        matrices |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        merged[name] = weights[name] + ALPHA / RANK * up @ down
        if dora:
            matrices[f"{module}.lora_magnitude_vector"] = magnitude = torch.randn(rows) * 0.1 + 1
            merged[name] *= (magnitude / merged[name].norm(dim=1))[:, None]
    (folder / "adapter").mkdir()
    save_file(matrices, folder / "adapter/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear"}
    (folder / "adapter/adapter_config.json").write_text(json.dumps(config | {"use_dora": dora}))

    reference = _reference_of(model, folder / "merged", merged)
    after, squares = {}, torch.zeros(())
    for name in adapted:
        module = PREFIX + name.removesuffix(".weight")
        gradient = (merged[name] - reference.weights[name]) / REFERENCE_RATE
        down, up = matrices[f"{module}.lora_A.weight"], matrices[f"{module}.lora_B.weight"]
        of_each = {}
        if dora:
            magnitude = matrices[f"{module}.lora_magnitude_vector"]
            direction = merged[name] / magnitude[:, None]
            of_each[f"{module}.lora_magnitude_vector"] = (gradient * direction).sum(dim=1)
            turned = (weights[name] + ALPHA / RANK * up @ down).norm(dim=1)
            gradient = gradient * (magnitude / turned)[:, None]
        of_each[f"{module}.lora_A.weight"] = ALPHA / RANK * up.t() @ gradient
        of_each[f"{module}.lora_B.weight"] = ALPHA / RANK * gradient @ down.t()
        after |= {key: matrices[key] - LEARNING_RATE * value for key, value in of_each.items()}
        squares += sum(value.square().sum() for value in of_each.values())
    found = AdapterReference(
        reference.samples, reference.logits, reference.loss, squares.sqrt().item(), after
    )
    torch.save(found, folder / "reference.pt")


def _is_linear(name: str) -> bool:
    """Whether this is a linear weight of attention, MLP or expert; not a router's, nor a multi-token layer's own."""
    *_, module, kind = name.split(".")
    return kind == "weight" and module.endswith(("_proj", "_proj_with_mqa")) and module != "eh_proj"


def _reference_of(model: Path, folder: Path, weights: dict[str, Tensor]) -> Reference:
    """transformers' results with other weights."""
    import transformers

    shutil.copytree(model, folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float()
    depths = multi_token_layers(whole)
    with torch.no_grad():
        for name, tensor in names_of(whole, depths).items():
            tensor.copy_(weights[name])
    samples = torch.load(model.parent / "reference.pt", weights_only=False).samples
    return reference_of(whole.eval(), depths, samples, folder.with_name("stepped"))


def make_adapter(model: Path, folder: Path, **settings: object) -> None:
    """A random adapter on `model`, as peft saves it in `folder`/adapter, and its AdapterReference."""
    import peft
    import transformers

    torch.manual_seed(7)
    base = transformers.AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").float()
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        **({"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": "all-linear"} | settings),
    )
    adapted = peft.get_peft_model(base, config).eval()
    trained = {name: value for name, value in adapted.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():  # B too: with B = 0 the gradient of A would vanish
            parameter.copy_(torch.randn(parameter.shape) * 0.1 + ("norm" in name or "magnitude" in name))
    adapted.save_pretrained(folder / "adapter")
    leaves = {_name_in_file(name): value for name, value in trained.items()}
    _finish(model, folder, lambda sample: adapted(input_ids=sample[None]).logits[0], leaves)


def _name_in_file(parameter: str) -> str:
    name = parameter.replace(".modules_to_save", "").replace(".default", "")
    return name.removesuffix(".weight") if "magnitude" in name else name


def _finish(
    model: Path, folder: Path, forward: Callable[[Tensor], Tensor], leaves: dict[str, Tensor]
) -> None:
    samples = torch.load(model.parent / "reference.pt", weights_only=False).samples
    logits = [forward(sample) for sample in samples]
    terms = [
        torch.nn.functional.cross_entropy(rows[PROMPT - 1 : -1], sample[PROMPT:], reduction="sum")
        for rows, sample in zip(logits, samples, strict=True)
    ]
    loss = torch.stack(terms).sum() / sum(length - PROMPT for length in LENGTHS)
    loss.backward()
    norm = torch.stack([matrix.grad.norm() for matrix in leaves.values()]).norm()
    after = {name: (value - LEARNING_RATE * value.grad).detach() for name, value in leaves.items()}
    if "base_model.model.lm_head.weight" in load_file(folder / "adapter/adapter_model.safetensors"):
        # a tied weight is saved twice, but is one parameter
        after.setdefault(
            "base_model.model.lm_head.weight", after.get("base_model.model.model.embed_tokens.weight")
        )
    detached = [rows.detach() for rows in logits]
    torch.save(AdapterReference(samples, detached, loss.item(), norm.item(), after), folder / "reference.pt")

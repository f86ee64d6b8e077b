"""What peft says of adapters on the tiny checkpoints: the reference of the adapters' grid."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from parity_models import LENGTHS, PROMPT
from safetensors.torch import load_file
from torch import Tensor

LEARNING_RATE = 1.0
RANK, ALPHA = 3, 5.0


@dataclass
class AdapterReference:
    """samples: token ids; logits of each before the step; loss; after: adapter matrices after one plain SGD step."""

    samples: list[Tensor]
    logits: list[Tensor]
    loss: float
    grad_norm: float
    after: dict[str, Tensor]


def make_expert_adapter(model: Path, folder: Path, *, dora: bool = False) -> None:
    """The same on every linear layer of a model with experts, which transformers keeps fused, so that peft has no
    layers to adapt: the reference is transformers' forward pass with W + scaling * B A in place of each W.
    """
    import transformers
    from safetensors.torch import save_file

    torch.manual_seed(7)
    base = (
        transformers.AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").float().eval()
    )
    weights = load_file(model / "model.safetensors")
    adapted = [name for name in weights if "_proj." in name]
    matrices = {}
    for name in adapted:
        rows, columns = weights[name].shape
        module = f"base_model.model.{name.removesuffix('.weight')}"
        matrices[f"{module}.lora_A.weight"] = torch.randn(RANK, columns) * 0.1
        matrices[f"{module}.lora_B.weight"] = torch.randn(rows, RANK) * 0.1
        if dora:
            matrices[f"{module}.lora_magnitude_vector"] = torch.randn(rows) * 0.1 + 1
    (folder / "adapter").mkdir()
    save_file(matrices, folder / "adapter/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear"}
    config["use_dora"] = dora
    (folder / "adapter/adapter_config.json").write_text(json.dumps(config))

    leaves = {name: matrix.clone().requires_grad_() for name, matrix in matrices.items()}

    def effective(name: str) -> Tensor:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        delta = leaves[f"{module}.lora_B.weight"] @ leaves[f"{module}.lora_A.weight"]
        turned = weights[name] + ALPHA / RANK * delta
        if dora:
            turned = (leaves[f"{module}.lora_magnitude_vector"] / turned.norm(dim=1).detach())[
                :, None
            ] * turned
        return turned

    def parameters() -> dict[str, Tensor]:
        state = {name: effective(name) for name in adapted if ".experts." not in name}
        experts = base.config.num_experts
        for name in base.state_dict():
            prefix = name.rpartition(".experts.")[0]
            if name.endswith(".experts.gate_up_proj"):
                pairs = [
                    [effective(f"{prefix}.experts.{n}.{part}_proj.weight") for part in ("gate", "up")]
                    for n in range(experts)
                ]
                state[name] = torch.stack([torch.cat(pair) for pair in pairs])
            elif name.endswith(".experts.down_proj"):
                state[name] = torch.stack(
                    [effective(f"{prefix}.experts.{n}.down_proj.weight") for n in range(experts)]
                )
        return state

    def forward(sample: Tensor) -> Tensor:
        return torch.func.functional_call(base, parameters(), kwargs={"input_ids": sample[None]}).logits[0]

    _finish(model, folder, forward, leaves)


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
        for name, parameter in trained.items():  # B too: zero would hide what A's gradient is
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
        # a tied one is saved twice, and is one parameter
        after.setdefault(
            "base_model.model.lm_head.weight", after.get("base_model.model.model.embed_tokens.weight")
        )
    detached = [rows.detach() for rows in logits]
    torch.save(AdapterReference(samples, detached, loss.item(), norm.item(), after), folder / "reference.pt")

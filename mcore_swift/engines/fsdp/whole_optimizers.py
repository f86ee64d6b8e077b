"""Optimizers that need whole matrices, or come from packages that support only plain tensors.

Muon and GaLore decompose matrices, Adafactor averages over rows and columns, and 8-bit states are quantized in blocks:
on shards of matrices they would compute something else. They run only where a process holds whole parameters, and get
the memory of each parameter as a plain tensor.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mcore_swift.engines.fsdp.dtensor import local
from mcore_swift.errors import UserError

Group = dict[str, Any]


class WholeTensorOptimizer:
    """One or several optimizers over plain tensors that share the memory of the model's parameters."""

    def __init__(
        self, makers: Sequence[tuple[Callable[[list[Group]], torch.optim.Optimizer], list[Group]]]
    ) -> None:
        """makers: pairs of a function that builds an optimizer from parameter groups, and those groups."""
        self._twins: dict[nn.Parameter, nn.Parameter] = {}
        self._of: dict[nn.Parameter, torch.optim.Optimizer] = {}
        self._inner = []
        for make, groups in makers:
            if not groups:
                continue
            optimizer = make(
                [group | {"params": [self._twin(p) for p in group["params"]]} for group in groups]
            )
            self._of |= {parameter: optimizer for group in groups for parameter in group["params"]}
            self._inner.append(optimizer)

    def _twin(self, parameter: nn.Parameter) -> nn.Parameter:
        self._twins[parameter] = nn.Parameter(local(parameter).detach())
        return self._twins[parameter]

    @property
    def param_groups(self) -> list[Group]:
        return [group for optimizer in self._inner for group in optimizer.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self._twins:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for parameter, twin in self._twins.items():
            twin.grad = None if parameter.grad is None else local(parameter.grad)
        self._step()

    @torch.no_grad()
    def make_states(self) -> None:
        """Create the state that the first step creates, without changing a parameter."""
        before = [(group["lr"], group["weight_decay"]) for group in self.param_groups]
        for group in self.param_groups:
            group["lr"], group["weight_decay"] = 0.0 * group["lr"], 0.0
        for twin in self._twins.values():
            twin.grad = torch.zeros_like(twin)
        self._step()
        for group, (lr, decay) in zip(self.param_groups, before, strict=True):
            group["lr"], group["weight_decay"] = lr, decay

    def _step(self) -> None:
        for optimizer in self._inner:
            optimizer.step()
        for twin in self._twins.values():
            twin.grad = None

    def states(self) -> Iterator[dict[str, Any]]:
        """The state of each parameter."""
        return (self._of[parameter].state[twin] for parameter, twin in self._twins.items())

    def tensors(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The state tensors of a parameter that a checkpoint needs, by name, without constant 8-bit lookup tables."""
        state = self._of[parameter].state[self._twins[parameter]]
        kept = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        projector = state.get("projector")
        if projector is not None:
            kept["ortho_matrix"] = projector.ortho_matrix
        return {name: value for name, value in kept.items() if name != "step" and "qmap" not in name}


def build_whole_optimizer(model: nn.Module, groups: list[Group], args: Any) -> WholeTensorOptimizer:
    """The optimizer that `args.optimizer` names, over groups of the model's parameters.

    Raises UserError for a package that is not installed.
    """
    betas = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_eps}

    def adamw(groups: list[Group]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=args.lr, **betas)

    name = args.optimizer
    if name == "adafactor":
        return WholeTensorOptimizer([(lambda groups: torch.optim.Adafactor(groups, lr=args.lr), groups)])
    if name in ("muon", "galore_adamw"):
        matrices, others = _divided(groups, _matrices(model))
        make = _muon(args) if name == "muon" else _galore(args, betas)
        return WholeTensorOptimizer([(make, matrices), (adamw, others)])
    return WholeTensorOptimizer([(_of_bitsandbytes(name, args, betas), groups)])


def _muon(args: Any) -> Callable[[list[Group]], torch.optim.Optimizer]:
    """Muon, scaled to AdamW's update size (arXiv:2502.16982), so that both use the same learning rate."""
    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"--optim muon: torch {torch.__version__} has none", "install torch 2.9 or later")
    return lambda groups: torch.optim.Muon(groups, lr=args.lr, adjust_lr_fn="match_rms_adamw")


def _galore(args: Any, betas: dict[str, Any]) -> Callable[[list[Group]], torch.optim.Optimizer]:
    try:
        from galore_torch import GaLoreAdamW
    except ImportError as error:
        raise UserError(
            f"--optim galore_adamw needs the package galore-torch ({error})", "pip install galore-torch"
        ) from None
    projected = {
        "rank": args.galore_rank,
        "update_proj_gap": args.galore_update_proj_gap,
        "scale": args.galore_scale,
        "proj_type": args.galore_proj_type,
    }
    return lambda groups: GaLoreAdamW(
        [group | projected for group in groups], lr=args.lr, no_deprecation_warning=True, **betas
    )


def _of_bitsandbytes(
    name: str, args: Any, betas: dict[str, Any]
) -> Callable[[list[Group]], torch.optim.Optimizer]:
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            f"--optim {name} needs the package bitsandbytes ({error})", "pip install bitsandbytes"
        ) from None
    warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")
    names = {
        "adamw_8bit": "AdamW8bit",
        "paged_adamw_8bit": "PagedAdamW8bit",
        "paged_adamw_32bit": "PagedAdamW32bit",
    }
    make = getattr(bitsandbytes.optim, names[name])
    return lambda groups: make(groups, lr=args.lr, **betas)


def _matrices(model: Any) -> set[nn.Parameter]:
    """Trained two-dimensional parameters, without embedding and output layer."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    ends = {module.weight for module in (base.get_input_embeddings(), base.get_output_embeddings()) if module}
    return {p for p in model.parameters() if p.requires_grad and p.dim() == 2 and p not in ends}


def _divided(groups: list[Group], chosen: set[nn.Parameter]) -> tuple[list[Group], list[Group]]:
    """Split the groups into those of the `chosen` parameters and those of the others."""
    halves: tuple[list[Group], list[Group]] = ([], [])
    for group in groups:
        for half, is_wanted in zip(halves, (True, False), strict=True):
            own = [parameter for parameter in group["params"] if (parameter in chosen) == is_wanted]
            if own:
                half.append(group | {"params": own})
    return halves

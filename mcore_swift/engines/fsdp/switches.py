"""How a transformers model computes: recomputation, Liger's kernels, torch.compile, noise on embeddings."""

import importlib.util
from typing import Any

from torch import nn

from mcore_swift.accelerator import get_accelerator
from mcore_swift.engines.fsdp.model import blocks_of
from mcore_swift.errors import UserError


def recompute_layers(model: Any, settings: dict[str, Any], *, adapters: bool, processes: int) -> None:
    """Gradient checkpointing of each layer. settings: arguments of torch.utils.checkpoint.

    adapters: the first layer's input has no gradient of its own, which the reentrant form needs.
    Raises UserError for the reentrant form on several processes.
    """
    settings = {"use_reentrant": False} | settings
    if settings["use_reentrant"] and processes > 1:
        raise UserError(
            "--gradient_checkpointing_kwargs: the reentrant form does not work with weights that are gathered",
            'give {"use_reentrant": false}, which computes the same',
        )
    if settings["use_reentrant"] and adapters:
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable(settings)


def use_liger(model: Any) -> None:
    """Put Liger's kernels into a model: norms, rotary embedding, MLP. Raises UserError where they cannot run."""
    if not get_accelerator().is_cuda or importlib.util.find_spec("triton") is None:
        raise UserError("--use_liger_kernel: Liger's kernels are written in Triton and need a GPU", "drop it")
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError(
            "--use_liger_kernel: the package liger-kernel is not installed", "pip install liger-kernel"
        )
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(
            f"--use_liger_kernel: Liger knows no models of type {model.config.model_type}", "drop it"
        )
    # The objective computes the loss, over the positions that have one.
    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)


def add_noise(model: Any, alpha: float) -> None:
    """NEFTune: in training, add uniform noise in +-alpha / sqrt(length * width) to embeddings (arXiv:2310.05914)."""
    from transformers.integrations.neftune import neftune_post_forward_hook

    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = alpha
    embeddings.register_forward_hook(neftune_post_forward_hook)


def compile_layers(model: nn.Module, backend: str) -> None:
    """Have each layer of a model compiled on its first call. Raises UserError if there is no compiler."""
    if backend == "inductor" and (missing := _missing_compiler()):
        raise UserError(f"--torch_compile: {missing}", "install it, or drop --torch_compile")
    for layer in blocks_of(model) or [model]:
        layer.compile(backend=backend)


def _missing_compiler() -> str:
    if get_accelerator().is_cuda:
        return (
            ""
            if importlib.util.find_spec("triton")
            else "there is no Triton here, which it compiles for GPUs with"
        )
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return "there is no C++ compiler here (g++ or clang++)"
    return ""

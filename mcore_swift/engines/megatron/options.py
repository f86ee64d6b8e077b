"""Fields of megatron-core's TransformerConfig that come from the user's flags: recomputation and fused kernels."""

import importlib.util
from typing import Any

from mcore_swift.accelerator import get_accelerator
from mcore_swift.models.specs import have_transformer_engine


def model_options(args: Any, implementation: str, *, experts: bool) -> dict[str, Any]:
    """Fields of TransformerConfig that come from the user's flags rather than from the model."""
    recompute, parts = args.recompute_granularity, list(args.recompute_modules)
    if experts and getattr(args, "moe_layer_recompute", False) and "moe" not in parts:
        parts.append("moe")
    if implementation == "transformer_engine" and recompute == "selective" and "core_attn" in parts:
        # its attention does not store the scores, so recomputing it would save nothing
        parts.remove("core_attn")
        recompute = "selective" if parts else "none"
    options: dict[str, Any] = {
        "calculate_per_token_loss": args.calculate_per_token_loss is not False,
        "attention_softmax_in_fp32": args.attention_softmax_in_fp32,
        "transformer_impl": implementation,
    }
    if recompute != "none":
        options["recompute_granularity"] = recompute
    if recompute == "full":
        options["recompute_method"] = args.recompute_method or "uniform"
        options["recompute_num_layers"] = args.recompute_num_layers or 1
    if recompute == "selective":
        options["recompute_modules"] = parts
    if get_accelerator().is_cuda:
        options |= {name: getattr(args, name) for name in _FUSIONS}
        # these kernels come with other packages; without them plain operations give the same result
        options["gradient_accumulation_fusion"] &= _installed("fused_weight_gradient_mlp_cuda")
        options["apply_rope_fusion"] &= have_transformer_engine()
    return options


_FUSIONS = (
    "masked_softmax_fusion",
    "bias_dropout_fusion",
    "bias_activation_fusion",
    "apply_rope_fusion",
    "gradient_accumulation_fusion",
    "cross_entropy_loss_fusion",
)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None

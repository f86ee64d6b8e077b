"""transformers models whose frozen weights are quantized, on loading or already in the checkpoint.

Each process holds such a model whole on its own device; only the adapters are data parallel. On loading, weights are
quantized one by one, so that at most one of them is in memory in full precision.
"""

import time
import warnings
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from converters.hf_reader import HFReader
from mcore_swift.accelerator import get_accelerator
from mcore_swift.engines.fsdp.model import TransformersPlan, first_line
from mcore_swift.errors import UserError
from mcore_swift.plan.quantization import stored_method

_REPEATED_WARNINGS = (
    r"MatMul8bitLt: inputs will be cast",
    r".*Casting input to.*8bit",
    r".*to float16 during quantization",
)


def is_quantized(plan: TransformersPlan, args: Any) -> bool:
    """Whether --quant_method is given, or the checkpoint is quantized in a form that transformers computes with."""
    return bool(args.quant_method) or stored_method(plan.hf.to_dict()) is not None


def check_trainable(args: Any, *, is_sharded: bool, has_adapters: bool) -> None:
    """Raise UserError for what quantized weights cannot be: trained, sharded, or placed on several devices."""
    if not has_adapters:
        raise UserError(
            f"{args.model}: quantized weights cannot be trained, and --tuner_type full trains all of them",
            "add --tuner_type lora",
        )
    if args.device_map and torch.cuda.device_count() > 1:
        raise UserError(
            f"--device_map {args.device_map}: quantized weights stay on one device", "drop --device_map"
        )
    if is_sharded:
        raise UserError(
            "--backend fsdp shards weights over the processes, and quantized ones stay whole on each",
            "use --backend ddp",
        )


def load_quantized(
    plan: TransformersPlan, args: Any, attention: str | None, dtype: torch.dtype
) -> tuple[nn.Module, str]:
    """The model on this process's device, and a line for the log.

    dtype: of weights that are not quantized. FP8 and MXFP4 checkpoints are dequantized and quantized again.
    Raises UserError for a form that transformers cannot train adapters on, or whose package is missing.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    for text in _REPEATED_WARNINGS:  # bitsandbytes warns for each layer in each step
        warnings.filterwarnings("ignore", message=text)
    started = time.monotonic()
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": get_accelerator().device}}
    if attention:
        options["attn_implementation"] = attention
    if args.quant_method:
        how = f"quantized to {args.quant_bits} bits by {args.quant_method}"
    else:
        how = f"quantized by {stored_method(plan.hf.to_dict())}"
    _check_form(plan, args, dtype, how, options["device_map"])
    try:
        if args.quant_method:
            model, told = _quantized_as_read(plan, args, dtype, options)
        else:
            model, told = AutoModelForCausalLM.from_pretrained(
                args.model, output_loading_info=True, **options
            )
    except (
        ImportError,
        NotImplementedError,
        OSError,
    ) as error:  # a package, a form, a file; the rest is ours
        raise UserError(f"{args.model}: {first_line(error)}", _remedy(args)) from None
    if told["missing_keys"] or told["mismatched_keys"]:
        names = sorted(map(str, (*told["missing_keys"], *told["mismatched_keys"])))[:5]
        raise UserError(
            f"{args.model} does not hold {', '.join(names)}", "copy or download the checkpoint again"
        )
    model.config.use_cache = False
    model.name_or_path = args.model  # peft saves it as the adapter's base
    return model.train(), f"weights {how}, read in {time.monotonic() - started:.1f} s"


def _check_form(
    plan: TransformersPlan, args: Any, dtype: torch.dtype, how: str, device_map: dict[str, Any]
) -> None:
    """Raise UserError where transformers' own check says that it, or a package, cannot compute with such weights here.

    Only its check is asked, so that an error of another kind, while the model is read, is not told as the user's.
    """
    from transformers.quantizers import AutoHfQuantizer

    try:
        if args.quant_method:
            settings = quantization_config(args, dtype)
        else:
            stored = plan.hf.to_dict()
            settings = deepcopy(stored.get("quantization_config") or stored["compression_config"])
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=not args.quant_method)
        quantizer.validate_environment(device_map=device_map, weights_only=True)
    except (ImportError, NotImplementedError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{args.model}: weights {how}: {first_line(error)}", _remedy(args)) from None
    if not quantizer.is_trainable:
        raise UserError(
            f"{args.model}: transformers does not train adapters beside weights {how}", _remedy(args)
        )


def _quantized_as_read(
    plan: TransformersPlan, args: Any, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    config = deepcopy(plan.hf)
    for name in ("quantization_config", "compression_config"):
        if hasattr(config, name):
            delattr(config, name)
    cls = AutoModelForCausalLM._model_mapping[type(config)]
    with HFReader(args.model) as reader:
        return cls.from_pretrained(
            None,
            config=config,
            state_dict={name: _Unread(reader, name) for name in reader.names},
            quantization_config=quantization_config(args, dtype),
            output_loading_info=True,
            **options,
        )


class _Unread:
    """A lazy tensor of a checkpoint: it is read when transformers indexes it with `[...]`."""

    def __init__(self, reader: HFReader, name: str) -> None:
        self.reader, self.name = reader, name

    def __getitem__(self, index: Any) -> Tensor:
        return self.reader.read(self.name)[index]


def number_of_values(parameter: nn.Parameter) -> int:
    """Number of weights in a parameter, which may be packed, several to a byte."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else parameter.numel()


def quantization_config(args: Any, dtype: torch.dtype) -> Any:
    """transformers' quantization config for `--quant_method` and its settings."""
    import transformers

    if args.quant_method == "bnb":
        compute = getattr(torch, args.bnb_4bit_compute_dtype) if args.bnb_4bit_compute_dtype else dtype
        storage = getattr(torch, args.bnb_4bit_quant_storage) if args.bnb_4bit_quant_storage else torch.uint8
        return transformers.BitsAndBytesConfig(
            load_in_4bit=args.quant_bits == 4,
            load_in_8bit=args.quant_bits == 8,
            bnb_4bit_compute_dtype=compute,
            bnb_4bit_quant_type=args.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=args.bnb_4bit_use_double_quant,
            bnb_4bit_quant_storage=storage,
        )
    if args.quant_method == "hqq":
        return transformers.HqqConfig(nbits=args.quant_bits, **_given(axis=args.hqq_axis))
    if args.quant_method == "quanto":
        return transformers.QuantoConfig(weights=f"int{args.quant_bits}")
    return transformers.EetqConfig(f"int{args.quant_bits}")


def _given(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _remedy(args: Any) -> str:
    if args.quant_method:
        return "use --quant_method bnb, or drop it"
    return "give the checkpoint of the same model that is not quantized, with --quant_method bnb if it has to be small"

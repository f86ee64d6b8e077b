"""Which quantized Hugging Face checkpoints can be read, judged by what config.json says about storage."""

import importlib.util
from typing import Any

from ..errors import UserError

READABLE = {"fp8": "FP8 in blocks with their scales", "mxfp4": "MXFP4"}
"""`quant_method` of what converters/dequantize.py reads."""

PACKAGES = {
    "bitsandbytes": ("bitsandbytes",),
    "gptq": ("gptqmodel", "optimum"),
    "awq": ("gptqmodel",),
    "hqq": ("hqq",),
    "compressed-tensors": ("compressed-tensors",),
    "torchao": ("torchao",),
    "quanto": ("optimum-quanto",),
    "eetq": ("kernels",),
}
"""`quant_method` of what transformers computes with, and the packages it does that with."""
_MODULES = {"compressed-tensors": "compressed_tensors", "optimum-quanto": "optimum.quanto"}
_METHOD_OF_FLAG = {"bnb": "bitsandbytes"}

REMEDY = "give the checkpoint of the same model that is not quantized (bfloat16)"


def quantization_problems(config: dict[str, Any], source: str) -> list[UserError]:
    """Why the weights that a config.json describes cannot be read; empty if they can.

    source: names the file in messages.
    """
    settings = config.get("quantization_config") or config.get("compression_config")
    if settings is None:
        return []
    if not isinstance(settings, dict):
        return [UserError(f"{source}: quantization_config is no object", "copy the file again")]
    method = settings.get("quant_method")
    if method not in READABLE:
        kinds = ", ".join(f"{name} ({what})" for name, what in READABLE.items())
        return [
            UserError(f"{source}: weights quantized by {method!r} cannot be read; {kinds} can", REMEDY),
        ]
    if method == "fp8":
        return _fp8_problems(settings, source)
    return []


def _fp8_problems(settings: dict[str, Any], source: str) -> list[UserError]:
    block = settings.get("weight_block_size")
    whole = isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int for n in block)
    if not whole or min(block) < 1:
        return [
            UserError(
                f"{source}: fp8 weights with weight_block_size {block!r} cannot be read, only those with a"
                " scale for each block, such as [128, 128]",
                REMEDY,
            )
        ]
    if settings.get("fmt", "e4m3") != "e4m3":
        return [UserError(f"{source}: fp8 weights of format {settings['fmt']!r}; e4m3 can be read", REMEDY)]
    return []


def stored_method(config: dict[str, Any]) -> str | None:
    """`quant_method` if the weights stay quantized, which only transformers can compute with; None for others."""
    settings = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(settings, dict):
        return None
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"  # written by early versions
    return None if method in READABLE else method


def problems_beside_adapters(args: Any, config: dict[str, Any], source: str) -> list[UserError]:
    """Why a transformers run cannot use the weights that a config.json describes, stored quantized or to be quantized.

    Formats that are read as plain weights have no restriction; the others can only be trained with adapters.
    """
    method = stored_method(config)
    if method not in PACKAGES:
        return quantization_problems(config, source) + package_problems(args.quant_method)
    if args.tuner_type == "full":
        return [
            UserError(
                f"{source}: weights quantized by {method} cannot be trained, and --tuner_type full trains all of them",
                f"add --tuner_type lora, or {REMEDY}",
            )
        ]
    if args.quant_method:
        return [
            UserError(
                f"--quant_method {args.quant_method}: the weights are quantized by {method}", "drop it"
            ),
        ]
    return package_problems(method, source)


def package_problems(method: str | None, source: str = "--quant_method") -> list[UserError]:
    """Errors for packages that `method` needs and that are not installed. source: the flag or file that names it."""
    needed = PACKAGES.get(_METHOD_OF_FLAG.get(method or "", method or ""), ())
    missing = [name for name in needed if not _installed(_MODULES.get(name, name))]
    if not missing:
        return []
    names = " and ".join(missing)
    return [
        UserError(
            f"{source}: weights quantized by {method} need what is not installed: {names}",
            f"pip install {' '.join(missing)}",
        )
    ]


def _installed(module: str) -> bool:
    parent, _, child = module.rpartition(".")
    if parent and importlib.util.find_spec(parent) is None:
        return False
    return importlib.util.find_spec(module) is not None

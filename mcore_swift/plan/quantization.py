"""Which quantized Hugging Face checkpoints can be read: config.json says how its weights are stored."""

from typing import Any

from ..errors import UserError

READABLE = {"fp8": "FP8 in blocks with their scales", "mxfp4": "MXFP4"}
"""`quant_method` of what converters/dequantize.py reads."""

REMEDY = "give the checkpoint of the same model that is not quantized (bfloat16)"


def quantization_problems(config: dict[str, Any], source: str) -> list[UserError]:
    """What keeps the weights beside a config.json from being read; source names the file in messages."""
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

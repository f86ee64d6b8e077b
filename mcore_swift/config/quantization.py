"""Quantized frozen weights beside trained adapters (QLoRA, arXiv:2305.14314)."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from ..errors import UserError
from .base import Arguments
from .fields import arg

BITS = {"bnb": (4, 8), "hqq": (1, 2, 3, 4, 8), "eetq": (8,), "quanto": (2, 4, 8)}
"""Values of --quant_method, and the numbers of bits that each supports."""

_STORED = "it quantizes with calibration data: give a checkpoint that is already in that form"


@dataclasses.dataclass(kw_only=True)
class QuantizationArguments(Arguments):
    TITLE: ClassVar[str] = "Quantized weights"

    quant_method: str | None = arg(
        None,
        "with adapters: quantize the frozen weights of linear layers to --quant_bits bits while they are read, with "
        "bitsandbytes (bnb), hqq, eetq or optimum-quanto (quanto); megatron-core's layers support bnb",
        choices=tuple(BITS),
        refused={
            "fp8": "adapters cannot be trained beside FP8 weights; an FP8 checkpoint is read as bfloat16, or quantized "
            "again by --quant_method bnb",
            **dict.fromkeys(("awq", "gptq", "gptq_v2"), _STORED),
        },
    )
    quant_bits: int | None = arg(None, "bits per weight; bnb: 4 or 8", at_least=1, at_most=8)
    load_in_4bit: bool = arg(False, "short for --quant_method bnb --quant_bits 4")
    load_in_8bit: bool = arg(False, "short for --quant_method bnb --quant_bits 8")
    bnb_4bit_compute_dtype: str | None = arg(
        None,
        "precision of matrix products with 4-bit weights",
        choices=("float16", "bfloat16", "float32"),
        default_text="--torch_dtype",
    )
    bnb_4bit_quant_type: str = arg(
        "nf4",
        "the 16 values of a 4-bit weight: quantiles of a normal distribution (nf4), or floats (fp4)",
        choices=("nf4", "fp4"),
    )
    bnb_4bit_use_double_quant: bool = arg(
        True, "quantize the scale of each block of 64 weights too, to 8 bits in blocks of 256"
    )
    bnb_4bit_quant_storage: str | None = arg(
        None,
        "dtype of the tensors that hold the packed bits",
        choices=("uint8", "float16", "bfloat16", "float32"),
        default_text="uint8",
    )
    hqq_axis: int | None = arg(None, "axis along which hqq groups weights", at_least=0, at_most=1)

    def fill(self) -> None:
        for bits, short in ((4, self.load_in_4bit), (8, self.load_in_8bit)):
            if short and self.quant_method is None and self.quant_bits is None:
                self.quant_method, self.quant_bits = "bnb", bits

    def check(self) -> Iterator[UserError]:
        for bits, short in ((4, self.load_in_4bit), (8, self.load_in_8bit)):
            if short and (self.quant_method, self.quant_bits) != ("bnb", bits):
                yield UserError(
                    f"--load_in_{bits}bit means --quant_method bnb --quant_bits {bits}, and another is given too",
                    "give one of them",
                )
                return
        method, bits = self.quant_method, self.quant_bits
        if (method is None) != (bits is None):
            given, missing = (
                ("quant_bits", "quant_method") if method is None else ("quant_method", "quant_bits")
            )
            yield UserError(f"--{given} without --{missing}", f"add --{missing}")
            return
        if method is not None and bits not in BITS[method]:
            known = ", ".join(map(str, BITS[method]))
            yield UserError(f"--quant_bits {bits}: {method} knows {known}", f"give one of {known}")
        if self.hqq_axis is not None and method != "hqq":
            yield UserError("--hqq_axis is a setting of hqq", "drop it, or give --quant_method hqq")
        if method is None:
            return
        if getattr(self, "tuner_type", None) == "full":
            yield UserError(
                "--quant_method: quantized weights cannot be trained, and --tuner_type full trains all of them",
                "add --tuner_type lora, or drop the quantization",
            )
        if getattr(self, "perform_initialization", False):
            yield UserError(
                "--perform_initialization: random weights would be frozen and quantized",
                "give a model with weights, or drop the quantization",
            )
        if self.PROGRAM == "megatron":
            yield from self._on_megatron()

    def _on_megatron(self) -> Iterator[UserError]:
        if (self.quant_method, self.quant_bits) != ("bnb", 4):
            yield UserError(
                f"--quant_method {self.quant_method} --quant_bits {self.quant_bits}: on megatron-core's layers, only "
                "4 bits of bitsandbytes are supported",
                "give --quant_method bnb --quant_bits 4, or use `swift sft --backend ddp`",
            )
        given = {
            "bnb_4bit_compute_dtype": getattr(self, "torch_dtype", None),
            "bnb_4bit_quant_storage": "uint8",
        }
        for name, harmless in given.items():
            if getattr(self, name) not in (None, harmless):
                yield UserError(
                    f"--{name} {getattr(self, name)}: not supported on megatron-core's layers, which multiply in the "
                    "precision of the model and store bits as uint8",
                    f"drop --{name}",
                )
        if getattr(self, "transformer_impl", "") == "transformer_engine":
            yield UserError(
                "--transformer_impl transformer_engine: its layers do not support 4-bit weights",
                "use --transformer_impl local",
            )

"""Frozen weights in few bits beside adapters that train (QLoRA, arXiv:2305.14314)."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from ..errors import UserError
from .base import Arguments
from .fields import arg

BITS = {"bnb": (4, 8), "hqq": (1, 2, 3, 4, 8), "eetq": (8,), "quanto": (2, 4, 8)}
"""Values of --quant_method, and how many bits each can keep a weight in."""

_STORED = (
    "weights are brought to it with sample data: give the folder of a checkpoint that is in that form already"
)


@dataclasses.dataclass(kw_only=True)
class QuantizationArguments(Arguments):
    TITLE: ClassVar[str] = "Quantized weights"

    quant_method: str | None = arg(
        None,
        "keep the weights of linear layers in --quant_bits bits, quantized as they are read: by bitsandbytes (bnb), "
        "hqq, eetq or optimum-quanto (quanto); megatron-core's layers know bnb. For adapters only",
        choices=tuple(BITS),
        refused={
            "fp8": "adapters do not train beside weights in FP8; a checkpoint in FP8 is read as bfloat16, or is "
            "quantized anew by --quant_method bnb",
            **dict.fromkeys(("awq", "gptq", "gptq_v2"), _STORED),
        },
    )
    quant_bits: int | None = arg(None, "bits of a weight; bnb: 4 or 8", at_least=1, at_most=8)
    load_in_4bit: bool = arg(False, "short for --quant_method bnb --quant_bits 4")
    load_in_8bit: bool = arg(False, "short for --quant_method bnb --quant_bits 8")
    bnb_4bit_compute_dtype: str | None = arg(
        None,
        "precision that 4-bit weights are multiplied in",
        choices=("float16", "bfloat16", "float32"),
        default_text="--torch_dtype",
    )
    bnb_4bit_quant_type: str = arg(
        "nf4",
        "values that 4 bits stand for: quantiles of a normal distribution, or floats",
        choices=("nf4", "fp4"),
    )
    bnb_4bit_use_double_quant: bool = arg(
        True, "keep the scale of each block of 64 weights in 8 bits, with a scale for each 256 of them"
    )
    bnb_4bit_quant_storage: str | None = arg(
        None,
        "type of the tensors that hold the packed bits",
        choices=("uint8", "float16", "bfloat16", "float32"),
        default_text="uint8",
    )
    hqq_axis: int | None = arg(None, "axis that hqq groups weights along", at_least=0, at_most=1)

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
                "--perform_initialization: random weights stay as they are beside adapters, and quantized at that",
                "give a model with weights, or drop the quantization",
            )
        if self.PROGRAM == "megatron":
            yield from self._on_megatron()

    def _on_megatron(self) -> Iterator[UserError]:
        if (self.quant_method, self.quant_bits) != ("bnb", 4):
            yield UserError(
                f"--quant_method {self.quant_method} --quant_bits {self.quant_bits}: megatron-core's layers keep "
                "weights in 4 bits by bitsandbytes, and in no other form",
                "give --quant_method bnb --quant_bits 4, or use `swift sft --backend ddp`",
            )
        given = {
            "bnb_4bit_compute_dtype": getattr(self, "torch_dtype", None),
            "bnb_4bit_quant_storage": "uint8",
        }
        for name, harmless in given.items():
            if getattr(self, name) not in (None, harmless):
                yield UserError(
                    f"--{name} {getattr(self, name)}: on megatron-core's layers it is not a choice; they multiply in "
                    "the precision of the model, and bits are kept in uint8",
                    f"drop --{name}",
                )
        if getattr(self, "transformer_impl", "") == "transformer_engine":
            yield UserError(
                "--transformer_impl transformer_engine: its layers do not keep weights in 4 bits",
                "use --transformer_impl local",
            )

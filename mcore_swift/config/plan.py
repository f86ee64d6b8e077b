"""The arguments of `mcore-swift plan`: a model, GPUs, a batch, and sizes that are fixed in advance."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from ..errors import UserError
from .base import Arguments
from .fields import arg

_FREE = "chosen by the planner"


@dataclasses.dataclass(kw_only=True)
class MachineArguments(Arguments):
    TITLE: ClassVar[str] = "Model and machine"

    model: str | None = arg(
        None, "folder of a Hugging Face checkpoint, or its config.json; no weights are needed"
    )
    gpu: str | None = arg(None, "kind of GPU, such as h100, h200, a100, b200; a wrong name lists all")
    num_gpus: int | None = arg(None, "GPUs of the whole run", at_least=1)
    gpus_per_node: int | None = arg(
        None, "GPUs that fast links (NVLink) join", at_least=1, default_text="as that kind is sold: mostly 8"
    )
    memory_gib: float | None = arg(
        None, "memory of a GPU that training may use", above=0, default_text="95 % of what that kind has"
    )


@dataclasses.dataclass(kw_only=True)
class WorkloadArguments(Arguments):
    TITLE: ClassVar[str] = "Training"

    command: str = arg("sft", "command the answer is written for", choices=("sft", "pt"))
    tuner_type: str = arg(
        "full",
        "which parameters train: all, or low-rank adapters on every linear layer",
        choices=("full", "lora"),
        refused={"lora_llm": "it is for models with a vision part, which are not supported yet"},
    )
    lora_rank: int = arg(8, "with lora: rows of A and columns of B", at_least=1)
    load_in_4bit: bool = arg(False, "with lora: keep the frozen weights of linear layers in 4 bits")
    max_length: int = arg(4096, "tokens of a row; rows are taken to be full, as with packing", above=1)
    global_batch_size: int = arg(256, "rows of one step, over all GPUs", at_least=1)
    micro_batch_size: int | None = arg(None, "rows one GPU takes at a time", at_least=1, default_text=_FREE)
    torch_dtype: str = arg(
        "bfloat16", "precision of parameters and activations", choices=("bfloat16", "float32")
    )
    optimizer: str = arg("adam", "update rule", choices=("adam", "sgd"))
    use_distributed_optimizer: bool = arg(
        True, "every data-parallel process keeps only its share of the optimizer state"
    )
    accumulate_allreduce_grads_in_fp32: bool = arg(True, "keep gradients in float32")
    recompute_granularity: str | None = arg(
        None,
        "what the backward pass computes again",
        choices=("none", "selective", "full"),
        default_text="as little as fits",
    )
    recompute_modules: list[str] = arg(
        ["core_attn"],
        "parts that selective recomputes",
        choices=("core_attn", "layernorm", "mlp", "moe", "moe_act", "mla_up_proj"),
    )


@dataclasses.dataclass(kw_only=True)
class FixedSizeArguments(Arguments):
    TITLE: ClassVar[str] = "Sizes to fix"

    tensor_model_parallel_size: int | None = arg(None, "TP", at_least=1, default_text=_FREE)
    pipeline_model_parallel_size: int | None = arg(None, "PP", at_least=1, default_text=_FREE)
    virtual_pipeline_model_parallel_size: int | None = arg(
        None, "VPP; 1 does not interleave", at_least=1, default_text=_FREE
    )
    context_parallel_size: int | None = arg(None, "CP", at_least=1, default_text=_FREE)
    expert_model_parallel_size: int | None = arg(None, "EP", at_least=1, default_text=_FREE)
    expert_tensor_parallel_size: int | None = arg(None, "ETP", at_least=1, default_text=_FREE)
    sequence_parallel: bool = arg(True, "spread norms over the tensor-parallel processes too")


@dataclasses.dataclass(kw_only=True)
class PlanArguments(MachineArguments, WorkloadArguments, FixedSizeArguments):
    """The layouts that fit and how fast they are estimated to be, each with the command line that runs it."""

    TITLE: ClassVar[str] = "Answer"
    COMMAND: ClassVar[str] = "plan"
    PROGRAM: ClassVar[str] = "mcore-swift"
    REQUIRED: ClassVar[tuple[str, ...]] = ("model", "gpu", "num_gpus")

    top: int = arg(5, "layouts to show", at_least=1)
    json: bool = arg(False, "print JSON for programs")

    @property
    def quant_method(self) -> str | None:
        """The quantization method under the name of the training commands' flag."""
        return "bnb" if self.load_in_4bit else None

    @property
    def bnb_4bit_use_double_quant(self) -> bool:
        """The default of the training commands' flag."""
        return True

    def check(self) -> Iterator[UserError]:
        if self.load_in_4bit and self.tuner_type == "full":
            yield UserError(
                "--load_in_4bit: quantized weights cannot be trained, and --tuner_type full trains all of them",
                "add --tuner_type lora, or drop it",
            )
        if self.optimizer == "sgd" and self.use_distributed_optimizer:
            yield UserError(
                "--optimizer sgd cannot be spread over data-parallel processes",
                "add --use_distributed_optimizer false",
            )

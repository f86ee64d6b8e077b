"""How model and batch are divided over processes, and how these communicate."""

import dataclasses
import importlib.util
from collections.abc import Iterator
from typing import ClassVar

from ..errors import UserError
from ..plan.stages_check import flag_problems, stages_of_layout
from .base import Arguments
from .fields import arg


@dataclasses.dataclass(kw_only=True)
class ProcessGroupArguments(Arguments):
    TITLE: ClassVar[str] = "Process group"

    ddp_backend: str = arg(
        "auto",
        "communication library; auto: nccl with CUDA, else gloo",
        choices=("auto", "nccl", "gloo"),
    )
    ddp_timeout: int = arg(
        600,
        "seconds a process waits for the others before the run stops and names what hung (ms-swift waits "
        "208 days)",
        above=0,
    )


@dataclasses.dataclass(kw_only=True)
class ParallelArguments(ProcessGroupArguments):
    TITLE: ClassVar[str] = "Parallelism"

    tensor_model_parallel_size: int = arg(
        1, "processes that divide the matrices of each layer (TP)", at_least=1
    )
    pipeline_model_parallel_size: int = arg(
        1, "number of pipeline stages that the layers are divided into (PP)", at_least=1
    )
    virtual_pipeline_model_parallel_size: int | None = arg(
        None, "number of interleaved groups of layers in each pipeline stage (VPP)", at_least=1
    )
    pipeline_model_parallel_layout: str | None = arg(
        None,
        "content of each pipeline stage, in megatron-core's notation: E embedding, t decoder layer, m multi-token "
        "prediction, L loss, | between stages, such as 'Ettt|(tttt|)*2tttL'; VPP follows from it. In a YAML file "
        "also a list of lists of embedding, decoder, mtp, loss",
        nested=True,
    )
    decoder_first_pipeline_num_layers: int | None = arg(
        None, "number of layers in the first pipeline stage; the others divide the rest", at_least=1
    )
    decoder_last_pipeline_num_layers: int | None = arg(
        None, "number of layers in the last pipeline stage; the others divide the rest", at_least=1
    )
    account_for_embedding_in_pipeline_split: bool = arg(
        False, "count the embedding as a layer: the first stage has one decoder layer less"
    )
    account_for_loss_in_pipeline_split: bool = arg(
        False, "count output layer and loss as a layer: the last stage has one decoder layer less"
    )
    sequence_parallel: bool = arg(
        False,
        "divide norms and dropout over the tensor-parallel processes too, to save activation memory (SP)",
    )
    context_parallel_size: int = arg(
        1,
        "processes that divide the tokens of each row (CP), for rows too long for one process",
        at_least=1,
    )
    cp_comm_type: str | None = arg(
        None,
        "how context-parallel processes attend to each other's tokens: all_gather (of keys and values), a2a "
        "(all-to-all, Ulysses: each process computes some of the heads), or p2p (a ring, in Transformer Engine)",
        choices=("all_gather", "a2a", "p2p"),
        default_text="p2p with Transformer Engine, all_gather without",
        refused={"a2a+p2p": "all-to-all within a ring is not supported yet; use a2a or p2p"},
    )

    def fill(self) -> None:
        if self.pipeline_model_parallel_layout and self.virtual_pipeline_model_parallel_size is None:
            self.virtual_pipeline_model_parallel_size = stages_of_layout(self)
        if self.virtual_pipeline_model_parallel_size == 1:
            self.virtual_pipeline_model_parallel_size = None
        if self.tensor_model_parallel_size == 1:
            self.sequence_parallel = False  # nothing to divide over

    def check(self) -> Iterator[UserError]:
        vpp, pp = self.virtual_pipeline_model_parallel_size, self.pipeline_model_parallel_size
        if vpp is not None and pp == 1:
            yield UserError(
                f"--virtual_pipeline_model_parallel_size {vpp} needs a pipeline, and "
                "--pipeline_model_parallel_size is 1",
                "drop --virtual_pipeline_model_parallel_size, or add --pipeline_model_parallel_size 2 or more",
            )
        if (
            self.cp_comm_type == "p2p"
            and self.context_parallel_size > 1
            and not _installed("transformer_engine")
        ):
            yield UserError(
                "--cp_comm_type p2p needs Transformer Engine, which is not installed",
                "use --cp_comm_type all_gather or a2a, or install mcore-swift[te] on a GPU machine",
            )
        yield from flag_problems(self)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@dataclasses.dataclass(kw_only=True)
class DataParallelArguments(Arguments):
    TITLE: ClassVar[str] = "Data parallelism"

    use_distributed_optimizer: bool = arg(True, "divide the optimizer state over the data-parallel processes")
    overlap_grad_reduce: bool = arg(False, "reduce gradients during the backward pass")
    overlap_param_gather: bool = arg(False, "gather updated parameters during the next forward pass")
    accumulate_allreduce_grads_in_fp32: bool = arg(
        True,
        "accumulate and reduce gradients in float32 if parameters are bfloat16; false halves their memory but "
        "loses small gradients when summing over many microbatches",
    )

    def check(self) -> Iterator[UserError]:
        if self.overlap_param_gather:
            for needed in ("use_distributed_optimizer", "overlap_grad_reduce"):
                if not getattr(self, needed):
                    yield UserError(f"--overlap_param_gather needs --{needed}", f"add --{needed} true")

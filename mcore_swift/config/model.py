"""Which model, in which precision, and how a conversation is rendered as text."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from ..errors import UserError
from .base import Arguments
from .fields import arg

_FP16 = "its small exponent range needs loss scaling, which is not supported yet; bfloat16 needs none"


@dataclasses.dataclass(kw_only=True)
class HFModelArguments(Arguments):
    TITLE: ClassVar[str] = "Model"

    model: str | None = arg(
        None,
        "folder of the Hugging Face checkpoint: config.json, safetensors, tokenizer. Its weights are loaded unless "
        "--mcore_model or --perform_initialization is given",
    )
    model_type: str | None = arg(
        None,
        "family that the model must belong to, as named by `mcore-swift list-models` or config.json; a name that only "
        "ms-swift has is noted, and has no effect",
        default_text="any, by the architecture in config.json",
    )
    torch_dtype: str | None = arg(
        None,
        "precision of parameters and activations; optimizer state and main weights are always float32",
        choices=("bfloat16", "float32"),
        refused={"float16": _FP16},
        default_text="that of config.json",
    )
    check_model: bool = arg(
        True,
        "before anything starts, check that the checkpoint's files are complete (headers only; nothing is looked up "
        "online)",
    )
    load_args: bool = arg(
        True,
        "take flags that describe the model and its text (model, torch_dtype, system, max_length ...) from the "
        "args.json of the checkpoint that is resumed or started from, or beside --adapters, unless the command gives "
        "them",
    )


@dataclasses.dataclass(kw_only=True)
class ModelArguments(HFModelArguments):
    TITLE: ClassVar[str] = "Model"

    transformer_impl: str = arg(
        "auto",
        "implementation of the layers: megatron-core's own (local, runs everywhere) or Transformer Engine's; auto: "
        "the latter if it and CUDA are available",
        choices=("auto", "local", "transformer_engine"),
    )
    mtp_num_layers: int | None = arg(
        None,
        "number of multi-token prediction layers, which predict tokens further ahead: as many as the checkpoint "
        "has, or 0 to leave them out",
        at_least=0,
        default_text="as many as the checkpoint has",
    )


def _loss_weights() -> dict[str, str]:
    """ms-swift's weights of single tokens, alone and behind a '+', and why each is refused."""
    why = dict.fromkeys(
        ("react", "hermes", "qwen", "agentflan", "alpha_umi", "ignore_think_prefix"),
        "weights of single tokens are not supported yet",
    )
    why["ignore_empty_think"] = "empty thoughts that the template writes are not learnt in any case; drop it"
    bases = ("default", "last_round", "all")
    return why | {f"{base}+{name}": reason for base in bases for name, reason in why.items()}


@dataclasses.dataclass(kw_only=True)
class TemplateArguments(Arguments):
    TITLE: ClassVar[str] = "Text"

    system: str | None = arg(
        None,
        "system prompt for rows that have none",
        default_text="that of the tokenizer's chat template",
    )
    max_length: int | None = arg(
        None,
        "maximum length of a sample in tokens",
        above=1,
        default_text="max_position_embeddings of the model",
    )
    truncation_strategy: str = arg(
        "delete",
        "what happens to a sample longer than --max_length: it is dropped and counted (delete), truncated at the "
        "start (left) or at the end (right), or split into several samples (split, pre-training only)",
        choices=("delete", "left", "right", "split"),
    )
    loss_scale: str = arg(
        "default",
        "tokens with a loss: every assistant turn (default), the last assistant turn (last_round), or every token "
        "(all)",
        choices=("default", "last_round", "all"),
        refused=_loss_weights(),
    )
    use_chat_template: bool = arg(
        True,
        "render rows with the tokenizer's chat template; false: train on plain text, as in pre-training",
    )
    enable_thinking: bool | None = arg(
        None,
        "passed to the chat template of reasoning models; a row's own setting takes precedence",
        default_text="decided by the template",
    )

    def check(self) -> Iterator[UserError]:
        if self.truncation_strategy == "split" and self.use_chat_template:
            yield UserError(
                "--truncation_strategy split cuts a sample into several, which would separate turns from "
                "their conversation; it is for pre-training only",
                "use delete, left or right, or `megatron pt`",
            )

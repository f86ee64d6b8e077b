"""Which model, in which precision, and how a conversation becomes its text."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from ..errors import UserError
from .base import Arguments
from .fields import arg

_FP16 = "its narrow exponent needs loss scaling, which is not there yet; bfloat16 needs none"


@dataclasses.dataclass(kw_only=True)
class HFModelArguments(Arguments):
    TITLE: ClassVar[str] = "Model"

    model: str | None = arg(
        None,
        "folder of the Hugging Face checkpoint: config.json, safetensors, tokenizer. Weights start from it, "
        "unless --mcore_model or --perform_initialization says otherwise",
    )
    model_type: str | None = arg(
        None,
        "family the model must be of, as `mcore-swift list-models` names it; another is refused",
        default_text="any family, by the architecture in config.json",
    )
    torch_dtype: str | None = arg(
        None,
        "precision of parameters and activations; optimizer and main weights are float32 in any case",
        choices=("bfloat16", "float32"),
        refused={"float16": _FP16},
        default_text="that of config.json",
    )
    check_model: bool = arg(
        True,
        "before anything starts, check that the checkpoint's files are all there and whole (headers only; "
        "nothing is looked up on-line)",
    )
    load_args: bool = arg(
        True,
        "take what describes the model and its text (model, torch_dtype, system, max_length ...) from the "
        "args.json of --resume or --mcore_model where the command does not give it",
    )


@dataclasses.dataclass(kw_only=True)
class ModelArguments(HFModelArguments):
    TITLE: ClassVar[str] = "Model"

    transformer_impl: str = arg(
        "auto",
        "layers to build the model from: megatron-core's own (local, runs everywhere) or Transformer "
        "Engine's; auto takes the latter where it and CUDA are present",
        choices=("auto", "local", "transformer_engine"),
    )
    mtp_num_layers: int | None = arg(
        None,
        "multi-token prediction: layers behind the decoder that predict tokens further ahead; those of the "
        "checkpoint, or 0 to leave them out",
        at_least=0,
        default_text="as many as the checkpoint has",
    )


@dataclasses.dataclass(kw_only=True)
class TemplateArguments(Arguments):
    TITLE: ClassVar[str] = "Text"

    system: str | None = arg(
        None,
        "system prompt for rows that have none of their own",
        default_text="that of the tokenizer's chat template",
    )
    max_length: int | None = arg(
        None, "longest sample in tokens", above=1, default_text="what the model was made for"
    )
    truncation_strategy: str = arg(
        "delete",
        "what happens to a sample above --max_length: dropped and counted (delete), cut at the start "
        "(left), cut at the end (right), or cut into several samples (split, pre-training only)",
        choices=("delete", "left", "right", "split"),
    )
    loss_scale: str = arg(
        "default",
        "which tokens the loss counts: every assistant turn (default), the last assistant turn "
        "(last_round), or every token (all)",
        choices=("default", "last_round", "all"),
        refused=dict.fromkeys(
            ("ignore_empty_think", "react", "hermes", "qwen", "agentflan", "alpha_umi"),
            "per-token loss weights are not supported yet",
        ),
    )
    use_chat_template: bool = arg(
        True,
        "render rows with the tokenizer's chat template; false trains on plain text, as pre-training does",
    )
    enable_thinking: bool | None = arg(
        None,
        "given to the chat template of models that think before they answer; a row's own setting wins",
        default_text="left to the template",
    )

    def check(self) -> Iterator[UserError]:
        if self.truncation_strategy == "split" and self.use_chat_template:
            yield UserError(
                "--truncation_strategy split cuts a sample into several, which would leave turns without "
                "their conversation; it is for pre-training only",
                "use delete, left or right, or `megatron pt`",
            )

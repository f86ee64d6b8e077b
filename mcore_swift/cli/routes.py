"""The commands, and ms-swift's commands that are refused for now, with alternatives."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Route:
    """A subcommand: the module with its `run`, and a line for `--help`."""

    module: str
    about: str


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A subcommand of ms-swift that we do not have yet."""

    reason: str
    instead: str


@dataclasses.dataclass(frozen=True)
class Program:
    """A console command. commands: by name; a Program among them has commands of its own."""

    name: str
    about: str
    commands: "Mapping[str, Route | Program]"
    refused: Mapping[str, Refusal] = dataclasses.field(default_factory=dict)


_SFT = Route("mcore_swift.cli.sft", "fine-tune on conversations")
_PT = Route("mcore_swift.cli.pt", "pre-train on plain text")
_SWIFT_SFT = Route("mcore_swift.cli.swift_sft", "fine-tune any model of transformers, on one device or many")
_SWIFT_PT = Route("mcore_swift.cli.swift_pt", "pre-train it on plain text")
_EXPORT = Route("mcore_swift.cli.export", "convert checkpoints: Hugging Face to megatron-core and back")
_PLAN = Route(
    "mcore_swift.cli.plan", "which layouts of a model fit on so many GPUs, and how fast they should be"
)
_DOCTOR = Route("mcore_swift.cli.doctor", "say what is installed, what is missing, what this machine can run")
_LIST_MODELS = Route("mcore_swift.cli.list_models", "list the model families that can be trained")

_RLHF = Refusal(
    "preference learning and RL are not supported yet", "fine-tune on chosen answers with `megatron sft`"
)
_EXPORTED = "export with `megatron export --to_hf true` and load the folder with transformers or vLLM"


def _not_there(what: str, instead: str) -> Refusal:
    return Refusal(f"{what} is not supported yet", instead)


MEGATRON = Program(
    "megatron",
    "Train with Megatron-core, from and to Hugging Face checkpoints.",
    {"sft": _SFT, "pt": _PT, "export": _EXPORT},
    {"rlhf": _RLHF},
)

SWIFT = Program(
    "swift",
    "The commands that users of ms-swift type, as far as they are there.",
    {
        "sft": _SWIFT_SFT,
        "pt": _SWIFT_PT,
        "export": Route(
            "mcore_swift.cli.swift_export",
            "--merge_lora, --to_peft_format: adapters; --to_mcore, --to_hf: as `megatron export`",
        ),
        "merge-lora": Route("mcore_swift.cli.merge_lora", "the same as `swift export --merge_lora true`"),
        "list-models": _LIST_MODELS,
        "doctor": _DOCTOR,
    },
    {
        "rlhf": _RLHF,
        "infer": _not_there("inference", _EXPORTED),
        "deploy": _not_there("serving", _EXPORTED),
        "rollout": _not_there("the rollout server", _EXPORTED),
        "sample": _not_there("sampling", _EXPORTED),
        "eval": _not_there("evaluation by benchmarks", _EXPORTED),
        "app": _not_there("the chat page", _EXPORTED),
        "web-ui": _not_there(
            "the training page", "write the flags into a YAML file: `megatron sft run.yaml`"
        ),
        "list-datasets": _not_there("a list of datasets", "give your files to --dataset"),
    },
)

MCORE_SWIFT = Program(
    "mcore-swift",
    "Hugging Face checkpoints in, Megatron-core training, Hugging Face checkpoints out.",
    {
        "sft": _SFT,
        "pt": _PT,
        "export": _EXPORT,
        "plan": _PLAN,
        "doctor": _DOCTOR,
        "list-models": _LIST_MODELS,
        "megatron": MEGATRON,
        "swift": SWIFT,
    },
)

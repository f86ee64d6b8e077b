"""What a PEFT folder contains, read without heavy imports: its config and the names and shapes of its tensors."""

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import UserError
from .weights import INDEX, SINGLE, BrokenFile, read_header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_COPY_AGAIN = "copy or download the file again"
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_MATRIX = re.compile(r"(.+)\.lora_([AB])\.weight")
_EMBEDDING = re.compile(r"(.+)\.lora_embedding_([AB])")
_EXPERT = re.compile(r"\.experts\.\d+\.")

_KNOWN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False,),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "megatron_config": (None,),
    "layer_replication": (None,),
    # other initializations subtract a part from the frozen weights, and the adapter fits only the remainder
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
"""Options of peft's that would change what the matrices mean, with the values that megatron-core's layers know."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class PeftFolder:
    """config: contents of adapter_config.json. shapes: tensor name in the file -> shape."""

    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, Shape] = field(default_factory=dict)

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS

    @property
    def kind(self) -> str:
        """peft's name for the kind of adapter, such as LORA."""
        return str(self.config.get("peft_type"))

    @cached_property
    def modules(self) -> dict[str, dict[str, Shape]]:
        """Module of the base model -> shapes of its low-rank matrices 'A' and 'B', as far as the file has them."""
        return self._matched(_MATRIX)

    @cached_property
    def embeddings(self) -> dict[str, dict[str, Shape]]:
        """The same for embeddings, whose weight gets the transpose of B A."""
        return self._matched(_EMBEDDING)

    def _matched(self, pattern: re.Pattern[str]) -> dict[str, dict[str, Shape]]:
        found: dict[str, dict[str, Shape]] = {}
        for name, shape in self.shapes.items():
            if match := pattern.fullmatch(name):
                found.setdefault(match[1].removeprefix(PREFIX), {})[match[2]] = shape
        return found

    @property
    def names(self) -> set[str]:
        """Names of the low-rank matrices in the file."""
        return {
            f"{PREFIX}{name}.lora_{matrix}.weight" for name, held in self.modules.items() for matrix in held
        }

    @property
    def weight_shapes(self) -> dict[str, Shape]:
        """Module -> shape of the weight that B A is added to."""
        return {name: (held["B"][0], held["A"][-1]) for name, held in self.modules.items()}

    def rank_of(self, module: str) -> int:
        """Rank that the config sets for a module. As in peft, patterns are suffixes of names or regular expressions."""
        return self._by_pattern("rank_pattern", module, self.config.get("r", 8))

    def alpha_of(self, module: str) -> float:
        return self._by_pattern("alpha_pattern", module, self.config.get("lora_alpha", 8))

    def scaling_of(self, module: str, rank: int) -> float:
        """The factor that B A of a module is multiplied by, where its A has `rank` rows."""
        alpha = self.alpha_of(module)
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _by_pattern(self, patterns: str, module: str, otherwise: Any) -> Any:
        for pattern, value in (self.config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return otherwise


def read_config(folder: str | Path) -> dict[str, Any]:
    """adapter_config.json of a folder. Raises UserError if it is missing or invalid."""
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: holds no {CONFIG}", "give the folder of a PEFT adapter") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})", _COPY_AGAIN) from None
    if not isinstance(config, dict) or "peft_type" not in config:
        raise UserError(f"{path}: names no peft_type", "give the folder of a PEFT adapter")
    return config


def read_peft_folder(folder: str | Path) -> PeftFolder:
    """Read the config of a PEFT folder and the header of its weights.

    Raises UserError for a file that is missing, truncated or damaged.
    """
    folder = Path(folder)
    config = read_config(folder)
    path = folder / WEIGHTS
    try:
        header = read_header(path)
    except FileNotFoundError:
        others = sorted(entry.name for entry in folder.glob("adapter_model.*"))
        if others:
            remedy = "load it with peft and save it again with save_pretrained, which makes safetensors"
            raise UserError(
                f"{folder}: weights are in {others[0]}, and only safetensors are read", remedy
            ) from None
        raise UserError(f"{folder}: holds no {WEIGHTS}", "copy or download the adapter again") from None
    except BrokenFile as error:
        raise UserError(f"{path}: {error}", _COPY_AGAIN) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", "check its permissions") from None
    return PeftFolder(folder, config, {name: tuple(tensor["shape"]) for name, tensor in header.items()})


def folder_problems(folder: str | Path, base: Path | None, *, only_lora: bool = False) -> list[UserError]:
    """Problems in the files of an adapter for the model in the folder `base` (None: the model is not checked).

    only_lora: refuse what megatron-core's layers do not support. Otherwise, adapters other than LoRA are only checked
    for complete files.
    """
    try:
        adapter = read_peft_folder(folder)
    except UserError as error:
        return [error]
    if adapter.kind != "LORA":
        told = (
            f"--adapters {folder}: is of the kind {adapter.kind}, and megatron-core's layers take LORA only"
        )
        remedy = (
            "go on with it by `swift sft --backend fsdp`, or merge it with `swift export --merge_lora true`"
        )
        return [UserError(told, remedy)] if only_lora else []
    if only_lora and (problems := option_problems(adapter.config, adapter.folder / CONFIG)):
        return problems
    return matrix_problems(adapter) or (base_problems(adapter, base) if base else [])


def option_problems(config: Mapping[str, Any], path: Path) -> list[UserError]:
    """Errors for a kind or an option of adapter that megatron-core's layers do not support.

    path: the file that `config` was read from.
    """
    refused = [
        f"{name} {config[name]!r}" for name, fine in _KNOWN.items() if config.get(name, fine[0]) not in fine
    ]
    if not refused:
        return []
    return [
        UserError(
            f"{path} asks for what is not supported on megatron-core's layers: {', '.join(refused)}",
            "train it with `swift sft --backend fsdp`, or merge it with `swift export --merge_lora true`",
        )
    ]


def matrix_problems(adapter: PeftFolder) -> list[UserError]:
    """Errors for an A without its B or the reverse, and for ranks that differ from the config."""
    if not adapter.modules and not adapter.embeddings:
        return [UserError(f"{adapter.weights}: holds no low-rank matrices", "is it a LoRA adapter?")]
    alone = [name for name, shapes in adapter.modules.items() if len(shapes) < 2]
    if alone:
        return [UserError(f"{adapter.weights}: of A and B only one is there for {_some(alone)}", _COPY_AGAIN)]
    wrong = []
    for module, shapes in adapter.modules.items():
        told, held = adapter.rank_of(module), (shapes["A"][0], shapes["B"][-1])
        if held[0] != held[1] or (held[0] != told and not _of_experts(module)):
            wrong.append(f"{module} has rank {' and '.join(map(str, dict.fromkeys(held)))} and not {told}")
    if not wrong:
        return []
    more = f", and {len(wrong) - 1} more like it" if len(wrong) > 1 else ""
    remedy = "config and weights are of different adapters: copy both again"
    return [UserError(f"{adapter.weights}: {wrong[0]}, as {CONFIG} says{more}", remedy)]


def base_problems(adapter: PeftFolder, base: Path) -> list[UserError]:
    """Errors for modules of the adapter that the model, whose safetensors files are in `base`, does not have."""
    stored = _headers(base)
    if not stored:
        return []  # reported by the checks of the base
    remedy = "it is an adapter of another base model"
    if named := adapter.config.get("base_model_name_or_path"):
        remedy += f": it says {named}; give that to --model"
    missing, shaped = [], []
    for module, shapes in adapter.modules.items():
        weight = stored.get(f"{module}.weight")
        if weight is None:  # Mixtral's router, under the name that transformers 5 and peft use
            weight = stored.get(f"{module.replace('.mlp.gate', '.block_sparse_moe.gate')}.weight")
        if weight is None:
            if not _in_one_tensor(module, stored):
                missing.append(module)
        elif weight["dtype"] in _FLOATS and len(weight["shape"]) == 2:
            fits = (shapes["B"][0], shapes["A"][-1])
            if tuple(weight["shape"]) != fits:
                shaped.append(f"{module} takes {list(fits)} and is {weight['shape']} there")
    problems = []
    if missing:
        linear = [
            name.removesuffix(".weight") for name, tensor in stored.items() if len(tensor["shape"]) == 2
        ]
        near = difflib.get_close_matches(missing[0], linear, n=1, cutoff=0.4)
        hint = f" (nearest: {near[0]})" if near else ""
        problems.append(
            UserError(
                f"--adapters {adapter.folder}: is for layers that {base} lacks: {_some(missing)}{hint}",
                remedy,
            )
        )
    elif shaped:
        problems.append(
            UserError(f"--adapters {adapter.folder}: does not fit {base}: {_some(shaped)}", remedy)
        )
    return problems


def _of_experts(module: str) -> bool:
    """Whether the module's matrices are those of all experts of a layer, stacked."""
    return module.endswith((".experts", ".experts.base_layer"))


def _in_one_tensor(module: str, stored: Mapping[str, Any]) -> bool:
    """Whether the module may be part of a tensor that holds all experts of a layer, or the other way round."""
    if _of_experts(module):
        prefix = module.removesuffix(".base_layer").rpartition(".")[0].rpartition(".")[0]
        return any(name.startswith(f"{prefix}.") and ".experts." in name for name in stored)
    if match := _EXPERT.search(module):
        prefix = module[: match.start()] + ".experts."
        return any(name.startswith(prefix) and not _EXPERT.search(name) for name in stored)
    return False


def _headers(base: Path) -> dict[str, Any]:
    """Header entry of every tensor in a folder's safetensors files; {} if they cannot be read."""
    tensors: dict[str, Any] = {}
    try:
        for path in _files(base):
            tensors |= read_header(path)
    except (OSError, ValueError, KeyError, BrokenFile):
        return {}
    return tensors


def _files(base: Path) -> Iterator[Path]:
    if (base / SINGLE).is_file():
        yield base / SINGLE
        return
    names = json.loads((base / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
    yield from (base / name for name in sorted(set(names)))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

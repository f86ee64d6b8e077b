"""Which layers each pipeline stage holds: spread evenly, or as the flags of an uneven pipeline say.

A model has `pp * vpp` stages; stage i is chunk `i // pp` of pipeline rank `i % pp`. The contents of a stage are written
in the letters of megatron-core's `--pipeline_model_parallel_layout`:

    E  the embedding        t  a decoder layer        m  a layer of multi-token prediction        L  output and loss

`stage_letters` alone decides; the checks, the estimates and the code that builds the model all call it.
"""

import json
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from .layout import Layout
    from .shape import ModelShape

LAYOUT, FIRST, LAST, EMBEDDING, LOSS = UNEVEN_FLAGS = (
    "pipeline_model_parallel_layout",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
_NAMES = {"E": "embedding", "t": "decoder", "m": "mtp", "L": "loss"}
_LETTERS = {name: letter for letter, name in _NAMES.items()}
_MOST = 1000  # repetitions: no model is deeper, and a typo should not exhaust memory
_GROUP = re.compile(r"\(([^()]*)\)\*(\d+)")
_ONE = re.compile(r"([^*()])\*(\d+)")


def stage_layers(layout: "Layout", shape: "ModelShape", args: Any) -> list[list[int]]:
    """The decoder layers of each stage in the model's order, numbered from 0 over the whole model.

    The result has `pp * vpp` lists; those of pipeline rank p are `result[p::pp]`. Raises UserError if the flags do not
    fit this model; `stages_check.stage_problems` lists everything that is wrong.
    """
    letters = stage_letters(layout, shape.num_layers, args, mtp=predicted_tokens(args, shape))
    counts = [stage.count("t") for stage in letters]
    ends = [sum(counts[: index + 1]) for index in range(len(counts))]
    return [list(range(end - count, end)) for end, count in zip(ends, counts, strict=True)]


def stage_letters(layout: "Layout", num_layers: int, args: Any, *, mtp: int = 0) -> list[str]:
    """What each of the `pp * vpp` stages holds, in the model's order, such as ['Ettt', 'tt', 'ttL'].

    mtp: number of multi-token-prediction layers, on the last stage unless the flags say otherwise. Raises UserError if
    the stages cannot hold exactly `num_layers` decoder layers.
    """
    given = getattr(args, LAYOUT, None)
    if given:
        return parse_stages(given)
    vpp = layout.vpp or 1
    if getattr(args, FIRST, None) is not None or getattr(args, LAST, None) is not None:
        ranks = _ends_given(num_layers, layout.pp, getattr(args, FIRST, None), getattr(args, LAST, None))
        counts = [_share(layers, vpp, "chunks of a stage") for layers in ranks] * vpp
    else:
        embedding, loss = bool(getattr(args, EMBEDDING, False)), bool(getattr(args, LOSS, False))
        units = num_layers + embedding + loss
        counts = [_share(units, layout.pp * vpp, "stages")] * (layout.pp * vpp)
        counts[0] -= embedding
        counts[-1] -= loss
    if sum(counts) != num_layers or min(counts) < 0:
        raise UserError(f"the pipeline's stages hold {sum(counts)} layers, and the model has {num_layers}")
    return with_ends(counts, mtp=mtp)


def megatron_stages(layout: "Layout", num_layers: int, args: Any, *, mtp: int = 0) -> list[list[str]] | None:
    """megatron-core's `pipeline_model_parallel_layout`: layer names by stage; None for an even pipeline.

    Every uneven pipeline is passed to megatron-core in this form, so that the model is built as it was planned:
    megatron-core's own arithmetic for first and last stages fails in some cases (two interleaved stages, both given).
    """
    if layout.pp == 1 or not is_uneven(args):
        return None
    return [
        [_NAMES[letter] for letter in stage] for stage in stage_letters(layout, num_layers, args, mtp=mtp)
    ]


def prediction_rank(args: Any) -> int | None:
    """The pipeline rank of the multi-token layers if `--pipeline_model_parallel_layout` puts them before the last."""
    pp = args.pipeline_model_parallel_size
    stages = parse_stages(getattr(args, LAYOUT, None) or "")
    holders = [number % pp for number, stage in enumerate(stages) if "m" in stage]
    return holders[0] if holders and holders[0] != pp - 1 else None


def is_uneven(args: Any) -> bool:
    """Whether any flag asks for unequal stages."""
    return any(getattr(args, name, None) not in (None, False, "") for name in UNEVEN_FLAGS)


def predicted_tokens(args: Any, shape: "ModelShape") -> int:
    """Number of multi-token-prediction layers to build: those of the model, or none if the flags say so."""
    return 0 if getattr(args, "mtp_num_layers", None) == 0 else shape.num_mtp_layers


def with_ends(counts: Sequence[int], *, mtp: int = 0) -> list[str]:
    """Letters of stages with these numbers of decoder layers, with embedding and loss in their places."""
    stages = ["t" * count for count in counts]
    stages[0] = "E" + stages[0]
    stages[-1] += "m" * mtp + "L"
    return stages


def parse_stages(text: str) -> list[str]:
    """The stages of a layout, in letters.

    text: megatron-core's string ('Et*3|(tt|)*29,m|L': `|` ends a stage, `x*3` means xxx, `(...)*3` repeats its
    contents, commas and blanks are ignored), or a JSON list of lists of the names embedding, decoder, mtp, loss.
    Raises UserError if it cannot be parsed.
    """
    if text.lstrip().startswith("["):
        return _parse_lists(text)
    letters = "".join(text.replace(",", "").split())
    for pattern in (_GROUP, _ONE):
        for found in pattern.finditer(letters):
            if not 0 < int(found[2]) <= _MOST:
                raise UserError(
                    f"--{LAYOUT} {text}: repeats '{found[1]}' {found[2]} times", "repeat it 1 time or more"
                )
        letters = pattern.sub(lambda found: found[1] * int(found[2]), letters)
    unknown = sorted({letter for letter in letters if letter not in "EtmL|"})
    if unknown:
        raise UserError(
            f"--{LAYOUT} {text}: cannot be read at {', '.join(repr(letter) for letter in unknown)}",
            "write E (embedding), t (decoder layer), m (multi-token prediction), L (loss) and | between stages; "
            "t*3 and (tt|)*3 repeat",
        )
    return letters.split("|")


def _parse_lists(text: str) -> list[str]:
    example = '[["embedding", "decoder"], ["decoder", "loss"]]'
    try:
        stages = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--{LAYOUT} {text}: is no JSON list ({error.msg})", f"such as {example}") from None
    if not all(isinstance(stage, list) for stage in stages):
        raise UserError(f"--{LAYOUT} {text}: is no list of lists, one for each stage", f"such as {example}")
    names = [[str(name).strip().lower() for name in stage] for stage in stages]
    unknown = sorted({name for stage in names for name in stage if name not in _LETTERS})
    if unknown:
        raise UserError(f"--{LAYOUT}: knows no {', '.join(unknown)}", f"write {', '.join(_LETTERS)}")
    return ["".join(_LETTERS[name] for name in stage) for stage in names]


def render_stages(stages: Iterable[str]) -> str:
    """Stages as a compact string such as 'Ettt|(tttt|)*2tttL': the inverse of `parse_stages`."""
    parts = [(stage, len(list(same))) for stage, same in groupby(stages)]
    text = ""
    for index, (stage, times) in enumerate(parts):
        is_last = index == len(parts) - 1
        written = "".join(_repeated(letter, len(list(run))) for letter, run in groupby(stage))
        repeated = times - is_last  # no | follows the last stage
        text += f"({written}|)*{repeated}" if repeated > 1 else f"{written}|" * repeated
        text += written if is_last else ""
    return text


def _repeated(letter: str, times: int) -> str:
    return letter * times if times < 4 else f"{letter}*{times}"


def _ends_given(layers: int, pp: int, first: int | None, last: int | None) -> list[int]:
    """Layers of each pipeline rank if those of the first rank, the last or both are given."""
    middle = pp - (first is not None) - (last is not None)
    rest = layers - (first or 0) - (last or 0)
    each = [_share(rest, middle, "stages between")] * middle if middle else []
    return [*([] if first is None else [first]), *each, *([] if last is None else [last])]


def _share(layers: int, parts: int, what: str) -> int:
    if layers % parts:
        raise UserError(f"{layers} layers cannot be shared by {parts} {what}")
    return layers // parts

"""Refuse a pipeline whose stages cannot hold the model's layers, and suggest flags that work."""

from collections.abc import Iterator
from itertools import product
from typing import Any

from ..errors import UserError
from .axes import nearest_size
from .layout import Layout
from .shape import ModelShape
from .stages import (
    EMBEDDING,
    FIRST,
    LAST,
    LAYOUT,
    LOSS,
    parse_stages,
    predicted_tokens,
    render_stages,
    stage_letters,
    with_ends,
)

_PP, _VPP = "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"


def flag_problems(args: Any) -> Iterator[UserError]:
    """What is wrong with the flags of an uneven pipeline, whatever the model."""
    pp, vpp = getattr(args, _PP), getattr(args, _VPP)
    given = [
        name for name in (LAYOUT, FIRST, LAST, EMBEDDING, LOSS) if getattr(args, name) not in (None, False)
    ]
    if not given:
        return
    if pp == 1:
        yield UserError(
            f"--{given[0]} needs a pipeline, and --{_PP} is 1",
            f"leave --{given[0]} out, or add --{_PP} 2 or more",
        )
        return
    ways = [group for group in ((LAYOUT,), (FIRST, LAST), (EMBEDDING, LOSS)) if set(group) & set(given)]
    if len(ways) > 1:
        names = " and ".join(f"--{next(name for name in group if name in given)}" for group in ways)
        yield UserError(f"{names} each say how layers are spread over the stages", "give one of them")
        return
    if not args.pipeline_model_parallel_layout:
        return
    try:
        stages = parse_stages(args.pipeline_model_parallel_layout)
    except UserError as error:
        yield error
        return
    if len(stages) % pp:
        yield UserError(
            f"--{LAYOUT} {render_stages(stages)} has {len(stages)} stages, which is no multiple of --{_PP} {pp}",
            f"describe {_multiples(len(stages), pp)} stages, or set --{_PP} to {_divisors(len(stages))}",
        )
    elif (vpp or 1) != len(stages) // pp:
        yield UserError(
            f"--{LAYOUT} {render_stages(stages)} has {len(stages)} stages, {len(stages) // pp} for each of "
            f"--{_PP} {pp}, and --{_VPP} is {vpp or 1}",
            f"drop --{_VPP}: the layout tells it",
        )


def stages_of_layout(args: Any) -> int | None:
    """Virtual stages of each pipeline stage that `--pipeline_model_parallel_layout` describes, if it can be read."""
    try:
        stages = parse_stages(args.pipeline_model_parallel_layout or "")
    except UserError:
        return None
    chunks, rest = divmod(len(stages), getattr(args, _PP))
    return chunks if not rest and chunks > 1 else None


def stage_problems(layout: Layout, shape: ModelShape, args: Any) -> list[UserError]:
    """Why the model's layers cannot be spread over the stages as the flags ask; empty if they can.

    The flags must have passed `flag_problems`. Each remedy names flags that work.
    """
    if layout.pp == 1:
        return []
    layers, given = shape.num_layers, getattr(args, LAYOUT, None)
    mtp = predicted_tokens(args, shape)
    if given:
        return list(_layout_problems(parse_stages(given), layout.pp, layers, mtp))
    if getattr(args, FIRST, None) is not None or getattr(args, LAST, None) is not None:
        return list(_ends_problems(layout, layers, args, mtp))
    try:
        if all(stage_letters(layout, layers, args, mtp=mtp)):
            return []
    except UserError:
        pass
    return [_uneven_problem(layout, layers, args, mtp)]


def working_flags(layout: Layout, layers: int, mtp: int = 0) -> str:
    """The simplest flags that spread `layers` over the stages of `layout` as evenly as possible."""
    stages = layout.pp * (layout.vpp or 1)
    if layers % stages == 0:
        return ""
    for flags in ((EMBEDDING, LOSS), (LOSS,), (EMBEDDING,)):
        if (layers + len(flags)) % stages == 0 and layers + len(flags) > stages:
            return " ".join(f"--{flag} true" for flag in flags)
    return f"--{LAYOUT} '{render_stages(balanced(layers, stages, mtp))}'"


def balanced(layers: int, stages: int, mtp: int = 0) -> list[str]:
    """Stages in letters, none empty: embedding and loss count as a layer each where layers are scarce."""
    counts = [0] * stages
    weights = [0] * stages
    weights[0] += 1
    weights[-1] += 1 + mtp
    for _ in range(layers):
        # the least loaded; among equals a middle one, which has no embedding
        place = min(range(stages), key=lambda index: (counts[index] + weights[index], -index))
        counts[place] += 1
    return with_ends(counts, mtp=mtp)


def _uneven_problem(layout: Layout, layers: int, args: Any, mtp: int) -> UserError:
    """The stages do not divide the layers (with embedding and loss, if the flags count them)."""
    counted = [name for name in (EMBEDDING, LOSS) if getattr(args, name, False)]
    units, vpp = layers + len(counted), layout.vpp or 1
    if units % layout.pp:
        what = f"the model's {layers} layers" + "".join(f" + 1 for --{name}" for name in counted)
        reason = f"--{_PP} {layout.pp} does not divide {what}"
        equal = nearest_size(layout.pp, lambda pp: units % pp == 0, units)
        nearest = f"the nearest possible in equal stages is --{_PP} {equal}" if equal > 1 else ""
    else:
        each = units // layout.pp
        reason = f"--{_VPP} {vpp} does not divide the {each} layers of each pipeline stage"
        chunks = nearest_size(vpp, lambda chunks: each % chunks == 0, each)
        chosen = f"--{_VPP} {chunks}" if chunks > 1 else f"no --{_VPP}"
        nearest = f"the nearest possible in equal stages is {chosen}"
    if layers + 2 < layout.pp * vpp:  # even with separate stages for embedding and loss, some would be empty
        return UserError(reason, nearest or f"use --{_PP} 1")
    working = working_flags(layout, layers, mtp).split(" --")
    working = [f"--{flag.removeprefix('--')}" for flag in working if flag]
    added = [flag for flag in working if flag.split()[0][2:] not in counted]
    dropped = [f"--{name}" for name in counted if f"--{name} true" not in working]
    steps = [f"{verb} {' '.join(flags)}" for verb, flags in (("drop", dropped), ("add", added)) if flags]
    return UserError(reason, "; ".join(filter(None, [" and ".join(steps), nearest])))


def _ends_problems(layout: Layout, layers: int, args: Any, mtp: int) -> Iterator[UserError]:
    """The layers of the first or last stage are given, but the rest cannot be divided among the others."""
    first, last = getattr(args, FIRST, None), getattr(args, LAST, None)
    vpp = layout.vpp or 1
    if _ends_fit(layout, layers, first, last):
        return
    given = _written(first, last)
    middle = layout.pp - (first is not None) - (last is not None)
    rest = layers - (first or 0) - (last or 0)
    if middle:
        reason = (
            f"{max(rest, 0)} of the model's {layers} layers are left, which {_stages(middle)} cannot share"
        )
    else:
        reason = f"{layers - rest} layers in all, and the model has {layers}"
    if vpp > 1:
        reason += f" (in {vpp} equal chunks each: --{_VPP} {vpp})"
    options = [range(1, layers) if value is not None else [None] for value in (first, last)]
    choices = [pair for pair in product(*options) if _ends_fit(layout, layers, *pair)]
    if choices:
        near = min(
            choices, key=lambda pair: abs((pair[0] or 0) - (first or 0)) + abs((pair[1] or 0) - (last or 0))
        )
        remedy = f"the nearest possible is {_written(*near)}"
    else:
        flags = working_flags(layout, layers, mtp)
        remedy = f"take {flags} instead" if flags else "leave them out"
    yield UserError(f"{given}: {reason}", remedy)


def _written(first: int | None, last: int | None) -> str:
    return " ".join(
        f"--{name} {value}" for name, value in ((FIRST, first), (LAST, last)) if value is not None
    )


def _ends_fit(layout: Layout, layers: int, first: int | None, last: int | None) -> bool:
    vpp = layout.vpp or 1
    middle = layout.pp - (first is not None) - (last is not None)
    rest = layers - (first or 0) - (last or 0)
    if (first or 0) % vpp or (last or 0) % vpp:
        return False
    return rest == 0 if not middle else rest > 0 and rest % (middle * vpp) == 0


def _layout_problems(stages: list[str], pp: int, layers: int, mtp: int) -> Iterator[UserError]:
    """Errors for a layout that has the right number of stages but does not fit this model."""
    reasons = list(_layout_reasons(stages, pp, layers, mtp))
    if not reasons:
        return
    nearest = _mended(stages, layers, mtp)
    if list(_layout_reasons(nearest, pp, layers, mtp)):
        nearest = balanced(layers, len(stages), mtp)
    remedy = f"the nearest possible is --{LAYOUT} '{render_stages(nearest)}'"
    if list(_layout_reasons(nearest, pp, layers, mtp)):
        remedy = f"describe at most {layers + 2} stages, one layer or an end in each"
    yield UserError(f"--{LAYOUT} {render_stages(stages)}: {'; '.join(reasons)}", remedy)


def _layout_reasons(stages: list[str], pp: int, layers: int, mtp: int) -> Iterator[str]:
    flat = "".join(stages)
    for letter, what, place in (("E", "embedding", 0), ("L", "loss", -1)):
        if flat.count(letter) != 1:
            yield f"has {flat.count(letter)} {letter} ({what}), not one"
        elif flat[place] != letter:
            yield f"{letter} ({what}) is not {'first' if place == 0 else 'last'}"
    if flat.count("t") != layers:
        yield f"has {flat.count('t')} decoder layers (t), and the model has {layers}"
    if "" in stages:
        yield f"stage {stages.index('') + 1} of {len(stages)} holds nothing"
    if flat.count("m") != mtp:
        yield f"has {flat.count('m')} layers of multi-token prediction (m), and the model has {mtp}"
    elif mtp:
        yield from _prediction_reasons(stages, pp)


def _prediction_reasons(stages: list[str], pp: int) -> Iterator[str]:
    """megatron-core's rules for `m`: after all layers, all in one stage, the last chunk of any rank but the first."""
    holders = [number for number, stage in enumerate(stages) if "m" in stage]
    if len(holders) > 1:
        yield "the m (multi-token prediction) are in several stages, and must be in one"
    if "t" in "".join(stages).partition("m")[2]:
        yield "a decoder layer (t) follows the multi-token prediction (m)"
    first = len(stages) - pp + 1  # the last chunks of all ranks but the first
    if holders[0] < first:
        which = "the last" if pp == 2 else f"one of the last {pp - 1}"
        yield f"m (multi-token prediction) is in stage {holders[0] + 1}, and must be in {which}"


def _mended(stages: list[str], layers: int, mtp: int) -> list[str]:
    """The layout with as few changes as needed: layers are added where there are fewest, removed where most."""
    counts = [stage.count("t") for stage in stages]
    held = [index for index, stage in enumerate(stages) if "t" in stage or not stage]
    held = held or list(range(len(stages)))
    for index in (index for index in held if not counts[index]):
        counts[index] = 1
    while sum(counts) < layers:
        counts[min(held, key=lambda index: counts[index])] += 1
    while sum(counts) > layers:
        fullest = max(held, key=lambda index: counts[index])
        if counts[fullest] <= 1:
            break
        counts[fullest] -= 1
    return with_ends(counts, mtp=mtp)


def _multiples(number: int, of: int) -> str:
    below = number - number % of
    return f"{below} or {below + of}" if below else str(of)


def _divisors(number: int) -> str:
    found = [str(divisor) for divisor in range(2, number + 1) if number % divisor == 0]
    return " or ".join(found) or "1"


def _stages(count: int) -> str:
    return "1 stage" if count == 1 else f"{count} stages"

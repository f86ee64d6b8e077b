"""Which parameters are frozen, by the --freeze_parameters and --trainable_parameters flags; for every engine."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mcore_swift.errors import UserError


def freezes(args: Any) -> bool:
    """Whether the flags freeze any parameter."""
    return bool(args.freeze_parameters or args.freeze_parameters_regex or args.freeze_parameters_ratio)


def frozen_names(
    sizes: Mapping[str, int], args: Any, fused: Iterable[Sequence[str]] | None = None
) -> set[str]:
    """Names of the frozen parameters.

    sizes: number of elements of each parameter of the whole model, by name, in order from the input.
    fused: the same names, grouped by tensor: `freeze_parameters_ratio` ends between two tensors.
    `trainable_parameters` overrides the other flags. Raises UserError for a prefix that no name has, an invalid
    regular expression, and if nothing would be trained.
    """
    stays = set(_named(sizes, args.freeze_parameters, "freeze_parameters"))
    stays |= set(_matching(sizes, args.freeze_parameters_regex, "freeze_parameters_regex"))
    budget = args.freeze_parameters_ratio * sum(sizes.values())
    for names in fused or ([name] for name in sizes):
        budget -= sum(sizes[name] for name in names)
        if budget < 0:
            break
        stays.update(names)
    stays -= set(_named(sizes, args.trainable_parameters, "trainable_parameters"))
    stays -= set(_matching(sizes, args.trainable_parameters_regex, "trainable_parameters_regex"))
    if len(stays) == len(sizes):
        raise UserError("every parameter is frozen: nothing trains", "name some in --trainable_parameters")
    return stays


def _named(sizes: Mapping[str, int], starts: Sequence[str], flag: str) -> Iterator[str]:
    for start in starts:
        found = [name for name in sizes if name.startswith(start)]
        if not found:
            near = difflib.get_close_matches(start, sizes, n=3, cutoff=0.3)
            raise UserError(
                f"--{flag} {start}: no parameter name begins with it", f"the nearest are: {', '.join(near)}"
            )
        yield from found


def _matching(sizes: Mapping[str, int], expression: str | None, flag: str) -> list[str]:
    if not expression:
        return []
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise UserError(f"--{flag} {expression}: is no regular expression ({error})") from None
    found = [name for name in sizes if pattern.search(name)]
    if not found:
        some = list(sizes)[:: max(1, len(sizes) // 3)][:3]
        raise UserError(
            f"--{flag} {expression}: matches no parameter", f"names are such as {', '.join(some)}"
        )
    return found

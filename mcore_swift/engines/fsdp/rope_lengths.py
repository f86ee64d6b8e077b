"""Models whose rotary angles depend on how long a text is, which transformers reads off the longest row of a batch.

Here they are those of each sample, as when it stands alone.
"""

from collections.abc import Iterator
from typing import Any

from mcore_swift.errors import UserError


def length_limit(config: Any, max_length: int | None) -> int | None:
    """Up to how many tokens LongRoPE (arXiv:2402.13753) has the one kind of angles, and beyond them the other.

    config: of a transformers model. max_length: of samples; None: not limited. None if all samples have the same kind.
    Raises UserError for dynamic NTK scaling of samples so long that it sets in: transformers keeps the angles of the
    longest row it has seen, so that results would depend on the batches before.
    """
    for settings in _by_length(config):
        known = settings.get("original_max_position_embeddings") or config.max_position_embeddings
        if max_length is not None and max_length <= known:
            continue
        if settings["rope_type"] == "longrope":
            return known
        if max_length is not None:
            raise UserError(
                f"--max_length {max_length}: beyond {known} tokens the rotary angles of this {config.model_type} "
                "change with each longer text (dynamic NTK scaling)",
                f"use --max_length {known}, another rope_type in its config.json, or `megatron sft`",
            )
    return None


def depends_on_length(config: Any) -> bool:
    """Whether texts of different lengths may have different angles."""
    return any(_by_length(config))


def _by_length(config: Any) -> Iterator[dict[str, Any]]:
    """The rope settings of a model, of each kind of layers where they differ, whose angles depend on the length."""
    given = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in given.values() if isinstance(value, dict)]
    yield from (one for one in nested or [given] if one.get("rope_type") in ("longrope", "dynamic"))

"""`swift export`: merging adapters, and converting between Hugging Face and megatron-core."""

from collections.abc import Sequence

from ..config import named_flags
from . import export, merge_lora


def run(argv: Sequence[str]) -> int:
    """The command; returns its exit code. Raises UserError if the flags ask for none of the supported exports."""
    if named_flags(argv) & {"to_mcore", "to_hf"}:
        return export.run(argv)
    return merge_lora.run_export(argv)

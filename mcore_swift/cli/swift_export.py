"""`swift export`: what of it converts between Hugging Face and megatron-core; the rest is not there yet."""

from collections.abc import Sequence

from ..errors import UserError
from . import export
from .start import wants_help


def run(argv: Sequence[str]) -> int:
    """The command; returns its exit code. Raises UserError when neither direction is asked for."""
    directions = ("--to_mcore", "--to_hf", "--to-mcore", "--to-hf")
    asks = any(word.partition("=")[0] in directions for word in argv)
    is_file = bool(argv) and not argv[0].startswith("-")
    if asks or is_file or wants_help(argv):
        return export.run(argv)
    raise UserError(
        "swift export: only --to_mcore and --to_hf are supported yet; merging LoRA, quantizing and "
        "uploading are not",
        "see `megatron export --help`",
    )

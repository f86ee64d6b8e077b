"""`swift export`: merging adapters, and what converts between Hugging Face and megatron-core."""

from collections.abc import Sequence

from ..errors import UserError
from . import export, merge_lora
from .start import wants_help


def run(argv: Sequence[str]) -> int:
    """The command; returns its exit code. Raises UserError when nothing that is there is asked for."""
    flags = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}
    if flags & {"to_mcore", "to_hf"} or not wants_help(argv) and not argv[0].startswith("-"):
        return export.run(argv)
    if flags & {"merge_lora", "to_peft_format", "adapters"} or wants_help(argv):
        return merge_lora.run(argv)
    raise UserError(
        "swift export: only --merge_lora, --to_peft_format, --to_mcore and --to_hf are supported yet; quantizing and "
        "uploading are not",
        "see `swift export --help` and `megatron export --help`",
    )

"""Arguments of every command: the single source of the flags, the YAML keys, `--help` and the docs.

    from mcore_swift.config import MegatronSftArguments, parse
    args = parse(MegatronSftArguments, ["run.yaml", "--lr", "1e-4"])

Importing this package imports neither torch nor megatron.
"""

from .arguments import COMMANDS, MegatronExportArguments, MegatronPretrainArguments, MegatronSftArguments
from .base import ARGS_FILE, Arguments
from .checkpoint import size_bytes
from .parser import Reading, from_values, named_flags, parse, parse_command, print_notice, read
from .swift import SWIFT_COMMANDS, SwiftPretrainArguments, SwiftSftArguments

__all__ = [
    "ARGS_FILE",
    "COMMANDS",
    "SWIFT_COMMANDS",
    "Arguments",
    "MegatronExportArguments",
    "MegatronPretrainArguments",
    "MegatronSftArguments",
    "Reading",
    "SwiftPretrainArguments",
    "SwiftSftArguments",
    "from_values",
    "named_flags",
    "parse",
    "parse_command",
    "print_notice",
    "read",
    "size_bytes",
]

"""Check the sources in milliseconds, before anything heavy is imported."""

from pathlib import Path
from typing import Any

from ..errors import UserError
from .problems import RowError
from .readers import parse_row, read_rows
from .settings import DataSettings
from .sources import INDEX, parse_sources

_LOOKED_AT = 20  # number of first rows whose columns are compared with --columns


def check_sources(args: Any) -> list[UserError]:
    """Everything wrong with the sources of `args` that their first rows show.

    Finds missing paths, unknown extensions, empty files, files with a broken first row, and names in `--columns` that
    none of the first rows has. Imports neither torch nor transformers (parquet needs pyarrow). Never raises UserError.
    """
    try:
        settings = DataSettings.from_args(args)
    except UserError as error:
        return [error]
    errors: list[UserError] = []
    if not settings.dataset:
        errors.append(UserError("no data to train on", "add --dataset FILE"))
    sources, missing = parse_sources(settings.dataset)
    val_sources, val_missing = parse_sources(settings.val_dataset, "--val_dataset")
    errors += missing + val_missing
    if settings.use_chat_template:
        errors += [
            UserError(
                f"{source.spec}: token ids tell no roles apart, and fine-tuning learns answers only",
                "use `megatron pt`, or give rows of text",
            )
            for source in sources + val_sources
            if source.is_indexed
        ]
    if settings.streaming:
        errors += [
            UserError(
                f"--streaming true: {source.spec} is token ids, which are not loaded into memory anyway",
                "drop --streaming, or give rows of text",
            )
            for source in sources
            if source.is_indexed
        ]
    names: set[str] = set()
    for path in {path: None for source in sources + val_sources for path in source.files}:
        try:
            names |= _look(path, settings)
        except UserError as error:
            errors.append(error)
    if not errors:
        errors += unknown_columns(settings.columns, names)
    return errors


def unknown_columns(columns: dict[str, str], names: set[str]) -> list[UserError]:
    """An error for each column that `--columns` renames but no row has."""
    return [
        UserError(f"--columns: no row has a column {old!r}", f"the rows have: {', '.join(sorted(names))}")
        for old in columns
        if old not in names
    ]


def _look(path: Path, settings: DataSettings) -> set[str]:
    """Columns of the first rows. Raises UserError if there are none, or the first (strict false: each) is broken."""
    names: set[str] = set()
    if path.suffix == INDEX:
        from .indexed import IndexedTokens  # reads the whole index, and needs numpy

        IndexedTokens(path)
        return names
    broken: UserError | None = None
    number = 0
    for number, row in enumerate(read_rows(path), 1):
        try:
            names |= set(parse_row(row.data))
        except RowError as error:
            broken = broken or UserError(f"{path}:{row.line}: {error.message}")
            if number == 1 and settings.strict is not False:
                raise broken from None
        if number == _LOOKED_AT or (names and not settings.columns):
            break
    if (
        broken and not names and number < _LOOKED_AT
    ):  # the whole file was seen; a longer one is judged when it is read
        raise broken
    if number == 0:
        raise UserError(f"{path}: the file has no rows")
    return names

"""Configuration files: YAML or JSON, keys as flags, and an ENV section for environment variables."""

import json
import os
from pathlib import Path
from typing import Any

from ..errors import UserError

SUFFIXES = (".yaml", ".yml", ".json")


def read_config(path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """(flags by name, environment variables of the ENV section) of a configuration file.

    Raises UserError that names the file and, where the syntax is wrong, the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", "give the path of a .yaml or .json file") from None
    values = _parse_json(path, text) if path.endswith(".json") else _parse_yaml(path, text)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: holds a {type(values).__name__}, not names and values", "write lines of `flag: value`"
        )
    env = values.pop("ENV", None) or {}
    if not isinstance(env, dict):
        raise UserError(f"{path}: ENV holds a {type(env).__name__}", "write lines of `NAME: value` under it")
    return {str(name): value for name, value in values.items()}, {
        str(k): _env_text(v) for k, v in env.items()
    }


def apply_env(env: dict[str, str], path: str) -> list[str]:
    """Set the variables that are not set yet; returns a notice for each that is set to something else."""
    notices = []
    for name, value in env.items():
        current = os.environ.setdefault(name, value)
        if current != value:
            notices.append(
                f"{path}: ENV {name}={value} is not used, the environment already has {name}={current}"
            )
    return notices


def _env_text(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _parse_json(path: str, text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _refuse_twice(path, [name for name, _ in pairs])
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None


def _parse_yaml(path: str, text: str) -> Any:
    import yaml  # imported only if a YAML file is given

    try:
        tree = yaml.compose(text, yaml.SafeLoader)
        if isinstance(tree, yaml.MappingNode):
            keys = [key for key, _ in tree.value]
            _refuse_twice(path, [key.value for key in keys], [key.start_mark.line + 1 for key in keys])
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else path
        raise UserError(f"{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from None


def _refuse_twice(path: str, names: list[Any], lines: list[int] | None = None) -> None:
    """Raise UserError for a name that occurs twice: parsers would silently use the last one."""
    for index, name in enumerate(names):
        if name in names[:index]:
            place = f"{path}:{lines[index]}" if lines else path
            raise UserError(f"{place}: {name} is given twice", "leave one of them out")

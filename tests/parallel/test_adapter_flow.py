"""Adapters through whole runs: trained, saved, resumed in other layouts, from and to peft, merged and converted."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from jobs import run_job  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tiny import EXPERTS, curve, make_model, make_tiny  # noqa: E402
from training_plan import argv, checkpoint  # noqa: E402

SAVED, STEPS = 2, 4
LORA = {
    "tuner_type": "lora",
    "lora_dropout": 0,
    "lora_rank": 4,
    "train_iters": STEPS,
    "save_steps": SAVED,
    "global_batch_size": 2,
}
SAVES = {"save_safetensors": "true"}
MOE = {"model": "{moe}"}
TP2, PP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": "true"}, {"pipeline_model_parallel_size": 2}
EP2, ETP2 = {"expert_model_parallel_size": 2}, {"expert_tensor_parallel_size": 2}
DROPS, RSLORA = {"lora_dropout": 0.2}, {"use_rslora": "true"}
KINDS = {
    "use_dora": "true",
    "lorap_lr_ratio": 4,
    "modules_to_save": "norm",
    "target_regex": r".*(_proj|lm_head)",
}
HALF = {"train_iters": STEPS, "save_steps": SAVED, "freeze_parameters_ratio": 0.6}
"""The first pipeline stage has nothing that trains."""
DENSE, PLAIN, EXPERT = (f"{{runs}}/{name}/checkpoint-{STEPS}" for name in ("dense", "plain", "moe"))
TO_HF, TO_MCORE, ALONE = {"to_hf": "true"}, {"to_mcore": "true"}, {"merge_lora": "false"}
ROWS = 4

CASES: dict[str, tuple[str, dict]] = {
    "dense": ("train", TP2 | LORA | DROPS | SAVES),
    "dense-again": ("train", TP2 | LORA | DROPS | checkpoint("dense", SAVED)),
    "plain": ("train", TP2 | LORA),
    "plain-pp2": ("train", PP2 | LORA | checkpoint("plain", SAVED)),
    "moe": ("train", MOE | EP2 | LORA | RSLORA | SAVES),
    "moe-etp2": ("train", MOE | TP2 | ETP2 | LORA | RSLORA | checkpoint("moe", SAVED)),
    "kinds": ("train", TP2 | LORA | KINDS | SAVES),
    "kinds-pp2": ("train", PP2 | LORA | KINDS | checkpoint("kinds", SAVED)),
    "kinds-trained": ("logits", TP2 | LORA | {"adapters": "{runs}/kinds/checkpoint-4"}),
    "half": ("train", TP2 | HALF),
    "half-pp2": ("train", PP2 | HALF | checkpoint("half", SAVED)),
    "dense-trained": ("logits", TP2 | LORA | {"adapters": DENSE}),
    "moe-trained": ("logits", MOE | EP2 | LORA | {"adapters": EXPERT}),
    "dense-of-checkpoint": ("logits", PP2 | {"tuner_type": "lora", "mcore_adapter": DENSE}),
    "dense-foreign": ("logits", TP2 | LORA | {"adapters": "{peft}/dense"}),
    "moe-foreign": ("logits", MOE | TP2 | ETP2 | LORA | {"adapters": "{peft}/moe"}),
    "merged-dense": ("export", {"adapters": DENSE} | TO_HF),
    "merged-moe-mcore": ("export", MOE | {"adapters": "{peft}/moe", "merge_lora": "true"} | TO_MCORE),
    "merged-moe-back": (
        "export",
        {"mcore_model": "{runs}/merged-moe-mcore", "max_shard_size": "60KB"} | TO_HF,
    ),
    "peft-of-mcore": ("export", {"mcore_adapter": PLAIN} | TO_HF | ALONE),
    "mcore-of-peft": ("export", MOE | {"adapters": "{peft}/moe"} | TO_MCORE),
    "peft-again": ("export", {"mcore_adapter": "{runs}/mcore-of-peft"} | TO_HF | ALONE),
    "swift-peft": ("swift-export", {"adapters": PLAIN, "to_peft_format": "true"}),
    "swift-merged": ("swift-export", {"adapters": PLAIN, "merge_lora": "true"}),
}
REFUSED: dict[str, tuple[dict, list[str]]] = {
    "of-another-base": (LORA | MOE | {"adapters": "{peft}/dense"}, ["adapter of another base model"]),
    "of-another-kind": (LORA | {"adapters": "{peft}/loha"}, ["peft_type 'LOHA'", "swift sft --backend fsdp"]),
    "nothing-so-named": (LORA | {"target_modules": "q_prj"}, ["--target_modules q_prj", "q_proj"]),
}
"""Told by each of the processes; what shows before they start is in tests/unit/test_plan_adapter.py."""


def make_foreign(model: Path, folder: Path, **settings: Any) -> None:
    """An adapter as peft makes it, with random A and B."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(model).float()
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    tiny = make_tiny(folder)
    from arithmetic_demo import make_tokenizer

    moe, peft = folder / "moe-model", folder / "peft"
    make_model(moe, make_tokenizer(), **EXPERTS)
    make_foreign(
        tiny.model,
        peft / "dense",
        r=3,
        lora_alpha=7,
        target_modules=["q_proj", "k_proj", "gate_proj", "up_proj", "down_proj"],
        layers_to_transform=[0, 2, 3],
        rank_pattern={"up_proj": 5},
        alpha_pattern={r"layers\.0\.self_attn\.k_proj": 2},
    )
    make_foreign(
        moe,
        peft / "moe",
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "o_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        alpha_pattern={"experts.down_proj": 2},
    )
    (peft / "loha").mkdir()
    (peft / "loha/adapter_config.json").write_text(json.dumps({"peft_type": "LOHA", "r": 4}))
    (peft / "loha/adapter_model.safetensors").write_bytes(
        (peft / "dense/adapter_model.safetensors").read_bytes()
    )
    places = {"train": str(tiny.train), "runs": str(folder), "moe": str(moe), "peft": str(peft)}

    def case(name: str, do: str, flags: dict, **options: Any) -> dict:
        if "export" in do:
            given = {"output_dir": folder / name} | flags
            words = [
                part for key, value in given.items() for part in (f"--{key}", str(value).format(**places))
            ]
        else:
            words = argv(name, flags, tiny, folder, places)
        return {"name": name, "do": do, "argv": words, "options": options}

    job = folder / "job"
    job.mkdir()
    cases = [
        case(
            name, do, flags, **({"rows": ROWS, "file": str(folder / f"{name}.pt")} if do == "logits" else {})
        )
        for name, (do, flags) in CASES.items()
    ]
    cases += [case(name, "refused", flags, said=said) for name, (flags, said) in REFUSED.items()]
    (job / "plan.json").write_text(json.dumps(cases))
    results = run_job(Path(__file__).with_name("train_job.py"), 2, job)
    failed = {name: error for name, error in results.items() if error}
    assert not failed, failed
    return folder


def logits_of(model: Path, adapter: Path | None = None) -> torch.Tensor:
    """transformers' logits of the tokens that the job gave its models, with peft's adapter where one is given."""
    import peft
    from transformers import AutoModelForCausalLM

    from converters.verify import fixed_rows

    module = AutoModelForCausalLM.from_pretrained(model).float()
    if adapter is not None:
        module = peft.PeftModel.from_pretrained(module, adapter)
    with torch.no_grad():
        return module.eval()(input_ids=fixed_rows(module.config.vocab_size, ROWS)).logits


# Two implementations of one model in fp32, whose logits are of order 10
ATOL = 1e-5


@pytest.mark.parametrize("model,run", [("model", "dense"), ("model", "kinds"), ("moe-model", "moe")])
def test_peft_loads_what_a_run_saves(runs, model, run):
    """And gives the logits that Megatron-core gives with the same adapter, and the merged checkpoint those of both."""
    last = runs / run / f"checkpoint-{STEPS}"
    beside, base = logits_of(runs / model, last), logits_of(runs / model)
    assert (beside - base).abs().max() > 0.05, "its steps have changed something"
    torch.testing.assert_close(torch.load(runs / f"{run}-trained.pt"), beside, atol=ATOL, rtol=0)
    torch.testing.assert_close(logits_of(last.with_name(last.name + "-merged")), beside, atol=ATOL, rtol=0)


@pytest.mark.parametrize("model,name", [("model", "dense"), ("moe-model", "moe")])
def test_a_foreign_adapter_starts_with_pefts_logits(runs, model, name):
    """A of q and k, gate and up each their own, of several ranks, on some layers; experts in one tensor."""
    expected = logits_of(runs / model, runs / "peft" / name)
    assert (expected - logits_of(runs / model)).abs().max() > 0.05
    torch.testing.assert_close(torch.load(runs / f"{name}-foreign.pt"), expected, atol=ATOL, rtol=0)


def test_an_adapter_of_a_checkpoint_starts_another_run_in_another_layout(runs):
    expected = torch.load(runs / "dense-trained.pt")
    torch.testing.assert_close(torch.load(runs / "dense-of-checkpoint.pt"), expected, atol=ATOL, rtol=0)


def test_a_resumed_run_is_exact_in_its_layout(runs):
    """With dropout."""
    expected, found = curve(runs / "dense"), curve(runs / "dense-again")
    assert found == {step: expected[step] for step in range(SAVED + 1, STEPS + 1)}


@pytest.mark.parametrize(
    "whole,rest", [("plain", "plain-pp2"), ("moe", "moe-etp2"), ("kinds", "kinds-pp2"), ("half", "half-pp2")]
)
def test_a_run_goes_on_in_another_layout(runs, whole, rest):
    expected, found = curve(runs / whole), curve(runs / rest)
    assert sorted(found) == list(range(SAVED + 1, STEPS + 1))
    for step, (loss, norm) in found.items():
        # fp32 sums in another order, grown over steps of Adam; a permuted B would differ in the second digit
        assert loss == pytest.approx(expected[step][0], rel=1e-5)
        assert norm == pytest.approx(expected[step][1], rel=1e-4)


def test_merged_weights_are_beside_each_checkpoint_that_is_saved_as_safetensors(runs):
    kept = sorted(path.name for path in (runs / "dense").glob("*checkpoint-*"))
    assert kept == [
        name for step in (SAVED, STEPS) for name in (f"checkpoint-{step}", f"checkpoint-{step}-merged")
    ]
    assert not list((runs / "plain").glob("*-merged"))
    assert (runs / "plain" / f"checkpoint-{STEPS}" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    "model,adapter,merged",
    [
        ("model", f"dense/checkpoint-{STEPS}", f"dense/checkpoint-{STEPS}-merged"),
        ("model", f"dense/checkpoint-{STEPS}", "merged-dense"),
        ("moe-model", "peft/moe", "merged-moe-back"),
        ("model", "swift-peft", "swift-merged"),
    ],
)
def test_merged_weights_are_those_that_peft_merges(runs, model, adapter, merged):
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(runs / model)
    whole = peft.PeftModel.from_pretrained(base, runs / adapter).merge_and_unload()
    ours = AutoModelForCausalLM.from_pretrained(runs / merged).state_dict()
    changed = 0
    plain = AutoModelForCausalLM.from_pretrained(runs / model).state_dict()
    for name, tensor in whole.state_dict().items():
        # fp32: products of the factors summed in another order
        torch.testing.assert_close(ours[name], tensor, atol=1e-6, rtol=1e-6)
        changed += not torch.equal(tensor, plain[name])
    assert changed >= 12


def test_adapters_go_from_one_form_to_the_other_bit_for_bit(runs):
    """A checkpoint without PEFT files as one, by either command; peft's own through a checkpoint and back."""
    first, second = (
        load_file(runs / name / "adapter_model.safetensors") for name in ("peft-of-mcore", "swift-peft")
    )
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
    torch.testing.assert_close(
        logits_of(runs / "model", runs / "peft-of-mcore"), logits_of(runs / "swift-merged"), atol=ATOL, rtol=0
    )
    torch.testing.assert_close(
        logits_of(runs / "moe-model", runs / "peft-again"),
        logits_of(runs / "moe-model", runs / "peft" / "moe"),
        atol=ATOL,
        rtol=0,
    )

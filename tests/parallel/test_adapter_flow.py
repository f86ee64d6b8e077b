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
from tiny import curve, make_model, make_tiny  # noqa: E402
from training_plan import SAVED, STEPS, argv, checkpoint  # noqa: E402

EXPERTS = {
    "architecture": "Qwen3Moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "mlp_only_layers": [2],
}
LORA = {"tuner_type": "lora", "lora_dropout": 0, "lora_rank": 4}
SAVES = {"save_safetensors": "true"}
MOE = {"model": "{moe}"}
TP2, PP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": "true"}, {"pipeline_model_parallel_size": 2}
EP2, ETP2 = {"expert_model_parallel_size": 2}, {"expert_tensor_parallel_size": 2}
DROPPED = LORA | {"lora_dropout": 0.2}
DENSE_LAST, MOE_LAST = (f"{{runs}}/{name}/checkpoint-{STEPS}" for name in ("dense", "moe"))
ROWS = 4

TRAIN: dict[int, dict[str, dict]] = {
    2: {
        "dense": TP2 | LORA | SAVES | {"save_total_limit": 1},
        "dense-first": TP2 | LORA | {"lora_rank": 4},
        "dense-again": TP2 | LORA | checkpoint("dense-first"),
        "dense-pp2": PP2 | LORA | checkpoint("dense-first"),
        "dropped": TP2 | DROPPED,
        "dropped-again": TP2 | DROPPED | checkpoint("dropped"),
        "moe": MOE | EP2 | LORA | SAVES | {"use_rslora": "true"},
        "moe-etp2": MOE | TP2 | ETP2 | LORA | {"use_rslora": "true"} | checkpoint("moe"),
    },
    1: {
        "dense-one": LORA | checkpoint("dense-first"),
        "moe-one": MOE | LORA | checkpoint("moe"),
    },
}
STARTS: dict[int, dict[str, dict]] = {
    2: {
        "dense-trained": TP2 | LORA | {"adapters": DENSE_LAST},
        "moe-trained": MOE | EP2 | LORA | {"adapters": MOE_LAST},
        "dense-of-checkpoint": PP2 | {"tuner_type": "lora", "mcore_adapter": DENSE_LAST},
        "dense-foreign": TP2 | LORA | {"adapters": "{peft}/dense"},
        "moe-foreign": MOE | TP2 | ETP2 | LORA | {"adapters": "{peft}/moe"},
    },
    1: {},
}
EXPORTS: dict[int, dict[str, dict]] = {
    2: {
        "merged-dense": {"adapters": DENSE_LAST, "to_hf": "true", "merge_lora": "true"},
        "merged-moe-mcore": {
            "adapters": "{peft}/moe",
            "to_mcore": "true",
            "merge_lora": "true",
            "model": "{moe}",
        },
        "merged-moe-back": {
            "mcore_model": "{runs}/merged-moe-mcore",
            "to_hf": "true",
            "max_shard_size": "60KB",
        },
        "peft-of-mcore": {
            "mcore_adapter": "{runs}/dense-first/checkpoint-6",
            "to_hf": "true",
            "merge_lora": "false",
        },
        "mcore-of-peft": {"adapters": "{peft}/moe", "to_mcore": "true", "model": "{moe}"},
        "peft-again": {"mcore_adapter": "{runs}/mcore-of-peft", "to_hf": "true", "merge_lora": "false"},
    },
    1: {},
}
SWIFT_EXPORTS = {
    "swift-peft": {"adapters": "{runs}/dense-first/checkpoint-6", "to_peft_format": "true"},
    "swift-merged": {"adapters": "{runs}/dense-first/checkpoint-6", "merge_lora": "true"},
}
REFUSED: dict[str, tuple[dict, list[str]]] = {
    "of-another-base": (LORA | MOE | {"adapters": "{peft}/dense"}, ["adapter of another base model"]),
    "of-another-kind": (LORA | {"adapters": "{peft}/loha"}, ["peft_type 'LOHA'", "swift sft --backend fsdp"]),
    "nothing-so-named": (LORA | {"target_modules": "q_prj"}, ["--target_modules q_prj", "q_proj"]),
}


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

    for world_size in (2, 1):
        job = folder / f"job-{world_size}"
        job.mkdir()
        cases = [case(name, "train", flags) for name, flags in TRAIN[world_size].items()]
        cases += [
            case(name, "logits", flags, rows=ROWS, file=str(folder / f"{name}.pt"))
            for name, flags in STARTS[world_size].items()
        ]
        cases += [case(name, "export", flags) for name, flags in EXPORTS[world_size].items()]
        if world_size == 1:
            cases += [case(name, "swift-export", flags) for name, flags in SWIFT_EXPORTS.items()]
            cases += [case(name, "refused", flags, said=said) for name, (flags, said) in REFUSED.items()]
        (job / "plan.json").write_text(json.dumps(cases))
        results = run_job(Path(__file__).with_name("train_job.py"), world_size, job)
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


@pytest.mark.parametrize("model,run", [("model", "dense"), ("moe-model", "moe")])
def test_peft_loads_what_a_run_saves(runs, model, run):
    """And gives the logits that Megatron-core gives with the same adapter, and the merged checkpoint those of both."""
    last = runs / run / f"checkpoint-{STEPS}"
    beside, base = logits_of(runs / model, last), logits_of(runs / model)
    assert (beside - base).abs().max() > 0.05, "six steps have changed something"
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


@pytest.mark.parametrize("whole,rest", [("dense-first", "dense-again"), ("dropped", "dropped-again")])
def test_a_resumed_run_is_exact_in_its_layout(runs, whole, rest):
    expected, found = curve(runs / whole), curve(runs / rest)
    assert found == {step: expected[step] for step in range(SAVED + 1, STEPS + 1)}


@pytest.mark.parametrize(
    "whole,rest",
    [("dense-first", "dense-pp2"), ("dense-first", "dense-one"), ("moe", "moe-etp2"), ("moe", "moe-one")],
)
def test_a_run_goes_on_in_another_layout(runs, whole, rest):
    expected, found = curve(runs / whole), curve(runs / rest)
    assert sorted(found) == list(range(SAVED + 1, STEPS + 1))
    for step, (loss, norm) in found.items():
        # fp32 sums in another order, grown over steps of Adam; a permuted B would differ in the second digit
        assert loss == pytest.approx(expected[step][0], rel=1e-5)
        assert norm == pytest.approx(expected[step][1], rel=1e-4)


def test_a_merged_checkpoint_is_kept_as_long_as_the_one_beside_it(runs):
    kept = sorted(path.name for path in (runs / "dense").glob("*checkpoint-*"))
    assert kept == [f"checkpoint-{STEPS}", f"checkpoint-{STEPS}-merged"]
    assert not list((runs / "dense-first").glob("*-merged")), "without safetensors nothing is merged"
    assert (runs / "dense-first" / f"checkpoint-{STEPS}" / "adapter_config.json").is_file()


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

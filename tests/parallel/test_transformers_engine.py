"""The engine for transformers' models gives the Megatron engine's numbers, spread in any way, for any architecture."""

import json
from pathlib import Path

import pytest
import transformers_plan
from jobs import run_job
from tiny import curve, eval_losses, make_tiny, stored
from transformers_plan import SAVED, STEPS


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Output folder of a run by its name; asking for a run that failed fails the test."""
    from arithmetic_demo import make_tokenizer

    folder = tmp_path_factory.mktemp("transformers")
    tiny = make_tiny(folder)
    transformers_plan.make_models(folder / "models", make_tokenizer())
    results: dict[str, str] = {}
    for world_size in transformers_plan.WORLD_SIZES:
        job = folder / f"job-{world_size}"
        job.mkdir()
        (job / "plan.json").write_text(json.dumps(transformers_plan.plan(world_size, tiny, folder)))
        results |= run_job(Path(__file__).with_name("transformers_job.py"), world_size, job)

    def run(name: str) -> Path:
        assert results[name] == "", f"{name}: {results[name]}"
        return folder / name

    return run


def assert_same_curve(one: Path, other: Path, *, steps: list[int], rel: float = 1e-5) -> None:
    # fp32 sums in another order, grown over the steps of Adam
    expected, found = curve(one), curve(other)
    assert sorted(found) == steps
    for step in steps:
        assert found[step][0] == pytest.approx(expected[step][0], rel=rel), step
        assert found[step][1] == pytest.approx(expected[step][1], rel=10 * rel), step


ALL = list(range(1, STEPS + 1))
REST = list(range(SAVED + 1, STEPS + 1))


@pytest.mark.parametrize("name", ["one", "fsdp2", "ddp2"])
def test_the_curve_is_that_of_the_megatron_engine(runs, name):
    """One objective, two models of the same weights: losses and gradient norms of every step agree."""
    assert_same_curve(runs("megatron"), runs(name), steps=ALL)


@pytest.mark.parametrize("name", ["fsdp2-again", "ddp2-to-fsdp2", "fsdp2-to-one"])
def test_a_run_goes_on_under_any_number_of_processes(runs, name):
    assert_same_curve(runs("one"), runs(name), steps=REST)


def test_streamed_rows_are_dealt_out_and_resumed_as_prepared_ones(runs):
    assert_same_curve(runs("streamed"), runs("streamed-fsdp2"), steps=ALL)
    assert_same_curve(runs("streamed"), runs("streamed-fsdp2-to-one"), steps=REST)
    losses, prepared = curve(runs("streamed")), curve(runs("one"))
    assert losses[1][0] != pytest.approx(prepared[1][0], rel=1e-4), "other rows than those of a prepared run"


@pytest.mark.parametrize(
    ("alone", "shared"),
    [
        ("one", "shared-fsdp2"),
        ("one", "shared-ddp2"),
        ("lora", "shared-lora-fsdp2"),
        ("windows", "shared-windows-fsdp2"),
        ("gpt2-padded", "shared-gpt2-ddp2"),
    ],
)
def test_processes_that_share_rows_have_the_losses_and_gradients_of_one(runs, alone, shared):
    """Packed and padded rows, windows, key heads repeated, layers computed again; later steps prove the gradients."""
    steps = sorted(curve(runs(shared)))
    assert steps in (ALL, [1])
    assert_same_curve(runs(alone), runs(shared), steps=steps)


def test_a_run_that_shared_its_rows_goes_on(runs):
    assert_same_curve(runs("one"), runs("shared-again"), steps=REST)
    assert eval_losses(runs("shared-fsdp2")) == pytest.approx(eval_losses(runs("one")), rel=1e-5)


def test_evaluation_does_not_depend_on_the_processes(runs):
    one, two = eval_losses(runs("one")), eval_losses(runs("fsdp2"))
    assert one.keys() == two.keys() == {SAVED, STEPS}
    assert [two[step] for step in one] == pytest.approx(list(one.values()), rel=1e-5)


def test_a_run_goes_on_on_megatron_and_back_by_the_exported_weights(runs):
    """Both have taken the first steps; the first loss after them is that of the weights, before Adam has a say."""
    expected = curve(runs("one"))[1], curve(runs("fsdp2-to-megatron"))[1], curve(runs("megatron-to-one"))[1]
    start, to_megatron, back = (loss for loss, _ in expected)
    assert to_megatron == pytest.approx(back, rel=1e-5)
    assert to_megatron < 0.95 * start, "three steps have taught something"


def test_bf16_is_near_fp32_and_the_same_however_it_is_spread(runs):
    exact, sharded, whole = (curve(runs(name)) for name in ("one", "fsdp2-bf16", "ddp2-bf16"))
    for step in ALL:
        assert sharded[step][0] == pytest.approx(whole[step][0], rel=1e-4), "sums in another order"
        assert sharded[step][0] == pytest.approx(exact[step][0], rel=1e-2), "8 bits of mantissa"
        assert sharded[step][0] != exact[step][0]


def test_random_weights_are_the_same_under_every_spread(runs):
    assert_same_curve(runs("random"), runs("random-fsdp2"), steps=[1])


@pytest.mark.parametrize(
    "packed,padded",
    [
        ("eight-packed", "eight-padded"),
        ("eight-eager", "eight-padded"),
        ("opt-packed", "opt-padded"),
        ("opt-fsdp2", "opt-padded"),
        ("gpt2-packed-fsdp2", "gpt2-padded"),
    ],
)
def test_samples_have_one_loss_however_they_are_laid_out(runs, packed, padded):
    """Also in architectures that the Megatron engine does not have, and whose masks know nothing of packing."""
    assert_same_curve(runs(padded), runs(packed), steps=[1])


def test_weights_that_transformers_joins_are_loaded_and_saved_in_their_own_form(runs):
    """Experts are one tensor a layer in the model, and one each in the files."""
    from safetensors.torch import load_file

    folder = runs("moe-still")
    source = load_file(folder.parent / "models" / "moe" / "model.safetensors")
    saved = load_file(folder / "checkpoint-1" / "model.safetensors")
    assert source.keys() == saved.keys()
    assert any("experts.3.gate_proj" in name for name in saved)
    assert [name for name in source if not source[name].equal(saved[name])] == [], "learning rate 0"


def test_lora_trains_alike_and_goes_on_under_any_number_of_processes(runs):
    assert_same_curve(runs("lora"), runs("lora-fsdp2"), steps=ALL)
    assert_same_curve(runs("lora"), runs("lora-fsdp2-to-one"), steps=REST)
    losses = [loss for loss, _ in curve(runs("lora")).values()]
    assert losses[0] == pytest.approx(curve(runs("one"))[1][0], rel=1e-6), "adapters begin as nothing"
    assert losses[-1] < 0.95 * losses[0]


def test_adapters_have_the_curve_of_the_megatron_engine(runs):
    """Both go on with one PEFT folder: A and B alike in the first step, and in each after it."""
    assert_same_curve(runs("lora-on-megatron"), runs("lora-on"), steps=ALL)
    assert curve(runs("lora-on"))[1][0] < 0.97 * curve(runs("one"))[1][0], "three steps have taught something"


def test_adapters_learn_on_megatron_when_layers_are_computed_again(runs):
    """Their first gradient is about that of peft's adapters, whose A is drawn from the same distribution."""
    megatron, peft = curve(runs("lora-recomputed"))[1], curve(runs("lora"))[1]
    assert megatron[0] == pytest.approx(peft[0], rel=1e-6)
    assert 0.5 * peft[1] < megatron[1] < 2 * peft[1]


def test_dora_in_bf16_is_the_same_however_it_is_spread(runs):
    whole, sharded = curve(runs("dora-ddp2")), curve(runs("dora-fsdp2"))
    assert sorted(whole) == [1, 2]
    for step in whole:
        assert sharded[step][0] == pytest.approx(whole[step][0], rel=1e-4)


def test_adapters_beside_quantized_weights_are_the_same_on_any_number_of_processes(runs):
    """The weights stay whole on each process; a run that goes on quantizes them as it did before."""
    pytest.importorskip("bitsandbytes")
    assert_same_curve(runs("qlora"), runs("qlora-ddp2"), steps=[1, 2])
    assert_same_curve(runs("qlora"), runs("qlora-again"), steps=[2])
    assert curve(runs("qlora"))[1][0] != pytest.approx(curve(runs("lora"))[1][0], rel=1e-4), "4 bits are few"


def test_biases_that_train_beside_adapters_begin_as_those_of_the_model(runs):
    beside, model = curve(runs("opt-lora-bias"))[1], curve(runs("opt-padded"))[1]
    assert beside[0] == pytest.approx(model[0], rel=1e-2), "bf16 beside fp32"


def test_an_adapter_goes_on_and_merged_by_peft_it_is_the_same_model(runs):
    """`merged` read the files with peft's own loader, so they are PEFT files with these values."""
    beside, inside = curve(runs("lora-still"))[1], curve(runs("merged-still"))[1]
    assert inside[0] == pytest.approx(beside[0], rel=1e-6)
    assert beside[0] < 0.95 * curve(runs("one"))[1][0], "six steps have taught something"
    folder = runs("lora") / f"checkpoint-{STEPS}"
    assert {"adapter_config.json", "adapter_model.safetensors", "args.json"} <= {
        p.name for p in folder.iterdir()
    }
    assert not (folder / "config.json").exists(), "it is no model"


@pytest.mark.parametrize(
    "run,exported,file", [("one", "as-hf", "model"), ("lora-on", "as-peft", "adapter_model")]
)
def test_a_checkpoint_without_safetensors_becomes_one_with_them(runs, run, exported, file):
    from safetensors.torch import load_file

    inside = stored(runs(run) / f"checkpoint-{STEPS}")
    kept = {
        name.replace(".default.", "."): value for name, value in inside.items() if "optimizer" not in name
    }
    found = load_file(runs(exported) / f"{file}.safetensors")
    assert found.keys() == kept.keys() and all(found[name].equal(kept[name]) for name in found)
    assert (runs(exported) / ("config.json" if file == "model" else "adapter_config.json")).is_file()


@pytest.mark.parametrize("kind", transformers_plan.KINDS)
def test_every_kind_of_adapter_begins_as_nothing_and_learns(runs, kind):
    losses, one = curve(runs(kind)), curve(runs("one"))
    # pissa takes its start out of the weights, by a decomposition in fp32
    assert losses[1][0] == pytest.approx(one[1][0], rel=1e-5)
    assert losses[1][1] > 0 and losses[3][0] != pytest.approx(one[3][0], rel=1e-4), (
        "not the full model's path"
    )


@pytest.mark.parametrize(
    ("kind", "two"), [("adalora", "adalora-fsdp2"), ("llamapro", "llamapro-fsdp2"), ("muon", "muon-ddp2")]
)
def test_what_changes_as_it_trains_is_the_same_on_two_and_resumed(runs, kind, two):
    # Muon iterates on directions, in bfloat16: what differs in the last digit of fp32 may grow
    rel = 1e-3 if kind == "muon" else 1e-5
    assert_same_curve(runs(kind), runs(two), steps=ALL, rel=rel)
    assert_same_curve(runs(kind), runs(f"{two}-to-one"), steps=REST, rel=rel)
    assert curve(runs(kind))[1][0] == pytest.approx(curve(runs("one"))[1][0], rel=1e-6), (
        "it begins as the model"
    )


def test_adalora_leaves_as_many_triplets_as_it_is_told(runs):
    import peft
    from safetensors.torch import load_file

    folder = runs("adalora-fsdp2") / f"checkpoint-{STEPS}"
    factors = load_file(folder / "adapter_model.safetensors")
    values = [tensor for name, tensor in factors.items() if "lora_E" in name]
    assert sum(int((value != 0).sum()) for value in values) == 3 * len(values) < 12 * len(values)
    assert peft.PeftConfig.from_pretrained(folder).peft_type == "ADALORA"


def test_new_layers_train_alone_and_are_exported_with_the_others(runs):
    from safetensors.torch import load_file

    folder = runs("llamapro-fsdp2") / f"checkpoint-{SAVED}"
    before = load_file(folder.parents[1] / "model" / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 6
    places = {0: 0, 1: 1, 2: 3, 3: 4}  # the third and the last are new
    for name, tensor in before.items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(places[int(parts[2])])
        assert after[".".join(parts)].equal(tensor), name
    assert after["model.layers.5.mlp.down_proj.weight"].abs().max() > 0

    assert curve(runs("llamapro-exported"))[1][0] < curve(runs("one"))[1][0]


def test_fourierft_learns(runs):
    losses = [loss for loss, _ in curve(runs("fourierft")).values()]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("mistake", [*transformers_plan.REFUSED, *transformers_plan.REFUSED_SHARED])
def test_a_mistake_is_told_in_words(runs, mistake):
    runs(mistake)


def test_frozen_parameters_have_no_part_in_the_gradient(runs):
    whole, part = curve(runs("one"))[1], curve(runs("frozen"))[1]
    assert part[0] == pytest.approx(whole[0], rel=1e-6)
    assert 0 < part[1] < 0.9 * whole[1]


def test_an_export_is_a_model_of_transformers(runs):
    from transformers import AutoModelForCausalLM

    folder = runs("gpt2-padded") / "checkpoint-1"
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert not told["missing_keys"] and not told["unexpected_keys"]


def test_python_calls_return_the_same_in_every_process(runs):
    """A mistake is an exception and no end; what follows it in the same process is none the worse."""
    job = runs("fsdp2").parent / "job-2"
    first, second = (json.loads((job / f"called-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert "no-such-model: no such folder" in first["called-nowhere"]["mistake"]
    called = first["called"]
    assert (
        called["last_model_checkpoint"].endswith(f"called/checkpoint-{STEPS}")
        and called["global_step"] == STEPS
    )
    losses = {row["step"]: row["loss"] for row in called["log_history"] if "loss" in row}
    assert losses == {step: loss for step, (loss, _) in curve(runs("fsdp2").parent / "called").items()}
    best = min((row["eval_loss"], row["step"]) for row in called["log_history"] if "eval_loss" in row)
    assert (called["best_metric"], called["best_model_checkpoint"].rpartition("-")[2]) == (
        best[0],
        str(best[1]),
    )
    for link, checkpoint in (("last", "last_model_checkpoint"), ("best", "best_model_checkpoint")):
        assert Path(called[checkpoint]).is_dir() and Path(called["output_dir"], link).samefile(
            called[checkpoint]
        )
    again = first["called-again"]
    assert again["best_model_checkpoint"] is None and len(again["log_history"]) == 1

"""What each pipeline stage holds: as megatron-core builds it; impossible splits are refused with possible flags."""

import dataclasses
import itertools
import shlex
from types import SimpleNamespace

import pytest

from mcore_swift.config import MegatronSftArguments, parse
from mcore_swift.errors import UserError
from mcore_swift.plan import Layout, ModelShape, check_layout, stage_layers
from mcore_swift.plan.stages import parse_stages, render_stages
from mcore_swift.plan.stages_check import balanced, stage_problems


def shape_of(layers: int) -> ModelShape:
    return ModelShape(
        family="qwen3", num_layers=layers, hidden_size=64, ffn_hidden_size=192, num_heads=12,
        num_query_groups=4, head_dim=16, vocab_size=997, max_position_embeddings=512,
    )  # fmt: skip


def parsed(*flags: str, pp: int = 1, vpp: int | None = None) -> MegatronSftArguments:
    argv = ["--model", "m", "--dataset", "d", "--train_iters", "1", "--global_batch_size", "60"]
    argv += ["--pipeline_model_parallel_size", str(pp)]
    argv += ["--virtual_pipeline_model_parallel_size", str(vpp)] if vpp else []
    return parse(MegatronSftArguments, [*argv, *flags], notify=lambda line: None)


def problems(layers: int, *flags: str, pp: int, vpp: int | None = None) -> list[UserError]:
    try:
        args = parsed(*flags, pp=pp, vpp=vpp)
    except UserError as error:
        return getattr(error, "errors", [error])
    return check_layout(Layout.from_args(args, pp), shape_of(layers), args, pp)


# layers of each stage by hand from the flags' meaning, stages in the model's order
SPLITS = {
    "even": (12, 4, None, (), [3, 3, 3, 3]),
    "interleaved": (12, 2, 3, (), [2] * 6),
    "first": (11, 4, None, ("--decoder_first_pipeline_num_layers", "2"), [2, 3, 3, 3]),
    "last": (11, 4, None, ("--decoder_last_pipeline_num_layers", "2"), [3, 3, 3, 2]),
    "first and last": (
        13, 4, None,
        ("--decoder_first_pipeline_num_layers", "4", "--decoder_last_pipeline_num_layers", "3"), [4, 3, 3, 3],
    ),
    "two stages, interleaved": (
        6, 2, 2,
        ("--decoder_first_pipeline_num_layers", "4", "--decoder_last_pipeline_num_layers", "2"), [2, 1, 2, 1],
    ),
    "first, interleaved": (10, 3, 2, ("--decoder_first_pipeline_num_layers", "2"), [1, 2, 2, 1, 2, 2]),
    "embedding": (11, 4, None, ("--account_for_embedding_in_pipeline_split",), [2, 3, 3, 3]),
    "embedding and loss, interleaved": (
        10, 2, 2,
        ("--account_for_embedding_in_pipeline_split", "--account_for_loss_in_pipeline_split"), [2, 3, 3, 2],
    ),
    "ends on their own": (
        2, 4, None,
        ("--account_for_embedding_in_pipeline_split", "--account_for_loss_in_pipeline_split"), [0, 1, 1, 0],
    ),
    "letters": (7, 2, None, ("--pipeline_model_parallel_layout", "Et*3|(tt)*2L"), [3, 4]),
    "letters, interleaved": (5, 2, None, ("--pipeline_model_parallel_layout", "E|(tt|)*2,tL"), [0, 2, 2, 1]),
    "names": (
        3, 2, None,
        ("--pipeline_model_parallel_layout", '[["embedding", "decoder"], ["decoder", "decoder", "loss"]]'), [1, 2],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPLITS)
def test_layers_of_each_stage(name):
    layers, pp, vpp, flags, expected = SPLITS[name]
    args = parsed(*flags, pp=pp, vpp=vpp)
    layout = Layout.from_args(args, pp)
    assert check_layout(layout, shape_of(layers), args, pp) == []
    stages = stage_layers(layout, shape_of(layers), args)
    assert [len(stage) for stage in stages] == expected
    assert [number for stage in stages for number in stage] == list(range(layers))
    assert len(stages) == layout.pp * (layout.vpp or 1)


@pytest.mark.parametrize(
    "text",
    [
        "Et*3|(tt|)*29,m|L",
        "Ettt|(tt|)*29,m|L",
        "E|(t|)*3,m|m|L",
        "Et*4|(tttt|)*14tmL",
        "EttL",
        "(Et)*1|(t|)*2tL",
    ],
)
def test_letters_are_read_as_megatron_core_reads_them(text):
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    theirs = PipelineParallelLayerLayout.parse_str_to_list(text)
    names = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}
    assert parse_stages(text) == ["".join(names[layer.name] for layer in stage) for stage in theirs]


def test_what_is_written_reads_back_here_and_in_megatron_core():
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    for layers in range(1, 40):
        for stages in range(1, min(layers, 12) + 3):
            made = balanced(layers, stages)
            assert "".join(made) == f"E{'t' * layers}L" and len(made) == stages and all(made)
            counts = [stage.count("t") for stage in made]
            assert max(counts) - min(counts) <= 2  # embedding and loss may share a stage of two
            text = render_stages(made)
            assert parse_stages(text) == made
            assert [len(stage) for stage in PipelineParallelLayerLayout.parse_str_to_list(text)] == [
                len(stage) for stage in made
            ]


REFUSED = [
    (30, 4, None, (), ["does not divide the model's 30 layers", "parallel_size 3"]),
    (29, 4, None, (), ["29 layers", "'Et*6|(t*8|)*2t*7L'"]),
    (11, 4, 2, (), ["11 layers"]),
    (12, 4, 2, (), ["3 layers of each", "no --virtual"]),
    (2, 5, None, (), ["2 layers", "parallel_size 2"]),
    (12, 4, None, ("--decoder_first_pipeline_num_layers", "2"), ["10 of the model's 12", "3 stages"]),
    (12, 4, None, ("--decoder_last_pipeline_num_layers", "12"), ["0 of the model's 12"]),
    (
        12, 2, None, ("--decoder_first_pipeline_num_layers", "6", "--decoder_last_pipeline_num_layers", "5"),
        ["11 layers in all, and the model has 12"],
    ),
    (12, 2, 2, ("--decoder_first_pipeline_num_layers", "5"), ["2 equal chunks"]),
    (12, 4, None, ("--account_for_loss_in_pipeline_split",), ["12 layers + 1", "drop --account_for_loss"]),
    (30, 4, None, ("--account_for_loss_in_pipeline_split",), ["30 layers + 1", "embedding_in_pipeline_split true"]),
    (12, 2, None, ("--pipeline_model_parallel_layout", "Et*5|t*6L"), ["11 decoder layers (t)", "has 12"]),
    (12, 2, None, ("--pipeline_model_parallel_layout", "Et*7|t*6L"), ["13 decoder layers (t)", "has 12"]),
    (12, 4, None, ("--pipeline_model_parallel_layout", "Et*6||t*6|L"), ["stage 2 of 4 holds nothing"]),
    (12, 2, None, ("--pipeline_model_parallel_layout", "t*6|Et*6L"), ["E (embedding) is not first"]),
    (12, 2, None, ("--pipeline_model_parallel_layout", "Et*6|t*6"), ["0 L (loss), not one"]),
    (12, 2, None, ("--pipeline_model_parallel_layout", "Et*6|t*6mL"), ["1 layers of multi-token"]),
]  # fmt: skip


@pytest.mark.parametrize("layers, pp, vpp, flags, words", REFUSED)
def test_the_remedy_of_a_refusal_works(layers, pp, vpp, flags, words):
    (problem,) = problems(layers, *flags, pp=pp, vpp=vpp)
    assert all(word in str(problem) for word in words), problem
    named = flags_in(problem.remedy)
    if named or "drop" in problem.remedy:
        kept = () if "drop" in problem.remedy or "nearest possible is" in problem.remedy else flags
        assert problems(layers, *kept, *named, pp=pp, vpp=vpp) == [], problem
    else:
        assert layers + 2 < pp  # only fewer stages help
        assert problems(layers, pp=2) == []


def flags_in(remedy: str) -> list[str]:
    """The flags of an uneven pipeline that a remedy gives values for."""
    words = [*shlex.split(remedy.partition("; the nearest")[0]), ""]
    kinds = ("--decoder", "--account", "--pipeline_model_parallel_layout")
    pairs = [pair for pair in itertools.pairwise(words) if pair[0].startswith(kinds)]
    return [word for flag, value in pairs if value not in ("", "and") for word in (flag, value)]


CONFLICTS = [
    (1, None, ("--pipeline_model_parallel_layout", "EttL"), "needs a pipeline"),
    (2, None, ("--pipeline_model_parallel_layout", "Et|t|tL"), "3 stages, which is no multiple"),
    (2, 3, ("--pipeline_model_parallel_layout", "Et|t|t|tL"), "is 3"),
    (2, None, ("--pipeline_model_parallel_layout", "Et|xL"), "'x'"),
    (2, None, ("--pipeline_model_parallel_layout", "Et*99999|tL"), "99999 times"),
    (2, None, ("--pipeline_model_parallel_layout", "Et*0|tL"), "0 times"),
    (2, None, ("--pipeline_model_parallel_layout", '[["embedding", "layer"], ["loss"]]'), "knows no layer"),
    (2, None, ("--pipeline_model_parallel_layout", '["E", "L"]'), "no list of lists"),
    (
        2, None, ("--pipeline_model_parallel_layout", "Et|tL", "--decoder_last_pipeline_num_layers", "1"),
        "--pipeline_model_parallel_layout and --decoder_last_pipeline_num_layers each say",
    ),
    (
        2, None, ("--account_for_loss_in_pipeline_split", "--decoder_first_pipeline_num_layers", "1"),
        "each say",
    ),
]  # fmt: skip


@pytest.mark.parametrize("pp, vpp, flags, words", CONFLICTS)
def test_flags_that_no_model_could_mend(pp, vpp, flags, words):
    with pytest.raises(UserError) as caught:
        parsed(*flags, pp=pp, vpp=vpp)
    assert words in str(caught.value) and caught.value.remedy


def test_a_list_in_a_yaml_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: m\ndataset: d\ntrain_iters: 1\npipeline_model_parallel_size: 2\n"
        "pipeline_model_parallel_layout: [[embedding, decoder], [decoder], [decoder], [decoder, loss]]\n"
    )
    args = parse(MegatronSftArguments, [str(path)], notify=lambda line: None)
    assert args.virtual_pipeline_model_parallel_size == 2
    assert parse_stages(args.pipeline_model_parallel_layout) == ["Et", "t", "t", "tL"]
    assert MegatronSftArguments.from_dict(args.to_dict()) == args


def test_layers_of_multi_token_prediction_are_those_of_the_model_unless_flags_say_otherwise():
    shape = dataclasses.replace(shape_of(4), num_mtp_layers=1)

    def told(letters: str, **flags: int) -> str:
        args = SimpleNamespace(pipeline_model_parallel_layout=letters, **flags)
        return "\n".join(str(problem) for problem in stage_problems(Layout(pp=2), shape, args))

    assert told("Ett|ttmL") == told("Ett|ttL", mtp_num_layers=0) == ""
    assert "nearest possible is --pipeline_model_parallel_layout 'Ett|ttmL'" in told("Ett|ttL")
    assert "m (multi-token prediction) is in stage 1, and must be in the last" in told("Ettttm|L")
    assert "a decoder layer (t) follows" in told("Ett|tmtL")
    # DeepSeek-V3 as NVIDIA lays it out: multi-token layers in a stage of their own
    deep, args = dataclasses.replace(shape_of(61), num_mtp_layers=1), SimpleNamespace()
    args.pipeline_model_parallel_layout = "Et*3|(tt|)*29m|L"
    assert stage_problems(Layout(pp=16, vpp=2), deep, args) == []
    args.pipeline_model_parallel_layout = "Et*3|(tt|)*28ttm||L"
    assert "holds nothing" in str(stage_problems(Layout(pp=16, vpp=2), deep, args))


def test_another_mistake_is_told_beside_the_stages():
    args = SimpleNamespace(
        tensor_model_parallel_size=5,
        pipeline_model_parallel_size=3,
        decoder_first_pipeline_num_layers=2,
        micro_batch_size=1,
        global_batch_size=4,
    )
    heads, stages = check_layout(Layout.from_args(args, 15), shape_of(13), args, 15)
    assert "num_attention_heads" in str(heads) and "11 of the model's 13 layers" in str(stages)

"""The embedded demo: the same from the same seed, honest about what is held out, and scored rightly."""

import hashlib
import json
import re
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import arithmetic_demo as demo  # noqa: E402
import quickstart  # noqa: E402

QUESTION = [{"role": "user", "content": "What is 37+45?"}]
TEXTS = [
    "What is 37+45?",
    "user assistant system",
    "täglich 東京 🙂\n\ttab",
    "  spaces  99 ",
    "7+5=12, 3+4+1=8, 82",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return demo.make_demo(tmp_path_factory.mktemp("demo"), seed=3, num_val=20)


@pytest.fixture(scope="module")
def tokenizer(made):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(made.model)


def digests(folder):
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def questions(path):
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    return {rows[0]["content"]: rows[1]["content"] for rows in rows}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(made, tmp_path):
    again = demo.make_demo(tmp_path / "again", seed=3, num_val=20)
    other = demo.make_demo(tmp_path / "other", seed=4, num_val=20)
    assert digests(again.model.parent) == digests(made.model.parent)
    different = {
        name
        for name, digest in digests(other.model.parent).items()
        if digest != digests(made.model.parent)[name]
    }
    assert different == {"model/model.safetensors", "train.jsonl", "val.jsonl"}


def test_making_the_demo_leaves_the_random_state_of_the_caller_alone(tmp_path):
    import torch

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    demo.make_demo(tmp_path, num_val=5)
    assert torch.equal(torch.rand(3), expected)


def test_no_question_of_the_validation_set_is_trained_on_in_either_order(made):
    train, val = questions(made.train), questions(made.val)
    assert len(val) == 20
    swapped = {f"What is {b}+{a.removeprefix('What is ')}?" for a, b in (q[:-1].split("+") for q in val)}
    assert not train.keys() & (val.keys() | swapped)
    assert len(train) > 9900


def test_answers_are_right_in_every_line_of_the_working():
    for a in range(100):
        for b in range(100):
            units, tens, total = demo.answer(a, b).split(", ")
            assert int(total) == a + b
            for line in (units, tens):
                terms, value = line.split("=")
                assert sum(map(int, terms.split("+"))) == int(value)
            assert int(tens.split("=")[1]) * 10 + int(units.split("=")[1]) % 10 == a + b


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_is_encoded_and_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_each_digit_is_a_token_and_each_special_token_too(tokenizer):
    assert tokenizer.tokenize("2048") == ["2", "0", "4", "8"]
    for token in demo.SPECIAL_TOKENS:
        assert len(tokenizer(token)["input_ids"]) == 1
    assert len(tokenizer) == max(tokenizer.get_vocab().values()) + 1  # no holes


def test_the_chat_template_renders_chatml_and_decodes_back(tokenizer):
    prompt = "<|im_start|>user\nWhat is 37+45?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True) == prompt
    answered = [*QUESTION, {"role": "assistant", "content": "82"}]
    text = tokenizer.apply_chat_template(answered, tokenize=False)
    assert text == prompt + "82<|im_end|>\n"
    # the prompt's tokens begin the whole's, so a loss mask can be found by rendering
    ids = tokenizer.apply_chat_template(answered, return_dict=True)["input_ids"]
    start = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids[: len(start)] == start
    assert tokenizer.decode(ids) == text


def test_the_checkpoint_is_a_qwen3_that_divides_by_two_and_knows_when_to_stop(made, tokenizer):
    config = json.loads((made.model / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["tie_word_embeddings"] is False
    assert config["vocab_size"] == len(tokenizer)
    for size in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "num_hidden_layers"):
        assert config[size] % 2 == 0
    generation = json.loads((made.model / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_random_model_scores_nothing_or_next_to_nothing(made):
    score = demo.score(made.model, made.val)
    assert score.total == 20
    assert score.accuracy <= 0.05  # a lucky hit among 199 sums at most


class Knows:
    """A model that adds rightly when the second number is even, and says one too many when it is odd."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def eval(self):
        return self

    def generate(self, *, input_ids, attention_mask, do_sample, max_new_tokens, eos_token_id, pad_token_id):
        import torch

        assert not do_sample
        answers = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            assert mask[-1] == 1  # padding is on the left
            prompt = self.tokenizer.decode(ids[mask.bool()])
            a, b = map(int, re.findall(r"\d+", prompt))
            said = demo.answer(a, b) if b % 2 == 0 else f"0+0=0, 0+0=0, {a + b + 1}"
            answers.append([*self.tokenizer(said)["input_ids"], eos_token_id])
        assert max(map(len, answers)) <= max_new_tokens
        longest = max(map(len, answers))
        padded = [answer + [pad_token_id] * (longest - len(answer)) for answer in answers]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)


def test_the_score_counts_the_questions_answered_right(made, tokenizer, monkeypatch):
    import transformers

    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *args, **options: Knows(tokenizer)
    )
    even = sum(int(question[-2]) % 2 == 0 for question in questions(made.val))
    assert 0 < even < 20
    # a batch size that does not divide: the last batch is a short one
    assert demo.score(made.model, made.val, batch_size=7) == demo.Score(even, 20)


@pytest.mark.parametrize(("text", "number"), [("7+5=12, 82", "82"), ("82.", "82"), ("none", None)])
def test_last_number(text, number):
    assert demo.last_number(text) == number


def test_the_command_of_the_quick_start_is_one_that_megatron_sft_accepts(made, tmp_path):
    from mcore_swift.config import MegatronSftArguments, parse

    program, name, *flags = quickstart.command(made, tmp_path)
    assert (program, name) == ("megatron", "sft")
    args = parse(MegatronSftArguments, flags)
    assert args.problems() == []
    assert args.tensor_model_parallel_size == 2 and args.packing and args.save_safetensors


def test_the_example_configuration_is_accepted():
    from mcore_swift.config import MegatronSftArguments, parse

    args = parse(MegatronSftArguments, [str(EXAMPLES / "sft.yaml"), "--lr", "1e-4"])
    assert args.problems() == []
    assert args.lr == 1e-4 and args.tensor_model_parallel_size == 2


def test_the_quick_start_finds_the_newest_complete_export(tmp_path):
    for name, files in {
        "v0/checkpoint-2": ["config.json", "model.safetensors"],
        "v0/checkpoint-10": ["config.json", "model.safetensors"],
        "v0/checkpoint-20": ["config.json"],
    }.items():
        (tmp_path / name).mkdir(parents=True)
        for file in files:
            (tmp_path / name / file).write_text("{}")
    assert quickstart.exported(tmp_path).name == "checkpoint-10"
    with pytest.raises(quickstart.Failed, match="no checkpoint-N"):
        quickstart.exported(tmp_path / "v0" / "checkpoint-2")


def test_the_quick_start_reports_the_median_rate_without_the_warm_up(tmp_path):
    log = tmp_path / "logging.jsonl"
    log.write_text("".join(json.dumps({"tokens_per_s": rate}) + "\n" for rate in (1, 100, 300, 200)))
    assert quickstart.tokens_per_s(log) == 200


def test_the_quick_start_stops_a_command_that_hangs_and_says_so(monkeypatch):
    monkeypatch.setattr(quickstart, "installed", lambda arguments: ["sleep", "60"])
    with pytest.raises(quickstart.Failed, match="not finished after 1 s"):
        quickstart.run(["megatron", "sft"], processes=1, limit_s=1)

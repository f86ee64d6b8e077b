"""The main job: Hugging Face checkpoint and dataset in, a Hugging Face checkpoint out that transformers agrees with."""

import json
import os
from pathlib import Path

import pytest
from commands import REPOSITORY, flags, run
from tiny import eval_losses, make_model, rows_of

SHARED = Path(os.environ.get("MCORE_SWIFT_SHARED") or REPOSITORY.parent / "shared")
GSM8K, QWEN3 = SHARED / "data/gsm8k/train.jsonl", SHARED / "tokenizers/qwen3"
EMPTY_THOUGHTS = "<think>\n\n</think>\n\n"  # Qwen3's template writes them; they are prompt, not answer


def transformers_loss(checkpoint, conversations):
    """Mean loss of the assistant's tokens, one conversation at a time, with nothing of ours."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for messages in conversations:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        start = len(tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True))
        start += len(EMPTY_THOUGHTS) if text.startswith(EMPTY_THOUGHTS, start) else 0
        stop = text.rindex("<|im_end|>") + len("<|im_end|>")
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        ids = torch.tensor(encoded["input_ids"])
        learnt = torch.tensor([start <= a and b <= stop for a, b in encoded["offset_mapping"]])
        with torch.inference_mode():
            logits = model(ids[None]).logits[0]
        nll = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
        total += nll[learnt[1:]].sum().item()
        count += int(learnt[1:].sum())
    return total / count


def held_back(run_dir):
    """The rows that --split_dataset_ratio took out, as the run wrote them down."""
    return [json.loads(line) for line in (run_dir / "val_dataset.jsonl").read_text().splitlines()]


def assert_it_learnt_and_agrees(run_dir, conversations, *, fall):
    losses = [row["loss"] for row in rows_of(run_dir)]
    assert losses[-1] < losses[0] - fall, losses
    validation = eval_losses(run_dir)
    steps = sorted(validation)
    assert validation[steps[-1]] < validation[steps[0]]
    for step in steps:
        exported = run_dir / f"checkpoint-{step}"
        # the bound of the issue; in fp32 some 1e-6 are seen
        assert transformers_loss(exported, conversations) == pytest.approx(validation[step], abs=1e-3), step


def test_demo_data_from_a_yaml_file(tiny, tmp_path):
    """Settings in a file, some of them overruled on the command line; two processes; several files."""
    rows = [json.loads(line)["messages"] for line in tiny.train.read_text().splitlines()]
    settings = tmp_path / "run.yaml"
    settings.write_text(
        f"""
model: {tiny.model}
dataset: [{tiny.train}]
output_dir: {tmp_path / "overruled"}
cache_dir: {tmp_path / "cache"}
split_dataset_ratio: 0.1
tensor_model_parallel_size: 2
sequence_parallel: true
packing: true
max_length: 192
global_batch_size: 4
train_iters: 8
save_steps: 4
lr: 1.0e-9
logging_steps: 1
max_shard_size: 100KB
ENV:
  NPROC_PER_NODE: 2
"""
    )
    changes = flags(lr=4e-3, output_dir=tmp_path / "run")
    ended = run(["sft", str(settings), *changes], tmp_path).check()
    assert "on TP2" in ended.err and not (tmp_path / "overruled").exists()
    (run_dir,) = (tmp_path / "run").glob("v0-*")
    args = json.loads((run_dir / "args.json").read_text())
    assert (args["lr"], args["max_shard_size"]) == (4e-3, "100KB")
    conversations = [row["messages"] for row in held_back(run_dir)]
    assert len(conversations) == 9 and all(messages in rows for messages in conversations)
    assert_it_learnt_and_agrees(run_dir, conversations, fall=0.5)
    exported = run_dir / "checkpoint-8"
    files = sorted(path.name for path in exported.glob("*.safetensors"))
    assert len(files) > 1 and (exported / "model.safetensors.index.json").is_file()
    assert json.loads((exported / "config.json").read_text())["vocab_size"] % 2 == 1, (
        "padding is not exported"
    )
    assert list((run_dir / "runs").iterdir()) and (run_dir / "images" / "train_loss.png").is_file()


@pytest.mark.skipif(not (GSM8K.exists() and QWEN3.exists()), reason=f"{SHARED} holds no gsm8k and tokenizer")
def test_gsm8k_with_the_qwen3_tokenizer_on_four_processes(tmp_path):
    from transformers import AutoTokenizer

    # all of the vocabulary, and a tied embedding, as the smallest Qwen3 has them; the first and the last
    # pipeline stage then share it
    model, output = tmp_path / "model", tmp_path / "run"
    make_model(model, AutoTokenizer.from_pretrained(QWEN3), vocab_size=151936, tie_word_embeddings=True)
    argv = flags(
        model=model,
        dataset=f"{GSM8K}#40",
        columns='{"question": "query", "answer": "response"}',
        split_dataset_ratio=0.1,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        packing=True,
        max_length=512,
        global_batch_size=2,
        train_iters=8,
        eval_steps=8,
        save_steps=8,
        lr=5e-3,
        logging_steps=1,
        output_dir=output,
        add_version=False,
        cache_dir=tmp_path / "cache",
    )
    run(["sft", *argv], tmp_path, processes=4).check()
    rows = held_back(output)
    assert len(rows) == 4
    source = {json.loads(line)["question"]: json.loads(line)["answer"] for line in GSM8K.open()}
    conversations = []
    for row in rows:
        assert source[row["question"]] == row["answer"]
        turns = ("user", row["question"]), ("assistant", row["answer"])
        conversations.append([{"role": role, "content": content} for role, content in turns])
    losses = [row["loss"] for row in rows_of(output)]
    assert losses[-1] < losses[0] - 0.5, losses
    loss = transformers_loss(output / "checkpoint-8", conversations)
    assert loss == pytest.approx(eval_losses(output)[8], abs=1e-3)

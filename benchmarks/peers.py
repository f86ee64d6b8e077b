"""The same work with transformers' Trainer and with TRL's SFTTrainer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def cut(samples: list[Any], count: int, order: Callable[[Any], int] | None = None) -> list[list[Any]]:
    """The samples of a step, sorted by `order` if given, in `count` batches of nearly equal size."""
    samples = sorted(samples, key=order, reverse=True) if order else samples
    edges = [round(i * len(samples) / count) for i in range(count + 1)]
    return [samples[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def train(facts: dict[str, Any]) -> None:
    """Train with the peer's own defaults, except for the order of the samples and the settings in `facts`.

    facts: peer (Trainer or TRL), model, samples (file), output, accumulation, sorted, lora.
    """
    import torch
    from transformers import AutoModelForCausalLM, TrainerCallback

    steps = json.loads(Path(facts["samples"]).read_text())
    order = (lambda sample: len(sample[0])) if facts["sorted"] else None
    batches = [batch for step in steps for batch in cut(step, facts["accumulation"], order)]
    trainer, arguments, more = peer(facts)

    class InGivenOrder(trainer):
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=padded)

    class SayLoss(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                print(
                    f"step {state.global_step}/{state.max_steps} loss {float(logs['loss']):.4f}", flush=True
                )

    arguments = arguments(
        output_dir=facts["output"],
        max_steps=len(steps),
        gradient_accumulation_steps=facts["accumulation"],
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        logging_steps=1,
        logging_strategy="steps",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    model = AutoModelForCausalLM.from_pretrained(facts["model"], dtype=torch.float32)
    if facts["lora"]:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    InGivenOrder(model, arguments, callbacks=[SayLoss()], **more).train()


def peer(facts: dict[str, Any]) -> tuple[type, type, dict[str, Any]]:
    """(trainer class, class of its arguments, its further keyword arguments)."""
    if facts["peer"] == "Trainer":
        from transformers import Trainer, TrainingArguments

        return Trainer, TrainingArguments, {}
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    # It requires a data set; the given batches replace it.
    rows = Dataset.from_dict({"input_ids": [[0, 1, 2]], "labels": [[0, 1, 2]]})
    return (
        SFTTrainer,
        SFTConfig,
        {
            "train_dataset": rows,
            "processing_class": AutoTokenizer.from_pretrained(facts["model"]),
        },
    )


def padded(batch: list[tuple[list[int], list[int]]]) -> dict[str, Any]:
    """Samples as rows, padded on the right to the longest one."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    columns = {
        "input_ids": [torch.tensor(ids) for ids, _ in batch],
        "labels": [torch.tensor(labels) for _, labels in batch],
        "attention_mask": [torch.ones(len(ids), dtype=torch.int64) for ids, _ in batch],
    }
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {
        name: pad_sequence(rows, batch_first=True, padding_value=fill[name]) for name, rows in columns.items()
    }

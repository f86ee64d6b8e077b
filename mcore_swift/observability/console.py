"""Log lines for people: a progress bar with lines above it on a terminal, plain lines elsewhere."""

import sys
from typing import Any, TextIO

from .meter import Line

# key -> its text on the console; keys not listed here follow as `key value`
_FORMATS = {
    "loss": "loss {:.4f}",
    "eval_loss": "eval_loss {:.4f}",
    "grad_norm": "grad_norm {:.3f}",
    "learning_rate": "lr {:.3e}",
    "skipped_steps": "SKIPPED {} steps",
    "tokens_per_s": "{:,.0f} tokens/s",
    "tokens_per_s_per_device": "{:,.0f} tokens/s/device",
    "tflops_per_device": "{:.4g} TFLOP/s/device",
    "mfu": "MFU {:.1%}",
    "train_speed(s/it)": "{:.3g} s/it",
    "data_wait_s": "data wait {:.3g} s",
    "data_wait_share": "({:.1%})",
    "padding_share": "padding {:.1%}",
    "memory(GiB)": "memory {:.2f} GiB",
    "elapsed_time": "elapsed {}",
    "remaining_time": "remaining {}",
}
_LAST = ("elapsed_time", "remaining_time")
_SAID_OTHERWISE = {"step", "iteration", "global_step/max_steps", "percentage", "epoch", "consumed_samples"}


class ConsoleLogger:
    """Prints log lines to `stream`, and keeps a tqdm bar under them when standard error is a terminal."""

    def __init__(
        self,
        *,
        total_steps: int,
        start_step: int = 0,
        stream: TextIO | None = None,
        bar: bool | None = None,
    ) -> None:
        self._stream = stream or sys.stdout
        self._bar: Any = None
        if sys.stderr.isatty() if bar is None else bar:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_steps, initial=start_step, desc="train", unit="step", dynamic_ncols=True
            )

    def after_step(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def log(self, line: Line) -> None:
        text = format_line(line)
        if self._bar is None:
            print(text, file=self._stream, flush=True)
            return
        if "loss" in line:
            self._bar.set_postfix_str(f"loss {line['loss']:.4f}", refresh=False)
        self._bar.write(text, file=self._stream)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def format_line(line: Line) -> str:
    """A log line as one line of text: `step 10/300 · loss 0.5123 · ...`."""
    parts = [f"step {line['iteration']}"] if "iteration" in line else []
    if "epoch" in line:
        parts.append(f"epoch {line['epoch']:.2f}")
    known = [name for name in _FORMATS if name in line and name not in _LAST]
    further = [
        name
        for name in line
        if name not in _FORMATS and name not in _SAID_OTHERWISE and not name.startswith("time/")
    ]
    for name in [*known, *further, *(name for name in _LAST if name in line)]:
        text = _FORMATS[name].format(line[name]) if name in _FORMATS else f"{name} {_number(line[name])}"
        if text.startswith("("):  # a share belongs to the figure before it
            parts[-1] += f" {text}"
        else:
            parts.append(text)
    return " · ".join(parts)


def _number(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

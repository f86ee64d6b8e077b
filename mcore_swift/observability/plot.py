"""Curves of a run as PNG files, drawn from logging.jsonl at the end."""

import importlib.util
import logging
from pathlib import Path

from .jsonl import read_rows, step_of

FOLDER = "images"
CURVES = {
    "loss": "train_loss",
    "learning_rate": "train_learning_rate",
    "grad_norm": "train_grad_norm",
    "eval_loss": "eval_loss",
}
_log = logging.getLogger(__name__)


def plot_curves(log_file: str | Path, folder: str | Path) -> list[Path]:
    """Draw each curve of CURVES that the log has into `folder`/images; returns the files written.

    Without matplotlib, nothing is drawn and a message says so. Raises UserError when the log cannot be read.
    """
    if not importlib.util.find_spec("matplotlib"):
        _log.info("matplotlib is not installed, so no curves are drawn (pip install 'mcore-swift[tracking]')")
        return []
    rows = read_rows(log_file)
    images = Path(folder) / FOLDER
    files = []
    for name, stem in CURVES.items():
        points = [(step_of(row), row[name]) for row in rows if isinstance(row.get(name), int | float)]
        if points:
            images.mkdir(parents=True, exist_ok=True)
            files.append(_draw(images / f"{stem}.png", name, points))
    return files


def smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start as in Adam (arXiv:1412.6980, section 3)."""
    average, smoothed = 0.0, []
    for count, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**count))
    return smoothed


def _draw(path: Path, name: str, points: list[tuple[int, float]]) -> Path:
    # a Figure of our own, since pyplot would choose a backend for the whole process
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, values = [step for step, _ in points], [value for _, value in points]
    figure = Figure(figsize=(8, 5))
    figure.subplots_adjust(
        left=0.11, right=0.97, bottom=0.1, top=0.96
    )  # matplotlib's own layout would double the time
    axes = figure.add_subplot()
    marker = "." if len(points) < 50 else None
    if name == "loss" and len(points) >= 10:
        axes.plot(steps, values, color="tab:blue", alpha=0.3, label="logged")
        axes.plot(steps, smooth(values), color="tab:blue", label="smoothed")
        axes.legend()
    else:
        axes.plot(steps, values, color="tab:blue", marker=marker)
    axes.set_xlabel("step")
    axes.set_ylabel(name)
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(str(path))
    return path

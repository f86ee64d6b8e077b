"""What is on disk after a run, a crash and a resume."""

import io
import json
import logging
import sys

import pytest

from mcore_swift.errors import UserError
from mcore_swift.observability import JsonlLogger, Meter, RunLog, StepReport, plot_curves, read_rows
from mcore_swift.observability.console import ConsoleLogger
from mcore_swift.observability.jsonl import FILE_NAME
from mcore_swift.observability.plot import smooth
from mcore_swift.observability.tensorboard import tag_of


def report(step):
    return StepReport(
        step=step,
        loss=1.0 / step,
        grad_norm=0.5,
        learning_rate=1e-3,
        tokens=10,
        step_time_s=0.1,
        consumed_samples=step,
    )


def run_log(folder, *, start_step=0, total_steps=20, **options):
    meter = Meter(total_steps=total_steps, world_size=1, start_step=start_step)
    return RunLog(folder, meter, is_writer=True, **options)


def steps_in(folder, key="loss"):
    return [row["step"] for row in read_rows(folder / FILE_NAME) if key in row]


def test_lines_come_at_step_one_at_every_interval_and_at_the_end(tmp_path):
    with run_log(tmp_path, logging_steps=5, total_steps=12) as log:
        for step in range(1, 13):
            log.after_step(report(step))
    assert steps_in(tmp_path) == [1, 5, 10, 12]


def test_a_run_that_ends_early_still_logs_its_last_steps(tmp_path):
    with pytest.raises(RuntimeError), run_log(tmp_path, logging_steps=5) as log:
        for step in range(1, 8):
            log.after_step(report(step))
        raise RuntimeError
    assert steps_in(tmp_path) == [1, 5, 7]


def test_a_resumed_run_continues_one_clean_curve(tmp_path):
    crashed = run_log(tmp_path, logging_steps=2)
    for step in range(1, 9):
        crashed.after_step(report(step))
        if step == 6:
            crashed.after_eval(6, {"loss": 0.3})
    # killed here, in the middle of a line, with a checkpoint at step 4
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"loss": 0.1, "st')
    with run_log(tmp_path, logging_steps=2, start_step=4) as log:
        for step in range(5, 11):
            log.after_step(report(step))
    assert steps_in(tmp_path) == [1, 2, 4, 6, 8, 10]
    assert steps_in(tmp_path, "eval_loss") == []


def test_rows_of_ms_swift_are_cut_by_their_own_name_of_the_step(tmp_path):
    rows = [{"loss": 1.0, "iteration": "5/9"}, {"loss": 1.0, "global_step/max_steps": "6/9"}, {"model": "x"}]
    (tmp_path / FILE_NAME).write_text("".join(json.dumps(row) + "\n" for row in rows))
    JsonlLogger(tmp_path, start_step=5).close()
    assert read_rows(tmp_path / FILE_NAME) == [rows[0], rows[2]]


def test_each_row_is_on_disk_at_once_and_is_strict_json(tmp_path):
    log = run_log(tmp_path, logging_steps=1)
    log.after_step(
        StepReport(step=1, loss=float("nan"), grad_norm=None, learning_rate=0.0, tokens=1, step_time_s=1)
    )

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    row = json.loads((tmp_path / FILE_NAME).read_text(), parse_constant=refuse)
    assert row["loss"] == "nan"
    log.close()


def test_a_broken_row_in_the_middle_is_named(tmp_path):
    (tmp_path / FILE_NAME).write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match=rf"{FILE_NAME}:2"):
        read_rows(tmp_path / FILE_NAME)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full is Linux's")
def test_a_full_disk_is_a_user_error_that_names_the_file(tmp_path):
    (tmp_path / FILE_NAME).symlink_to("/dev/full")
    logger = JsonlLogger.__new__(JsonlLogger)
    logger.path = tmp_path / FILE_NAME
    logger._file = logger.path.open("a", buffering=1)
    with pytest.raises(UserError, match=f"{FILE_NAME}: cannot be written: No space left"):
        logger.log({"step": 1})


def test_a_log_folder_that_is_a_file_is_a_user_error(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        JsonlLogger(tmp_path / "taken")


def test_only_the_writer_writes(tmp_path):
    meter = Meter(total_steps=2, world_size=2)
    with RunLog(tmp_path, meter, is_writer=False, report_to=["tensorboard"]) as log:
        log.after_step(report(1))
        log.after_eval(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_console_lines_are_plain_where_there_is_no_terminal():
    stream = io.StringIO()
    logger = ConsoleLogger(total_steps=4, stream=stream, bar=False)
    logger.after_step(1)
    logger.log({"step": 1, "iteration": "1/4", "loss": 0.25})
    logger.close()
    assert stream.getvalue() == "step 1/4 · loss 0.2500\n"


def test_the_bar_follows_the_steps_and_lines_stay_whole(capfd):
    stream = io.StringIO()
    logger = ConsoleLogger(total_steps=8, start_step=4, stream=stream, bar=True)
    for step in (5, 6):
        logger.after_step(step)
    logger.log({"step": 6, "iteration": "6/8", "loss": 0.25})
    logger.close()
    assert stream.getvalue() == "step 6/8 · loss 0.2500\n"
    assert "6/8" in capfd.readouterr().err


def test_the_curves_are_png_files(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    with run_log(tmp_path, logging_steps=1) as log:
        for step in range(1, 21):
            log.after_step(report(step))
        log.after_eval(20, {"loss": 0.5})
        files = log.close()
    assert {file.name for file in files} == {
        "train_loss.png",
        "train_learning_rate.png",
        "train_grad_norm.png",
        "eval_loss.png",
    }
    pixels = image.imread(tmp_path / "images" / "train_loss.png")
    assert pixels.shape[0] > 300 and pixels.std() > 0  # decoded, and something is drawn


def test_without_matplotlib_one_line_says_so(tmp_path, monkeypatch, caplog):
    (tmp_path / FILE_NAME).write_text('{"step": 1, "loss": 1.0}\n')
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(logging.getLogger("mcore_swift"), "propagate", True)
    caplog.set_level("INFO", logger="mcore_swift")
    assert plot_curves(tmp_path / FILE_NAME, tmp_path) == []
    assert [message for message in caplog.messages if "matplotlib" in message] == caplog.messages != []
    assert not (tmp_path / "images").exists()


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant():
    assert smooth([5.0, 5.0, 5.0]) == pytest.approx([5.0, 5.0, 5.0])
    assert smooth([1.0, 2.0], weight=0.5) == pytest.approx([1.0, (0.25 * 1 + 0.5 * 2) / 0.75])


def test_tensorboard_events_hold_the_curve_once(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    crashed = run_log(tmp_path, logging_steps=1, report_to=["tensorboard"])
    for step in range(1, 7):
        crashed.after_step(report(step))
    crashed._loggers[-1].close()
    with run_log(tmp_path, logging_steps=1, start_step=3, report_to=["tensorboard"]) as log:
        for step in range(4, 9):
            log.after_step(report(step))
        log.after_eval(8, {"loss": 0.25})
    events = accumulator.EventAccumulator(str(tmp_path / "runs")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))
    assert events.Scalars("train/loss")[3].value == pytest.approx(0.25)
    assert [event.value for event in events.Scalars("eval/loss")] == [0.25]


def test_a_tracker_that_is_asked_for_and_missing_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tensorboard is not installed") as error:
        run_log(tmp_path, report_to=["tensorboard"])
    assert "mcore-swift[tracking]" in error.value.remedy
    assert not (tmp_path / FILE_NAME).exists()
    run_log(tmp_path, report_to=["tensorboard"], required=False).close()


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(ValueError, match="wandb"):
        run_log(tmp_path, report_to=["wandb"])


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("loss", "train/loss"),
        ("eval_loss", "eval/loss"),
        ("train_speed(s/it)", "train/train_speed(s/it)"),
        ("time/save", "time/save"),
    ],
)
def test_tags(name, tag):
    assert tag_of(name) == tag

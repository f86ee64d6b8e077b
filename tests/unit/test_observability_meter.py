"""Every number of a log line against one worked out by hand."""

import math

import pytest

from mcore_swift.observability import Meter, PhaseTimer, StepReport, format_duration
from mcore_swift.observability.console import format_line
from mcore_swift.observability.meter import eval_line, weighted_mean


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def report(step=1, **changes):
    values = {
        "step": step,
        "loss": 2.0,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "tokens": 1000,
        "padded_tokens": 250,
        "samples": 10,
        "flops": 4e12,
        "step_time_s": 0.5,
        "data_wait_s": 0.05,
        "memory_peak_bytes": 3 * 1024**3,
        "consumed_samples": 10 * step,
        "epoch": 0.1 * step,
    }
    return StepReport(**(values | changes))


def make_meter(**changes):
    return Meter(**({"total_steps": 100, "world_size": 4, "peak_flops": 10e12, "clock": Clock()} | changes))


def test_rates_of_one_step():
    meter = make_meter()
    meter.add(report())
    line = meter.line()
    assert line["tokens_per_s"] == 2000  # 1000 tokens in half a second
    assert line["tokens_per_s_per_device"] == 500
    assert line["tflops_per_device"] == 2  # 4e12 in 0.5 s is 8e12 /s over four devices
    assert line["mfu"] == 0.2  # of 10e12
    assert line["train_speed(s/it)"] == 0.5
    assert line["data_wait_s"] == 0.05
    assert line["data_wait_share"] == 0.1
    assert line["padding_share"] == 0.2  # 250 of 1250 positions
    assert line["memory(GiB)"] == 3
    assert line["learning_rate"] == 1e-3
    assert line["consumed_samples"] == 10


def test_a_line_over_several_steps_is_the_mean_over_tokens_and_not_over_steps():
    meter = make_meter()
    meter.add(report(1, loss=1.0, tokens=100, step_time_s=1.0, memory_peak_bytes=2 * 1024**3, grad_norm=1.0))
    meter.add(report(2, loss=4.0, tokens=300, step_time_s=3.0, memory_peak_bytes=5 * 1024**3, grad_norm=2.0))
    line = meter.line()
    assert line["loss"] == pytest.approx((1 * 100 + 4 * 300) / 400)
    assert line["grad_norm"] == 1.5
    assert line["tokens_per_s"] == 100
    assert line["train_speed(s/it)"] == 2
    assert line["memory(GiB)"] == 5
    assert line["step"] == 2
    assert meter.empty


def test_the_weight_of_a_loss_is_its_own_count_when_it_has_one():
    meter = make_meter()
    meter.add(report(1, loss=1.0, tokens=900, loss_count=1, metrics={"acc": 0.0}))
    meter.add(report(2, loss=4.0, tokens=100, loss_count=3, metrics={"acc": 1.0, "late": 7.0}))
    line = meter.line()
    assert line["loss"] == pytest.approx(3.25)
    assert line["acc"] == pytest.approx(0.75)
    assert line["late"] == 7.0


def test_a_logged_loss_of_one_step_is_the_step_s_loss_bit_for_bit():
    meter = make_meter()
    meter.add(report(loss=0.1 + 0.2, tokens=977))
    assert meter.line()["loss"] == 0.1 + 0.2


def test_a_skipped_step_is_counted_and_kept_out_of_the_curve():
    meter = make_meter()
    meter.add(report(1, loss=3.0, grad_norm=2.0))
    meter.add(report(2, loss=math.inf, grad_norm=math.nan, skipped=True))
    line = meter.line()
    assert (line["loss"], line["grad_norm"], line["skipped_steps"]) == (3.0, 2.0, 1)
    meter.add(report(3, loss=math.nan, skipped=True))
    assert math.isnan(meter.line()["loss"])


def test_a_loss_that_is_no_number_is_not_hidden():
    meter = make_meter()
    meter.add(report(1, loss=3.0))
    meter.add(report(2, loss=math.nan))
    assert math.isnan(meter.line()["loss"])


def test_no_peak_means_no_mfu():
    meter = make_meter(peak_flops=None)
    meter.add(report())
    assert "mfu" not in meter.line()


def test_elapsed_and_remaining_are_of_this_process_after_a_resume():
    clock = Clock()
    meter = make_meter(start_step=40, clock=clock)
    clock.now += 30
    line = meter.position(50)
    assert line["elapsed_time"] == "30s"
    assert line["remaining_time"] == "2m 30s"  # 3 s a step, 50 to go
    assert line["iteration"] == line["global_step/max_steps"] == "50/100"
    assert line["percentage"] == "50.00%"
    assert "remaining_time" not in meter.position(40)


def test_an_empty_window_has_no_line():
    with pytest.raises(ValueError, match="no step"):
        make_meter().line()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m 0s"), (3600, "1h 0m 0s"), (90061, "1d 1h 1m 1s"), (-3, "0s")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_weighted_mean_of_weights_that_are_all_zero():
    assert weighted_mean([(1.0, 0), (3.0, 0)]) == 2.0
    assert math.isnan(weighted_mean([]))


def test_console_line_says_what_the_issue_asks_for():
    clock = Clock()
    meter = make_meter(clock=clock)
    clock.now += 2
    meter.add(report())
    text = format_line(meter.line())
    for part in (
        "step 1/100",
        "loss 2.0000",
        "grad_norm 1.000",
        "lr 1.000e-03",
        "2,000 tokens/s",
        "500 tokens/s/device",
        "2 TFLOP/s/device",
        "MFU 20.0%",
        "0.5 s/it",
        "data wait 0.05 s (10.0%)",
        "padding 20.0%",
        "memory 3.00 GiB",
        "elapsed 2s",
        "remaining 3m 18s",
    ):
        assert part in text
    assert "\n" not in text


def test_eval_metrics_get_the_prefix_once():
    assert eval_line({"loss": 1.0, "eval_acc": 0.5}) == {"eval_loss": 1.0, "eval_acc": 0.5}


def test_phases_add_up_nest_and_start_again():
    clock = Clock()
    timer = PhaseTimer(clock=clock)
    for seconds in (1, 2):
        with timer("forward_backward"):
            clock.now += seconds
            with timer("data_wait"):
                clock.now += 0.5
    assert timer.seconds("data_wait") == 1.0
    meter = make_meter()
    meter.add(report(phases_s=timer.take()))
    assert meter.line()["time/forward_backward"] == 4.0
    assert timer.take() == {}


def test_a_phase_counts_when_it_fails():
    clock = Clock()
    timer = PhaseTimer(clock=clock)
    with pytest.raises(RuntimeError), timer("save"):
        clock.now += 3
        raise RuntimeError
    assert timer.take() == {"save": 3.0}

"""Learning rate and weight decay of every step are those of megatron-core's OptimizerParamScheduler."""

from types import SimpleNamespace

import pytest

from mcore_swift.training.schedule import Schedule

TOTAL = 40
DEFAULTS = {
    "lr": 3e-4,
    "min_lr": 2e-5,
    "lr_decay_style": "cosine",
    "lr_decay_iters": None,
    "lr_warmup_iters": 0,
    "lr_warmup_fraction": None,
    "lr_warmup_init": 0.0,
    "lr_wsd_decay_style": "exponential",
    "lr_wsd_decay_iters": None,
    "start_weight_decay": 0.1,
    "end_weight_decay": 0.1,
    "weight_decay_incr_style": "constant",
}
CASES = {
    **{
        f"{style}-warmup{warmup}": {"lr_decay_style": style, "lr_warmup_iters": warmup}
        for style in ("constant", "linear", "cosine", "inverse-square-root")
        for warmup in (0, 1, 7)
    },
    **{
        f"WSD-{style}": {"lr_decay_style": "WSD", "lr_wsd_decay_style": style, "lr_wsd_decay_iters": 9}
        for style in ("exponential", "linear", "cosine", "minus_sqrt")
    },
    "WSD-and-warmup": {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 30, "lr_warmup_iters": 5},
    "warmup-from-above-zero": {"lr_warmup_iters": 6, "lr_warmup_init": 1e-5},
    "decay-ends-before-the-run": {"lr_decay_iters": 20, "lr_warmup_iters": 4},
    "root-decay-ends-before-the-run": {"lr_decay_style": "inverse-square-root", "lr_decay_iters": 20},
    "decay-goes-on-after-the-run": {"lr_decay_iters": 90},
    "weight-decay-linear": {"weight_decay_incr_style": "linear", "start_weight_decay": 0.01},
    "weight-decay-cosine": {"weight_decay_incr_style": "cosine", "start_weight_decay": 0.0},
}


def schedule(**changes):
    return Schedule.from_args(SimpleNamespace(**(DEFAULTS | changes)), TOTAL)


def reference(**changes):
    """(lr, weight decay) of each step, from megatron-core, one increment a step."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    args = SimpleNamespace(**(DEFAULTS | changes))
    group = {}
    scheduler = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]),
        init_lr=args.lr_warmup_init,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=args.lr_warmup_iters,
        lr_decay_steps=args.lr_decay_iters or TOTAL,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.start_weight_decay,
        end_wd=args.end_weight_decay,
        wd_incr_steps=TOTAL,
        wd_incr_style=args.weight_decay_incr_style,
        wsd_decay_steps=args.lr_wsd_decay_iters,
        lr_wsd_decay_style=args.lr_wsd_decay_style,
    )
    values = []
    for _ in range(TOTAL + 5):
        values.append((group["lr"], group["weight_decay"]))
        scheduler.step(1)
    return values


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_megatron_cores(case):
    ours = schedule(**CASES[case])
    for step, (lr, weight_decay) in enumerate(reference(**CASES[case])):
        # the same formulas in another order of operations: a few units in the last place of float64
        assert ours.lr(step) == pytest.approx(lr, rel=1e-13, abs=1e-18), step
        assert ours.weight_decay(step) == pytest.approx(weight_decay, rel=1e-13, abs=1e-18), step


def test_the_cases_differ():
    curves = {case: tuple(schedule(**CASES[case]).lr(step) for step in range(TOTAL)) for case in CASES}
    curves |= {
        case: tuple(schedule(**CASES[case]).weight_decay(step) for step in range(TOTAL))
        for case in CASES
        if case.startswith("weight")
    }
    assert len(set(curves.values())) == len(CASES)


def test_warmup_as_a_share_of_the_decay_steps():
    assert schedule(lr_warmup_fraction=0.25) == schedule(lr_warmup_iters=TOTAL // 4)
    assert schedule(lr_warmup_fraction=0.25, lr_decay_iters=20).warmup_steps == 5


def test_warmup_may_last_the_whole_run():
    rates = [schedule(lr_warmup_fraction=1.0).lr(step) for step in range(TOTAL + 1)]
    assert rates[:-1] == sorted(rates[:-1]) and rates[0] == 0.0
    assert rates[-1] == DEFAULTS["min_lr"]

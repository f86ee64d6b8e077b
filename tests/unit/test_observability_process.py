"""What concerns the whole process: messages, memory, limits, and what an import costs."""

import logging
import mmap
import os
import subprocess
import sys
import textwrap
import time

import pytest

from mcore_swift.errors import UserError
from mcore_swift.observability import (
    Limit,
    configure_logging,
    host_memory_bytes,
    host_memory_peak_bytes,
    reset_host_memory_peak,
)


def python(code, **environment):
    """Run `code` in a fresh interpreter; returns the finished process."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
    )


@pytest.fixture
def project_logger():
    logger = logging.getLogger("mcore_swift")
    before = logger.level, logger.propagate, list(logger.handlers)
    levels = {name: logging.getLogger(name).level for name in ("transformers", "megatron", "torch")}
    yield logger
    logger.setLevel(before[0])
    logger.propagate = before[1]
    logger.handlers = before[2]
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_a_limit_that_is_exceeded_names_the_phase_and_the_rank_and_ends_the_process():
    begin = time.monotonic()
    done = python(
        """
        import time
        from mcore_swift.observability import Limit

        def waits_for_ever():
            time.sleep(50)

        with Limit("save of checkpoint-500", 0.5, remedy="look at rank 1"):
            waits_for_ever()
        """,
        RANK="3",
    )
    assert done.returncode == 1
    assert "rank 3: save of checkpoint-500 did not finish within 0.5 s" in done.stderr
    assert "look at rank 1" in done.stderr
    assert "in waits_for_ever" in done.stderr  # the stack says where
    assert time.monotonic() - begin < 40


def test_the_inner_of_two_limits_is_named_when_it_is_the_one():
    done = python(
        """
        import time
        from mcore_swift.observability import Limit

        with Limit("step", 30), Limit("all-reduce", 0.2):
            time.sleep(50)
        """
    )
    assert done.returncode == 1
    assert "all-reduce" in done.stderr and "rank 0: step" not in done.stderr


def test_a_limit_that_is_kept_does_nothing():
    done = python(
        """
        import time
        from mcore_swift.observability import Limit

        with Limit("save", 0.3):
            pass
        try:
            with Limit("eval", 0.3):
                raise KeyError
        except KeyError:
            pass
        time.sleep(0.8)
        print("alive")
        """
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "alive", "")


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_limit_must_be_a_limit(seconds):
    with pytest.raises(ValueError, match="must be positive"):
        Limit("save", seconds)


def test_the_memory_peak_sees_an_allocation_and_outlives_it():
    reset_host_memory_peak()
    before = host_memory_peak_bytes()
    # pages of its own: an allocator may have kept some of an earlier test
    with mmap.mmap(-1, 200 * 1024**2) as block:
        for place in range(0, len(block), mmap.PAGESIZE):
            block[place] = 1
        during = host_memory_peak_bytes()
    # what is given back at the same time is not as much as this
    assert during - before > 150 * 1024**2
    assert host_memory_peak_bytes() >= during - 1024**2  # the kernel counts pages in batches


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs /proc")
def test_the_memory_peak_can_start_again():
    block = bytearray(os.urandom(1) * (200 * 1024**2))
    del block
    if not reset_host_memory_peak():
        pytest.skip("the system does not allow it")
    assert host_memory_peak_bytes() - host_memory_bytes() < 100 * 1024**2


def test_messages_carry_the_rank_only_where_it_is_not_zero(project_logger, capsys):
    configure_logging(0)
    logging.getLogger("mcore_swift.training").info("saved")
    configure_logging(2)
    logging.getLogger("mcore_swift.training").info("saved")
    logging.getLogger("mcore_swift.training").warning("slow\nvery")
    assert capsys.readouterr().err == "saved\n[rank 2] WARNING: slow\n[rank 2] very\n"


def test_what_all_ranks_come_to_is_said_once(project_logger, capsys):
    for rank in range(3):
        configure_logging(rank).warning("left out", extra={"on_all_ranks": True})
    assert capsys.readouterr().err == "WARNING: left out\n"


def test_log_level_comes_from_the_environment(project_logger, capsys, monkeypatch):
    monkeypatch.setenv("LOG_LEVEL", "error")
    configure_logging(0).warning("quiet")
    monkeypatch.setenv("LOG_LEVEL", "debug")
    configure_logging(1).debug("every rank speaks")
    assert capsys.readouterr().err == "[rank 1] DEBUG: every rank speaks\n"
    monkeypatch.setenv("LOG_LEVEL", "loud")
    with pytest.raises(UserError, match="LOG_LEVEL=LOUD"):
        configure_logging(0)


def test_importing_changes_nothing_and_brings_in_nothing_heavy():
    done = python(
        """
        import logging, sys, warnings
        filters = list(warnings.filters)
        import mcore_swift.observability
        heavy = {"torch", "transformers", "megatron", "tensorboard", "matplotlib", "tqdm"} & set(sys.modules)
        assert not heavy, heavy
        assert warnings.filters == filters
        assert not logging.getLogger("mcore_swift").handlers
        assert logging.getLogger("transformers").level == logging.NOTSET
        """
    )
    assert done.returncode == 0, done.stderr

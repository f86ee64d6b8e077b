"""What every test needs."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "parallel"))

import jobs  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def jobs_show_where_they_are(pytestconfig: pytest.Config) -> Iterator[None]:
    """On the terminal, past pytest's capturing: some of them run for a minute and more."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")

    def show(line: str) -> None:
        with capture.global_and_fixture_disabled():
            print(line, flush=True)

    before, jobs.show = jobs.show, show
    yield
    jobs.show = before

"""What every unit test needs."""

import pytest


@pytest.fixture(autouse=True)
def this_process_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that failed cuts its own process off after a while; a test that plays a rank must not lose pytest's."""
    monkeypatch.setattr("launch.run.end_this_process_soon", lambda code: None)

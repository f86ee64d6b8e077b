"""What every unit test needs."""

import importlib

import pytest


@pytest.fixture(autouse=True)
def this_process_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that failed cuts its own process off after a while; a test that plays a rank must not lose pytest's."""
    module = importlib.import_module("launch.run")  # `launch.run` by attribute is the function
    monkeypatch.setattr(module, "end_this_process_soon", lambda code: None)

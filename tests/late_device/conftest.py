"""The tests of this folder have the late device; process.py says why they run in a process of their own."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from late_device.process import VARIABLE, Process, Server, is_ours

HERE = Path(__file__).resolve().parent
_process = pytest.StashKey[Process]()


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get(VARIABLE, "").isdigit():
        config.pluginmanager.register(Server(config))


def pytest_unconfigure(config: pytest.Config) -> None:
    if _process in config.stash:
        config.stash[_process].close()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if is_ours() or HERE not in item.path.parents:
        return None
    if _process not in item.config.stash:
        item.config.stash[_process] = Process(item.config, HERE)
    item.config.stash[_process].run(item)
    return True


@pytest.fixture(autouse=True)
def _late_device() -> Iterator[None]:
    """The device is idle before each test; what a stream still has to run after it runs, and may fail it."""
    pytest.importorskip("triton", reason="Triton launches on the late device")
    from late_device import build, device, driver

    if reason := build.missing():
        pytest.skip(reason)
    driver.start()
    yield
    try:
        device.synchronize()
    finally:
        device.abandon()

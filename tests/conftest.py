"""Every test starts from the same random state; workers side by side do not fight for the cores.

`--only-backend torch` takes the other back ends away, so that the tests of behaviour run on the reference too.
"""

import os

import pytest
import torch

from xgrad_optim import backends

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--only-backend", choices=backends.NAMES, help="the only back end that is available")
    parser.addoption("--every-interrupt", action="store_true", help="interrupt every visit of every line")
    parser.addoption("--all-variants", action="store_true", help="compile and simulate every kernel for every GPU")
    parser.addoption("--memory-rounds", type=int, default=600, help="rounds of each act in tests/test_memory.py")
    parser.addoption("--stateful-examples", type=int, default=2000, help="sequences of tests/test_stateful.py")


@pytest.fixture
def are_all_variants(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--all-variants"))


@pytest.fixture
def every_interrupt(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--every-interrupt"))


@pytest.fixture(autouse=True)
def _only_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    only = request.config.getoption("--only-backend")
    if only is not None:
        monkeypatch.setattr(backends, "NAMES", (only,))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

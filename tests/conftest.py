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


@pytest.fixture(autouse=True)
def _only_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    only = request.config.getoption("--only-backend")
    if only is not None:
        monkeypatch.setattr(backends, "NAMES", (only,))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

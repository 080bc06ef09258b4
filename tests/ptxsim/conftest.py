"""The references compute with infinities and NaN on purpose: numpy does not warn of them."""

from collections.abc import Iterator

import numpy
import pytest


@pytest.fixture(autouse=True)
def _no_floating_point_warnings() -> Iterator[None]:
    with numpy.errstate(all="ignore"):
        yield

"""The scripts of examples/ for these clients run without an argument and train."""

import pytest
from example_scripts import CLIENTS, run_example


@pytest.mark.parametrize("name", CLIENTS)
def test_the_script_trains(name, tmp_path):
    pytest.importorskip(CLIENTS[name], reason="make test-clients installs it")
    losses = run_example(name, tmp_path)
    assert losses[-1] < losses[0]

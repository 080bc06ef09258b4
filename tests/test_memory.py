"""Memory stays flat over steps, swaps, attaching and reloading. `--memory-rounds N` repeats each one more often."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from twins import needs_library

BYTES = 24
"""What a round may add: less than any Python object that were kept, more than the allocator's own noise."""


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_no_round_of_training_adds_memory(backend, request):
    n = request.config.getoption("--memory-rounds")
    script = Path(__file__).with_name("memory.py")
    output = subprocess.run([sys.executable, script, backend, str(n)], check=True, capture_output=True, text=True)
    grown = json.loads(output.stdout)
    assert len(grown) == 7 and {name: size for name, size in grown.items() if size > BYTES} == {}

"""The README's pages about these clients run as they stand: the blocks of a page are one script."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
PACKAGES = {"transformers.Trainer": "transformers", "accelerate": "accelerate", "Lightning": "lightning"}


def script(heading: str) -> str:
    page = re.search(rf"^### {re.escape(heading)}$(.*?)(?=^##)", README.read_text(), re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"^```python$(.*?)^```$", page[1], re.MULTILINE | re.DOTALL)
    assert blocks
    return "\n".join(blocks)


@pytest.mark.parametrize("heading", PACKAGES)
def test_the_page_runs(heading, tmp_path):
    pytest.importorskip(PACKAGES[heading], reason="make test-clients installs it")
    run = subprocess.run(
        [sys.executable, "-c", script(heading)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert list((tmp_path / "output").iterdir())

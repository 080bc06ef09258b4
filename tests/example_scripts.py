"""The scripts of examples/, run as a reader runs them: without an argument, in a folder of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = {
    "transformers_trainer.py": "transformers",
    "accelerate_loop.py": "accelerate",
    "lightning_module.py": "lightning",
}
"""The package of each script that needs one that only `make test-clients` installs."""

NAMES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def run_example(name: str, folder: Path) -> list[float]:
    """The losses that the script prints; a warning that names one of its lines is an error."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::UserWarning:__main__"}
    command = [sys.executable, str(ROOT / "examples" / name)]
    for _ in range(4):
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        # torch's gloo now and then aborts at the exit of a process that has left its group, when all is done.
        if "terminate called without an active exception" not in done.stderr:
            break
    assert done.returncode == 0, done.stdout + done.stderr
    return [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("loss ")]

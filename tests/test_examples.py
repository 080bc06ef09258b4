"""Every script of examples/ runs without an argument and trains, and the documentation names it.

Those for packages that only `make test-clients` installs are run there.
"""

import pytest
from example_scripts import CLIENTS, NAMES, ROOT, run_example


@pytest.mark.parametrize("name", [name for name in NAMES if name not in CLIENTS])
def test_the_script_trains(name, tmp_path):
    losses = run_example(name, tmp_path)
    assert losses[-1] < losses[0]


def test_the_readme_shows_the_quickstart_as_it_is():
    script = (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8")
    assert f"```python\n{script}```\n" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_documentation_names_every_script():
    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"(../examples/{name})" not in page] == []

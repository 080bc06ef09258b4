"""Every public optimizer stands in tests/family.py, and whatever else lists the family lists the same.

An optimizer that is missing from the table would be tested by nothing that iterates it, in silence.
"""

import re
from pathlib import Path

import pytest
from cases import every_class
from family import CLASSES, FAMILY, MEMBERS, RULES
from reference import Reference

import xgrad_optim
from xgrad_optim import backends
from xgrad_optim.backends import build_cuda
from xgrad_optim.optimizer import XGradOptimizer
from xgrad_optim.rule import Rule

ROOT = Path(__file__).resolve().parent.parent


def _subclasses(cls):
    return [each for child in cls.__subclasses__() for each in (child, *_subclasses(child))]


def _page(name):
    return (ROOT / name).read_text(encoding="utf-8")


def _table(page, header):
    """The cells of the table that begins with this header, a list for each row, the header's own first."""
    lines = _page(page)[_page(page).index(header) :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if not line.startswith("|---")]


def _classes_in(text):
    return [name for name in re.findall(r"`(\w+)`", text) if name in dir(xgrad_optim)]


def test_every_optimizer_of_the_package_is_public_and_has_a_row():
    """Those with a rule: a class without one only serves others."""
    own = [cls for cls in _subclasses(XGradOptimizer) if cls.__module__.startswith("xgrad_optim.")]
    optimizers = {cls for cls in own if isinstance(getattr(cls, "rule", None), Rule)}
    public = {getattr(xgrad_optim, name) for name in xgrad_optim.__all__} - {xgrad_optim.XGrad}
    assert optimizers <= public, "export it in xgrad_optim/__init__.py"
    assert {cls for cls in public if isinstance(cls, type)} == optimizers == set(CLASSES), "tests/family.py lacks a row"
    assert len(MEMBERS) == len(FAMILY)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_written_in_each_language_and_in_the_reference(rule):
    pytest.importorskip("triton", reason="the Triton kernels need the package triton")
    assert rule in backends._module("triton").RULES
    assert rule in build_cuda.rules()
    assert hasattr(Reference, f"_{rule}")


def test_the_page_on_options_has_a_row_for_each_class():
    _, *rows = _table("docs/options.md", "| class | base |")
    assert [name for row in rows for name in _classes_in(row[0])] == [member.name for member in FAMILY]
    bases = [base for row in rows for base in re.findall(r"\w+", row[1].split("(")[0].replace("torch.optim", ""))]
    assert bases == [member.base_name for member in FAMILY]


@every_class
def test_the_page_on_options_names_the_state(cls):
    _, *rows = _table("docs/options.md", "| class | base |")
    (state,) = [row[2] for row in rows if cls.__name__ in _classes_in(row[0])]
    keys = re.findall(r"`(\w+)`", state)
    optional = [] if cls.rule.optional is None else [cls.rule.optional.key]
    assert keys == [*cls.rule.state_keys, *optional]


def test_the_table_of_precisions_has_a_column_for_each_class():
    header, *_ = _table("docs/options.md", "| precision |")
    assert sorted(name for cell in header for name in _classes_in(cell)) == sorted(member.name for member in FAMILY)


def test_the_reference_documents_each_class():
    documented = re.findall(r"autoclass:: xgrad_optim\.(\w+)$", _page("docs/api.md"), re.MULTILINE)
    assert documented == [*(member.name for member in FAMILY), "XGrad"]


def test_the_front_page_names_each_class_and_measures_it():
    """Its table of measurements has a column for each; its first paragraph names them all."""
    introduction = _page("README.md").split("```python")[0]
    assert _classes_in(introduction) == [member.name for member in FAMILY]
    header, sizes, *_ = _table("README.md", "| | `XSGDM`")
    assert _classes_in(" ".join(header)) == [member.name for member in FAMILY]
    ours = [int(cell.split(";")[0]) for cell in sizes[1:-1]]
    assert ours == [4 * (2 + len(member.rule.state_keys)) for member in FAMILY]

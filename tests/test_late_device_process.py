"""Tests of the late device run in a process of their own, and what becomes of it there is reported here."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from late_device.process import Process

TESTS = Path(__file__).resolve().parent

FILES = {
    "conftest.py": "from late_device.conftest import pytest_configure\n",
    "pytest.ini": "[pytest]\n",
    "test_some.py": """
import os
import pytest

@pytest.fixture(scope="module")
def numbers():
    return []

@pytest.mark.parametrize("i", [1, 2])
def test_passes(i, numbers):
    numbers.append(i)

def test_fails():
    print("printed before")
    assert 1 + 1 == 3

def test_skips():
    pytest.skip("on purpose")

def test_dies():
    os.abort()
""",
}


@pytest.fixture
def run(tmp_path, monkeypatch, request):
    """Runs a test of a folder in another process; gives its reports by phase."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("PYTHONPATH", f"{TESTS}:{TESTS.parent}")
    reports: list[pytest.TestReport] = []
    hooks = SimpleNamespace(
        pytest_runtest_logstart=lambda **_: None,
        pytest_runtest_logfinish=lambda **_: None,
        pytest_runtest_logreport=lambda report: reports.append(report),
    )
    process = Process(request.config, tmp_path)

    def run_one(name: str) -> dict[str, pytest.TestReport]:
        reports.clear()
        process.run(SimpleNamespace(nodeid=f"test_some.py::{name}", location=("test_some.py", 1, name), ihook=hooks))
        return {report.when: report for report in reports}

    yield run_one
    process.close()


def test_reports_come_back(run):
    assert [report.outcome for report in run("test_passes[1]").values()] == ["passed"] * 3
    failure = run("test_fails")["call"]
    assert failure.failed and "assert (1 + 1) == 3" in failure.longreprtext and failure.capstdout == "printed before\n"
    assert run("test_skips")["call"].skipped
    assert run("test_passes[2]")["call"].passed


def test_the_end_of_the_process_fails_one_test(run):
    death = run("test_dies")["call"]
    assert death.failed and "ended with code -6" in death.longreprtext and "in test_dies" in death.longreprtext
    assert run("test_passes[1]")["call"].passed


def test_this_process_has_no_late_device():
    """Whatever tests of it have run beside this one."""
    assert "late_device_extension" not in sys.modules and torch._C._get_privateuse1_backend_name() == "privateuseone"

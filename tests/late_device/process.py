"""Runs the tests of this folder in a process of their own, started by the first of them, and reports them here.

Once torch knows a PrivateUse1 device, that is the process's accelerator: `torch.accelerator` tells of it, pinned memory
is its own, a back end that asks for a GPU finds one, and nothing takes it back. Triton's active driver is the process's
too. So no other test may share a process with the device. Under xdist every worker has such a process beside it.

`LATE_DEVICE=here pytest tests/late_device` runs them in the process itself, for a debugger.
"""

import os
import subprocess
import sys
import tempfile
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "LATE_DEVICE"
"""Set where this process may have the device: "here", or the file descriptor of the connection to who started it."""


def is_ours() -> bool:
    return VARIABLE in os.environ


class Process:
    """The other process as this one sees it; started at the first test, and anew where it has died."""

    def __init__(self, config: pytest.Config, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._log = Path(tempfile.mkstemp(suffix=".log")[1])

    def run(self, item: pytest.Item) -> None:
        """Run a test there, and log its reports here."""
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)

    def _reports(self, item: pytest.Item) -> list[Any]:
        try:
            connection = self._connection or self._start()
            connection.send(item.nodeid)
            read = self._config.hook.pytest_report_from_serializable
            return [read(config=self._config, data=data) for data in connection.recv()]
        except (EOFError, OSError):
            code = self.stop()
            text = f"the late device's process ended with code {code}:\n{self._log.read_text()[-10000:]}"
            return [pytest.TestReport(item.nodeid, item.location, {}, "failed", text, "call")]

    def _start(self) -> Connection:
        options = ["-p", "no:cacheprovider", "-p", "no:xdist", str(self._folder)]
        self._connection, theirs = Pipe()
        with theirs, self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pytest", *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._config.rootpath,
                env={**os.environ, VARIABLE: str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
            )
        return self._connection

    def stop(self) -> int | None:
        """Let it end; returns its exit code."""
        code = None
        if self._connection is not None and self._process is not None:
            self._connection.close()
            code = self._process.wait()
        self._connection = self._process = None
        return code

    def close(self) -> None:
        self.stop()
        self._log.unlink()


class Server:
    """A pytest plugin of the other process: runs the tests whose names come in, one by one, and sends their reports."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._reports: list[Any] = []
        self._connection: Connection = Connection(int(os.environ[VARIABLE]))

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        while True:
            try:
                item = items[self._connection.recv()]
            except EOFError:
                return True
            self._reports.clear()
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            self._connection.send(self._reports)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        write = self._config.hook.pytest_report_to_serializable
        self._reports.append(write(config=self._config, report=report))

"""Runs tests with the marker ``simulated_cuda`` in a process that has the simulated device.

The process is forked once a session, from the server of :mod:`processes`, which has everything imported. It is told
the tests one by one, runs each as pytest does, and answers with the reports.
"""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import processes
import pytest

from phantom import build, cuda

MARKER = "simulated_cuda"


class _Reports:
    """Collects the reports of a run of pytest, in the plain form that can be sent."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.config: pytest.Config | None = None

    def pytest_configure(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        assert self.config is not None
        self.sent.append(self.config.hook.pytest_report_to_serializable(config=self.config, report=report))


def _serve(connection: Connection, folder: Path, temporary: Path) -> None:
    """Run the tests that are named, one after another, until there is no one to name more."""
    import torch

    os.chdir(folder)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # they would warn that their modules have been imported
    torch.set_num_threads(1)
    output = os.open(temporary / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    cuda.install()
    number = 0
    with connection:
        while True:
            try:
                node = connection.recv()
            except EOFError:
                return
            number += 1
            reports = _Reports()
            arguments = ["-p", "no:cacheprovider", f"--basetemp={temporary / str(number)}", node]
            code = pytest.main(arguments, plugins=[reports])
            connection.send((int(code), reports.sent))


class Runner:
    """The process with the simulated device; started where a test first needs it, and again where a test ends it."""

    def __init__(self, config: pytest.Config, temporary: Path) -> None:
        self.config = config
        self.temporary = temporary
        self._connection: Connection | None = None
        self._process: Any = None
        self._started = 0

    def run(self, item: pytest.Item) -> list[pytest.TestReport]:
        """Return the reports of ``item``; one of a failure where the process ends in it."""
        if self._connection is None:
            self._start()
        assert self._connection is not None
        try:
            self._connection.send(item.nodeid)
            code, sent = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            self._connection = None
            return [_failure(item, f"the process with the simulated device ended with {self._process.exitcode}")]
        reports = [self.config.hook.pytest_report_from_serializable(config=self.config, data=one) for one in sent]
        return reports or [_failure(item, f"pytest ended with {code} before the test began")]

    def _start(self) -> None:
        self._started += 1
        temporary = self.temporary / f"{MARKER}-{self._started}"
        temporary.mkdir()
        server = processes.server()
        self._connection, other = server.Pipe()
        folder = Path(self.config.invocation_params.dir)
        self._process = server.Process(target=_serve, args=(other, folder, temporary))
        self._process.start()
        other.close()

    def close(self) -> None:
        """End the process."""
        if self._connection is not None:
            self._connection.close()
            self._process.join()


def _failure(item: pytest.Item, why: str) -> pytest.TestReport:
    return pytest.TestReport(item.nodeid, item.location, {}, "failed", why, "call")


_runner = pytest.StashKey[Runner]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Run a marked test in the other process, unless this is the other one."""
    if item.get_closest_marker(MARKER) is None or cuda.is_installed():
        return None
    if (reason := build.why_not()) is not None:
        item.add_marker(pytest.mark.skip(reason=reason))
        return None
    config = item.config
    if _runner not in config.stash:
        factory: Any = getattr(config, "_tmp_path_factory")  # noqa: B009 -- of pytest, without a public name
        runner = config.stash[_runner] = Runner(config, factory.getbasetemp())
        config.add_cleanup(runner.close)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in config.stash[_runner].run(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True

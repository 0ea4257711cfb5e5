"""Compilers start once the tests are collected, and run beside the tests that come first.

Most tests keep one processor busy. A test module that needs something compiled, or any other long
process, has ``prepare(ahead, fixtures)``, which is called with the names of the fixtures that its
selected tests use; it calls ``ahead.start(name, job)``, and a fixture asks ``ahead.result(name)``.
Jobs run one after another, in the order of the tests, each with a folder of its own. What they do
side by side they give to a ``multiprocessing.pool.ThreadPool``: for all that a ThreadPoolExecutor
was given the interpreter would wait at its end. Tests marked ``waits`` come last of all.
"""

from __future__ import annotations

import os
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

NICE = 10  # the tests go first


class Ahead:
    """Jobs and their results, by name."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(
            prefix="deltaops-ahead-", ignore_cleanup_errors=True
        )
        self.results: dict[str, Future[Any]] = {}
        self.jobs: queue.SimpleQueue[tuple[str, Callable[[Path], Any]]] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None

    def start(self, name: str, job: Callable[[Path], Any]) -> None:
        """Run ``job`` after those that were started before it."""
        assert name not in self.results, f"two jobs called {name}"
        self.results[name] = Future()
        self.jobs.put((name, job))
        if self.thread is None:
            # daemon: a run that stops early does not wait for what nobody asks for any more
            self.thread = threading.Thread(target=self._work, daemon=True)
            self.thread.start()

    def result(self, name: str) -> Any:
        """What the job returned, once it has; what it raised is raised."""
        return self.results[name].result()

    def _work(self) -> None:
        # of this thread, and so of the processes that it starts; only root may make it less
        thread = threading.get_native_id()
        nice = max(NICE, os.getpriority(os.PRIO_PROCESS, thread))
        os.setpriority(os.PRIO_PROCESS, thread, nice)
        while True:
            name, job = self.jobs.get()
            folder, future = Path(self.folder.name, name), self.results[name]
            try:
                folder.mkdir()
                future.set_result(job(folder))
            except BaseException as error:  # a skip, too, is what the test that asks shall see
                future.set_exception(error)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--everything", action="store_true", help="also what is marked so")
    told = "show a failure where it happens: the process may not live to the end"
    parser.addoption("--instantly", action="store_true", help=told)


class Instantly:
    """Shows a failure where it happens."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            terminal: Any = self.config.pluginmanager.get_plugin("terminalreporter")
            terminal.ensure_newline()
            terminal.write_line(report.longreprtext)
            terminal.flush()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Ahead(), "ahead")
    if config.option.instantly:
        config.pluginmanager.register(Instantly(config), "instantly")


def pytest_unconfigure(config: pytest.Config) -> None:
    plugin = config.pluginmanager.get_plugin("ahead")
    assert isinstance(plugin, Ahead)
    plugin.folder.cleanup()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("waits") is not None)
    if config.option.everything:
        return
    left = [item for item in items if item.get_closest_marker("everything") is not None]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item.get_closest_marker("everything") is None]


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly:
        return
    fixtures: dict[Any, set[str]] = {}  # by module, in the order of the tests
    for item in session.items:
        if isinstance(item, pytest.Function):
            fixtures.setdefault(item.module, set()).update(item.fixturenames)
    ahead = session.config.pluginmanager.get_plugin("ahead")
    for module, names in fixtures.items():
        if hasattr(module, "prepare"):
            module.prepare(ahead, names)


def pytest_exception_interact(node: pytest.Item, call: pytest.CallInfo[Any]) -> None:
    """After an illegal address the rest of this process's GPU calls fail, whatever they are:
    tests/gpu.py goes on in a new one."""
    if call.excinfo is not None and call.excinfo.typename == "AcceleratorError":
        node.session.shouldstop = "the GPU's context is lost"


@pytest.fixture(scope="session")
def ahead(pytestconfig: pytest.Config) -> Ahead:
    plugin = pytestconfig.pluginmanager.get_plugin("ahead")
    assert isinstance(plugin, Ahead)
    return plugin


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, as a team costs small tensors more than it gives; random numbers by a seed."""
    import torch  # here: the pytests that tests start want none of its seconds

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)

"""A plugin of pytest: writes each test into a part's progress as it begins and ends, and leaves out what is done.

With pytest-xdist the process that collects the reports writes, and the workers leave out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check.progress import Progress


def options(progress: Path, part: str, skip: Path) -> list[str]:
    """Return the options of pytest's command line for it.

    Args:
        skip: a file with the ids of tests to leave out, a line each, which does not change during the run: workers
            read it at different times, and all have to choose the same tests.
    """
    return ["-p", __name__, f"--progress={progress}", f"--progress-part={part}", f"--progress-skip={skip}"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("resuming")
    group.addoption("--progress", help="file of benchmarks.gpu_check.progress")
    group.addoption("--progress-part", help="part to write as")
    group.addoption("--progress-skip", help="file with the ids of tests to leave out")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Writer(config), "resuming-writer")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    done = set(Path(config.getoption("--progress-skip")).read_text(encoding="utf-8").splitlines())
    left_out = [item for item in items if item.nodeid in done]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.nodeid not in done]


class _Writer:
    def __init__(self, config: pytest.Config) -> None:
        self.progress = Progress(Path(config.getoption("--progress")))
        self.part: str = config.getoption("--progress-part")
        self.planned = False
        self.wrong: dict[str, str] = {}

    def _plan(self, ids: Sequence[str]) -> None:
        if not self.planned:
            earlier = self.progress.of(self.part)
            known = [name for name in earlier.planned if name in earlier.done or name in earlier.given_up]
            self.progress.note(self.part, planned=list(dict.fromkeys([*known, *ids])))
        self.planned = True

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:
            self._plan([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: Sequence[str]) -> None:
        self._plan(ids)

    def pytest_runtest_logstart(self, nodeid: str, location: Any) -> None:
        self.progress.note(self.part, begun=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = (crash.message if crash is not None else report.longreprtext).strip().splitlines() or ["failed"]
            self.wrong.setdefault(report.nodeid, f"{report.nodeid}: {said[0][:200]}")

    def pytest_runtest_logfinish(self, nodeid: str, location: Any) -> None:
        self.progress.note(self.part, done=nodeid, wrong=self.wrong.get(nodeid, ""))

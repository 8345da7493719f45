"""A pytest plugin for one of several processes that share a test run; it logs each test.

Needs only pytest. The first test of every test function comes before the second of any, so that a run that is stopped
has tried every operator. Each test writes a line to a log when it starts and when it ends; tests that already have a
line are left out, so that a run continues after a crash. A test that leaves the CUDA context broken ends the process,
as every later test would fail, too.
"""

from __future__ import annotations

import json
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

BROKEN = 70  # exit status of a process whose CUDA context is broken


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("shard")
    group.addoption("--shard", default="0/1", help="I/N: run every Nth test, from the Ith on.")
    group.addoption("--shard-log", type=Path, help="File to which a JSON line is added as tests start and end.")


def pytest_configure(config: pytest.Config) -> None:
    if (log := config.getoption("--shard-log")) is not None:
        config.pluginmanager.register(Shard(log, *map(int, config.getoption("--shard").split("/"))), "shard-log")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a shard's log; one that a killed process left unfinished is dropped."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def first_of_each_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """The first test of every test function, then the second of every one, and so on."""
    functions: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        functions.setdefault((str(item.path), getattr(item, "originalname", item.name)), []).append(item)
    return [item for round_ in zip_longest(*functions.values()) for item in round_ if item is not None]


class Shard:
    def __init__(self, log: Path, index: int, count: int) -> None:
        self.log, self.index, self.count = log, index, count
        self.session: pytest.Session | None = None

    def write(self, **line: Any) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        own = first_of_each_first(items)[self.index :: self.count]
        seen = {line["started"] for line in read_log(self.log) if "started" in line}
        self.write(collected=[item.nodeid for item in own])
        items[:] = [item for item in own if item.nodeid not in seen]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(started=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        reason = ""
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2]
        elif report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = crash.message.splitlines()[0] if crash is not None else str(report.longrepr)[-300:]
        self.write(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 3), reason=reason[:300])
        if report.outcome == "failed" and context_is_broken():
            pytest.exit("the CUDA context is broken", returncode=BROKEN)


def context_is_broken() -> bool:
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False

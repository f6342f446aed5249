"""What came of tests that run in this process, as rows of the report."""

from collections import Counter
from collections.abc import Callable
from typing import Any


class Outcomes:
    """A pytest plugin: a row for each test function, once the next begins, with what came of its cases."""

    def __init__(self, record: Callable[..., None]) -> None:
        self.record, self.name, self.failure = record, "", ""
        self.counts: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.rpartition("::")[2].partition("[")[0]
        if name != self.name:
            self.flush()
            self.name = name
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed and not self.failure:
            self.failure = f"{report.nodeid.rpartition('::')[2]}: {str(report.longrepr).strip().splitlines()[-1][:200]}"

    def pytest_sessionfinish(self) -> None:
        self.flush()

    def flush(self) -> None:
        if self.counts:
            outcomes = {outcome: self.counts[outcome] for outcome in ("passed", "failed", "skipped")}
            self.record(test=self.name, **outcomes, first_failure=self.failure)
        self.failure, self.counts = "", Counter()

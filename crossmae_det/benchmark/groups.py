"""Groups of measurements under one time budget: nothing is dropped without a row that says so.

The cases of a group run one after the other in a process of their own, most important first. A
group has a share of the time. Cases that it has not started by then follow after the other groups,
if any time is left. A case that fails, or that takes the process with it, does not stop the others.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from crossmae_det.benchmark.report import Column, Section
from crossmae_det.benchmark.workers import TIMED_OUT, Worker, WorkerError

NOT_RUN = "not run: time"
INTERRUPTED = "not run: interrupted"
# With less time than this left, nothing is started.
FEWEST_SECONDS = 3.0

# Of a record, in the line that is logged.
FIGURES = 4

REACHED = "reached"
MISSED = "missed"


@dataclass(frozen=True)
class Target:
    """What a case should achieve.

    Attributes:
        what: the quantity, for the table.
        key: of the record: a number, or a :class:`Spread`, of which the median counts.
        limit: the number that it should reach.
        at_least: whether more is better.
    """

    what: str
    key: str
    limit: float
    at_least: bool = True

    def __str__(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.limit:g}"

    def verdict(self, record: Mapping[str, Any]) -> tuple[str, str]:
        """The value in a record as text, and :data:`REACHED`, :data:`MISSED` or "not measured"."""
        value = record.get(self.key)
        if value is None:
            return "-", "not measured"
        median = getattr(value, "median", value)
        reached = median >= self.limit if self.at_least else median <= self.limit
        return format(value, ".2f"), REACHED if reached else MISSED


@dataclass(frozen=True)
class Entry:
    """A case of a group.

    Attributes:
        labels: what identifies its row; the first one is its name.
        baseline: index of the entry that it is compared with; None for none.
        targets: what it should achieve.
    """

    labels: Mapping[str, Any]
    baseline: int | None = None
    targets: tuple[Target, ...] = ()

    @property
    def name(self) -> str:
        return " ".join(str(label) for label in self.labels.values())


@dataclass(frozen=True, kw_only=True)
class Group:
    """Cases that run in one process, one after the other.

    Attributes:
        key: of the group, for the command line and JSON.
        title: the subject of the table.
        entries: the cases, most important first; a baseline stands before what it is compared with.
        build: returns what measures them, in the process: an object with ``measure(index, baseline,
            seconds)``, which returns a record. Picklable.
        seconds: per case, for ``measure``.
        share: of the time, relative to that of the other groups.
        columns: of the table.
        notes: sentences below the table.
        sort_by: label by which the rows of the table are put together; "" for none.
        preload: names of modules that the process imports.
    """

    key: str
    title: str
    entries: Sequence[Entry]
    build: Callable[[], Any]
    seconds: float
    share: float
    columns: Sequence[Column]
    notes: Sequence[str] = ()
    sort_by: str = ""
    preload: Sequence[str] = ()


@dataclass
class GroupResult:
    """The records of a group, one per entry: its labels, "failure", and what was measured.

    Attributes:
        group: the group.
        records: by index of the entry.
    """

    group: Group
    records: dict[int, dict[str, Any]] = field(default_factory=dict)

    def section(self) -> Section:
        """The table of the group."""
        group = self.group
        records = [self.records[index] for index in range(len(group.entries))]
        if group.sort_by:
            order = [*dict.fromkeys(record[group.sort_by] for record in records)]
            records.sort(key=lambda record: order.index(record[group.sort_by]))
        return Section(group.key, group.title, group.columns, records, group.notes)

    def describe(self, index: int) -> str:
        """The failure of an entry, or the first figures of its row, as text."""
        record = self.records[index]
        if record["failure"]:
            return record["failure"]
        labels = self.group.entries[index].labels
        figures = [c for c in self.group.columns if c.key not in labels and c.cell(record) != "-"]
        return ", ".join(f"{c.header}: {c.cell(record)}" for c in figures[:FIGURES])

    def pending(self) -> list[int]:
        """Indices of the entries that were not started."""
        indices = range(len(self.group.entries))
        return [i for i in indices if self.records.get(i, {"failure": NOT_RUN})["failure"] in IDLE]


IDLE = (NOT_RUN, INTERRUPTED)


def run_groups(
    groups: Sequence[Group],
    device: str,
    seconds: float,
    log: Callable[[str], None] = print,
) -> list[GroupResult]:
    """Measure groups within a time.

    Args:
        groups: in the order in which they run.
        device: "cpu" or "cuda".
        seconds: for all of them.
        log: called with a line for each case.

    Returns:
        The results, in the same order. They are complete after Ctrl-C as well: what was not
        measured has a ``failure``.
    """
    start = time.monotonic()
    results = [GroupResult(group) for group in groups]
    total = sum(group.share for group in groups)
    shares = 0.0

    def tell(line: str) -> None:
        log(f"[{time.monotonic() - start:4.0f} s] {line}")

    reason = NOT_RUN
    try:
        for result in results:
            shares += result.group.share
            _run(result, device, start + seconds * shares / total, tell)
        for result in results:
            _run(result, device, start + seconds, tell)
    except KeyboardInterrupt:
        reason = INTERRUPTED
        tell("interrupted")
    for result in results:
        for index in result.pending():
            labels = result.group.entries[index].labels
            result.records[index] = {**labels, "failure": reason}
    return results


def _run(result: GroupResult, device: str, deadline: float, tell: Callable[[str], None]) -> None:
    """Measure the entries of a group that have not been started, until the deadline."""
    group = result.group
    start_worker = partial(Worker, group.build, device, group.preload)
    worker: Worker | None = None
    try:
        for index in result.pending():
            left = deadline - time.monotonic()
            if left < FEWEST_SECONDS:
                break
            worker = worker or start_worker()
            entry = group.entries[index]
            baseline = entry.baseline
            if baseline is not None and result.records[baseline]["failure"]:
                baseline = None  # there is nothing to compare with
            begin = time.monotonic()
            try:
                arguments = (index, baseline, min(group.seconds, left - 1))
                record = worker.ask("measure", *arguments, timeout=left)
                result.records[index] = {**entry.labels, "failure": "", **record}
            except WorkerError as error:
                text = str(error)
                if text == TIMED_OUT:
                    text = f"{TIMED_OUT} ({time.monotonic() - begin:.0f} s)"
                result.records[index] = {**entry.labels, "failure": text}
                if error.lost:
                    worker = None
            tell(f"{group.key}: {entry.name}: {result.describe(index)}")
    finally:
        if worker:
            worker.stop()


def target_section(results: Sequence[GroupResult]) -> Section | None:
    """The targets of all entries, and whether they were reached; None where there are none."""
    records = []
    for result in results:
        for index, entry in enumerate(result.group.entries):
            for target in entry.targets:
                record = result.records[index]
                text, verdict = target.verdict(record)
                reason = record["failure"] or "its baseline was not measured"
                records.append(
                    {
                        "group": result.group.title,
                        "case": entry.name,
                        "what": target.what,
                        "target": str(target),
                        "measured": text,
                        "verdict": verdict if text != "-" else f"{verdict}: {reason}",
                    }
                )
    if not records:
        return None
    headers = {
        "group": "measurement",
        "case": "case",
        "what": "quantity",
        "target": "target",
        "measured": "median (range)",
        "verdict": "result",
    }
    return Section(
        key="targets",
        title="Targets",
        columns=[Column(header, key) for key, header in headers.items()],
        records=records,
        notes=["The median counts."],
    )

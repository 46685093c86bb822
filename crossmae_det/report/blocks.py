"""What pages are made of: sections of blocks, which the template turns into HTML."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from crossmae_det.report.charts import Chart
from crossmae_det.report.images import Comparison, Drawing

logger = logging.getLogger(__name__)

DASH = "–"


@dataclass(frozen=True)
class Tile:
    """A number of the headline: what it is, the number, and a line about it."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what it shows.
        key: what the column is sorted by; None for the text.
        bar: length of a bar behind the text, in [0, 1]; None without one.
        shade: of the background, in [0, 1]; None without one.
        tone: "good", "bad" or "".
    """

    text: str
    key: float | None = None
    bar: float | None = None
    shade: float | None = None
    tone: str = ""


@dataclass(frozen=True)
class Note:
    """A paragraph; ``tone`` is "bad" for a problem."""

    text: str
    tone: str = ""
    kind: str = field(default="note", init=False)


@dataclass(frozen=True)
class Charts:
    """Small multiples."""

    charts: Sequence[Chart]
    title: str = ""
    kind: str = field(default="charts", init=False)


@dataclass(frozen=True)
class Table:
    """A table in a box of its own, which scrolls.

    Attributes:
        columns: titles; the first column names the rows.
        rows: as many cells as columns; text is a cell without anything else.
        title: above it.
        note: below it.
        sortable: by a click on a title, where scripts run.
        text_columns: number of columns, from the left, that are text and not numbers.
        matrix: the columns are as narrow as their numbers.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    title: str = ""
    note: str = ""
    sortable: bool = False
    text_columns: int = 1
    matrix: bool = False
    kind: str = field(default="table", init=False)

    @property
    def cells(self) -> list[list[Cell]]:
        return [[c if isinstance(c, Cell) else Cell(c) for c in row] for row in self.rows]


@dataclass(frozen=True)
class Bar:
    """A bar: its name, what it means, its value as text, its length in [0, 1]."""

    name: str
    meaning: str
    value: str
    length: float


@dataclass(frozen=True)
class Bars:
    """Horizontal bars."""

    title: str
    bars: Sequence[Bar]
    note: str = ""
    kind: str = field(default="bars", init=False)


@dataclass(frozen=True)
class Columns:
    """Blocks side by side where there is space."""

    blocks: Sequence[Any]
    kind: str = field(default="columns", init=False)


@dataclass(frozen=True)
class Comparisons:
    """Images with ground truth beside predictions."""

    title: str
    images: Sequence[Comparison]
    note: str = ""
    kind: str = field(default="comparisons", init=False)


@dataclass(frozen=True)
class Sheet:
    """An image as wide as the page; folded, if ``folded``."""

    title: str
    drawing: Drawing
    folded: bool = False
    kind: str = field(default="sheet", init=False)


@dataclass(frozen=True)
class Code:
    """Text in a fixed font; folded if it is long."""

    title: str
    text: str
    folded: bool = False
    kind: str = field(default="code", init=False)


Block = Note | Charts | Table | Bars | Columns | Comparisons | Sheet | Code


@dataclass(frozen=True)
class Section:
    """A part of a page: its title, and its blocks."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-")


def build_sections(
    builders: Sequence[tuple[str, Callable[..., Sequence[Block]]]], *arguments: Any
) -> list[Section]:
    """The sections with blocks.

    A section that cannot be made of the files says so, and the others are not affected: the files
    may be from another version, or be damaged.

    Args:
        builders: (title, function that returns the blocks).
        *arguments: of the functions.
    """
    sections = []
    for title, build in builders:
        blocks: Sequence[Block]
        try:
            blocks = build(*arguments)
        except (
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            OSError,
        ) as error:
            logger.warning("The section '%s' of the report cannot be made: %s", title, error)
            logger.debug("Traceback of the error", exc_info=True)
            reason = f"{type(error).__name__}: {error}"
            blocks = [Note(f"This section cannot be made of the files of the run: {reason}", "bad")]
        if blocks:
            sections.append(Section(title, blocks))
    return sections


def finite(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def decimal(value: Any, digits: int = 2) -> str:
    """A number with ``digits`` decimals; a dash for none."""
    number = finite(value)
    return DASH if number is None else f"{number:,.{digits}f}"


def count(value: Any) -> str:
    """A whole number with separators; a dash for none."""
    return decimal(value, 0)


def duration(seconds: float | None) -> str:
    """Seconds as the two largest units: ``1 h 23 min``; a dash for None."""
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes < 10 else f"{minutes} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h"

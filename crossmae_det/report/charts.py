"""Charts for HTML pages: matplotlib's SVG, inlined, with the colors and the font of the page.

A chart is drawn with placeholder colors, which are replaced by CSS variables: the page decides what
they look like in its light and its dark scheme. Text stays text. Legends are not part of a chart:
the page writes them, so that they wrap on a phone and names need no glyphs in matplotlib's font.
"""

import hashlib
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from crossmae_det.utils.plots import smooth

# A chart is about as wide as a phone, in CSS pixels, so that its text is not shrunk there.
WIDTH, HEIGHT = 320, 200
POINTS_PER_INCH = 72

# Placeholder -> CSS variable of the page.
TEXT, MUTED, GRID, BACKGROUND, BAD = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05"
SERIES = tuple(f"#0a0b{16 + number:02x}" for number in range(8))
VARIABLES = {
    TEXT: "--text",
    MUTED: "--muted",
    GRID: "--grid",
    BACKGROUND: "--card",
    BAD: "--bad",
    **{color: f"--series-{number}" for number, color in enumerate(SERIES)},
}

STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 11,
    "text.color": TEXT,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.unicode_minus": True,
    "lines.solid_capstyle": "round",
}

# More points than this are drawn as the mean and the range of so many groups.
MOST_POINTS = 240

# So many are drawn with a mark for each.
FEW_POINTS = 12

# Ticks of a horizontal axis of fractions: without 0, which would meet that of the vertical axis.
FIFTHS = (0.2, 0.4, 0.6, 0.8, 1.0)

# Curves of single classes in a chart: prefix of their names, and how many are drawn.
CLASS = "class: "
MOST_CLASSES = 100


@dataclass(frozen=True)
class Entry:
    """An entry of a legend: the CSS variable of its color, its name, a value or ""."""

    color: str
    name: str
    value: str = ""
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart as inline SVG, with the entries of its legend."""

    title: str
    svg: Markup
    legend: Sequence[Entry] = ()
    note: str = ""


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: in the legend.
        points: x -> y; values that are not finite leave a gap and a cross on the axis below it.
        noisy: draw the values faintly behind their running mean.
        faint: one of many; without a legend entry.
        color: index of a color of the series; None for that of its position.
        dashed: the style of the line.
    """

    name: str
    points: Mapping[int, float]
    noisy: bool = False
    faint: bool = False
    color: int | None = None
    dashed: bool = False


def number(value: float | None, digits: int = 3) -> str:
    """A number with ``digits`` significant digits and no more zeros than needed; "–" for none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str = "iteration",
    log: bool = False,
    zero: bool = False,
    x_max: float | None = None,
    digits: int = 3,
    note: str = "",
) -> Chart | None:
    """Lines over iterations; None if no line has a finite value.

    Args:
        title: of the chart, for the page.
        lines: drawn in order; the last value of each is in the legend.
        x_label: of the axis, for screen readers as well.
        log: use a logarithmic axis if the values are positive and span more than a factor of ten.
        zero: let the axis begin at 0.
        x_max: end of the horizontal axis, such as the iterations of the run; None for the data's.
        digits: significant digits of the values in the legend.
        note: a sentence below the chart.
    """
    lines = [line for line in lines if any(map(math.isfinite, line.points.values()))]
    if not lines:
        return None
    legend: list[Entry] = []
    broken: set[int] = set()
    finite: list[float] = []
    with _axes() as (figure, axes):
        for position, line in enumerate(lines):
            color = SERIES[(position if line.color is None else line.color) % len(SERIES)]
            x = np.array(list(line.points), dtype=float)
            y = np.array(list(line.points.values()), dtype=float)
            good = np.isfinite(y)
            broken.update(int(value) for value in x[~good])
            finite += y[good].tolist()
            _draw_line(axes, x, np.where(good, y, np.nan), color, line)
            if not line.faint:
                last = number(float(y[good][-1]), digits)
                legend.append(Entry(VARIABLES[color], line.name, last, line.dashed))
        if broken:
            marks = axes.plot(sorted(broken), [0] * len(broken), "x", color=BAD, zorder=5)
            marks[0].set(transform=axes.get_xaxis_transform(), clip_on=False)
            legend.append(Entry(VARIABLES[BAD], "not finite", f"{len(broken)} logged"))
        low, high = min(finite), max(finite)
        if log and low > 0 and high > 10 * low:
            _set_log_scale(axes, high / low)
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 4)))
            if zero:
                axes.set_ylim(0, high * 1.08 or 1)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(_iterations))
        end = max(x_max or 0, max(max(line.points) for line in lines), 1)
        axes.set_xlim(-0.01 * end, 1.01 * end)
        axes.set_xlabel(x_label)
        names = ", ".join(line.name for line in lines if not line.faint)
        svg = _svg(figure, f"{title} by {x_label}: {names}")
    return Chart(title, svg, legend, note)


def _set_log_scale(axes: Axes, span: float) -> None:
    axes.set_yscale("log")
    formatter = FuncFormatter(lambda value, _: number(value))
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_major_formatter(formatter)
    if span < 50:  # few powers of ten
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter(formatter)
    else:
        axes.yaxis.set_minor_locator(NullLocator())


def _draw_line(axes: Axes, x: np.ndarray, y: np.ndarray, color: str, line: Line) -> None:
    style: dict[str, Any] = {"color": color, "linestyle": (0, (4, 2)) if line.dashed else "-"}
    if len(y) > MOST_POINTS:
        groups = np.array_split(np.arange(len(y)), MOST_POINTS)
        groups = [group for group in groups if np.isfinite(y[group]).any()]
        if line.noisy:
            low = [np.nanmin(y[group]) for group in groups]
            high = [np.nanmax(y[group]) for group in groups]
            middle = [x[group].mean() for group in groups]
            axes.fill_between(middle, low, high, color=color, alpha=0.18, linewidth=0)
        y = np.array([np.nanmean(y[group]) for group in groups])
        x = np.array([x[group].mean() for group in groups])
    elif line.noisy and np.isfinite(y).sum() > 2:
        axes.plot(x, y, color=color, alpha=0.3, linewidth=1)
    if line.faint:
        axes.plot(x, y, color=color, alpha=0.35, linewidth=1)
        return
    few = np.isfinite(y).sum() <= FEW_POINTS and not line.noisy
    marker: dict[str, Any] = {"marker": "o", "markersize": 3.5} if few else {}
    axes.plot(x, smooth(y) if line.noisy else y, linewidth=1.9, **style, **marker)


def precision_recall_chart(
    title: str, recall: Sequence[float], curves: Mapping[str, Sequence[float | None]]
) -> Chart:
    """Precision by recall.

    Args:
        title: of the chart.
        recall: (R,) in [0, 1].
        curves: name -> (R,) in [0, 1], None where it is not defined. Those whose names start with
            :data:`CLASS` are drawn faintly, at most :data:`MOST_CLASSES` of them.
    """
    legend = []
    with _axes() as (figure, axes):
        classes = [name for name in curves if name.startswith(CLASS)]
        for name in classes[:MOST_CLASSES]:
            axes.plot(recall, _floats(curves[name]), color=MUTED, alpha=0.45, linewidth=0.9)
        if classes:
            shown = min(len(classes), MOST_CLASSES)
            legend.append(Entry("--muted", "one class each", f"{shown} of {len(classes)}"))
        for position, name in enumerate(name for name in curves if not name.startswith(CLASS)):
            color = SERIES[position]
            values = _floats(curves[name])
            axes.plot(recall, values, color=color, linewidth=2.2)
            finite = values[np.isfinite(values)]
            mean = number(float(finite.mean())) if len(finite) else "–"
            legend.insert(position, Entry(VARIABLES[color], name, f"mean precision {mean}"))
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision", xticks=FIFTHS)
        svg = _svg(figure, f"{title}: precision by recall")
    return Chart(title, svg, legend)


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def calibration_chart(
    title: str, bins: Sequence[Mapping[str, float | None]], note: str = ""
) -> Chart:
    """Accuracy by confidence, with the number of detections below.

    Args:
        title: of the chart.
        bins: dicts with "low", "high", "confidence", "accuracy" and "count".
        note: a sentence below the chart.
    """
    with _axes(rows=(3, 1)) as (figure, axes):
        counts_axes = figure.axes[1]
        low = np.array([entry["low"] for entry in bins], dtype=float)
        width = np.array([entry["high"] for entry in bins], dtype=float) - low
        accuracy = _floats([entry["accuracy"] if entry["count"] else None for entry in bins])
        axes.bar(low, accuracy, width, align="edge", color=SERIES[0], alpha=0.75, linewidth=0)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy")
        axes.xaxis.set_major_formatter(NullFormatter())
        counts = [entry["count"] or 0 for entry in bins]
        counts_axes.bar(low, counts, width, align="edge", color=MUTED, alpha=0.6, linewidth=0)
        counts_axes.set(xlim=(0, 1), xlabel="score", ylabel="number", xticks=FIFTHS)
        counts_axes.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        counts_axes.yaxis.set_major_formatter(FuncFormatter(_iterations))
        svg = _svg(figure, f"{title}: accuracy and number of detections by score")
    legend = [
        Entry(VARIABLES[SERIES[0]], "share of detections that are right"),
        Entry("--muted", "perfect calibration", dashed=True),
    ]
    return Chart(title, svg, legend, note)


def _iterations(value: float, _: Any) -> str:
    """12000 as 12k."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e4 else f"{value:g}"


@contextmanager
def _axes(rows: Sequence[int] = (1,)) -> Iterator[tuple[Figure, Axes]]:
    """A figure and its first axes, drawn in the style of the page within this block."""
    with matplotlib.rc_context(STYLE):
        inches = (WIDTH / POINTS_PER_INCH, HEIGHT / POINTS_PER_INCH)
        layout = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.03, hspace=0.06)
        figure = Figure(figsize=inches, layout=layout)
        FigureCanvasSVG(figure)
        grid = figure.subplots(len(rows), 1, height_ratios=list(rows), squeeze=False)
        for axes in grid[:, 0]:
            axes.grid(axis="y", alpha=0.9)
            axes.set_axisbelow(True)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(which="both", length=0)
        yield figure, grid[0, 0]


def _svg(figure: Figure, description: str) -> Markup:
    """The figure as an SVG element that takes colors and font from the page."""
    file = io.BytesIO()
    unset = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    salt = hashlib.sha256(description.encode()).hexdigest()[:12]
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(file, format="svg", transparent=True, metadata=unset)
    text = file.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
    # References, to markers and clip paths, are made unique in a page; the other ids are not used.
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(
        r'\s+id="([^"]+)"', lambda m: f' id="{salt}-{m[1]}"' if m[1] in used else "", text
    )
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{salt}-", text)
    text = re.sub(r"xlink:href", "href", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    for placeholder, variable in VARIABLES.items():
        text = text.replace(placeholder, f"var({variable})")
    head = re.search(r'viewBox="[^"]+"', text)
    assert head is not None
    start = f'<svg class="chart" {head[0]} role="img" aria-label="{escape(description)}">'
    text = start + text[text.index(">") + 1 :]
    return Markup(re.sub(r"\s*\n\s*", " ", text))

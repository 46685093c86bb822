"""Write the pages of a report: one HTML file each, which loads nothing else."""

import base64
import functools
import hashlib
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

import crossmae_det
from crossmae_det.report import analysis, comparison, sections
from crossmae_det.report.blocks import build_sections
from crossmae_det.report.run_files import Run, read_run
from crossmae_det.utils import atomic_path

TEMPLATE = "page.html.j2"
STYLE = "style.css"
SCRIPT = "script.js"


def write_run_page(
    folder: str | os.PathLike[str], path: str | os.PathLike[str], *, with_images: bool = True
) -> None:
    """Write the page about a run, atomically.

    Args:
        folder: of the run.
        path: of the page.
        with_images: False leaves out drawings of the test set and reconstructions, which take
            seconds.

    Raises:
        ValueError: the folder has neither metrics nor results.
        OSError: the page cannot be written.
    """
    run = read_run(folder)

    def with_option(build: Any) -> Any:
        return functools.partial(build, with_images=with_images)

    builders = [
        ("Accuracy", sections.accuracy),
        ("Errors", analysis.errors),
        ("Classes", analysis.classes),
        ("Images", with_option(sections.examples)),
        ("Training", sections.training),
        ("Reconstructions", with_option(sections.reconstructions)),
        ("Configuration", sections.configuration),
        ("Data", sections.data),
        ("Environment", sections.environment),
    ]
    _write(
        path,
        title=run.name,
        subtitle=sections.subtitle(run),
        status=run.status,
        tiles=sections.tiles(run),
        problems=run.problems,
        sections=build_sections(builders, run),
    )


def write_comparison(
    folders: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]
) -> None:
    """Write the page that compares runs, atomically; differences are to the first one.

    Args:
        folders: of at least two runs, of any tasks.
        path: of the page.

    Raises:
        ValueError: a folder has neither metrics nor results, or is given twice.
        OSError: the page cannot be written.
    """
    runs: list[Run] = comparison.read_runs(folders)
    _write(
        path,
        title=f"Comparison of {len(runs)} runs",
        subtitle=", ".join(run.name for run in runs),
        status=None,
        tiles=[],
        problems=[problem for run in runs for problem in run.problems],
        sections=build_sections(comparison.BUILDERS, runs),
    )


def _write(path: str | os.PathLike[str], **content: Any) -> None:
    script = _read(SCRIPT)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(_read(TEMPLATE)).render(
        style=Markup(_read(STYLE)),
        script=Markup(script),
        script_hash=digest,
        version=crossmae_det.__version__,
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        **content,
    )
    with atomic_path(path) as temporary:
        # A name may hold half a surrogate pair, which has no bytes.
        temporary.write_text(page, encoding="utf-8", errors="replace")


def _read(name: str) -> str:
    return files(__package__).joinpath("data", name).read_text(encoding="utf-8")

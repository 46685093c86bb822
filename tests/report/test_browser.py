"""The pages of a report in headless Chromium: phone and desktop, light and dark.

Each page is shown in a frame of the width of the screen, in a page that measures it.
"""

import html
import json
import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
from sample_runs import write_run

from crossmae_det.report.page import write_comparison, write_run_page

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium: apt-get install chromium, or run .ci/run as root"
)

WIDTHS = {"phone": 360, "desktop": 1280}
SCHEMES = {"dark": 0, "light": 1}  # Chromium's numbers
SMALLEST_CONTRAST = 4.5  # of WCAG 2, level AA

MEASURE = Path(__file__).parents[1] / "helpers/measure_page.js"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages by name: of a run with images, and of two runs with long names of classes."""
    root = tmp_path_factory.mktemp("runs")
    long = ["a" * 120, "two words " * 12, "漢字", *(f"class {index}" for index in range(40))]
    runs = [write_run(root / "first"), write_run(root / ("second_" + "x" * 60), names=long)]
    for iteration in (10, 20):
        path = runs[0] / f"reconstructions/{iteration:07d}.png"
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), np.full((900, 1200, 3), 5 * iteration, np.uint8))
    found = {"run": runs[0] / "report.html", "many classes": root / "many.html"}
    write_run_page(runs[0], found["run"])
    write_run_page(runs[1], found["many classes"])
    found["comparison"] = root / "comparison.html"
    write_comparison(runs, found["comparison"])
    return found


def measure(path, folder, width, scheme):
    """Show a page and return what the script above measures."""
    # The page has loaded when its images have, and the browser writes what it has measured then.
    page = path.read_text(encoding="utf-8").replace(' loading="lazy"', "")
    source = json.dumps(page).replace("</", "<\\/")
    script = (
        MEASURE.read_text()
        .replace("CONTRAST;", f"{SMALLEST_CONTRAST};")
        .replace("SOURCE;", f"{source};")
    )
    wrapper = folder / "wrapper.html"
    wrapper.write_text(
        '<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        f'<iframe style="border:0;width:{width}px;height:2000px"></iframe>'
        f"<script>{script}</script>",
        encoding="utf-8",
    )
    command = [
        *[BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
        *[f"--user-data-dir={folder / 'profile'}", "--no-first-run", "--disable-extensions"],
        # Nothing can be reached, so a page that needs the network would show it.
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
        *[f"--window-size={max(width, 800)},2000", "--dump-dom"],
        wrapper.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    # The last one: the page has some, too.
    output = done.stdout.rpartition('<pre id="measured">')[2].partition("</pre>")[0]
    assert output.startswith("{"), done.stderr[-2000:]
    return json.loads(html.unescape(output))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("screen", WIDTHS)
@pytest.mark.parametrize("name", ["run", "many classes", "comparison"])
def test_pages_are_readable(pages, tmp_path, name, screen, scheme):
    width = WIDTHS[screen]
    found = measure(pages[name], tmp_path, width, scheme)
    assert found["width"] == width and found["dark"] == (scheme == "dark")
    assert (found["page"] < 0.1) == (scheme == "dark")
    assert found["scrollWidth"] <= width, "the page scrolls sideways"
    assert found["narrow"] == [] and found["faint"] == []
    assert found["texts"] > 100 and found["smallest"] > 10
    assert found["requests"] == []
    assert found["images"] == ([1000, 1000] if name == "run" else [])


def test_a_click_sorts_a_table(pages, tmp_path):
    down, up = measure(pages["many classes"], tmp_path, 1280, "light")["sorted"]
    values = [float(text.replace(",", "")) for text in down]
    assert values == sorted(values, reverse=True) and len(values) == 43
    assert [float(text.replace(",", "")) for text in up] == sorted(values)

"""The pages of a report: what they say of finished, running, failed, old and damaged runs."""

import json
import os
import re

import cv2
import numpy as np
import pytest
from html_pages import Page
from sample_runs import NAMES, detection_metrics, record, results, write_lines, write_run

from crossmae_det.report.page import write_comparison, write_run_page


def page_of(folder, **options):
    path = folder / "report.html"
    write_run_page(folder, path, **options)
    return Page(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("runs") / "four")
    return page_of(folder)


def test_headline(finished):
    headline = finished.text[: finished.text.index("Accuracy")]
    assert "four" in headline and "finished, 100 iterations" in headline
    assert "Mask AP 38.2" in headline and "EMA 38.2" in headline
    assert "10 min" in headline and "1.5 GiB" in headline and "39" in headline


def test_sections_and_links_agree(finished):
    links = [a["href"] for a in finished.having("a")]
    sections = ["#" + attributes["id"] for attributes in finished.having("section")]
    assert links == sections
    assert {"#accuracy", "#errors", "#classes", "#images", "#training"} < set(links)
    assert {"#configuration", "#data", "#environment"} < set(links)


def test_charts_have_descriptions_and_no_fixed_color(finished):
    charts = [a for a in finished.having("svg") if a.get("class") == "chart"]
    assert len(charts) >= 12
    descriptions = [chart["aria-label"] for chart in charts]
    assert len(set(descriptions)) == len(descriptions)
    assert any("Mask AP by iteration" in text for text in descriptions)
    styles = [
        a["style"] for tag, a in finished.elements if tag in ("path", "text") and "style" in a
    ]
    assert styles and not any("#" in re.sub(r"url\(#[^)]*\)", "", style) for style in styles)
    assert "iteration" in finished.texts  # the text of an axis is text


def test_ids_are_unique_and_references_resolve(finished):
    ids = [attributes["id"] for _, attributes in finished.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = {a["href"][1:] for a in finished.having("use")}
    used |= {a["clip-path"][5:-1] for _, a in finished.elements if "clip-path" in a}
    assert used and used <= set(ids)


def test_tables(finished):
    rows = finished.rows
    assert ["EMA mask", "38.25", "60.50", "35.00", "12.00", "–", "48.00"] in rows
    assert ["optimizer.lr", "0.0001", "0.001"] in rows  # the recipe's and the run's
    assert ["seed", "7"] in rows and ["CPU", "Zilog Z80"] in rows
    assert ["shapes_val", "20", "19", "2", "yes"] in rows
    assert ["warning", "boxes outside <b>", "1, 2", "2"] in rows
    (star,) = (row for row in rows if row[0] == "star" and len(row) == 11)
    assert star == ["star", "5", "30", "40.0", "40.0", "–", "40.0", "40.0", "40.0", "–", "40.0"]
    (confused,) = (row for row in rows if row[0] == "star" and len(row) == 6)
    assert confused == ["star", "·", "20", "7", "·", "3"]
    assert not any(row[0] == "train.output_dir" for row in rows)


def test_errors_are_explained(finished):
    assert "Missed object without a detection · 31 11.0" in finished.text
    assert "AP at IoU 0.5 is 60.5" in finished.text
    assert "Expected calibration error 0.071" in finished.text


def test_names_are_escaped(finished):
    scripts = finished.having("script")
    assert len(scripts) == 1
    for name in NAMES:
        assert name in finished.text
    assert "a=<b>" in finished.text


def test_nothing_is_loaded(finished):
    for tag, attributes in finished.elements:
        for name in ("src", "href", "poster", "srcset", "action", "data"):
            value = attributes.get(name, "#")
            assert value.startswith(("#", "data:image/")), (tag, name, value)
        assert tag not in ("link", "iframe", "object", "embed", "base")
    (policy,) = (a["content"] for a in finished.having("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_a_killed_run_has_a_truncated_line(tmp_path):
    write_lines(tmp_path, [*detection_metrics(50, evaluations=0)])
    with (tmp_path / "metrics.json").open("a") as file:
        file.write('{"iteration": 54, "total_l')
    (tmp_path / "run.json").write_text(json.dumps(record(ended=False)))
    page = page_of(tmp_path)
    assert "stopped at iteration 50 of 100" in page.text
    assert not any("curve" in text for text in page.texts) and "Total loss" in page.texts


def test_an_old_run_has_metrics_only(tmp_path):
    write_lines(tmp_path, [{"iteration": 19, "total_loss": 2.0}, {"iteration": 39, "bbox/AP": 1.5}])
    page = page_of(tmp_path)
    assert "stopped at iteration 20" in page.text
    assert "Box AP" in page.texts and "1.5" in page.texts
    assert "its command and environment are not known" in page.text
    (tmp_path / "model_final.pth").touch()
    assert "finished, 20 iterations" in page_of(tmp_path).text


def test_a_failed_run_shows_its_error(tmp_path):
    content = record(max_iter=500) | {"end": {"state": "failed", "error": "loss is <nan>"}}
    page = page_of(write_run(tmp_path / "run", record=content), with_images=False)
    assert "failed at iteration 100 of 500 loss is <nan>" in page.text
    assert "drawn when the run has ended" in page.text


def test_non_finite_losses_are_shown(tmp_path):
    lines = [{"iteration": i, "total_loss": None if i == 5 else 1.0} for i in range(10)]
    write_lines(tmp_path, lines)
    page = page_of(tmp_path)
    assert "not finite 1 logged" in page.text


def test_a_pretraining_run_shows_reconstructions(tmp_path):
    lines = [
        {"iteration": i, "total_loss": 1 / (i + 1), "val/total_loss": 0.5, "lr": 0.1}
        | {"reconstruction_psnr": 20.0 + i}
        for i in range(5)
    ]
    write_lines(tmp_path, lines)
    (tmp_path / "reconstructions").mkdir()
    for iteration in (1, 2, 3, 4, 5):
        image = np.full((600, 1200, 3), 40 * iteration, np.uint8)
        cv2.imwrite(str(tmp_path / f"reconstructions/{iteration:07d}.png"), image)
    page = page_of(tmp_path)
    images = page.having("img")
    assert [image["alt"].split()[-2] for image in images] == ["5", "3", "1"]
    assert all(image["width"] == "1000" and image["height"] == "500" for image in images)
    assert "PSNR 24.0 dB" in page.text and "After 5 iterations" in page.texts
    assert not any("Mask" in text or "Box" in text for text in page.texts)
    assert not page_of(tmp_path, with_images=False).having("img")


@pytest.mark.parametrize("count", [1, 80, 1203])
def test_any_number_of_classes(tmp_path, count):
    content = results([f"class {index}" for index in range(count)])
    if count > 300:  # as the evaluation does
        for analysis in content["analysis"].values():
            analysis["confusion_matrix"] = None
    folder = write_run(tmp_path / "run", results=content)
    page = page_of(folder)
    assert sum(row[0].startswith("class ") and len(row) == 11 for row in page.rows) == count
    matrix = [row for row in page.rows if row[0] == "background" and len(row) == count + 2]
    assert bool(matrix) == (count == 1)
    pairs = [row for row in page.rows if len(row) == 4 and row[1].startswith("class ")]
    assert len(pairs) == (30 if count == 80 else 0)
    if pairs:
        assert pairs[0][2:] == ["7", "23%"]
    assert (folder / "report.html").stat().st_size < 3e6


def test_results_alone_are_a_report(tmp_path):
    folder = tmp_path / "run"
    (folder / "inference").mkdir(parents=True)
    (folder / "inference/results.json").write_text(json.dumps(results()))
    page = page_of(folder)
    assert "evaluated, without training" in page.text and "38.2" in page.texts


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "inference/results.json").write_text('{"results": {')
    (folder / "config.yaml").write_text("{a: [")
    (folder / "run.json").write_text("[]")
    page = page_of(folder)
    for name in ("inference/results.json", "config.yaml", "run.json"):
        assert any(name in text and str(folder) in text for text in page.texts)
    assert "Total loss" in page.texts and "EMA mask" in page.texts


def test_a_section_of_unknown_content_leaves_the_others(tmp_path):
    content = results()
    content["analysis"]["segm"]["tide"] = {"delta_ap": "unknown"}
    page = page_of(write_run(tmp_path / "run", results=content))
    assert "This section cannot be made" in page.text
    assert any(row[0] == "star" for row in page.rows) and "Total loss" in page.texts


def test_comparison(tmp_path):
    first = write_run(tmp_path / "a" / "run")
    content = results(NAMES[:2])
    content["results"]["segm"]["AP"] = 40.5
    second = write_run(tmp_path / "b" / "run", results=content)
    (second / "config.yaml").write_text((first / "recipe.yaml").read_text())
    old = tmp_path / "old"
    write_lines(old, [{"iteration": 9, "total_loss": 3.0}])
    write_comparison([first, second, old], tmp_path / "comparison.html")
    page = Page(tmp_path / "comparison.html")
    names = [os.path.join("a", "run"), os.path.join("b", "run"), "old"]
    assert names in [row[1:] for row in page.rows]
    assert ["Mask AP", "38.25", "40.50 (+2.25)", "–"] in page.rows
    assert ["Box AP", "38.25", "38.25 (±0)", "–"] in page.rows
    assert ["optimizer.lr", "0.001", "0.0001"] in page.rows
    assert "Without a config.yaml: old." in page.text
    rows = [row for row in page.rows if row[0] == "star"]
    assert rows[0] == ["star", "40.0", "66.7 (+26.7)", "–"]
    (loss,) = (row for row in page.rows if row[0] == "loss")
    assert loss[3].startswith("3 (+")
    cells = [a for tag, a in page.elements if tag == "td" and "bad" in a.get("class", "")]
    assert cells  # a higher loss is worse


def test_comparison_of_equal_configs(tmp_path):
    runs = [write_run(tmp_path / name) for name in "ab"]
    write_comparison(runs, tmp_path / "comparison.html")
    assert "The configs are the same." in Page(tmp_path / "comparison.html").text


def test_a_run_given_twice_is_a_user_error(tmp_path):
    folder = write_run(tmp_path / "run")
    with pytest.raises(ValueError, match="twice"):
        write_comparison([folder, folder], tmp_path / "comparison.html")

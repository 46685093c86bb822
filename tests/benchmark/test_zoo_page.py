"""MODEL_ZOO.md is what the records give, and names the origin of every number."""

import json
import re
import shutil
from functools import partial

import pytest
from tool_calls import call_tool

from crossmae_det import model_zoo
from crossmae_det.benchmark import zoo_page
from crossmae_det.benchmark.zoo_page import BASELINES, PAGE, TEMPLATE, is_up_to_date, measure
from crossmae_det.model_zoo.records import FOLDER, checkpoints, read_records

STALE = "MODEL_ZOO.md is stale: run crossmae-det zoo"
LINK = r"\[([^\]]+)\]\(([^)]+)\)"
CHEAP = [
    "pretraining/crossmae_vit_s_800ep.py",
    "pretraining/mae_vit_s_800ep.py",
    "coco/mask_rcnn_crossmae_vit_s_25ep.py",
    "demo/pretrain.py",
    "demo/mask_rcnn.py",
]


@pytest.fixture(scope="module")
def page():
    return PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def sections(page):
    """Title of each section -> its text."""
    title, *rest = re.split(r"^## (.+)\n", page, flags=re.MULTILINE)
    assert title.startswith("# Model zoo")
    return dict(zip(rest[::2], rest[1::2], strict=True))


def tables(text):
    """Every table in the text: a list of rows, each a dict of cells by header."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE):
        headers, rule, *rows = (
            [cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()
        )
        assert all(re.fullmatch("-+:?", cell) for cell in rule)
        found.append([list(zip(headers, row, strict=True)) for row in rows])
    return found


def cell(row, header):
    return next(text for name, text in row if name == header)


def targets(text):
    """Targets of the links in a text."""
    return [target for _, target in re.findall(LINK, text)]


def test_the_page_is_up_to_date():
    assert is_up_to_date(), f"{STALE} --write-page"


def test_every_row_names_its_origin_and_no_table_mixes_published_and_measured(sections):
    published = tables(sections["Published elsewhere"]) + tables(sections["Checkpoints"])
    measured = tables(sections["Measured here"]) + tables(sections["Costs"])
    assert (len(published), len(measured)) == (8, 5)
    for table in published:
        for row in table:
            header, sources = row[-1]
            assert header == "source" and "run" not in dict(row)
            assert targets(sources)
            assert all(target.startswith("https://") for target in targets(sources)), row
    commands = dict(re.findall(r"^\* (.+?): `(.+)` on ", sections["Measured here"], re.MULTILINE))
    for table in measured:
        for row in table:
            header, run = row[-1]
            assert header == "run" and "source" not in dict(row)
            assert commands[run], row


def test_every_link_has_a_target(page, repo):
    headings = re.findall(r"^#+ (.+)$", page, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in targets(page):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("https://"):
            assert (repo / target).is_file(), target


def test_results_and_costs_link_to_configs(sections):
    for section in ("Published elsewhere", "Measured here", "Costs"):
        for table in tables(sections[section]):
            linked = [text for row in table for name, text in row if name in ("config", "configs")]
            linked = [targets(text) for text in linked if text != "-"]
            assert all(target.startswith("configs/") for each in linked for target in each)
            assert not linked or len(linked) >= len(table) - 2 and all(linked)


def test_every_checkpoint_states_its_license(sections):
    files = [row for table in tables(sections["Checkpoints"]) for row in table]
    assert len(files) == len(checkpoints())
    for row in files:
        assert "CC BY-NC 4.0" in cell(row, "license"), row
        if "CrossMAE" in cell(row, "weights"):
            assert cell(row, "license") == "CC BY-NC 4.0", row


def test_every_config_has_recorded_costs():
    costs = read_records("measured")["costs"]
    rows = costs["pretraining"] + costs["detection"]
    counted = [name for row in rows if not row["overrides"] for name in row["configs"]]
    assert sorted(counted) == model_zoo.list(), f"{STALE} --measure"
    others = {(*row["configs"], *row["overrides"]) for row in rows if row["overrides"]}
    assert others == {(name, *overrides) for name, overrides in BASELINES}


@pytest.mark.parametrize("name", CHEAP)
def test_recounted_costs_match_the_records(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    costs = read_records("measured")["costs"]
    rows = costs["pretraining"] + costs["detection"]
    (row,) = (row for row in rows if name in row["configs"] and not row["overrides"])
    cost = measure(name)
    assert cost.items() <= row.items() and row.keys() - cost.keys() == {"configs", "overrides"}
    assert not list(tmp_path.iterdir())  # no images were drawn for it


@pytest.mark.parametrize(
    ("crossmae", "mae", "override"),
    [
        ("[crossmae_vit_b_800ep]", "[mae_vit_b_800ep]", ""),
        ("[crossmae_vit_b_448_400ep]", "[mae_vit_b_800ep]", "dataloader.image_size=448"),
    ],
)
def test_crossmae_is_compared_with_the_mae_of_the_same_encoder_and_image_size(
    sections, crossmae, mae, override
):
    rows = tables(sections["Costs"])[0]
    ours = next(row for row in rows if row[0][1].startswith(crossmae))
    other = next(row for row in rows if row[0][1].startswith(mae) and override in row[0][1])
    for header in ("pixels", "encoder M params"):
        assert cell(ours, header) == cell(other, header)
    for header in ("decoder GFLOPs", "total GFLOPs"):
        index = [name for name, _ in ours].index(header)
        ratio = float(ours[index][1]) / float(other[index][1])
        assert other[index + 1] == ("x MAE", "1.00")
        assert float(ours[index + 1][1]) == pytest.approx(ratio, abs=0.006)


@pytest.fixture
def tool(repo, monkeypatch):
    """Run the tool in this process."""
    return partial(call_tool, repo, monkeypatch, "make_model_zoo")


def exit_code(tool, *arguments):
    with pytest.raises(SystemExit) as stop:
        tool(*arguments)
    return stop.value.code


def test_the_tool_checks_and_writes_the_page(tool, tmp_path, capsys):
    page = tmp_path / "MODEL_ZOO.md"

    def check():
        code = exit_code(tool, "--check", "--page", page)
        captured = capsys.readouterr()
        assert captured.out == "" and len(captured.err.splitlines()) == 1
        return code

    assert check() == 1 and not page.exists()
    tool("--page", page)
    assert page.read_bytes() == PAGE.read_bytes(), f"{STALE} --write-page"
    tool("--check", "--page", page)
    assert capsys.readouterr().err == ""
    page.write_text(page.read_text().replace("52.1", "53.1"))
    assert check() == 1


def test_a_changed_number_makes_the_page_stale(tool, tmp_path):
    data = shutil.copytree(FOLDER, tmp_path / "data")
    tool("--check", "--data", data)
    path = data / "measured.json"
    path.write_text(path.read_text().replace("45.64", "45.65"))
    assert exit_code(tool, "--check", "--data", data) == 1


def test_measuring_changes_only_the_costs(tool, tmp_path, monkeypatch):
    data = shutil.copytree(FOLDER, tmp_path / "data")
    path = data / "measured.json"
    before = json.loads(path.read_text())
    monkeypatch.setattr(zoo_page, "list_configs", lambda: CHEAP[:1] + CHEAP[3:])
    monkeypatch.setattr(zoo_page, "BASELINES", ())
    tool("--measure", "--data", data, "--page", tmp_path / "page.md")
    after = json.loads(path.read_text())
    # The machine changes as well if torch is another version than in the records.
    assert {key for key in before if before[key] != after[key]} - {"machines"} == {"costs"}
    assert [row["configs"] for row in after["costs"]["pretraining"]] == [[CHEAP[0]], [CHEAP[3]]]
    for group in ("pretraining", "detection"):
        for row in after["costs"][group]:
            (old,) = (r for r in before["costs"][group] if set(row["configs"]) <= set(r["configs"]))
            assert row == old | {"configs": row["configs"]}
    assert "[crossmae_vit_b_800ep]" in (tmp_path / "page.md").read_text()


def test_invalid_data_is_a_one_line_error(tool, tmp_path, capsys):
    data = shutil.copytree(FOLDER, tmp_path / "data")

    def error():
        assert exit_code(tool, "--check", "--data", data) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        return line

    template = data / TEMPLATE
    template.write_text("{{ hearsay }}")
    assert TEMPLATE in (line := error()) and "hearsay" in line
    template.write_text("{% if %}")
    assert TEMPLATE in error()
    template.unlink()
    assert TEMPLATE in error()
    (data / "checkpoints.json").write_text("{}")
    line = error()
    assert "checkpoints.json" in line and "origins" in line

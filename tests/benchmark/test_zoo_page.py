"""MODEL_ZOO.md is what the records give, and says of every number where it comes from."""

import json
import re
import shutil
from functools import partial

import pytest
from tool_calls import call_tool, load_tool

from crossmae_det import model_zoo
from crossmae_det.benchmark.zoo_page import BASELINES, PAGE, is_up_to_date, measure
from crossmae_det.model_zoo.records import FOLDER, checkpoints, read_records

STALE = "MODEL_ZOO.md is not what its data give: run python tools/make_model_zoo.py"
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
    """The title of each section -> its text."""
    title, *rest = re.split(r"^## (.+)\n", page, flags=re.MULTILINE)
    assert title.startswith("# Model zoo")
    return dict(zip(rest[::2], rest[1::2], strict=True))


@pytest.fixture(scope="module")
def targets(page):
    """The label of each link -> where it goes."""
    found = re.findall(r"^\[(.+)\]: (\S+)$", page, flags=re.MULTILINE)
    assert len(found) == len({label.lower() for label, _ in found})  # as Markdown compares them
    return dict(found)


def tables(text):
    """Every table in the text: a list of rows, each a list of cells, the headers first."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE):
        lines = block.splitlines()
        assert len({len(line) for line in lines}) == 1, f"not aligned: {lines[0]}"
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        assert len({len(row) for row in rows}) == 1
        assert all(re.fullmatch(":?-+:?", cell) for cell in rows.pop(1))
        found.append(rows)
    return found


def labels(cell):
    """The labels of the links in a cell."""
    return re.findall(r"\[([^\]]+)\](?!\[)", cell)


def test_the_page_is_up_to_date():
    assert is_up_to_date(), STALE


def test_the_page_opens_with_how_to_read_it(sections):
    assert list(sections) == [
        "How to read the tables",
        "Published elsewhere",
        "Measured here",
        "Checkpoints",
        "Costs",
    ]


def test_every_row_has_its_origin_and_no_table_mixes_what_is_published_and_measured(
    sections, targets
):
    published = tables(sections["Published elsewhere"]) + tables(sections["Checkpoints"])
    measured = tables(sections["Measured here"]) + tables(sections["Costs"])
    assert (len(published), len(measured)) == (8, 5)
    for headers, *rows in published:
        assert headers[-1] == "source" and "run" not in headers
        for row in rows:
            assert labels(row[-1])
            assert all(targets[label].startswith("https://") for label in labels(row[-1])), row
    commands = dict(re.findall(r"^\* (.+?): `(.+)` on ", sections["Measured here"], re.MULTILINE))
    for headers, *rows in measured:
        assert headers[-1] == "run" and "source" not in headers
        for row in rows:
            assert commands[row[-1]], row


def test_every_link_goes_somewhere(page, targets, repo):
    body = re.sub(r"```.*?```|`[^`]*`", "", page, flags=re.DOTALL)
    used = {label for cell in re.findall(r"\|([^|\n]+)", body) for label in labels(cell)}
    assert used == targets.keys()
    inline = [target for _, target in re.findall(r"\[([^\]]+)\]\(([^)]+)\)", body)]
    headings = re.findall(r"^#+ (.+)$", page, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in [*targets.values(), *inline]:
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("https://"):
            assert (repo / target).is_file(), target


def test_rows_of_results_and_costs_link_to_configs(sections, targets):
    for section in ("Published elsewhere", "Measured here", "Costs"):
        for headers, *rows in tables(sections[section]):
            for column in {"config", "configs"} & set(headers):
                linked = [row for row in rows if labels(row[headers.index(column)])]
                assert len(linked) >= len(rows) - 2
                for row in linked:
                    for label in labels(row[headers.index(column)]):
                        assert targets[label].startswith("configs/"), row


def test_every_checkpoint_states_its_license(sections):
    files = tables(sections["Checkpoints"])
    assert sum(len(rows) - 1 for rows in files) == len(checkpoints())
    for headers, *rows in files:
        for row in rows:
            license = row[headers.index("license")]
            assert "CC BY-NC 4.0" in license, row
            if "CrossMAE" in row[0]:
                assert license == "CC BY-NC 4.0", row


def test_the_costs_are_those_of_every_config():
    costs = read_records("measured")["costs"]
    rows = costs["pretraining"] + costs["detection"]
    counted = [name for row in rows if not row["overrides"] for name in row["configs"]]
    assert sorted(counted) == model_zoo.list(), f"{STALE} --measure"
    others = {(*row["configs"], *row["overrides"]) for row in rows if row["overrides"]}
    assert others == {(name, *overrides) for name, overrides in BASELINES}


@pytest.mark.parametrize("name", CHEAP)
def test_costs_counted_anew_are_those_of_the_records(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    costs = read_records("measured")["costs"]
    rows = costs["pretraining"] + costs["detection"]
    (row,) = (row for row in rows if name in row["configs"] and not row["overrides"])
    cost = measure(name)
    assert cost.items() <= row.items() and row.keys() - cost.keys() == {"configs", "overrides"}
    assert not list(tmp_path.iterdir())  # no dataset was drawn for it


@pytest.mark.parametrize(
    ("crossmae", "mae"),
    [
        (
            "[crossmae_vit_b_800ep]<br>[pretrain_crossmae_vit_b]",
            "[mae_vit_b_800ep]<br>[mae_vit_b_1600ep]",
        ),
        (
            "[crossmae_vit_b_448_400ep]<br>[crossmae_vit_b_448_800ep]",
            "[mae_vit_b_800ep]<br>`dataloader.image_size=448`",
        ),
    ],
)
def test_crossmae_is_compared_with_the_mae_of_its_encoder_and_image_size(sections, crossmae, mae):
    headers, *rows = tables(sections["Costs"])[0]
    ours, theirs = (next(row for row in rows if row[0] == name) for name in (crossmae, mae))
    for column in ("pixels", "encoder M params"):
        assert ours[headers.index(column)] == theirs[headers.index(column)]
    for column in ("decoder GFLOPs", "total GFLOPs"):
        index = headers.index(column)
        ratio = float(ours[index]) / float(theirs[index])
        assert headers[index + 1] == "x MAE" and theirs[index + 1] == "1.00"
        assert float(ours[index + 1]) == pytest.approx(ratio, abs=0.006)


@pytest.fixture
def tool(repo, monkeypatch):
    """Run the tool in this process."""
    main = load_tool(repo, "make_model_zoo").main
    return partial(call_tool, main, monkeypatch, "make_model_zoo")


def test_the_tool_checks_and_writes_the_page(tool, tmp_path, capsys):
    page = tmp_path / "MODEL_ZOO.md"

    def check():
        with pytest.raises(SystemExit) as stop:
            tool("--check", "--page", page)
        captured = capsys.readouterr()
        assert captured.out == "" and len(captured.err.splitlines()) == 1
        assert "run python tools/make_model_zoo.py" in captured.err
        return stop.value.code

    assert check() == 1 and not page.exists()
    tool("--page", page)
    assert page.read_bytes() == PAGE.read_bytes(), STALE
    tool("--check", "--page", page)
    assert capsys.readouterr().err == ""
    page.write_text(page.read_text().replace("52.1", "53.1"))
    assert check() == 1


def test_a_changed_number_makes_the_page_stale(tool, tmp_path):
    data = shutil.copytree(FOLDER, tmp_path / "data")
    tool("--check", "--data", data)
    path = data / "measured.json"
    path.write_text(path.read_text().replace("45.64", "45.65"))
    with pytest.raises(SystemExit) as stop:
        tool("--check", "--data", data)
    assert stop.value.code == 1


def test_measuring_changes_the_costs_alone(tool, tmp_path, monkeypatch):
    data = shutil.copytree(FOLDER, tmp_path / "data")
    path = data / "measured.json"
    before = json.loads(path.read_text())
    monkeypatch.setattr(
        "crossmae_det.benchmark.zoo_page.list_configs", lambda: CHEAP[:1] + CHEAP[3:]
    )
    monkeypatch.setattr("crossmae_det.benchmark.zoo_page.BASELINES", ())
    tool("--measure", "--data", data, "--page", tmp_path / "page.md")
    after = json.loads(path.read_text())
    # And with another torch than that of the records, the machine.
    assert {key for key in before if before[key] != after[key]} - {"machines"} == {"costs"}
    assert [row["configs"] for row in after["costs"]["pretraining"]] == [[CHEAP[0]], [CHEAP[3]]]
    for group in ("pretraining", "detection"):
        for row in after["costs"][group]:
            (old,) = (r for r in before["costs"][group] if set(row["configs"]) <= set(r["configs"]))
            assert row == old | {"configs": row["configs"]}
    assert "[crossmae_vit_b_800ep]" in (tmp_path / "page.md").read_text()


def test_bad_data_end_in_one_line(tool, tmp_path, capsys):
    data = shutil.copytree(FOLDER, tmp_path / "data")

    def refusal():
        with pytest.raises(SystemExit) as stop:
            tool("--check", "--data", data)
        line = capsys.readouterr().err
        assert stop.value.code == 2 and line.count("\n") == 1
        return line

    words = data / "page.md"
    words.write_text("$published $hearsay")
    assert "the page needs 'hearsay', which is not there" in refusal()
    path = data / "published.json"
    path.write_text(path.read_text().replace('CrossMAE, Table 1"', 'CrossMAE, Table 2"'))
    path.write_text(path.read_text().replace("2401.14391v2", "2401.14391v3", 1))
    assert "two links are called 'CrossMAE, Table 2'" in refusal()
    shutil.copy(FOLDER / path.name, path)
    words.unlink()
    assert "page.md" in refusal()
    (data / "checkpoints.json").write_text("{}")
    assert "checkpoints.json: there is no 'origins'" in refusal()

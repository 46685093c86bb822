import cv2

from crossmae_det.benchmark.report import plot_growth, plot_latency, plot_precision


def case(name, side, failure="", batch=1):
    measured = dict(median_seconds=1e-6 * side**2, peak_bytes=side**3)
    values = dict(backbone=name, image_size=side, batch_size=batch, failure=failure)
    return (
        values | dict(train=False, precision="fp32", device="cpu") | ({} if failure else measured)
    )


def assert_pictures(files, stem):
    assert [file.name for file in files] == [f"{stem}.png", f"{stem}.svg"]
    image = cv2.imread(str(files[0]))
    assert image.std() > 5 and min(image.shape[:2]) > 400
    assert "<svg" in files[1].read_text()


def test_latency_and_memory(tmp_path):
    cases = [case(name, side) for name in ("a", "b") for side in (256, 512)]
    cases += [case("b", 1024, failure="out of memory"), case("a", 512, batch=2)]
    assert_pictures(plot_latency(cases, tmp_path / "latency"), "latency")
    assert plot_latency([case("a", 64, failure="out of memory")], tmp_path / "none") == []
    assert not list(tmp_path.glob("none*"))


def test_precision_against_cost(tmp_path):
    files = plot_precision([("a", 100.0, 50.1), ("b", 300.0, 54.2)], tmp_path / "precision")
    assert_pictures(files, "precision")
    assert plot_precision([], tmp_path / "none") == []


def test_growth(tmp_path):
    points = [dict(image_size=s, seconds=s**2 / 1e6, bytes=None) for s in (256, 512)]
    curve = dict(time_exponent=2.0, memory_exponent=None, points=points)
    assert_pictures(
        plot_growth({"windowed": curve, "global": curve}, tmp_path / "growth"), "growth"
    )

"""Parity of attention backends, and the run of the tests that need a GPU."""

import shutil

import pytest
import torch

from crossmae_det.benchmark.checks import (
    ParityCase,
    ParityMeter,
    TestRun,
    relative_errors,
    test_results,
)
from crossmae_det.layers import attention_backends
from crossmae_det.layers.attention_backends import BACKENDS

TESTS = """
import pytest

@pytest.mark.cuda
@pytest.mark.parametrize("number", [1, 2, 3])
def test_number(number):
    assert number != 2

@pytest.mark.cuda
@pytest.mark.skip
def test_skipped():
    pass

def test_on_any_machine():
    raise AssertionError
"""


def parity(backend="eager", precision="bf16", grid=(4, 6)):
    case = ParityCase(backend, precision, 2, 2, 16, grid)
    return ParityMeter([case], "cpu").measure(0, None, 0)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("auto", "flex")])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_backends_are_near_the_definition(backend, precision):
    errors = parity(backend, precision)
    limit = {"bf16": 2e-2, "fp16": 3e-3, "fp32": 1e-5}[precision]
    assert errors.keys() == {"output_mean", "output_max", "gradient_mean", "gradient_max"}
    assert 0 < max(errors.values()) < limit


def test_a_wrong_backend_has_large_errors(monkeypatch):
    def without_columns(q, k, v, rel_pos):
        rows, columns = rel_pos
        return attention_backends._eager(q, k, v, (rows, 0 * columns))

    monkeypatch.setitem(attention_backends._FUNCTIONS, "sdpa", without_columns)
    assert min(parity("sdpa").values()) > 10 * max(parity().values())


def test_results_that_are_not_finite_are_a_failure(monkeypatch):
    def divided_by_zero(q, k, v, rel_pos):
        return attention_backends._eager(q, k, v, rel_pos) / 0

    monkeypatch.setitem(attention_backends._FUNCTIONS, "sdpa", divided_by_zero)
    with pytest.raises(ValueError, match="not finite"):
        parity("sdpa")


def test_a_backend_of_another_device_is_a_failure():
    with pytest.raises(ValueError, match="'flex' runs on cuda only"):
        parity("flex")


def test_relative_errors():
    expected = torch.tensor([3.0, -4.0])
    assert relative_errors(expected, expected) == (0, 0)
    assert relative_errors(torch.tensor([3.0, -3.0]), expected) == pytest.approx((0.2, 0.25))


@pytest.fixture
def repository(tmp_path, repo):
    shutil.copy(repo / "pyproject.toml", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_gpu.py").write_text(TESTS)
    (tmp_path / "tests" / "test_other.py").write_text("raise RuntimeError")  # not imported
    return tmp_path


def test_the_marked_tests_are_run(repository):
    result = TestRun(repository).measure(0, None, 300)
    assert (result["passed"], result["failed"], result["skipped"]) == (2, 1, 1)
    (name,) = result["failures"]
    assert name.endswith("test_gpu::test_number[2]")
    assert result["seconds"] > 0


def test_tests_that_cannot_run_are_a_failure(repository, tmp_path_factory):
    with pytest.raises(ValueError, match="stopped after 0 s: time"):
        TestRun(repository).measure(0, None, 0.1)
    (repository / "pyproject.toml").write_text("[tool.pytest.ini_options]\naddopts = '--nothing'")
    with pytest.raises(ValueError, match="pytest ended with 4"):
        TestRun(repository).measure(0, None, 300)
    with pytest.raises(ValueError, match="not part of an installed package"):
        TestRun(tmp_path_factory.mktemp("empty")).measure(0, None, 300)


def test_errors_count_as_failures(tmp_path):
    file = tmp_path / "results.xml"
    file.write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="1" skipped="0" time="1.5">'
        '<testcase classname="a" name="x"><failure/></testcase>'
        '<testcase classname="a" name="y"><error/></testcase>'
        '<testcase classname="a" name="z"/></testsuite></testsuites>'
    )
    result = test_results(file)
    assert (result["passed"], result["failed"], result["seconds"]) == (1, 2, 1.5)
    assert result["failures"] == ["a::x", "a::y"]

"""Every backend against the definition, one query at a time, in values and gradients."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from crossmae_det.layers import attention_backends
from crossmae_det.layers.attention import Attention
from crossmae_det.layers.attention_backends import (
    BACKENDS,
    attend,
    choose_backend,
    full_bias,
    relative_position,
    resample_table,
)

CPU = ("auto", "eager", "sdpa", "folded", "chunked")
CUDA = ("auto", "eager", "sdpa", "folded", "flex")
everywhere = pytest.mark.parametrize(
    ("device", "backend"),
    [("cpu", name) for name in CPU]
    + [pytest.param("cuda", name, marks=pytest.mark.cuda) for name in CUDA],
)
# Everything but compilation, which tests/modeling/test_compile.py covers.
CONTRACT = ("test_schema", "test_autograd_registration", "test_faketensor")
NAMES = ("q", "k", "v", "table_h", "table_w")


def random_inputs(grid, table_grid=None, *, n=2, heads=2, channels=16):
    """q, k, v and the tables, on the CPU; entries of size 1 where that makes scores of size 1."""
    torch.manual_seed(0)
    height, width = table_grid or grid
    length = grid[0] * grid[1]
    tokens = [torch.randn(n, heads, length, channels) for _ in range(3)]
    tables = [torch.randn(2 * side - 1, channels) * channels**-0.5 for side in (height, width)]
    return tokens + tables


def naive(q, k, v, table_h, table_w, grid):
    """One query at a time, and its bias one key at a time; the tables fit the grid."""
    height, width = grid
    rows = []
    for query in range(height * width):
        bias = []
        for key in range(height * width):
            dy = query // width - key // width + height - 1
            dx = query % width - key % width + width - 1
            bias.append(q[:, :, query] @ (table_h[dy] + table_w[dx]))
        products = torch.einsum("nmd,nmkd->nmk", q[:, :, query], k) / q.shape[-1] ** 0.5
        weights = (products + torch.stack(bias, dim=-1)).softmax(-1)
        rows.append(torch.einsum("nmk,nmkd->nmd", weights, v))
    return torch.stack(rows, dim=2)


def with_gradients(function, inputs, device="cpu", dtype=torch.float32):
    """Value and gradients in float32 on the CPU, of inputs given in ``dtype`` on ``device``."""
    inputs = [x.to(device, dtype).requires_grad_() for x in inputs]
    y = function(*inputs)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    gradients = torch.autograd.grad((y * weight).sum(), inputs)
    return [x.detach().float().cpu() for x in (y, *gradients)]


def by_backend(backend, grid):
    def function(q, k, v, table_h, table_w):
        return attend(q, k, v, relative_position(q, table_h, table_w, grid), backend)

    return function


def assert_equal(got, expected, tolerance):
    for name, a, b in zip(("output", *NAMES), got, expected, strict=True):
        assert (a - b).abs().max() < tolerance * max(1, b.abs().max()), name


@everywhere
@pytest.mark.parametrize("grid", [(4, 4), (3, 6), (5, 2), (1, 3)])
def test_equals_the_definition_in_values_and_gradients(device, backend, grid):
    inputs = random_inputs(grid)
    expected = with_gradients(lambda *x: naive(*x, grid), inputs)
    assert_equal(with_gradients(by_backend(backend, grid), inputs, device), expected, 1e-4)


@everywhere
@pytest.mark.parametrize("grid", [(4, 4), (3, 6)])
def test_an_empty_batch_has_an_empty_result_and_zero_gradients(device, backend, grid):
    inputs = random_inputs(grid, n=0)
    results = with_gradients(by_backend(backend, grid), inputs, device)
    assert [x.shape for x in results] == [inputs[0].shape, *(x.shape for x in inputs)]
    assert not any(x.any() for x in results)
    with torch.no_grad():
        assert by_backend(backend, grid)(*(x.to(device) for x in inputs)).shape == inputs[0].shape
        plain = attend(*(x.to(device) for x in inputs[:3]), None, backend)
        assert plain.shape == inputs[0].shape


def test_the_chunked_operator_takes_an_empty_batch():
    q, k, v, *_ = (x.requires_grad_() for x in random_inputs((2, 3), n=0))
    bias = torch.zeros(0, 2, 6, 2), torch.zeros(0, 2, 6, 3)
    out = attention_backends.chunked_attention(q, k, v, *bias, 0.5)
    assert out.shape == q.shape
    out.sum().backward()
    assert q.grad.shape == q.shape


@everywhere
@pytest.mark.parametrize("table_grid", [(7, 3), (3, 9)])
def test_tables_of_another_size_are_resampled(device, backend, table_grid):
    grid = (4, 6)
    inputs = random_inputs(grid, table_grid)

    def resampled(q, k, v, *tables):
        fitting = [
            torch.nn.functional.interpolate(table.T[None], size=2 * side - 1, mode="linear")[0].T
            for table, side in zip(tables, grid, strict=True)
        ]
        return naive(q, k, v, *fitting, grid)

    expected = with_gradients(resampled, inputs)
    assert_equal(with_gradients(by_backend(backend, grid), inputs, device), expected, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [(9, 9), (5, 9)])
def test_without_a_bias_low_precision_on_a_cpu_equals_the_fused_attention(dtype, tokens):
    torch.manual_seed(0)
    queries, keys = tokens
    inputs = [torch.randn(2, 3, length, 16) for length in (queries, keys, keys)]
    expected = with_gradients(F.scaled_dot_product_attention, inputs)
    got = with_gradients(attend, inputs, dtype=dtype)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() < (0.05 if dtype == torch.bfloat16 else 0.01) * b.abs().max()


@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_close(device, backend, dtype):
    grid = (4, 6)
    inputs = [x.to(dtype).float() for x in random_inputs(grid)]
    expected = with_gradients(lambda *x: naive(*x, grid), inputs)
    got = with_gradients(by_backend(backend, grid), inputs, device, dtype)
    assert_equal(got, expected, 0.05 if dtype == torch.bfloat16 else 0.01)


@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_runs_under_autocast(device, backend, dtype):
    torch.manual_seed(0)
    attention = Attention(32, 2, (4, 6), backend)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 24, 32)
    results = []
    for use_autocast, name in ((False, "eager"), (True, backend)):
        attention.backend = name
        attention.to(device).zero_grad()
        with torch.autocast(device, dtype, enabled=use_autocast):
            y = attention(x.to(device), (4, 6))
            y_window = attention(x.to(device), (4, 6), 4)
        assert y.dtype == (dtype if use_autocast else torch.float32)
        (y.float().square().sum() + y_window.float().square().sum()).backward()
        gradients = [p.grad for p in attention.parameters()]
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        results.append([y.float(), y_window.float(), *gradients])
    for got, expected in zip(results[1], results[0], strict=True):
        assert (got - expected).norm() < 0.05 * expected.norm()


@everywhere
def test_without_relative_position_it_is_plain_attention(device, backend):
    inputs = random_inputs((3, 5))[:3]

    def plain(q, k, v):
        return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v

    got = with_gradients(lambda *x: attend(*x, backend=backend), inputs, device)
    for a, b in zip(got, with_gradients(plain, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# Chunks of one matrix and 16 queries, of several matrices, of all; lengths they do not divide.
@pytest.mark.parametrize("pairs", [1, 900, 2000, 10**6])
def test_chunks_of_any_size_give_the_same(monkeypatch, pairs):
    monkeypatch.setattr(attention_backends, "FORWARD_PAIRS_PER_CORE", pairs)
    monkeypatch.setattr(attention_backends, "BACKWARD_PAIRS_PER_CORE", pairs)
    grid = (3, 7)
    inputs = random_inputs(grid, n=3)
    assert_equal(
        with_gradients(by_backend("chunked", grid), inputs),
        with_gradients(by_backend("eager", grid), inputs),
        1e-5,
    )


def test_the_chunked_operator_keeps_its_contract():
    grid = (3, 4)
    q, k, v, table_h, table_w = random_inputs(grid)
    rel_pos = relative_position(q, table_h, table_w, grid)
    inputs = [x.detach().requires_grad_() for x in (q, k, v, *rel_pos)]
    opcheck(attention_backends.chunked_attention, (*inputs, 0.25), test_utils=CONTRACT)


def test_large_scores_do_not_overflow():
    grid = (4, 4)
    inputs = random_inputs(grid)
    inputs[0] *= 100
    expected = by_backend("eager", grid)(*inputs)
    assert expected.isfinite().all()
    for backend in CPU:
        torch.testing.assert_close(
            by_backend(backend, grid)(*inputs), expected, rtol=1e-4, atol=1e-4
        )


def test_unknown_names_and_backends_of_other_devices_are_rejected():
    with pytest.raises(ValueError, match=r"'fast'.* auto, eager, sdpa"):
        Attention(8, 2, backend="fast")
    with pytest.raises(ValueError, match=r"'flex'.* cuda .*cpu.* auto, eager, sdpa, folded, chu"):
        by_backend("flex", (2, 2))(*random_inputs((2, 2)))


@pytest.mark.cuda
def test_the_cpu_backend_is_rejected_on_cuda():
    inputs = [x.cuda() for x in random_inputs((2, 2))]
    with pytest.raises(ValueError, match=r"'chunked'.* cpu .*cuda"):
        by_backend("chunked", (2, 2))(*inputs)


def test_auto_follows_device_type_size_and_grad_mode(monkeypatch):
    monkeypatch.setattr(attention_backends, "HAS_TRITON", True)

    def chosen(device, dtype, side, n=1, grad=True):
        rel_pos = (torch.empty(n, 4, side**2, side, device="meta"),) * 2
        return choose_backend(device, dtype, 64, rel_pos, grad)

    # 4 heads x 32 ** 4 pairs are as many as few pairs are.
    assert chosen("cpu", torch.float32, 32) == "eager"
    assert chosen("cpu", torch.float32, 32, grad=False) == "sdpa"
    assert chosen("cpu", torch.float32, 32, n=2) == "chunked"
    assert chosen("cpu", torch.float32, 33, grad=False) == "chunked"
    assert chosen("mps", torch.float32, 64) == "sdpa"
    assert chosen("cuda", torch.bfloat16, 96) == "folded"  # 64 + 2 * 96 = 256
    assert chosen("cuda", torch.bfloat16, 97) == "flex"
    assert chosen("cuda", torch.float32, 97) == "folded"
    monkeypatch.setattr(attention_backends, "HAS_TRITON", False)
    assert chosen("cuda", torch.bfloat16, 97) == "folded"


def test_the_choice_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(attention_backends, "_logged", set())
    inputs = random_inputs((2, 2))
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            by_backend("auto", (2, 2))(*inputs)
        by_backend("auto", (2, 2))(*[x.double() for x in inputs])
    first, second = (record.getMessage() for record in caplog.records)
    assert "float32: eager" in first and "float64: eager" in second


def test_on_meta_every_backend_has_shapes():
    inputs = [x.to("meta") for x in random_inputs((3, 4))]
    for backend in BACKENDS:
        assert by_backend(backend, (3, 4))(*inputs).shape == (2, 2, 12, 16)


def naive_bias(q, table_h, table_w, grid):
    """One pair of positions at a time, for tables that fit the grid."""
    height, width = grid
    bias = torch.zeros(*q.shape[:3], height * width)
    for query in range(height * width):
        for key in range(height * width):
            dy = query // width - key // width + height - 1
            dx = query % width - key % width + width - 1
            bias[:, :, query, key] = q[:, :, query] @ (table_h[dy] + table_w[dx])
    return bias


@pytest.mark.parametrize("grid", [(3, 3), (2, 4)])
def test_bias_equals_the_naive_sum_in_values_and_gradients(grid):
    torch.manual_seed(0)
    height, width = grid
    inputs = [
        torch.randn(2, 3, height * width, 5, requires_grad=True),
        torch.randn(2 * height - 1, 5, requires_grad=True),
        torch.randn(2 * width - 1, 5, requires_grad=True),
    ]
    bias = full_bias(*relative_position(*inputs, grid))
    expected = naive_bias(*inputs, grid)
    torch.testing.assert_close(bias, expected)
    weight = torch.randn_like(bias)
    gradients = torch.autograd.grad((bias * weight).sum(), inputs)
    torch.testing.assert_close(gradients, torch.autograd.grad((expected * weight).sum(), inputs))


def test_a_fitting_table_is_returned_as_it_is():
    table = torch.randn(7, 2)
    assert resample_table(table, 4) is table


def test_resampling_keeps_a_linear_table_linear():
    table = torch.linspace(-1, 1, 9)[:, None]
    resampled = resample_table(table, 3)
    assert resampled.shape == (5, 1)
    torch.testing.assert_close(resampled.diff(dim=0).diff(dim=0)[1:-1], torch.zeros(1, 1))
    torch.testing.assert_close(resampled, -resampled.flip(0))


def test_the_parts_have_the_type_of_the_queries_under_autocast():
    table = torch.randn(3, 8)
    for dtype in (torch.bfloat16, torch.float32):
        q = torch.randn(1, 1, 4, 8, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            parts = relative_position(q, table, table, (2, 2))
        assert [part.dtype for part in parts] == [dtype, dtype]

import pytest
import torch
from torch.library import opcheck

from crossmae_det.layers.attention import (
    Attention,
    CrossAttention,
    window_partition,
    window_unpartition,
)
from crossmae_det.layers.attention_backends import full_bias, relative_position

on_each_device = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.cuda),
    ],
)
# Windows of 3 divide the first, one side of the next two, neither side of the last two; the last
# is smaller than a window.
on_each_grid = pytest.mark.parametrize("grid", [(3, 6), (6, 4), (4, 6), (5, 7), (1, 2)])


def naive_attention(attention, x, grid):
    """The definition, with the scores of every pair in memory."""
    n, length, channels = x.shape
    heads = attention.num_heads
    qkv = attention.qkv(x).view(n, length, 3, heads, channels // heads)
    q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
    scores = q @ k.transpose(-1, -2) / (channels // heads) ** 0.5
    if grid is not None and attention.use_rel_pos:
        tables = attention.rel_pos_h, attention.rel_pos_w
        scores = scores + full_bias(*relative_position(q, *tables, grid))
    out = scores.softmax(-1) @ v
    return attention.proj(out.transpose(1, 2).reshape(n, length, channels))


def naive_windows(attention, x, grid, size):
    """Zeros around the map, every window alone, and the zeros cut away again."""
    (height, width), channels = grid, x.shape[-1]
    padded = x.new_zeros(len(x), height + size, width + size, channels)
    padded[:, :height, :width] = x.unflatten(1, grid)
    y = torch.zeros_like(padded)
    for top in range(0, height, size):
        for left in range(0, width, size):
            part = (slice(None), slice(top, top + size), slice(left, left + size))
            window = naive_attention(attention, padded[part].flatten(1, 2), (size, size))
            y[part] = window.unflatten(1, (size, size))
    return y[:, :height, :width].flatten(1, 2)


def random_attention(table_size):
    torch.manual_seed(0)
    attention = Attention(12, 3, table_size)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return attention


def assert_same(attention, x, y, expected):
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    inputs = [x, *attention.parameters()]
    got = torch.autograd.grad((y * weight).sum(), inputs, allow_unused=True)
    want = torch.autograd.grad((expected * weight).sum(), inputs, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("table_size", [None, (3, 4), (5, 5)])
@pytest.mark.parametrize("grid", [None, (3, 4)])
def test_equals_the_definition_in_values_and_gradients(table_size, grid):
    attention = random_attention(table_size)
    x = torch.randn(2, 12, 12, requires_grad=True)
    assert_same(attention, x, attention(x, grid), naive_attention(attention, x, grid))


@pytest.mark.parametrize("table_size", [None, (3, 3), (5, 2)])
@pytest.mark.parametrize("grid", [(3, 6), (4, 6), (5, 7), (2, 1)])
def test_windows_equal_those_of_a_map_padded_with_zeros(table_size, grid):
    attention = random_attention(table_size)
    x = torch.randn(2, grid[0] * grid[1], 12, requires_grad=True)
    assert_same(attention, x, attention(x, grid, 3), naive_windows(attention, x, grid, 3))


def test_heads_must_divide_the_width():
    for make in (lambda: Attention(10, 3), lambda: CrossAttention(10, 9, 3)):
        with pytest.raises(ValueError, match=r"10 .* 3 "):
            make()


def naive_cross_attention(attention, queries, memory):
    """One image, one head and one query at a time."""
    n, count, channels = queries.shape
    size = channels // attention.num_heads
    images = []
    for i in range(n):
        q = attention.q(queries[i])
        k, v = attention.kv(memory[i]).split(channels, dim=1)
        rows = []
        for query in range(count):
            heads = []
            for head in range(attention.num_heads):
                part = slice(head * size, (head + 1) * size)
                weights = (k[:, part] @ q[query, part] / size**0.5).softmax(0)
                heads.append(weights @ v[:, part])
            rows.append(torch.cat(heads))
        images.append(attention.proj(torch.stack(rows)))
    return torch.stack(images)


def test_cross_attention_equals_the_definition_in_values_and_gradients():
    torch.manual_seed(0)
    attention = CrossAttention(12, 10, 3)
    queries = torch.randn(2, 4, 12, requires_grad=True)
    memory = torch.randn(2, 7, 10, requires_grad=True)
    inputs = [queries, memory, *attention.parameters()]
    y, expected = attention(queries, memory), naive_cross_attention(attention, queries, memory)
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    gradients = torch.autograd.grad((y * weight).sum(), inputs)
    torch.testing.assert_close(gradients, torch.autograd.grad((expected * weight).sum(), inputs))


def naive_partition(x, pad, size, grid):
    """The map is padded token by token, and cut window by window."""
    height, width = grid
    tokens = x.unflatten(1, grid)
    images = []
    for image in tokens:
        for top in range(0, height, size):
            for left in range(0, width, size):
                window = [
                    image[y, x] if y < height and x < width else pad
                    for y in range(top, top + size)
                    for x in range(left, left + size)
                ]
                images.append(torch.stack(window, dim=1))
    return torch.stack(images)


@on_each_device
@on_each_grid
def test_partition_equals_the_naive_one_in_values_and_gradients(device, grid):
    torch.manual_seed(0)
    # A third of a longer last dimension: not contiguous, as queries, keys and values are.
    x = torch.randn(2, grid[0] * grid[1], 3, 2, 5, device=device)[:, :, 1].requires_grad_()
    pad = torch.randn(2, 5, device=device, requires_grad=True)
    got, expected = window_partition(x, pad, 3, grid), naive_partition(x, pad, 3, grid)
    assert torch.equal(got, expected) and got.is_contiguous()
    weight = torch.randn_like(got)
    gradients = torch.autograd.grad((got * weight).sum(), (x, pad), allow_unused=True)
    wanted = torch.autograd.grad((expected * weight).sum(), (x, pad), allow_unused=True)
    assert torch.equal(gradients[0], wanted[0])
    zero = torch.zeros_like(pad)
    torch.testing.assert_close(gradients[1], zero if wanted[1] is None else wanted[1])


@on_each_device
@on_each_grid
def test_unpartition_is_the_inverse_and_gives_no_gradient_to_padding(device, grid):
    torch.manual_seed(0)
    x = torch.randn(2, grid[0] * grid[1], 2, 5, device=device)
    ones = torch.ones(2, 5, device=device)
    windows = window_partition(x, ones, 3, grid).requires_grad_()
    y = window_unpartition(windows, 3, grid)
    assert torch.equal(y, x) and y.is_contiguous()
    weight = torch.randn_like(y)
    (gradient,) = torch.autograd.grad((y * weight).sum(), windows)
    assert torch.equal(gradient, window_partition(weight, 0 * ones, 3, grid))


def test_windows_are_row_major_and_padded_at_the_bottom_and_right():
    x = torch.arange(1.0, 7.0).view(1, 6, 1, 1)
    windows = window_partition(x, torch.full((1, 1), 9.0), 2, (2, 3))[:, 0, :, 0]
    assert windows.tolist() == [[1, 2, 4, 5], [3, 9, 6, 9]]


def test_padding_is_converted_to_the_type_of_the_map():
    x = torch.zeros(1, 2, 1, 1, dtype=torch.bfloat16)
    windows = window_partition(x, torch.ones(1, 1), 2, (1, 2))
    assert windows.dtype == torch.bfloat16
    assert windows.flatten().tolist() == [0, 0, 1, 1]


@on_each_grid
def test_window_operators_keep_their_contracts(grid):
    x = torch.randn(2, grid[0] * grid[1], 2, 5, requires_grad=True)
    pad = torch.randn(2, 5, requires_grad=True)
    # Everything but compilation, which tests/modeling/test_compile.py covers.
    contract = ("test_schema", "test_autograd_registration", "test_faketensor")
    operators = torch.ops.crossmae_det
    opcheck(operators.window_partition, (x, pad, 3, *grid), test_utils=contract)
    windows = window_partition(x, pad, 3, grid).detach().requires_grad_()
    opcheck(operators.window_unpartition, (windows, 3, *grid), test_utils=contract)


def test_windows_are_those_of_detectron2():
    utils = pytest.importorskip("detectron2.modeling.backbone.utils")
    x = torch.randn(2, 5, 7, 4)
    expected, _ = utils.window_partition(x, 3)
    got = window_partition(x.flatten(1, 2).unflatten(2, (2, 2)), torch.zeros(2, 2), 3, (5, 7))
    assert torch.equal(got.transpose(1, 2).flatten(2), expected.flatten(1, 2))

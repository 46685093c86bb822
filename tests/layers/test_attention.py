import pytest
import torch

from crossmae_det.layers.attention import Attention, CrossAttention
from crossmae_det.layers.attention_backends import axis_scores, full_bias, pairwise_table


def naive_attention(attention, x, grid):
    """The definition, with the scores of every pair in memory."""
    n, length, channels = x.shape
    heads = attention.num_heads
    qkv = attention.qkv(x).view(n, length, 3, heads, channels // heads)
    q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
    scores = q @ k.transpose(-1, -2) / (channels // heads) ** 0.5
    if grid is not None and attention.use_rel_pos:
        pairs_h = pairwise_table(attention.rel_pos_h, grid[0])
        pairs_w = pairwise_table(attention.rel_pos_w, grid[1])
        scores = scores + full_bias(*axis_scores(q, pairs_h, pairs_w, grid))
    out = scores.softmax(-1) @ v
    return attention.proj(out.transpose(1, 2).reshape(n, length, channels))


def naive_windows(attention, x, grid, size):
    """Zeros around the map, every window by itself, and the zeros cut away again."""
    (height, width), channels = grid, x.shape[-1]
    padded = x.new_zeros(len(x), height + size, width + size, channels)
    padded[:, :height, :width] = x.unflatten(1, grid)
    y = torch.zeros_like(padded)
    for top in range(0, height, size):
        for left in range(0, width, size):
            place = (slice(None), slice(top, top + size), slice(left, left + size))
            window = naive_attention(attention, padded[place].flatten(1, 2), (size, size))
            y[place] = window.unflatten(1, (size, size))
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
    with pytest.raises(ValueError, match="width 10 is not divisible by 3"):
        Attention(10, 3)


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


def test_heads_must_divide_the_width_of_the_queries():
    with pytest.raises(ValueError, match="width 10 is not divisible by 3"):
        CrossAttention(10, 9, 3)

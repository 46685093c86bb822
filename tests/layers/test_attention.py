import pytest
import torch

from crossmae_det.layers.attention import Attention, CrossAttention
from crossmae_det.layers.relative_position import decomposed_bias


def naive_attention(attention, x, grid):
    """The definition, with the scores of every pair in memory."""
    n, length, channels = x.shape
    heads = attention.num_heads
    qkv = attention.qkv(x).view(n, length, 3, heads, channels // heads)
    q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
    scores = q @ k.transpose(-1, -2) / (channels // heads) ** 0.5
    if grid is not None and attention.use_rel_pos:
        scores = scores + decomposed_bias(q, attention.rel_pos_h, attention.rel_pos_w, grid)
    out = scores.softmax(-1) @ v
    return attention.proj(out.transpose(1, 2).reshape(n, length, channels))


@pytest.mark.parametrize("table_size", [None, (3, 4), (5, 5)])
@pytest.mark.parametrize("grid", [None, (3, 4)])
def test_equals_the_definition_in_values_and_gradients(table_size, grid):
    torch.manual_seed(0)
    attention = Attention(12, 3, table_size)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 12, 12)
    y, expected = attention(x, grid), naive_attention(attention, x, grid)
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    parameters = list(attention.parameters())
    got = torch.autograd.grad((y * weight).sum(), parameters, allow_unused=True)
    want = torch.autograd.grad((expected * weight).sum(), parameters, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


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

import pytest
import torch

from crossmae_det.layers.attention_backends import (
    axis_scores,
    full_bias,
    pairwise_table,
    resample_table,
)


def decomposed_bias(q, table_h, table_w, grid):
    pairs = pairwise_table(table_h, grid[0]), pairwise_table(table_w, grid[1])
    return full_bias(*axis_scores(q, *pairs, grid))


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
    bias = decomposed_bias(*inputs, grid)
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
    q, table = torch.randn(1, 1, 4, 8), torch.randn(3, 8)
    pairs = pairwise_table(table, 2)
    with torch.autocast("cpu", torch.bfloat16):
        parts = axis_scores(q.bfloat16(), pairs, pairs, (2, 2))
        assert all(part.dtype == torch.bfloat16 for part in parts)
        assert all(part.dtype == q.dtype for part in axis_scores(q, pairs, pairs, (2, 2)))


def test_pairwise_table_is_indexed_by_query_minus_key():
    table = torch.arange(5.0)[:, None]
    assert pairwise_table(table, 3)[..., 0].tolist() == [[2, 1, 0], [3, 2, 1], [4, 3, 2]]

import math

import pytest
import torch
import torch.nn.functional as F

from crossmae_det.layers.position_embedding import (
    resample_position_embedding,
    sincos_position_embedding,
)


def test_sincos_table_by_its_formula():
    table = sincos_position_embedding(8, (2, 3))
    assert table.shape == (1, 7, 8)
    assert not table[0, 0].any()
    y, x = 1, 2
    expected = [
        function(position * frequency)
        for position in (x, y)
        for function in (math.sin, math.cos)
        for frequency in (1.0, 10000 ** (-1 / 2))
    ]
    torch.testing.assert_close(table[0, 1 + y * 3 + x], torch.tensor(expected))


def test_width_must_be_a_multiple_of_four():
    with pytest.raises(ValueError, match="divisible by 4, got 6"):
        sincos_position_embedding(6, (2, 2))


def test_resampling_is_bicubic_and_leaves_the_class_row():
    torch.manual_seed(0)
    embedding = torch.randn(1, 1 + 3 * 4, 5)
    resampled = resample_position_embedding(embedding, (3, 4), (5, 2))
    grid = embedding[:, 1:].view(1, 3, 4, 5).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(5, 2), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(resampled[:, 1:], expected)
    assert torch.equal(resampled[:, :1], embedding[:, :1])


def test_the_same_grid_changes_nothing():
    embedding = torch.randn(1, 13, 5)
    assert torch.equal(resample_position_embedding(embedding, (3, 4), (3, 4)), embedding)

import pytest
import torch

from crossmae_det.layers.windows import window_partition, window_unpartition


@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (1, 2)])
def test_round_trip_gives_the_map_back(grid):
    x = torch.randn(2, *grid, 3)
    windows = window_partition(x, 2)
    rows, columns = -(-grid[0] // 2), -(-grid[1] // 2)
    assert windows.shape == (2 * rows * columns, 4, 3)
    assert torch.equal(window_unpartition(windows, 2, grid), x)


def test_windows_are_row_major_and_padded_with_zeros():
    x = torch.arange(1.0, 7.0).view(1, 2, 3, 1)
    windows = window_partition(x, 2)[..., 0]
    assert windows.tolist() == [[1, 2, 4, 5], [3, 0, 6, 0]]

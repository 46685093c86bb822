import pytest
import torch
from torch.library import opcheck

from crossmae_det.layers import attention as module
from crossmae_det.layers.attention import window_partition, window_unpartition

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    ),
]
# All that does not compile: tests/modeling/test_compile.py does.
CONTRACT = ("test_schema", "test_autograd_registration", "test_faketensor")
on_each_device = pytest.mark.parametrize("device", DEVICES)
# Windows of 3 divide the first, one side of the next two, neither side of the last two; the last
# is smaller than a window.
on_each_grid = pytest.mark.parametrize("grid", [(3, 6), (6, 4), (4, 6), (5, 7), (1, 2)])


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
def test_the_operators_keep_their_contracts(grid):
    x = torch.randn(2, grid[0] * grid[1], 2, 5, requires_grad=True)
    pad = torch.randn(2, 5, requires_grad=True)
    opcheck(module._partition, (x, pad, 3, *grid), test_utils=CONTRACT)
    windows = window_partition(x, pad, 3, grid).detach().requires_grad_()
    opcheck(module._unpartition, (windows, 3, *grid), test_utils=CONTRACT)


def test_it_is_detectron2s_partition():
    """There a map is padded with zeros, as is one whose padding is zero here."""
    utils = pytest.importorskip("detectron2.modeling.backbone.utils")
    x = torch.randn(2, 5, 7, 4)
    theirs, _ = utils.window_partition(x, 3)
    ours = window_partition(x.flatten(1, 2).unflatten(2, (2, 2)), torch.zeros(2, 2), 3, (5, 7))
    assert torch.equal(ours.transpose(1, 2).flatten(2), theirs.flatten(1, 2))

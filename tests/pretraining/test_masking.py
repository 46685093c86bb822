import pytest
import torch

from crossmae_det.pretraining.masked_image_model import count_patches, mask_patches

RATIOS = [(mask / 20, part / 20) for mask in range(1, 20) for part in range(1, mask + 1)]


@pytest.mark.parametrize("length", [1, 2, 7, 16, 49, 196, 784])
def test_counts_round_as_published_and_add_up(length):
    tried = 0
    for mask_ratio, prediction_ratio in RATIOS:
        visible = int(length * (1 - mask_ratio))
        ignored = int(length * (mask_ratio - prediction_ratio))
        if visible == 0:
            with pytest.raises(ValueError, match=f"none of {length} patches visible"):
                count_patches(length, mask_ratio, prediction_ratio)
            continue
        tried += 1
        counts = count_patches(length, mask_ratio, prediction_ratio)
        assert counts == (visible, length - visible - ignored, ignored)
        assert counts[1] > 0
    assert tried or length == 1


@pytest.mark.parametrize(
    ("ratios", "counts"),
    [
        # 224 / 16 = 14 patches a side: 196.
        ((196, 0.75, 0.75), (49, 147, 0)),
        ((196, 0.75, 0.25), (49, 49, 98)),
        ((196, 0.75, 0.5), (49, 98, 49)),
        # Just below 2 in floats: 20 * (1 - 0.9) is 1.9999999999999996.
        ((20, 0.9, 0.9), (1, 19, 0)),
        ((10, 0.7, 0.4), (3, 5, 2)),
    ],
)
def test_known_counts(ratios, counts):
    assert count_patches(*ratios) == counts


@pytest.mark.parametrize("length", [2, 7, 16, 49])
def test_indices_are_ascending_disjoint_and_complete(length):
    torch.manual_seed(0)
    tried = 0
    for mask_ratio, prediction_ratio in RATIOS:
        if int(length * (1 - mask_ratio)) == 0:
            continue
        tried += 1
        masking = mask_patches(torch.rand(3, length), mask_ratio, prediction_ratio)
        for indices in masking:
            assert (indices.diff(dim=1) > 0).all()
        together = torch.cat(masking, dim=1).sort(dim=1).values
        assert torch.equal(together, torch.arange(length).expand(3, -1))
    assert tried


def test_the_lowest_noise_is_visible_and_the_highest_predicted():
    noise = torch.tensor([[0.5, 0.1, 0.9, 0.3, 0.7, 0.2, 0.8, 0.4]])
    masking = mask_patches(noise, 0.75, 0.25)
    assert masking.visible.tolist() == [[1, 5]]
    assert masking.ignored.tolist() == [[0, 3, 4, 7]]
    assert masking.predicted.tolist() == [[2, 6]]


@pytest.mark.parametrize("mask_ratio", [-0.1, 0.0, 1.0, 1.5, float("nan")])
def test_mask_ratio_out_of_range(mask_ratio):
    with pytest.raises(ValueError, match="^mask_ratio must lie between 0 and 1.*got"):
        mask_patches(torch.rand(1, 16), mask_ratio, 0.25)


@pytest.mark.parametrize("prediction_ratio", [-0.1, 0.0, 0.76, float("nan")])
def test_prediction_ratio_out_of_range(prediction_ratio):
    with pytest.raises(ValueError, match="^prediction_ratio is a fraction of all patches.*got"):
        mask_patches(torch.rand(1, 16), 0.75, prediction_ratio)


def test_no_patch_left():
    with pytest.raises(ValueError, match="mask_ratio 0.75 leaves none of 3 patches visible"):
        mask_patches(torch.rand(1, 3), 0.75, 0.75)
    with pytest.raises(ValueError, match="leaves none of 4 patches predicted"):
        mask_patches(torch.rand(1, 4), 0.75, 1e-17)

import pytest
import torch

from crossmae_det.layers.patches import PatchEmbed, patchify, take_patches, unpatchify


def test_a_patch_lists_rows_columns_channels():
    images = torch.arange(2 * 4 * 6).view(1, 2, 4, 6).float()
    patches = patchify(images, (2, 3))
    assert patches.shape == (1, 4, 12)
    # Patch 3 is the one at the bottom right.
    expected = images[0, :, 2:4, 3:6].permute(1, 2, 0).flatten()
    assert torch.equal(patches[0, 3], expected)


def test_round_trip():
    images = torch.randn(2, 3, 8, 12)
    assert torch.equal(unpatchify(patchify(images, (4, 2)), (4, 2), (2, 6)), images)


def test_patches_must_divide_the_image():
    with pytest.raises(ValueError, match="8x9.*4x4"):
        patchify(torch.zeros(1, 3, 8, 9), (4, 4))


def test_embedding_the_visible_patches_is_a_selection_of_embedding_all():
    torch.manual_seed(0)
    embed = PatchEmbed((4, 2), in_chans=3, embed_dim=5)
    images = torch.randn(2, 3, 8, 8)
    visible = torch.tensor([[0, 3, 6], [7, 1, 2]])
    expected = torch.stack([embed(images)[n, visible[n]] for n in range(2)])
    got = embed.embed_visible(images, visible)
    torch.testing.assert_close(got, expected)
    weight = torch.randn_like(got)
    gradients = torch.autograd.grad((got * weight).sum(), embed.parameters())
    wanted = torch.autograd.grad((expected * weight).sum(), embed.parameters())
    torch.testing.assert_close(gradients, wanted)


def test_chosen_patches_are_those_of_patchify_and_the_others_are_not_read():
    images = torch.randn(2, 3, 8, 12)
    indices = torch.tensor([[0, 5, 3], [4, 4, 1]])
    expected = torch.stack([patchify(images, (4, 3))[n, indices[n]] for n in range(2)])
    assert torch.equal(take_patches(images, indices, (4, 3)), expected)
    images[0, :, :4, 3:6] = float("nan")  # patch 1 of the first image
    assert torch.equal(take_patches(images, indices, (4, 3)), expected)

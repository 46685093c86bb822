import pytest
import torch

from crossmae_det.modeling import SIZES, ViT
from crossmae_det.modeling.vit import spread_global_blocks

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}


def make(**overrides):
    torch.manual_seed(0)
    return ViT(**(TINY | overrides)).eval()


def test_token_path_gives_the_input_and_every_output_class_token_first():
    vit = make()
    images = torch.randn(2, 3, 32, 32)
    features = vit.forward_tokens(images)
    assert [tuple(f.shape) for f in features] == [(2, 17, 16)] * 5
    first = vit.patch_embed(images) + vit.pos_embed[:, 1:]
    torch.testing.assert_close(features[0][:, 1:], first)
    torch.testing.assert_close(features[0][0, 0], vit.cls_token[0, 0] + vit.pos_embed[0, 0])
    torch.testing.assert_close(features[-1], vit.blocks[3](features[-2]))


def test_visible_patches_are_encoded_without_the_others():
    vit = make()
    images = torch.randn(2, 3, 32, 32)
    visible = torch.tensor([[0, 5, 9], [2, 3, 15]])
    features = vit.forward_tokens(images, visible)
    assert features[-1].shape == (2, 4, 16)
    all_tokens = vit.forward_tokens(images)[0]
    for n in range(2):
        torch.testing.assert_close(features[0][n, 1:], all_tokens[n, 1 + visible[n]])
    hidden = images.clone()
    hidden[0, :, 8:16, 16:24] = 7.0  # patch 6 of the first image
    assert torch.equal(vit.forward_tokens(hidden, visible)[-1], features[-1])


def test_token_path_ignores_windows_and_relative_position():
    plain, windowed = make(), make(window_size=2, use_rel_pos=True)
    windowed.load_state_dict(plain.state_dict(), strict=False)
    for block in windowed.blocks:
        torch.nn.init.normal_(block.attn.rel_pos_h)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(windowed.forward_tokens(images)[-1], plain.forward_tokens(images)[-1])
    assert not torch.equal(windowed.forward_map(images), plain.forward_map(images))


def test_map_path_without_windows_is_the_token_path_without_the_class_token():
    vit = make()
    images = torch.randn(2, 3, 16, 40)  # another grid, not square
    x = vit.forward_map(images)
    assert x.shape == (2, 16, 2, 5)
    grid = vit.pos_embed[:, 1:].view(1, 4, 4, 16).permute(0, 3, 1, 2)
    position = torch.nn.functional.interpolate(grid, size=(2, 5), mode="bicubic")
    tokens = vit.patch_embed(images) + position.flatten(2).transpose(1, 2)
    for block in vit.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(x, tokens.transpose(1, 2).view(2, 16, 2, 5))


def test_an_image_that_the_patch_does_not_divide_is_padded_at_the_bottom_and_right():
    vit = make(window_size=3, use_rel_pos=True)
    images = torch.randn(1, 3, 19, 30)
    padded = torch.zeros(1, 3, 24, 32)
    padded[..., :19, :30] = images
    assert torch.equal(vit.forward_map(images), vit.forward_map(padded))


def test_an_image_smaller_than_a_patch_is_rejected():
    with pytest.raises(ValueError, match="5x300.*8x8"):
        make().forward_map(torch.zeros(1, 3, 5, 300))


def test_windows_confine_the_attention():
    vit = make(window_size=2, global_blocks=[])
    images = torch.randn(1, 3, 32, 32)
    changed = images.clone()
    changed[..., :16, :16] += 1.0  # the first window
    difference = (vit.forward_map(images) - vit.forward_map(changed)).abs().amax(1)[0]
    assert (difference[:2, :2] > 0).all()
    assert not difference[2:].any() and not difference[:, 2:].any()


def test_activation_checkpointing_gives_the_same_gradients():
    images = torch.randn(1, 3, 32, 32)
    gradients = []
    for use_act_checkpoint in (False, True):
        vit = make(use_act_checkpoint=use_act_checkpoint, window_size=2, use_rel_pos=True).train()
        vit.forward_map(images).square().sum().backward()
        gradients.append([p.grad for p in vit.parameters() if p.grad is not None])
    assert len(gradients[0]) > 30
    torch.testing.assert_close(*gradients)


def test_frozen_blocks_get_no_gradient_and_no_stochastic_depth():
    vit = make(freeze_blocks=2, drop_path_rate=0.5).train()
    vit.forward_tokens(torch.randn(1, 3, 32, 32))[-1].sum().backward()
    frozen = {name for name, p in vit.named_parameters() if p.grad is None}
    expected = {
        name
        for name, _ in vit.named_parameters()
        if name.startswith(("patch_embed", "pos_embed", "blocks.0.", "blocks.1."))
    }
    assert frozen == expected
    assert [block.training for block in vit.blocks] == [False, False, True, True]


def test_stochastic_depth_grows_linearly_and_is_off_in_evaluation():
    vit = make(drop_path_rate=0.3)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in vit.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(vit.forward_map(images), make().forward_map(images))


def test_the_position_embedding_may_be_made_for_another_size_than_the_tables():
    vit = make(img_size=64, pretrain_img_size=(32, 16), use_rel_pos=True)
    assert vit.pos_embed.shape == (1, 1 + 4 * 2, 16)
    assert vit.blocks[0].attn.rel_pos_h.shape == (15, 8)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"freeze_blocks": 5}, r"freeze_blocks .*4.*5"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"window_size": 2, "global_blocks": [4]}, "global block 4"),
        ({"num_heads": 3}, r"16 .* 3 "),
    ],
)
def test_arguments_out_of_range_are_rejected(overrides, message):
    with pytest.raises(ValueError, match=message):
        make(**overrides)


def test_token_path_needs_a_class_token_and_whole_patches():
    with pytest.raises(ValueError, match="class_token=True"):
        make(class_token=False).forward_tokens(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="30x32.*8x8"):
        make().forward_tokens(torch.zeros(1, 3, 30, 32))


def test_global_blocks_are_those_of_vitdet():
    assert spread_global_blocks(12) == [2, 5, 8, 11]
    assert SIZES["large"].global_blocks == [5, 11, 17, 23]
    assert SIZES["huge"].global_blocks == [7, 15, 23, 31]
    assert spread_global_blocks(2) == [0, 1]


# Published sizes: ViT-S/B/L/H have 21.7, 85.8, 303.3 and 630.8 million parameters in patch
# embedding, class token, position embedding and blocks.
@pytest.mark.parametrize(
    ("size", "millions"),
    [("tiny", 5.5), ("small", 21.7), ("base", 85.8), ("large", 303.3), ("huge", 630.8)],
)
def test_sizes_have_the_published_number_of_parameters(size, millions):
    s = SIZES[size]
    with torch.device("meta"):
        vit = ViT(224, s.patch_size, s.embed_dim, s.depth, s.num_heads)
    assert sum(p.numel() for p in vit.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa", "folded", "chunked"])
@pytest.mark.parametrize("window_size", [0, 3])
def test_a_map_of_no_images_is_computed_and_every_parameter_gets_a_gradient(backend, window_size):
    vit = ViT(
        *(32, 8, 16, 2, 2),
        class_token=False,
        window_size=window_size,
        global_blocks=[1] if window_size else None,
        use_rel_pos=True,
        attention_backend=backend,
    )
    features = vit.forward_map(torch.zeros(0, 3, 40, 24))
    assert features.shape == (0, 16, 5, 3)
    features.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in vit.parameters())

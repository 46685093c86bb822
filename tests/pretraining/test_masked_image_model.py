"""CrossMAE and MAE against a naive reference: one image, one head, one query at a time."""

import dataclasses
import math

import pytest
import torch
from timm.optim import param_groups_weight_decay

from crossmae_det.layers.position_embedding import resample_position_embedding
from crossmae_det.modeling import ViT
from crossmae_det.pretraining import MAE, CrossMAE
from crossmae_det.pretraining.masked_image_model import count_patches, mask_patches

DEPTH = 3


def make_model(kind, *, img_size=(16, 24), patch_size=4, **options):
    """A tiny model, every parameter random: zeros would hide what they multiply."""
    torch.manual_seed(0)
    encoder = ViT(img_size, patch_size, embed_dim=12, depth=DEPTH, num_heads=3)
    model = kind(encoder, decoder_dim=8, decoder_depth=2, decoder_num_heads=2, **options)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def linear(x, layer):
    return x @ layer.weight.T + layer.bias


def layer_norm(x, norm):
    centered = x - x.mean(-1, keepdim=True)
    variance = (centered**2).mean(-1, keepdim=True)
    return centered / (variance + 1e-6).sqrt() * norm.weight + norm.bias


def mlp(x, layer):
    hidden = linear(x, layer.fc1)
    return linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), layer.fc2)


def attend(query, keys, values, heads):
    """One query (C,) to keys and values (K, C)."""
    size = len(query) // heads
    result = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        weights = (keys[:, part] @ query[part] / size**0.5).softmax(0)
        result.append(weights @ values[:, part])
    return torch.cat(result)


def self_attention(x, layer):
    q, k, v = linear(x, layer.qkv).chunk(3, dim=1)
    return linear(torch.stack([attend(row, k, v, layer.num_heads) for row in q]), layer.proj)


def cross_attention(x, memory, layer):
    k, v = linear(memory, layer.kv).chunk(2, dim=1)
    rows = [attend(linear(row, layer.q), k, v, layer.num_heads) for row in x]
    return linear(torch.stack(rows), layer.proj)


def naive_cross_decoder(decoder, features, indices, positions, predicted):
    x = torch.stack([decoder.mask_token[0, 0] + positions[1 + index] for index in predicted])
    for row, (block, norm) in enumerate(zip(decoder.blocks, decoder.feature_norms, strict=True)):
        memory = 0
        for column, index in enumerate(indices):
            memory = memory + decoder.feature_weights[row, column] * features[index]
        if block.self_attention:
            x = x + self_attention(layer_norm(x, block.self_norm), block.self_attn)
        memory = layer_norm(memory, norm)
        x = x + cross_attention(layer_norm(x, block.norm1), memory, block.cross_attn)
        x = x + mlp(layer_norm(x, block.norm2), block.mlp)
    return linear(layer_norm(x, decoder.norm), decoder.pred)


def naive_mae_decoder(decoder, features, positions, visible, predicted):
    encoded = linear(layer_norm(features[-1], decoder.encoder_norm), decoder.embed)
    rows = [encoded[0] + positions[0]]
    for index in range(len(positions) - 1):
        seen = index in visible
        token = encoded[1 + visible.index(index)] if seen else decoder.mask_token[0, 0]
        rows.append(token + positions[1 + index])
    x = torch.stack(rows)
    for block in decoder.blocks:
        x = x + self_attention(layer_norm(x, block.norm1), block.attn)
        x = x + mlp(layer_norm(x, block.norm2), block.mlp)
    pixels = linear(layer_norm(x, decoder.norm), decoder.pred)
    return torch.stack([pixels[1 + index] for index in predicted])


def naive_targets(image, patch_size, columns, predicted, normalized):
    height, width = patch_size
    targets = []
    for index in predicted:
        row, column = index // columns * height, index % columns * width
        patch = image[:, row : row + height, column : column + width]
        values = patch.permute(1, 2, 0).flatten()
        if normalized:
            mean = values.sum() / len(values)
            variance = ((values - mean) ** 2).sum() / (len(values) - 1)
            values = (values - mean) / (variance + 1e-6).sqrt()
        targets.append(values)
    return torch.stack(targets)


def naive_predict(model, images, noise, mask_ratio, prediction_ratio, indices, normalized):
    patch_size, decoder = model.encoder.patch_size, model.decoder
    grid = images.shape[2] // patch_size[0], images.shape[3] // patch_size[1]
    length = grid[0] * grid[1]
    positions = resample_position_embedding(decoder.pos_embed, model.encoder.pos_grid, grid)[0]
    num_visible = int(length * (1 - mask_ratio))
    num_ignored = int(length * (mask_ratio - prediction_ratio))
    pred, target = [], []
    for image, row in zip(images, noise.tolist(), strict=True):
        order = sorted(range(length), key=row.__getitem__)
        visible = sorted(order[:num_visible])
        predicted = sorted(order[num_visible + num_ignored :])
        tokens = model.encoder.forward_tokens(image[None], torch.tensor([visible]))
        features = [feature[0] for feature in tokens]
        if isinstance(model, CrossMAE):
            pred.append(naive_cross_decoder(decoder, features, indices, positions, predicted))
        else:
            pred.append(naive_mae_decoder(decoder, features, positions, visible, predicted))
        target.append(naive_targets(image, patch_size, grid[1], predicted, normalized))
    return torch.stack(pred), torch.stack(target)


# What the decoder reads, for each way to say it: 0 is the input of the first block.
CROSSMAE = {
    "defaults": (dict(), [0, 1, 2, 3]),
    "a subset": (dict(feature_blocks=[0, 2]), [0, 1, 3]),
    "from the end": (dict(feature_blocks=[-1, -3]), [0, 1, 3]),
    "the last block alone": (dict(feature_blocks=[-1], use_input_feature=False), [3]),
    "no input": (dict(use_input_feature=False), [1, 2, 3]),
    "self-attention": (dict(decoder_self_attention=True), [0, 1, 2, 3]),
    "raw pixels": (dict(norm_pix_loss=False), [0, 1, 2, 3]),
    "every masked patch": (dict(prediction_ratio=0.75), [0, 1, 2, 3]),
    "other ratios": (dict(mask_ratio=0.6, prediction_ratio=0.35), [0, 1, 2, 3]),
    "patch of 8": (dict(patch_size=8, mask_ratio=0.5), [0, 1, 2, 3]),
    "patch of 4 x 6": (dict(patch_size=(4, 6)), [0, 1, 2, 3]),
    "made for another size": (dict(img_size=(24, 24)), [0, 1, 2, 3]),
}
MAES = {
    "defaults": dict(),
    "raw pixels": dict(norm_pix_loss=False),
    "other ratio": dict(mask_ratio=0.6),
    "patch of 4 x 6": dict(patch_size=(4, 6)),
    "made for another size": dict(img_size=(24, 24)),
}
CASES = {
    **{f"CrossMAE, {name}": (CrossMAE, *case) for name, case in CROSSMAE.items()},
    **{f"MAE, {name}": (MAE, options, None) for name, options in MAES.items()},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_naive_reference_in_values_and_gradients(case):
    kind, options, indices = CASES[case]
    model = make_model(kind, **options)
    images = torch.randn(2, 3, 16, 24)
    patch_h, patch_w = model.encoder.patch_size
    noise = torch.rand(2, 16 // patch_h * 24 // patch_w)
    mask_ratio = options.get("mask_ratio", 0.75)
    prediction_ratio = options.get("prediction_ratio", 0.25) if kind is CrossMAE else mask_ratio
    normalized = options.get("norm_pix_loss", True)
    pred, target = naive_predict(
        model, images, noise, mask_ratio, prediction_ratio, indices, normalized
    )
    result = model.predict(images, noise)
    torch.testing.assert_close(result.pred, pred, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.target, target)

    losses = model(images, noise)
    assert list(losses) == ["loss_reconstruction"]
    loss, expected = losses["loss_reconstruction"], ((pred - target) ** 2).mean()
    torch.testing.assert_close(loss, expected)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    got = torch.autograd.grad(loss, list(parameters.values()))
    want = torch.autograd.grad(expected, list(parameters.values()))
    for name, a, b in zip(parameters, got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", [CrossMAE, MAE])
def test_the_indices_of_a_reconstruction_say_what_was_seen_and_predicted(kind):
    model = make_model(kind)
    noise = torch.rand(2, 24)
    result = model.predict(torch.randn(2, 3, 16, 24), noise)
    ranks = noise.argsort(dim=1).argsort(dim=1)
    assert result.visible.shape == (2, 6)
    assert (ranks.gather(1, result.visible) < 6).all()
    first = 6 if kind is MAE else 18
    assert result.predicted.shape == (2, 24 - first)
    assert (ranks.gather(1, result.predicted) >= first).all()
    for indices in (result.visible, result.predicted):
        assert (indices.diff(dim=1) > 0).all()


@pytest.mark.parametrize("kind", [CrossMAE, MAE])
def test_predictions_do_not_depend_on_invisible_patches(kind):
    model = make_model(kind)
    images, noise = torch.randn(1, 3, 16, 24), torch.rand(1, 24)
    expected = model.predict(images, noise)
    hidden = torch.ones(24, dtype=torch.bool)
    hidden[expected.visible[0]] = False
    pixels = hidden.view(4, 6).repeat_interleave(4, 0).repeat_interleave(4, 1)
    spoilt = images.masked_fill(pixels, float("nan"))
    result = model.predict(spoilt, noise)
    assert torch.equal(result.pred, expected.pred)
    assert result.target.isnan().all()


@pytest.mark.parametrize("kind", [CrossMAE, MAE])
def test_the_state_dict_is_the_encoder_and_a_decoder(kind):
    model = make_model(kind)
    assert {name.partition(".")[0] for name in model.state_dict()} == {"encoder", "decoder"}
    encoder = ViT((16, 24), 4, embed_dim=12, depth=DEPTH, num_heads=3)
    names = {name for name in model.state_dict() if name.startswith("encoder.")}
    assert names == {f"encoder.{name}" for name in encoder.state_dict()}


@pytest.mark.parametrize("kind", [CrossMAE, MAE])
def test_only_the_position_tables_are_fixed(kind):
    model = make_model(kind)
    fixed = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert fixed == ["encoder.pos_embed"]
    buffers = [name for name, _ in model.named_buffers()]
    assert buffers == ["pixel_mean", "pixel_std", "decoder.pos_embed"]


@pytest.mark.parametrize("kind", [CrossMAE, MAE])
def test_without_noise_every_masking_is_different(kind):
    model = make_model(kind)
    images = torch.randn(2, 3, 16, 24)
    first, second = (model.predict(images).visible for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("kind", [CrossMAE, MAE])
def test_mixed_precision_gives_a_loss_in_float32(kind):
    model = make_model(kind)
    images, noise = torch.randn(2, 3, 16, 24), torch.rand(2, 24)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images, noise)["loss_reconstruction"]
    assert loss.dtype == torch.float32
    loss.backward()
    expected = model(images, noise)["loss_reconstruction"]
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)


def test_ratios_may_be_set_later():
    model = make_model(CrossMAE)
    images, noise = torch.randn(2, 3, 16, 24), torch.rand(2, 24)
    some = model.predict(images, noise)
    model.prediction_ratio = model.mask_ratio
    every = model.predict(images, noise)
    assert every.pred.shape[1] == 18
    for n in range(2):
        at = torch.searchsorted(every.predicted[n], some.predicted[n])
        assert torch.equal(every.predicted[n, at], some.predicted[n])
        torch.testing.assert_close(every.pred[n, at], some.pred[n])


@pytest.mark.parametrize("kind", [CrossMAE, MAE])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(decoder_dim=20, decoder_num_heads=3), "decoder_dim 20 .* 3 "),
        (dict(decoder_num_heads=0), "decoder_dim .* 0 "),
        (dict(decoder_dim=6, decoder_num_heads=2), "4.* 6"),
        (dict(decoder_depth=0), "decoder_depth .*0"),
        (dict(mask_ratio=1.0), "mask_ratio"),
    ],
)
def test_bad_options(kind, options, message):
    with pytest.raises(ValueError, match=message) as error:
        kind(ViT(16, 8, embed_dim=12, depth=1, num_heads=3), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [CrossMAE, MAE])
def test_bad_input(kind):
    model = make_model(kind)
    with pytest.raises(ValueError, match="16x22.*4x4"):
        model(torch.randn(1, 3, 16, 22))
    with pytest.raises(ValueError, match=r"noise .*\(2, 24\).*\(1, 24\)"):
        model(torch.randn(1, 3, 16, 24), torch.rand(2, 24))
    with pytest.raises(ValueError, match="mask_ratio 0.75 .* 1 patch"):
        model(torch.randn(1, 3, 4, 4))


@pytest.mark.parametrize("kind", [CrossMAE, MAE])
def test_an_encoder_without_a_class_token_is_rejected(kind):
    with pytest.raises(ValueError, match="class_token=True"):
        kind(ViT(16, 8, embed_dim=12, depth=1, num_heads=3, class_token=False))


@pytest.mark.parametrize("kind", [CrossMAE, MAE])
def test_bytes_are_normalized_and_floats_are_not(kind):
    model = make_model(kind)
    images = torch.randint(256, (2, 3, 16, 24), dtype=torch.uint8)
    noise = torch.rand(2, 24)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    usual = torch.stack(
        [(images[:, i] / 255 - mean[i]) / std[i] for i in range(3)],  # torchvision's, on 0 to 1
        dim=1,
    )
    torch.testing.assert_close(model.normalize(images), usual, atol=1e-5, rtol=1e-5)
    assert model.normalize(usual) is usual
    expected = model.predict(usual, noise)
    result = model.predict(images, noise)
    torch.testing.assert_close(result.pred, expected.pred, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(result.target, expected.target, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("kind", [CrossMAE, MAE])
def test_a_reconstruction_shows_every_patch_that_is_masked(kind, normalized):
    model = make_model(kind, norm_pix_loss=normalized).eval()
    images = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    noise = model.fixed_noise(images, seed=1)
    assert torch.equal(noise, model.fixed_noise(images, seed=1))
    assert not torch.equal(noise, model.fixed_noise(images, seed=2))
    panels = model.reconstruct(images, noise)
    assert torch.equal(panels.original, images)
    mean_color = model.denormalize(torch.zeros(1, 3, 1, 1))
    visible = (panels.masked != mean_color).any(1, keepdim=True)
    # 6 of 24 patches of 16 pixels are visible; a random pixel is seldom of the mean color.
    assert visible.sum() == 2 * 6 * 16
    assert torch.equal(panels.masked, torch.where(visible, images, mean_color))
    assert torch.equal(panels.pasted, torch.where(visible, images, panels.predicted))
    assert torch.equal(panels.predicted, torch.where(visible, mean_color, panels.predicted))

    # The prediction itself, by the definition of a target.
    result = model.predict(images, noise, prediction_ratio=0.75)
    assert result.predicted.shape == (2, 18)
    values = result.pred[1, 5]
    row, column = divmod(result.predicted[1, 5].item(), 6)
    cell = (1, slice(None), slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
    if normalized:
        pixels = model.normalize(images)[cell]
        values = values * (pixels.var() + 1e-6).sqrt() + pixels.mean()
    expected = model.denormalize(values.view(4, 4, 3).permute(2, 0, 1)[None])[0]
    assert torch.equal(panels.predicted[cell], expected)
    error = (panels.pasted.double() - images.double()).square().sum(dim=(1, 2, 3)) / (3 * 18 * 16)
    torch.testing.assert_close(panels.psnr.double(), 10 * torch.log10(255**2 / error))
    assert panels.loss == pytest.approx(((result.pred - result.target) ** 2).mean().item())


@pytest.mark.parametrize("kind", [CrossMAE, MAE])
def test_a_feature_is_the_mean_of_the_last_patch_tokens(kind):
    model = make_model(kind)
    images = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    tokens = model.encoder.forward_tokens(model.normalize(images))[-1]
    expected = torch.stack([sum(image[1:]) / 24 for image in tokens])
    torch.testing.assert_close(model.features(images), expected)


@pytest.mark.parametrize("normalized", [True, False])
def test_a_perfect_prediction_reconstructs_the_image(monkeypatch, normalized):
    model = make_model(CrossMAE, norm_pix_loss=normalized).eval()
    images = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    predict = model.predict

    def perfect(*args, **options):
        result = predict(*args, **options)
        return dataclasses.replace(result, pred=result.target)

    monkeypatch.setattr(model, "predict", perfect)
    panels = model.reconstruct(images)
    assert torch.equal(panels.pasted, images)
    assert panels.psnr.tolist() == [math.inf, math.inf] and panels.loss == 0


def test_a_reconstruction_under_autocast_is_close():
    model = make_model(MAE).eval()
    images = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    noise = model.fixed_noise(images)
    with torch.autocast("cpu", torch.bfloat16):
        panels = model.reconstruct(images, noise)
    difference = panels.pasted.float() - model.reconstruct(images, noise).pasted.float()
    assert difference.abs().mean() < 2


def test_a_patch_of_one_color_has_a_finite_target():
    target = make_model(CrossMAE).predict(torch.full((1, 3, 16, 24), 0.25)).target
    assert not target.any()


@pytest.mark.parametrize("kind", [CrossMAE, MAE])
def test_biases_and_norms_are_not_decayed(kind):
    model = make_model(kind)
    # As configs/common/pretraining.py has it.
    groups = param_groups_weight_decay(model, 0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {names.pop(id(p)): group["weight_decay"] for group in groups for p in group["params"]}
    assert set(names.values()) == {"encoder.pos_embed"}  # fixed
    assert decay == {
        name: 0.0 if name.endswith(".bias") or "norm" in name else 0.05 for name in decay
    }
    assert decay["encoder.cls_token"] == decay["decoder.mask_token"] == 0.05


RATIOS = [(mask / 20, part / 20) for mask in range(1, 20) for part in range(1, mask + 1)]


@pytest.mark.parametrize("length", [1, 2, 7, 16, 49, 196, 784])
def test_counts_round_as_published_and_add_up(length):
    tried = 0
    for mask_ratio, prediction_ratio in RATIOS:
        visible = int(length * (1 - mask_ratio))
        ignored = int(length * (mask_ratio - prediction_ratio))
        if visible == 0:
            with pytest.raises(ValueError, match=f"mask_ratio .* {length} patches"):
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
    with pytest.raises(ValueError, match="^mask_ratio"):
        mask_patches(torch.rand(1, 16), mask_ratio, 0.25)


@pytest.mark.parametrize("prediction_ratio", [-0.1, 0.0, 0.76, float("nan")])
def test_prediction_ratio_out_of_range(prediction_ratio):
    with pytest.raises(ValueError, match="^prediction_ratio"):
        mask_patches(torch.rand(1, 16), 0.75, prediction_ratio)


def test_no_patch_left():
    with pytest.raises(ValueError, match="mask_ratio 0.75 .* 3 patches"):
        mask_patches(torch.rand(1, 3), 0.75, 0.75)
    with pytest.raises(ValueError, match="prediction_ratio .* 4 patches"):
        mask_patches(torch.rand(1, 4), 0.75, 1e-17)

"""CrossMAE and MAE against a naive reference: one image, one head, one query at a time."""

import math

import pytest
import torch

from crossmae_det.layers.position_embedding import resample_position_embedding
from crossmae_det.modeling import ViT
from crossmae_det.pretraining import MAE, CrossMAE

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
    num_unseen = int(length * (mask_ratio - prediction_ratio))
    pred, target = [], []
    for image, row in zip(images, noise.tolist(), strict=True):
        order = sorted(range(length), key=row.__getitem__)
        visible = sorted(order[:num_visible])
        predicted = sorted(order[num_visible + num_unseen :])
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
def test_nothing_of_an_invisible_patch_reaches_a_prediction(kind):
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
    rooms = {name.partition(".")[0] for name in model.state_dict()}
    assert rooms == {"encoder", "decoder"}
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
def test_without_noise_every_masking_is_another(kind):
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
        (dict(decoder_dim=20, decoder_num_heads=3), "decoder_dim 20 is not divisible by 3"),
        (dict(decoder_num_heads=0), "not divisible by 0 attention heads"),
        (dict(decoder_dim=6, decoder_num_heads=2), "divisible by 4, got 6"),
        (dict(decoder_depth=0), "decoder_depth must be at least 1, got 0"),
        (dict(mask_ratio=1.0), "mask_ratio must lie between 0 and 1"),
    ],
)
def test_bad_options(kind, options, message):
    with pytest.raises(ValueError, match=message) as error:
        kind(ViT(16, 8, embed_dim=12, depth=1, num_heads=3), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [CrossMAE, MAE])
def test_bad_input(kind):
    model = make_model(kind)
    with pytest.raises(ValueError, match="16x22 pixels is not divisible into 4x4 patches"):
        model(torch.randn(1, 3, 16, 22))
    with pytest.raises(ValueError, match=r"noise is \(2, 24\) where the images have \(1, 24\)"):
        model(torch.randn(1, 3, 16, 24), torch.rand(2, 24))
    with pytest.raises(ValueError, match="leaves none of 1 patches visible"):
        model(torch.randn(1, 3, 4, 4))


@pytest.mark.parametrize("kind", [CrossMAE, MAE])
def test_a_encoder_without_a_class_token_is_refused(kind):
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
    # The constants are no weights: checkpoints do not have them.
    assert not [
        name for name in model.state_dict() if not name.startswith(("encoder.", "decoder."))
    ]


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

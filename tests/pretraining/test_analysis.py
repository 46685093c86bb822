"""What decoders attend to, against loops over images, heads, queries, keys, tokens and channels."""

import json

import pytest
import torch

from crossmae_det.modeling import ViT
from crossmae_det.pretraining import MAE, CrossMAE, analysis
from crossmae_det.pretraining.analysis import (
    PAPER_KEYS,
    PAPER_NUM_HEADS,
    PAPER_PER_KEY,
    DecoderAttention,
    decoder_attention,
    feature_usage,
)

# A grid of 4 x 6 patches, of which 6 are visible.
LENGTH, VISIBLE = 24, 6
DEPTH = 3


def make_model(kind, **options):
    """A tiny model, every parameter large and random: attention that is far from uniform."""
    torch.manual_seed(0)
    encoder = ViT((16, 24), 4, embed_dim=12, depth=DEPTH, num_heads=3)
    model = kind(encoder, decoder_dim=8, decoder_depth=2, decoder_num_heads=2, **options)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.fixture
def images():
    return torch.randn(3, 3, 16, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def noise():
    return torch.rand(3, LENGTH, generator=torch.Generator().manual_seed(2))


def visible_patches(noise):
    order = sorted(range(LENGTH), key=noise.tolist().__getitem__)
    return sorted(order[:VISIBLE])


def decoder_tokens(model, image, visible):
    """The input of each decoder block for one image: (T, C) tensors."""
    decoder = model.decoder
    encoded = model.encoder.forward_tokens(image[None], torch.tensor([visible]))[-1]
    encoded = decoder.embed(decoder.encoder_norm(encoded))[0]
    tokens = [encoded[0]] + [decoder.mask_token[0, 0]] * LENGTH
    for index, patch in enumerate(visible):
        tokens[1 + patch] = encoded[1 + index]
    x = torch.stack(tokens) + decoder.positions((4, 6))[0]
    for block in decoder.blocks:
        yield x
        x = block(x[None])[0]


def naive_weights(block, x, visible):
    """(head, mask token, attention to each of the 1 + LENGTH tokens) of one image."""
    heads, dim = block.attn.num_heads, x.shape[1]
    size = dim // heads
    qkv = block.attn.qkv(block.norm1(x))
    for head in range(heads):
        for query in range(1, 1 + LENGTH):
            if query - 1 in visible:
                continue
            q = qkv[query, head * size : (head + 1) * size]
            scores = []
            for key in range(1 + LENGTH):
                k = qkv[key, dim + head * size : dim + (head + 1) * size]
                scores.append(sum(q[i] * k[i] for i in range(size)) / size**0.5)
            yield head, query, torch.stack(scores).softmax(0).tolist()


def group_of(key, visible):
    return 2 if key == 0 else 0 if key - 1 in visible else 1


def naive_mass(block, x, visible):
    """Mean over heads and mask tokens of the attention to visible, masked and class tokens."""
    mass, count = [0.0, 0.0, 0.0], 0
    for _, _, weights in naive_weights(block, x, visible):
        for key, weight in enumerate(weights):
            mass[group_of(key, visible)] += weight
        count += 1
    return [value / count for value in mass]


def naive_per_key(block, x, visible):
    """The paper's unit: the mean over mask tokens and keys, summed over the heads."""
    sums = [0.0, 0.0, 0.0]
    pairs = [0, 0, 0]  # of a mask token and a key
    for head, _, weights in naive_weights(block, x, visible):
        for key, weight in enumerate(weights):
            sums[group_of(key, visible)] += weight
            pairs[group_of(key, visible)] += head == 0
    return [value / count for value, count in zip(sums, pairs, strict=True)]


@torch.no_grad()
def naive_attention(model, images, noise, measure=naive_mass):
    """(depth, 3), a measure of one block and image averaged over the images."""
    values = []
    for image, row in zip(images, noise, strict=True):
        visible = visible_patches(row)
        tokens = decoder_tokens(model, image, visible)
        values.append(
            [
                measure(block, x, visible)
                for block, x in zip(model.decoder.blocks, tokens, strict=True)
            ]
        )
    return torch.tensor(values).mean(0)


def test_attention_of_mask_tokens(images, noise):
    model = make_model(MAE)
    attention = decoder_attention(model, images, noise)
    mass = naive_attention(model, images, noise)
    assert mass.std(0).min() > 0.01  # the blocks differ, and so would their mix-up
    torch.testing.assert_close(attention.mass, mass)
    torch.testing.assert_close(attention.mass.sum(1), torch.ones(2))
    assert (attention.keys, attention.num_images) == ((VISIBLE, LENGTH - VISIBLE, 1), 3)
    # The mean weight of a key, times the number of keys.
    expected = mass / torch.tensor([6, 18, 1]) * 25
    torch.testing.assert_close(attention.relative, expected)


def test_attention_in_the_unit_of_the_paper(images, noise):
    model = make_model(MAE)
    attention = decoder_attention(model, images, noise)
    assert attention.num_heads == 2
    expected = naive_attention(model, images, noise, naive_per_key)
    torch.testing.assert_close(attention.per_key, expected)
    # The attention of a query sums to 1 in each head.
    keys = torch.tensor(attention.keys, dtype=torch.float32)
    torch.testing.assert_close(attention.per_key @ keys, torch.full((2,), 2.0))


def test_figures_of_the_paper():
    visible, masked = (torch.tensor(PAPER_PER_KEY[name]) for name in ("visible", "masked"))
    assert (len(visible), len(masked)) == (8, 8)
    assert visible.sum().item() == pytest.approx(1.42, abs=0.005)
    assert masked.sum().item() == pytest.approx(0.39, abs=0.005)
    num_visible, num_masked, _ = PAPER_KEYS
    to_class = PAPER_NUM_HEADS - num_visible * visible - num_masked * masked
    assert to_class.min() > 0 and to_class.max() < 0.3
    # A model that had the paper's attention would get the paper's figures.
    keys = torch.tensor(PAPER_KEYS)
    mass = torch.stack([visible, masked, to_class], dim=1) * keys / PAPER_NUM_HEADS
    attention = DecoderAttention(mass, PAPER_KEYS, PAPER_NUM_HEADS, num_images=1)
    torch.testing.assert_close(attention.per_key[:, 0], visible)
    *_, last = attention.table().splitlines()
    assert last.split() == ["sum", "1.419", "0.387", "1.419", "0.387"]


def test_uniform_attention_is_1(images, noise):
    model = make_model(MAE)
    for block in model.decoder.blocks:
        # Without queries all scores are 0.
        torch.nn.init.zeros_(block.attn.qkv.weight[:8])
        torch.nn.init.zeros_(block.attn.qkv.bias[:8])
    attention = decoder_attention(model, images, noise)
    torch.testing.assert_close(attention.relative, torch.ones(2, 3))
    torch.testing.assert_close(attention.mass[0], torch.tensor([6 / 25, 18 / 25, 1 / 25]))


def test_every_patch_that_is_not_visible_is_a_mask_token(images, noise):
    model = make_model(MAE)
    expected = decoder_attention(model, images, noise).mass
    model.prediction_ratio = 0.25
    torch.testing.assert_close(decoder_attention(model, images, noise).mass, expected)


@pytest.mark.parametrize("max_weights", [1, 2 * 18 * 25])
def test_parts_make_no_difference(images, noise, monkeypatch, max_weights):
    mae, crossmae = make_model(MAE), make_model(CrossMAE)
    mass = decoder_attention(mae, images, noise).mass
    deviation = feature_usage(crossmae, images, noise).deviation
    monkeypatch.setattr(analysis, "BATCH_SIZE", 2)
    monkeypatch.setattr(analysis, "MAX_WEIGHTS", max_weights)
    torch.testing.assert_close(decoder_attention(mae, images, noise).mass, mass)
    torch.testing.assert_close(feature_usage(crossmae, images, noise).deviation, deviation)


@torch.no_grad()
def naive_deviation(model, images, noise):
    """Root mean square of each of the encoder's features about the mean of each token."""
    squares = torch.zeros(DEPTH + 1)
    for image, row in zip(images, noise, strict=True):
        visible = torch.tensor([visible_patches(row)])
        for index, feature in enumerate(model.encoder.forward_tokens(image[None], visible)):
            for token in feature[0]:
                mean = sum(token) / len(token)
                for value in token:
                    squares[index] += (value - mean) ** 2
    return (squares / (len(images) * (1 + VISIBLE) * 12)) ** 0.5


def test_features_that_a_block_reads(images, noise):
    model = make_model(CrossMAE)
    usage = feature_usage(model, images, noise)
    deviation = naive_deviation(model, images, noise)
    torch.testing.assert_close(usage.deviation, deviation)
    assert usage.names == ["input", "block 0", "block 1", "block 2"]
    assert torch.equal(usage.weights, model.decoder.feature_weights)
    assert usage.num_images == 3
    for row in range(2):
        weights = [abs(weight) for weight in usage.weights[row].tolist()]
        products = [weight * d for weight, d in zip(weights, deviation.tolist(), strict=True)]
        share = torch.tensor([weight / sum(weights) for weight in weights])
        torch.testing.assert_close(usage.weight_share[row], share)
        contribution = torch.tensor([product / sum(products) for product in products])
        torch.testing.assert_close(usage.contribution[row], contribution)


def test_some_features_by_name(images):
    model = make_model(CrossMAE, feature_blocks=[-1, 0], use_input_feature=False)
    with torch.no_grad():
        model.decoder.feature_weights.copy_(torch.tensor([[0.0, -2.0], [1.0, 0.0]]))
    usage = feature_usage(model, images)
    assert usage.names == ["block 0", "block 2"]
    assert usage.contribution.tolist() == usage.weight_share.tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(("kind", "analyze"), [(MAE, decoder_attention), (CrossMAE, feature_usage)])
def test_without_noise_it_is_the_same_every_time(images, kind, analyze):
    model = make_model(kind)
    first = analyze(model, images).as_dict()
    torch.rand(1)
    assert analyze(model, images).as_dict() == first


@pytest.mark.parametrize(
    ("kind", "analyze", "message"),
    [
        (CrossMAE, decoder_attention, "class CrossMAE"),
        (MAE, feature_usage, "class MAE"),
    ],
)
def test_the_other_method_is_rejected(images, kind, analyze, message):
    with pytest.raises(ValueError, match=message):
        analyze(make_model(kind), images)


@pytest.mark.parametrize(("kind", "analyze"), [(MAE, decoder_attention), (CrossMAE, feature_usage)])
def test_nothing_is_left_on_the_model(images, kind, analyze):
    model = make_model(kind)
    analyze(model, images)
    with pytest.raises(ValueError, match="noise"):
        analyze(model, images, torch.rand(3, 5))
    with pytest.raises(ValueError, match="16x23"):
        analyze(model, images[..., :-1])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_tables_and_json(images, noise):
    attention = decoder_attention(make_model(MAE), images, noise)
    table, paper_table = attention.table().split("\n\n")
    lines = table.splitlines()
    assert [line.split()[0] for line in lines[3:]] == ["0", "1", "mean"]
    numbers = [float(number) for number in lines[-1].split()[1:]]
    visible, masked, _ = attention.relative.mean(0).tolist()
    expected = [*attention.mass.mean(0).tolist(), *attention.relative.mean(0).tolist()]
    assert numbers == pytest.approx([*expected, visible / masked], abs=6e-4)
    *_, first, _, _, _, _, _, _, last, sums = (line.split() for line in paper_table.splitlines())
    here = attention.per_key[:, :2]
    assert [float(number) for number in first[1:]] == pytest.approx(
        [*here[0].tolist(), 0.196, 0.042], abs=6e-4
    )
    assert last == ["7", "0.179", "0.048"]  # this model has two blocks
    assert [float(number) for number in sums[1:]] == pytest.approx(
        [*here.sum(0).tolist(), 1.419, 0.387], abs=6e-4
    )
    content = json.loads(json.dumps(attention.as_dict(), allow_nan=False))
    assert content["per_key_summed_over_heads"]["visible"] == {
        "blocks": attention.per_key[:, 0].tolist(),
        "sum": pytest.approx(attention.per_key[:, 0].sum().item()),
    }
    assert content["paper_per_key_summed_over_heads"]["masked"]["sum"] == pytest.approx(0.387)
    assert content["num_heads"] == 2
    assert content["keys"] == {"visible": 6, "masked": 18, "class token": 1}
    assert content["relative_to_uniform"]["visible"]["mean"] == pytest.approx(visible)
    assert content["mass"]["masked"]["blocks"] == attention.mass[:, 1].tolist()

    usage = feature_usage(make_model(CrossMAE), images, noise)
    lines = usage.table().splitlines()
    assert [line.rsplit(maxsplit=2)[0].strip() for line in lines[2:]] == usage.names
    percent = [[float(number) for number in line.split()[-2:]] for line in lines[2:]]
    torch.testing.assert_close(
        torch.tensor(percent), 100 * usage.contribution.T, atol=0.051, rtol=0
    )
    content = json.loads(json.dumps(usage.as_dict(), allow_nan=False))
    assert content["weights"] == usage.weights.tolist()

"""Pretraining models under torch.compile: one graph, the same results, compiled once."""

import pytest
import torch
from torch._dynamo.utils import counters

from crossmae_det.modeling import ViT
from crossmae_det.pretraining import MAE, CrossMAE

# The compiler "eager" stops where Dynamo does; "aot_eager" takes the backward pass apart as well.
CPU = ("cpu", "eager")
CUDA = pytest.param("cuda", "inductor", marks=pytest.mark.cuda)
each_kind = pytest.mark.parametrize("kind", [MAE, CrossMAE])


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def twins(kind, device):
    torch.manual_seed(0)
    models = []
    for _ in range(2):
        encoder = ViT(32, 8, embed_dim=24, depth=2, num_heads=3)
        model = kind(encoder, decoder_dim=16, decoder_depth=2, decoder_num_heads=2)
        models.append(model.to(device).train())
    models[1].load_state_dict(models[0].state_dict())
    return models


def batch(seed, device):
    """Images as a loader gives them, and noise for their 16 patches."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return images.to(device), torch.rand(2, 16, generator=generator).to(device)


@each_kind
@pytest.mark.parametrize(("device", "compiler"), [CPU, ("cpu", "aot_eager"), CUDA])
def test_one_graph_trains_like_the_model_itself(kind, device, compiler):
    plain, model = twins(kind, device)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    runs = [
        (m, function, torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1))
        for m, function in ((plain, plain), (model, compiled))
    ]
    for step in range(3):
        losses = []
        for _, function, optimizer in runs:
            (loss,) = function(*batch(step, device)).values()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    for got, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert (got - expected).norm() <= 1e-4 * expected.norm() + 1e-6


@each_kind
@pytest.mark.parametrize(("device", "compiler"), [CPU, CUDA])
def test_steps_with_random_masks_are_compiled_once(kind, device, compiler):
    _, model = twins(kind, device)
    model.compile(backend=compiler)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    for step in range(3):
        with torch.autocast(device, torch.bfloat16):
            (loss,) = model(batch(step, device)[0]).values()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]

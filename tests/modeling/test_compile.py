"""The ViT under torch.compile: one graph, the same results, few compilations."""

import pytest
import torch
from torch._dynamo.utils import counters

from crossmae_det.layers.attention_backends import BACKENDS
from crossmae_det.modeling import ViT

# In patches of 8 pixels: windows of 3 divide the first, one side of the next two, no side of the
# others.
SIZES = [(48, 48), (64, 72), (48, 64), (56, 80), (80, 40), (88, 104), (104, 64), (40, 112)]
CPU = [("cpu", "eager", name) for name in BACKENDS if name != "flex"]
CUDA = [
    pytest.param("cuda", "inductor", name, marks=pytest.mark.cuda)
    for name in BACKENDS
    if name != "chunked"
]


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def twins(device, **overrides):
    torch.manual_seed(0)
    arguments = {
        **{"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
        **{"window_size": 3, "global_blocks": [1], "use_rel_pos": True, "class_token": False},
        **overrides,
    }
    models = [ViT(**arguments).to(device) for _ in range(2)]
    for parameter in models[0].parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    models[1].load_state_dict(models[0].state_dict())
    return models


def gradients(model, y):
    weight = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)
    return torch.autograd.grad((y * weight).sum(), model.parameters())


# The compiler "eager" stops where Dynamo does; "aot_eager" takes the backward pass apart as well.
@pytest.mark.parametrize(
    ("device", "compiler", "backend"), [*CPU, ("cpu", "aot_eager", "auto"), *CUDA]
)
def test_one_graph_gives_the_same_values_and_gradients(device, compiler, backend):
    plain, model = twins(
        device, attention_backend=backend, use_act_checkpoint=compiler == "aot_eager"
    )
    compiled = torch.compile(model.forward_map, fullgraph=True, backend=compiler)
    images = torch.randn(2, 3, 56, 80, device=device)
    y, expected = compiled(images), plain.forward_map(images)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for got, wanted in zip(gradients(model, y), gradients(plain, expected), strict=True):
        assert (got - wanted).norm() <= 1e-4 * wanted.norm()
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("device", "compiler"),
    [("cpu", "eager"), pytest.param("cuda", "inductor", marks=pytest.mark.cuda)],
)
def test_changing_sizes_are_compiled_a_few_times_only(device, compiler):
    plain, model = twins(device)
    compiled = torch.compile(model.forward_map, fullgraph=True, backend=compiler)
    for size in SIZES:
        images = torch.randn(2, 3, *size, device=device)
        torch.testing.assert_close(
            compiled(images), plain.forward_map(images), rtol=1e-4, atol=1e-4
        )
    # One for the first size, one for all others, one for those whose height fits the tables.
    assert counters["stats"]["unique_graphs"] <= 3
    assert not counters["graph_break"]

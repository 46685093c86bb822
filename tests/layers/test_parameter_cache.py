import copy
import gc
import pickle

import pytest
import torch
from torch import nn

from crossmae_det.layers.attention import CAPACITY, ParameterCache


class Doubler:
    """Doubles a parameter through a cache, and counts how often it had to."""

    def __init__(self):
        self.cache = ParameterCache()
        self.count = 0

    def __call__(self, parameter, key=0):
        def double(x):
            self.count += 1
            return 2 * x

        value = self.cache(key, parameter, double)
        assert torch.equal(value, 2 * parameter)
        return value


def test_a_value_is_computed_once_for_each_key():
    double, parameter = Doubler(), nn.Parameter(torch.ones(3))
    with torch.no_grad():
        for key in (1, 2, 1, 2):
            double(parameter, key)
    assert double.count == 2


def test_with_gradients_nothing_is_kept():
    double, parameter = Doubler(), nn.Parameter(torch.ones(3))
    with torch.no_grad():
        double(parameter)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(double(parameter).sum(), parameter)
        assert torch.equal(gradient, torch.full((3,), 2.0))
    assert double.count == 3


def optimizer_step(optimizer, **options):
    def change(parameter, double):
        double(parameter).sum().backward()
        optimizer([parameter], lr=0.5, **options).step()

    return change


def load(parameter, double):
    module = nn.Module()
    module.p = parameter
    module.load_state_dict({"p": torch.full((3,), 5.0)})


def in_place(parameter, double):
    with torch.no_grad():
        parameter.add_(1)


def other_memory(parameter, double):
    parameter.data = torch.full((3,), 7.0)


def other_type(parameter, double):
    module = nn.Module()
    module.p = parameter
    module.to(torch.float64)


@pytest.mark.parametrize(
    "change",
    [
        optimizer_step(torch.optim.SGD),
        optimizer_step(torch.optim.AdamW, foreach=True),
        optimizer_step(torch.optim.AdamW, fused=True),
        *[load, in_place, other_memory, other_type],
    ],
)
def test_no_change_of_the_parameter_is_missed(change):
    double, parameter = Doubler(), nn.Parameter(torch.ones(3))
    for _ in range(3):
        with torch.no_grad():
            double(parameter)
        change(parameter, double)
        with torch.no_grad():
            value = double(parameter)
            assert value.dtype == parameter.dtype
            assert double(parameter) is value


def test_another_parameter_at_the_same_address_is_not_mistaken():
    double = Doubler()
    for number in range(20):
        parameter = nn.Parameter(torch.full((1000,), float(number)))
        with torch.no_grad():
            double(parameter)
        del parameter
        gc.collect()
    assert double.count == 20


def test_memory_that_comes_and_goes_is_not_mistaken():
    double, parameter = Doubler(), nn.Parameter(torch.zeros(1000))
    for number in range(20):
        parameter.data = torch.full((1000,), float(number))
        with torch.no_grad():
            double(parameter)


def test_inference_mode_parameters_have_no_version_and_are_not_cached():
    double = Doubler()
    with torch.inference_mode():
        parameter = nn.Parameter(torch.ones(3), requires_grad=False)
        double(parameter)
        double(parameter)
    assert double.count == 2


def test_it_keeps_a_few_sizes_only():
    double, parameter = Doubler(), nn.Parameter(torch.ones(3))
    with torch.no_grad():
        for key in range(CAPACITY + 1):
            double(parameter, key)
        double(parameter, CAPACITY)
        assert double.count == CAPACITY + 1
        double(parameter, 0)
    assert double.count == CAPACITY + 2


def test_copies_start_empty():
    double, parameter = Doubler(), nn.Parameter(torch.ones(3))
    with torch.no_grad():
        double(parameter)
    for other in (copy.deepcopy(double.cache), pickle.loads(pickle.dumps(double.cache))):
        assert isinstance(other, ParameterCache) and not other._entries

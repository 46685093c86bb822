"""What follows from a parameter and a size alone, computed once for each size."""

import weakref
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

# Sizes that are kept: images of one data set have a few.
CAPACITY = 8


class ParameterCache:
    """Keeps what was computed from a parameter, for as long as the parameter stays as it is.

    It keeps nothing while a graph is compiled, where it would be a constant, and forgets all where
    gradients are recorded: a backward pass needs a graph of its own, and an optimizer's step may
    follow. torch's fused optimizers change a parameter without a trace. Otherwise a value is taken
    again only where the parameter is the same object, with the same memory and the same version:
    ``load_state_dict``, ``.to()`` and whatever else writes to it change one of them. A write
    through ``parameter.data`` changes none; :meth:`clear` is for that.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[Tensor, int, Tensor]] = {}
        self._owner: weakref.ref[nn.Parameter] | None = None

    def __call__(
        self, key: Hashable, parameter: nn.Parameter, compute: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The value of ``compute(parameter)``.

        Args:
            key: what else the value depends on, such as a size.
            parameter: one cache is for one parameter.
            compute: a function of the parameter and of the key.
        """
        if torch.compiler.is_compiling():
            return compute(parameter)
        if torch.is_grad_enabled():
            self.clear()
            return compute(parameter)
        # Inference tensors have no version, and those on "meta" no memory.
        if parameter.is_inference() or parameter.is_meta:
            return compute(parameter)
        if self._owner is None or self._owner() is not parameter:
            self.clear()
            self._owner = weakref.ref(parameter)
        memory, version, value = self._entries.get(key, (None, -1, None))
        if (
            memory is not None
            and value is not None
            and memory.data_ptr() == parameter.data_ptr()
            and version == parameter._version
        ):
            return value
        value = compute(parameter)
        self._entries.pop(key, None)
        while len(self._entries) >= CAPACITY:
            self._entries.pop(next(iter(self._entries)))
        # The alias keeps the memory, lest other numbers come to lie at the same address.
        self._entries[key] = (parameter.detach(), parameter._version, value)
        return value

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._owner = None

    def __deepcopy__(self, memo: dict) -> "ParameterCache":
        return ParameterCache()

    def __reduce__(self) -> tuple:
        return ParameterCache, ()

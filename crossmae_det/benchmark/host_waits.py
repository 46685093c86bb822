"""How often a training step makes the host wait for the device, counted without a GPU.

On a CPU nothing waits, but the same operators run. Counted are those that a GPU's host waits for:
reading a number (``item``, ``bool``, ``tolist``), copies that block, and operators whose result has
a size that depends on the values, such as ``nonzero``, boolean indices and NMS.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.engine import HookBase, SimpleTrainer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from crossmae_det.benchmark.report import Column, Section
from crossmae_det.engine.config import build_model, resolve
from crossmae_det.engine.train import build_optimizer
from crossmae_det.engine.trainer import Trainer
from crossmae_det.model_zoo import get_config

# Operators whose output has a size that depends on values, and the reading of one number.
OPERATORS = {
    "aten::_local_scalar_dense": "item",
    "aten::nonzero": "nonzero",
    "aten::masked_select": "masked_select",
    "aten::equal": "equal",
    "aten::unique_dim": "unique",
    "aten::_unique2": "unique",
    "torchvision::nms": "nms",
}
INDEXING = ("aten::index.Tensor", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")
METHODS = ("cpu", "numpy", "tolist")

COUNTED = 2  # iteration; earlier ones allocate and check

COLUMNS = (
    Column("config", "name"),
    Column("detectron2's loop", "detectron2"),
    Column("this loop", "ours"),
    Column("of them in the model", "model"),
)


class HostWaits(TorchDispatchMode):
    """Counts what a GPU's host waits for while it is active, by kind, in ``counts``."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._methods = _Methods(self.counts)

    def __enter__(self) -> "HostWaits":
        self._methods.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._methods.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        kind = OPERATORS.get(name) or OPERATORS.get(name.partition(".")[0])
        if name in INDEXING and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in args[1]
        ):
            kind = "boolean index"
        if kind:
            self.counts[kind] += 1
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    """Counts the methods of tensors that no operator shows on a CPU.

    The result of a copy to the host that does not block is on the host, where reading is free.
    """

    def __init__(self, counts: Counter[str]):
        super().__init__()
        self.counts = counts
        self.on_host = WeakIdKeyDictionary()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if func is Tensor.to and (kwargs or {}).get("non_blocking"):
            self.on_host[result] = True
        elif name in METHODS and func is getattr(Tensor, name) and args[0] not in self.on_host:
            self.counts[name] += 1
        return result


class _Count(HookBase):
    """Counts the waits of iteration ``COUNTED``: all, and those of the model's two passes."""

    def __init__(self, model: nn.Module):
        self.step: Counter[str] = Counter()
        self.in_model: Counter[str] = Counter()
        self.mode = HostWaits()
        self.start: Counter[str] = Counter()
        self.before: Counter[str] = Counter()
        model.register_forward_pre_hook(self._enter)

    def _enter(self, *_: Any) -> None:
        self.before = self.mode.counts.copy()

    def before_step(self) -> None:
        if self.trainer.iter == 0:
            self.mode.__enter__()
        self.start = self.mode.counts.copy()

    def after_backward(self) -> None:
        if self.trainer.iter == COUNTED:
            self.in_model = self.mode.counts - self.before

    def after_step(self) -> None:
        if self.trainer.iter == COUNTED:
            self.mode.__exit__(None, None, None)
            self.step = self.mode.counts - self.start


def count_waits(
    build: Callable[[], tuple[nn.Module, torch.optim.Optimizer]], batch: Any
) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Count the waits of a training step between two times that metrics are written.

    Args:
        build: returns a model and its optimizer, on the CPU.
        batch: what the model takes, on the CPU.

    Returns:
        In detectron2's ``SimpleTrainer``, in this project's ``Trainer`` as it runs on a GPU, and
        those of the latter in the forward and backward pass of the model.
    """
    counts = []
    for kind in (SimpleTrainer, Trainer):
        torch.manual_seed(0)
        model, optimizer = build()
        batches = (batch for _ in itertools.count())
        counter = _Count(model)
        if kind is Trainer:
            trainer: Any = Trainer(model, batches, optimizer, log_period=1000, clip_norm=1.0)
            trainer.reads_later = True
        else:
            trainer = SimpleTrainer(model, batches, optimizer)
        trainer.register_hooks([counter])
        # The last step is not counted: it waits for the metrics.
        trainer.train(0, COUNTED + 2)
        counts.append(counter)
    reference, ours = counts
    return reference.step, ours.step, ours.in_model


def waits_section(configs: Sequence[str], overrides: Sequence[str]) -> Section:
    """The waits of a training step of each config, as a table.

    Args:
        configs: names or paths; their training sets must exist.
        overrides: of every config.
    """
    records: list[Mapping[str, Any]] = []
    for config in configs:
        cfg = resolve(get_config(config, ["dataloader.train.num_workers=0", *overrides]))
        cfg.optimizer.fused = True
        batch = next(iter(instantiate(cfg.dataloader.train)))

        def build(cfg: Any = cfg) -> tuple[nn.Module, torch.optim.Optimizer]:
            model = build_model(cfg)
            return model, build_optimizer(cfg.optimizer, model)

        reference, ours, in_model = count_waits(build, batch)
        record = {"detectron2": reference, "ours": ours, "model": in_model}
        totals = {name: sum(counts.values()) for name, counts in record.items()}
        kinds = {name: dict(counts) for name, counts in record.items()}
        records.append({"name": config, **totals, "kinds": kinds})
    notes = [
        "Times that a GPU's host waits in a step, counted on the CPU; --json has their kinds.",
        "Blocking copies of the batch to the GPU, one or more for each image, are not included.",
    ]
    return Section("host_waits", "Waits for the device in a training step", COLUMNS, records, notes)

"""Mixed precision at inference: in the backbone, with float32 after it.

The training loop of every task: detectron2's, with what a long run on any hardware needs.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from crossmae_det.engine.checkpointing import match_optimizer_state, parameter_names
from crossmae_det.engine.fsdp import distribute_state


@contextlib.contextmanager
def inference_autocast(model: nn.Module, dtype: str | None) -> Iterator[None]:
    """Mixed precision for the inference of any model: evaluation, demo and drawings.

    A model with a ``backbone`` runs it in mixed precision, where nearly all of the time goes, and
    everything after it in float32: logits of 8 bits would give tied scores, and detectron2 pastes a
    mask on a sampling grid of the mask's own type. Other models run in mixed precision as a whole.

    Args:
        model: the model itself, not a wrapper of it.
        dtype: "bf16", "fp16", or None for float32.

    Raises:
        ValueError: another dtype.
    """
    device = next(model.parameters()).device
    backbone = getattr(model, "backbone", None)
    if dtype is None or not isinstance(backbone, nn.Module):
        with autocast(device, dtype):
            yield
        return
    autocast(device, dtype)  # rejects an unknown dtype now
    model.backbone = _MixedPrecision(backbone, dtype)
    try:
        yield
    finally:
        model.backbone = backbone


class _MixedPrecision(nn.Module):
    """A module that runs in mixed precision and returns float32; its attributes are the module's.

    It stands in for the module only for a while. A forward method or hooks on the module itself
    would become a part of its compiled graph, and compile it again in every evaluation.
    """

    def __init__(self, module: nn.Module, dtype: str):
        super().__init__()
        self.module = module
        self.dtype = dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with autocast(next(self.module.parameters()).device, self.dtype):
            output = self.module(*args, **kwargs)
        return _float32(output)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def _float32(value: Any) -> Any:
    """The floating-point tensors of a tensor, a dict, a list or a tuple in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _float32(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_float32(item) for item in value)
    return value


logger = logging.getLogger(__name__)


AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

# Instruction sets that multiply matrices in bf16: of AMD and Intel, and of ARM.
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


class NonFiniteError(FloatingPointError):
    """A loss or the gradient is not finite; the message says where."""


def autocast(device: torch.device, dtype: str | None) -> contextlib.AbstractContextManager:
    """Mixed precision on ``device``: "bf16", "fp16", or None for none.

    Raises:
        ValueError: another name.
    """
    if dtype is None:
        return contextlib.nullcontext()
    if dtype not in AMP_DTYPES:
        raise ValueError(
            f"train.amp.dtype must be one of auto, {', '.join(AMP_DTYPES)}, got '{dtype}'"
        )
    return torch.autocast(device.type, dtype=AMP_DTYPES[dtype])


def amp_dtype(options: Mapping[str, Any], device: torch.device) -> str | None:
    """The mixed precision that the ``train`` key of a config asks for, for :func:`autocast`.

    "auto" is what the device computes fastest in: on a GPU "bf16", or "fp16" before Ampere; on a
    CPU "bf16" where it has instructions for it, else None. Without them bf16 is emulated, which
    takes ten times as long as float32.
    """
    if not options["amp"]["enabled"]:
        return None
    if options["amp"]["dtype"] != "auto":
        return options["amp"]["dtype"]
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if BF16_FLAGS & set(_cpu_flags()) else None


def _cpu_flags() -> list[str]:
    """The names of the CPU's instruction sets, as Linux tells them; elsewhere none."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line for line in file if line.startswith(("flags", "Features"))]
    except OSError:
        return []
    return lines[0].split() if lines else []


def split_batch(batch: Any, parts: int) -> list[Any]:
    """Split a batch into ``parts`` of nearly equal size, in order.

    Args:
        batch: a list of samples, or a tensor with the samples in its first dimension.
        parts: number of parts; a batch smaller than that is split into single samples.
    """
    parts = min(parts, len(batch))
    bounds = [len(batch) * part // parts for part in range(parts + 1)]
    return [batch[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]


def total_loss(losses: Mapping[str, Tensor]) -> Tensor:
    """The sum of a model's losses, which training minimizes: a scalar."""
    return torch.stack([*losses.values()]).sum()


def training_step(
    batch: Any,
    forward: Callable[[Any], Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    *,
    parts: int = 1,
    scaler: torch.amp.GradScaler | None = None,
    gradient_sync: Callable[[bool], contextlib.AbstractContextManager] | None = None,
    before_step: Callable[[], None] | None = None,
) -> dict[str, Tensor]:
    """One optimizer step: forward and backward of each part of a batch, then the update.

    Args:
        batch: a list of samples, or a tensor with the samples in its first dimension.
        forward: takes a part of the batch and returns its scalar losses.
        optimizer: its gradients are set to those of this step, and stay.
        parts: number of parts the batch is split into; see :func:`split_batch`. The gradient is
            the mean over the samples, as if there were one part.
        scaler: scales the loss for fp16; None does not scale.
        gradient_sync: context of a part's passes; its argument is True for the last part.
        before_step: called with the unscaled gradients, before the optimizer's step.

    Returns:
        The losses by name, detached: the mean over the samples.
    """
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    losses: dict[str, Tensor] = {}
    pieces = split_batch(batch, parts)
    optimizer.zero_grad()
    for index, part in enumerate(pieces):
        share = len(part) / len(batch)
        last = index == len(pieces) - 1
        with gradient_sync(last) if gradient_sync else contextlib.nullcontext():
            part_losses = forward(part)
            scaler.scale(share * total_loss(part_losses)).backward()
        for name, loss in part_losses.items():
            losses[name] = losses.get(name, 0) + share * loss.detach()
    scaler.unscale_(optimizer)
    if before_step:
        before_step()
    scaler.step(optimizer)
    scaler.update()
    return losses


class Trainer(SimpleTrainer):
    """detectron2's trainer with mixed precision, accumulation, clipping and a guard against NaN.

    Iteration i draws its random numbers from (seed, i, rank) alone, and asks the loader for batch
    i: a run that was interrupted continues exactly as if it had not been. One that is resumed with
    another batch size goes on with the next image: iterations are then counted as if the run had
    had that batch size from the start.

    Args:
        model: takes a batch, returns a dict of scalar losses.
        data_loader: an endless iterable of batches; a method ``start_at(iteration)``, where it has
            one, makes the next ``iter()`` begin at that iteration. One with ``total_batch_size``
            (images of an iteration) takes an ``offset`` in images as well.
        optimizer: over the model's parameters.
        seed: non-negative.
        amp_dtype: "bf16", "fp16" or None.
        gradient_accumulation_steps: number of parts that a batch is processed in, for memory; the
            gradient is the mean of those of the parts, as between so many processes.
        clip_norm: largest norm of the gradient; None does not clip.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: torch.optim.Optimizer,
        *,
        seed: int = 0,
        amp_dtype: str | None = None,
        gradient_accumulation_steps: int = 1,
        clip_norm: float | None = None,
    ):
        super().__init__(model, data_loader, optimizer)
        if gradient_accumulation_steps < 1:
            raise ValueError(
                "train.gradient_accumulation_steps must be at least 1, got"
                f" {gradient_accumulation_steps}"
            )
        if seed < 0:
            raise ValueError(f"train.seed must not be negative, got {seed}")
        if clip_norm is not None and clip_norm <= 0:
            raise ValueError(f"train.clip_grad.max_norm must be positive, got {clip_norm}")
        self.seed = seed
        self.amp_dtype = amp_dtype
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.clip_norm = clip_norm
        self.batch_size: int | None = getattr(data_loader, "total_batch_size", None)
        # Images that the run has seen beyond iteration x batch size, from other batch sizes.
        self.image_offset = 0
        self.device = next(model.parameters()).device
        self.autocast()  # refuses an unknown dtype now, not at the first step
        self.grad_scaler = torch.amp.GradScaler(self.device.type, enabled=amp_dtype == "fp16")

    def train(self, start_iter: int, max_iter: int) -> None:
        """Run iterations ``start_iter`` to ``max_iter`` - 1 with the hooks around them.

        A hook ends the run early where it sets ``max_iter`` to the iterations that are done.
        """
        logger.info("Starting training from iteration %d", start_iter)
        self.iter = self.start_iter = start_iter
        self.max_iter = max_iter
        if hasattr(self.data_loader, "start_at"):
            offset = {} if self.batch_size is None else {"offset": self.image_offset}
            self.data_loader.start_at(start_iter, **offset)
        with EventStorage(start_iter) as self.storage:
            try:
                self.before_train()
                # after_train tells a finished run from a failed one by what self.iter has become.
                while self.iter < self.max_iter:
                    self.before_step()
                    self.run_step()
                    self.after_step()
                    self.iter += 1
            finally:
                self.after_train()

    def run_step(self) -> None:
        """One iteration: all parts of a batch forward and backward, then one optimizer step."""
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        seed_sequence = np.random.SeedSequence([self.seed, self.iter, comm.get_rank()])
        seed_all_rng(int(seed_sequence.generate_state(1)[0]))

        losses = training_step(
            batch,
            self._forward,
            self.optimizer,
            parts=self.gradient_accumulation_steps,
            scaler=self.grad_scaler,
            gradient_sync=self._gradient_sync,
            before_step=lambda: self._check_and_clip(batch),
        )
        self._write_metrics(losses, data_time)

    def autocast(self) -> contextlib.AbstractContextManager:
        """The precision that the model is trained in."""
        return autocast(self.device, self.amp_dtype)

    def _gradient_sync(self, last: bool) -> contextlib.AbstractContextManager:
        """Processes exchange gradients once a batch, with its last part."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return contextlib.nullcontext()

    def _forward(self, part: Any) -> dict[str, Tensor]:
        """The losses of a part of a batch, all finite."""
        losses: dict[str, Tensor] = {}
        reason = ""
        try:
            with self.autocast():
                losses = self.model(part)
            failed = ~torch.stack([loss.detach() for loss in losses.values()]).isfinite()
        except FloatingPointError as error:  # detectron2's own word for NaN in predicted boxes
            failed = torch.ones(1, device=self.device)
            reason = str(error)

        def describe() -> str:
            bad = [f"{key} is {loss.item()}" for key, loss in losses.items() if not loss.isfinite()]
            return f"{reason or ', '.join(bad)} (images: {_names(part)})"

        self._stop_if(failed, describe)
        return losses

    def _check_gradients(self) -> None:
        """Say which parameters nothing reads.

        Raises:
            ValueError: there are some, and DistributedDataParallel would stop at the next step.
        """
        unread = [
            name for name, p in self.model.named_parameters() if p.requires_grad and p.grad is None
        ]
        if not unread:
            return
        parallel = self.model if isinstance(self.model, DistributedDataParallel) else None
        what = (
            f"{len(unread)} parameters get no gradient, '{unread[0].removeprefix('module.')}' first"
        )
        if parallel is not None and not parallel.find_unused_parameters:
            raise ValueError(
                f"{what}: freeze or remove what the losses do not depend on, or set"
                " train.ddp.find_unused_parameters=True"
            )
        logger.warning("%s: they are not trained", what)

    def _check_and_clip(self, batch: Any) -> None:
        """Between the backward pass and the optimizer's step."""
        self.after_backward()
        if self.iter == self.start_iter:
            self._check_gradients()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        total = torch.nn.utils.get_total_norm(gradients)
        norm = total.full_tensor() if isinstance(total, DTensor) else total
        # fp16 overflows now and then by design: the scaler then skips the step and scales less.
        # Where a scale below 1 does not help, it is not the scale.
        if not self.grad_scaler.is_enabled() or self.grad_scaler.get_scale() < 1:
            self._stop_if(
                ~norm.isfinite(),
                lambda: f"the gradient's norm is {norm.item()} (images: {_names(batch)})",
            )
        self.storage.put_scalar("grad_norm", norm.item())
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.clip_norm, total)

    def _stop_if(self, failed: Tensor, describe: Callable[[], str]) -> None:
        """Raise NonFiniteError on every process when any entry of ``failed`` is true on one of
        them.

        The device is waited for once.
        """
        flag = failed.any().float()
        if comm.get_world_size() == 1:
            message = describe() if flag else ""
        else:
            here = flag.clone()
            torch.distributed.all_reduce(flag)
            messages = comm.all_gather(describe() if here else "") if flag else []
            message = "; ".join(filter(None, messages))
        if message:
            raise NonFiniteError(f"training stopped at iteration {self.iter}: {message}")

    def state_dict(self) -> dict[str, Any]:
        """Iteration, images seen, hooks, optimizer with names, gradient scaler."""
        state = super().state_dict() | {"grad_scaler": self.grad_scaler.state_dict()}
        state["parameter_names"] = parameter_names(self._bare_model(), self.optimizer)
        if self.batch_size is not None:
            state["images_seen"] = (self.iter + 1) * self.batch_size + self.image_offset
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave; the next iteration is ``self.iter + 1``.

        The settings of the optimizer stay as they are, and so does the batch size: see
        :mod:`crossmae_det.engine.checkpointing`.

        Raises:
            ValueError: the state does not fit the optimizer.
        """
        names = parameter_names(self._bare_model(), self.optimizer)
        optimizer = match_optimizer_state(
            state_dict["optimizer"], state_dict.get("parameter_names"), self.optimizer, names
        )
        state = {**state_dict, "optimizer": distribute_state(self.optimizer, optimizer)}
        # Earlier versions saved the schedule, which follows from the config and the iteration.
        hooks = state.get("hooks", {})
        state["hooks"] = {name: hooks[name] for name in hooks if name != "LRScheduler"}
        if self.batch_size is not None and "images_seen" in state:
            iterations, self.image_offset = divmod(state["images_seen"], self.batch_size)
            state["iteration"] = iterations - 1
        super().load_state_dict(state)
        if state_dict["grad_scaler"]:  # empty where the run was not in fp16
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])

    def _bare_model(self) -> nn.Module:
        wrapped = isinstance(self.model, DistributedDataParallel)
        return self.model.module if wrapped else self.model


def _names(samples: Any) -> str:
    """The images of a batch for a message: file names where the samples carry them."""
    if isinstance(samples, list) and all(isinstance(sample, dict) for sample in samples):
        return ", ".join(str(sample.get("file_name", "unnamed")) for sample in samples)
    return f"a batch of {len(samples)}"

"""The training loop: detectron2's, extended for long runs on any hardware.

It adds mixed precision on every device, gradient accumulation and clipping, a stop at losses or
gradients that are not finite, and random numbers that depend on the seed and the iteration alone.
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

logger = logging.getLogger(__name__)

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

# Instruction sets that multiply bf16 matrices: of AMD and Intel, and of ARM.
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")


class NonFiniteError(FloatingPointError):
    """A loss or the gradient is not finite; the message says where."""


def amp_dtype(options: Mapping[str, Any], device: torch.device) -> str | None:
    """The mixed precision that the ``train`` key of a config selects, for :func:`autocast`.

    "auto" is the fastest one on the device: on a GPU "bf16", or "fp16" before Ampere; on a CPU
    "bf16" if it has instructions for it, else None: emulated bf16 is ten times slower than float32.
    """
    if not options["amp"]["enabled"]:
        return None
    if options["amp"]["dtype"] != "auto":
        return options["amp"]["dtype"]
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    # Before torch 2.9 there is no such function, and "auto" is float32 on a CPU.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if any(capabilities.get(name) for name in BF16_INSTRUCTIONS) else None


def autocast(device: torch.device, dtype: str | None) -> contextlib.AbstractContextManager:
    """Mixed precision on ``device``: "bf16", "fp16", or None for none.

    Raises:
        ValueError: another name.
    """
    if dtype is None:
        return contextlib.nullcontext()
    if dtype not in AMP_DTYPES:
        raise ValueError(f"train.amp.dtype='{dtype}': must be one of auto, {', '.join(AMP_DTYPES)}")
    return torch.autocast(device.type, dtype=AMP_DTYPES[dtype])


@contextlib.contextmanager
def inference_autocast(model: nn.Module, dtype: str | None) -> Iterator[None]:
    """Mixed precision for inference: evaluation, prediction and visualizations.

    A model with a ``backbone`` runs it in mixed precision, where nearly all of the time goes, and
    everything after it in float32: with the 8 significant bits of bf16, scores would tie, and
    detectron2 pastes a mask on a sampling grid of the mask's own type. Other models run in mixed
    precision as a whole.

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
    """Runs a module in mixed precision and returns float32; its attributes are the module's.

    A temporary stand-in: a forward method or hooks set on the module itself would become a part of
    its compiled graph, and compile it again in every evaluation.
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


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a DistributedDataParallel wrapper, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


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
        optimizer: its parameters keep the gradients of this step.
        parts: number of parts the batch is split into; see :func:`split_batch`. The gradient is
            the mean over the samples, as if there were one part.
        scaler: scales the loss for fp16; None does not scale.
        gradient_sync: returns the context of the passes of a part; called with True for the last.
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
    """Trains a model whose iteration i depends on the seed and on i alone.

    Iteration i draws its random numbers from (seed, i, rank) and asks the loader for batch i: an
    interrupted run continues exactly as if it had not been interrupted. A run that is resumed with
    another batch size continues with the next image; iterations are then counted as if the run had
    had that batch size from the start.

    Args:
        model: takes a batch, returns a dict of scalar losses.
        data_loader: an endless iterable of batches. If it has ``start_at(iteration)``, that makes
            the next ``iter()`` begin there; with ``total_batch_size`` (images per iteration),
            ``start_at`` takes an ``offset`` in images as well.
        optimizer: over the model's parameters.
        seed: at least 0.
        amp_dtype: "bf16", "fp16" or None.
        gradient_accumulation_steps: number of parts a batch is processed in, to save memory.
        clip_norm: largest norm of the gradient; None does not clip.

    Raises:
        ValueError: ``amp_dtype`` or ``clip_norm`` out of range.
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
        if clip_norm is not None and clip_norm <= 0:
            raise ValueError(f"train.clip_grad.max_norm={clip_norm}: must be positive")
        self.seed = seed
        self.amp_dtype = amp_dtype
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.clip_norm = clip_norm
        self.batch_size: int | None = getattr(data_loader, "total_batch_size", None)
        # Images that the run has seen beyond iteration x batch size, from other batch sizes.
        self.image_offset = 0
        self.device = next(model.parameters()).device
        autocast(self.device, amp_dtype)  # rejects an unknown dtype now
        self.grad_scaler = torch.amp.GradScaler(self.device.type, enabled=amp_dtype == "fp16")

    def train(self, start_iter: int, max_iter: int) -> None:
        """Run iterations ``start_iter`` to ``max_iter`` - 1 with the hooks around them.

        A hook ends the run early by setting ``max_iter`` to the number of completed iterations.
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

    def _gradient_sync(self, last: bool) -> contextlib.AbstractContextManager:
        """Processes exchange gradients once per batch, with its last part."""
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
            with autocast(self.device, self.amp_dtype):
                losses = self.model(part)
            failed = ~torch.stack([loss.detach() for loss in losses.values()]).isfinite()
        except FloatingPointError as error:  # detectron2 found NaN in predicted boxes
            failed = torch.ones(1, device=self.device)
            reason = str(error)

        def describe() -> str:
            bad = [f"{key} is {loss.item()}" for key, loss in losses.items() if not loss.isfinite()]
            return f"{reason or ', '.join(bad)} (images: {_names(part)})"

        self._stop_if(failed, describe)
        return losses

    def _check_and_clip(self, batch: Any) -> None:
        """Check, log and clip the gradients of a batch before the optimizer uses them."""
        self.after_backward()
        if self.iter == self.start_iter:
            self._check_gradients()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        total = torch.nn.utils.get_total_norm(gradients)
        norm = total.full_tensor() if isinstance(total, DTensor) else total
        # fp16 overflows now and then by design: the scaler then skips the step and scales less.
        # A scale below 1 that still overflows is not the cause.
        if not self.grad_scaler.is_enabled() or self.grad_scaler.get_scale() < 1:
            self._stop_if(
                ~norm.isfinite(),
                lambda: f"the gradient's norm is {norm.item()} (images: {_names(batch)})",
            )
        self.storage.put_scalar("grad_norm", norm.item())
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.clip_norm, total)

    def _check_gradients(self) -> None:
        """Warn about parameters without gradient, or raise an error if the next step would fail.

        Raises:
            ValueError: there are some, and DistributedDataParallel is not set to find them.
        """
        unread = [
            name for name, p in self.model.named_parameters() if p.requires_grad and p.grad is None
        ]
        if not unread:
            return
        what = (
            f"{len(unread)} parameters get no gradient, '{unread[0].removeprefix('module.')}' first"
        )
        parallel = isinstance(self.model, DistributedDataParallel)
        if parallel and not self.model.find_unused_parameters:
            raise ValueError(
                f"{what}: freeze or remove what the losses do not depend on, or set"
                " train.ddp.find_unused_parameters=True"
            )
        logger.warning("%s: they are not trained", what)

    def _stop_if(self, failed: Tensor, describe: Callable[[], str]) -> None:
        """Raise NonFiniteError in every process if an entry of ``failed`` is true in one of them.

        It synchronizes with the device once.
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
        """Iteration, images seen, hooks, optimizer with parameter names, gradient scaler."""
        state = super().state_dict() | {"grad_scaler": self.grad_scaler.state_dict()}
        state["parameter_names"] = parameter_names(unwrap(self.model), self.optimizer)
        if self.batch_size is not None:
            state["images_seen"] = (self.iter + 1) * self.batch_size + self.image_offset
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from the result of :meth:`state_dict`; the next iteration is ``self.iter + 1``.

        The settings of the optimizer stay as they are, and so does the batch size: see
        :mod:`crossmae_det.engine.checkpointing`.

        Raises:
            ValueError: the state does not fit the optimizer.
        """
        optimizer = match_optimizer_state(
            state_dict["optimizer"],
            state_dict.get("parameter_names"),
            self.optimizer,
            parameter_names(unwrap(self.model), self.optimizer),
        )
        state = {**state_dict, "optimizer": distribute_state(self.optimizer, optimizer)}
        # Earlier versions saved the schedule, which follows from the config and the iteration.
        hooks = state.get("hooks", {})
        state["hooks"] = {name: hooks[name] for name in hooks if name != "LRScheduler"}
        if self.batch_size is not None and "images_seen" in state:
            iterations, self.image_offset = divmod(state["images_seen"], self.batch_size)
            state["iteration"] = iterations - 1
        super().load_state_dict(state)
        if state_dict["grad_scaler"]:  # empty if the run was not in fp16
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def _names(samples: Any) -> str:
    """The images of a batch for a message: file names if the samples have them."""
    if isinstance(samples, list) and all(isinstance(sample, dict) for sample in samples):
        return ", ".join(str(sample.get("file_name", "unnamed")) for sample in samples)
    return f"a batch of {len(samples)}"

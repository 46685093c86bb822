"""The training loop: detectron2's, extended for long runs on any hardware.

It adds mixed precision on every device, gradient accumulation and clipping, a stop at losses or
gradients that are not finite, and random numbers that depend on the seed and the iteration alone.
On a GPU, the host does not wait for a step that it has queued until it has queued the next one.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping
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
from crossmae_det.engine.precision import autocast
from crossmae_det.engine.step_record import Part, StepRecord, image_names

logger = logging.getLogger(__name__)


class NonFiniteError(FloatingPointError):
    """A loss or the gradient is not finite; the message says where."""


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
    before_step: Callable[[Mapping[str, Tensor]], Tensor | None] | None = None,
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
        before_step: called with the losses of the batch, when the gradients are unscaled and the
            optimizer has not stepped. It may return a scalar on the device, 1 to have a fused
            optimizer change nothing, else 0; such a step does not wait for the device.

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
    skip = before_step(losses) if before_step else None
    if skip is None:
        scaler.step(optimizer)
    else:
        # As GradScaler does it: fused kernels read this attribute.
        optimizer.found_inf = skip  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]
    scaler.update()
    return losses


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer can skip an update by a flag on the device, without waiting for it.

    Fused Adam and AdamW can. Other fused optimizers have the flag, too, but SGD keeps uninitialized
    momentum if its first update is skipped.
    """
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)


class Trainer(SimpleTrainer):
    """Trains a model whose iteration i depends on the seed and on i alone.

    On a GPU, with an optimizer for which :func:`skips_on_device`, a step's losses and gradient norm
    are read after the next step is queued. A step with one that is not finite still changes
    nothing: its update is skipped on the device, and the run stops before the next update. Until
    :meth:`settle`, what a step has changed is not confirmed; hooks that save or measure the model
    call it first, and pass what they do after every step to :meth:`when_confirmed`.

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
        log_period: iterations between two calls of :meth:`settle`, which write the metrics; 1 suits
            hooks that do not call it.

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
        log_period: int = 1,
    ):
        super().__init__(model, data_loader, optimizer)
        if clip_norm is not None and clip_norm <= 0:
            raise ValueError(f"train.clip_grad.max_norm={clip_norm}: must be positive")
        self.seed = seed
        self.amp_dtype = amp_dtype
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.clip_norm = clip_norm
        self.log_period = log_period
        self.batch_size: int | None = getattr(data_loader, "total_batch_size", None)
        # Images that the run has seen beyond iteration x batch size, from other batch sizes.
        self.image_offset = 0
        self.device = next(model.parameters()).device
        autocast(self.device, amp_dtype)  # rejects an unknown dtype now
        self.grad_scaler = torch.amp.GradScaler(self.device.type, enabled=amp_dtype == "fp16")
        # On a CPU, a result is there at once.
        self.reads_later = self.device.type == "cuda" and skips_on_device(optimizer)
        self._unread: StepRecord | None = None  # of the step that is queued
        # Restores what that step changes even if its update is skipped.
        self._undo: Callable[[], None] = lambda: None
        self._actions: list[Callable[[], None]] = []  # to run when it is confirmed
        self._confirmed: list[StepRecord] = []  # whose metrics are not written
        # Processes exchange errors of a forward pass on the host, beside the work of the GPUs.
        self._host_group: Any = None
        if comm.get_world_size() > 1 and torch.distributed.get_backend() != "gloo":
            self._host_group = torch.distributed.new_group(backend="gloo")

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
                self.settle()
            except BaseException as error:
                # Processes stop together at what is not finite, and at nothing else.
                if comm.get_world_size() == 1 or isinstance(error, NonFiniteError):
                    self._write_confirmed()
                raise
            finally:
                self.after_train()

    def run_step(self) -> None:
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        seed_sequence = np.random.SeedSequence([self.seed, self.iter, comm.get_rank()])
        seed_all_rng(int(seed_sequence.generate_state(1)[0]))
        parts: list[Part] = []
        training_step(
            batch,
            lambda part: self._forward(part, parts),
            self.optimizer,
            parts=self.gradient_accumulation_steps,
            scaler=self.grad_scaler,
            gradient_sync=self._gradient_sync,
            before_step=lambda losses: self._before_update(batch, data_time, parts, losses),
        )
        done = self.iter + 1
        if done % self.log_period == 0 or done >= self.max_iter:
            self.settle()

    def settle(self) -> None:
        """Wait until the last step is done and confirmed, and write the metrics up to it.

        Call it in every process, before the model, what is beside it or a metric of it is used.

        Raises:
            NonFiniteError: a loss or the gradient of that step was not finite. The model, the
                optimizer, the average and ``iter`` are those before it.
        """
        self._confirm()
        self._write_confirmed()

    def when_confirmed(self, action: Callable[[], None]) -> None:
        """Run an action that needs the weights of this step, once these are known to be final.

        That is now, or before the next update: the weights are those of this step. If the step is
        found to have failed, the action does not run.
        """
        if self._unread is None:
            action()
        else:
            self._actions.append(action)

    def _gradient_sync(self, last: bool) -> contextlib.AbstractContextManager:
        """Processes exchange gradients once per batch, with its last part."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return contextlib.nullcontext()

    def _forward(self, part: Any, parts: list[Part]) -> dict[str, Tensor]:
        """The losses of a part of a batch, which is added to ``parts``."""
        losses: dict[str, Tensor] = {}
        error = ""
        try:
            with autocast(self.device, self.amp_dtype):
                losses = self.model(part)
        except FloatingPointError as raised:  # detectron2 found NaN in predicted boxes
            error = f"{raised} (images: {image_names(part)})"
        if errors := self._all_errors(error):
            self._confirm()  # the step before may have failed already
            raise self._failure(self.iter, errors)
        detached = {name: loss.detach() for name, loss in losses.items()}
        parts.append(Part(detached, image_names(part)))
        return losses

    def _all_errors(self, error: str) -> str:
        """The messages of all processes, the same in each; "" if none has one."""
        if comm.get_world_size() == 1:
            return error
        flag = torch.tensor(int(bool(error)))
        torch.distributed.all_reduce(flag, group=self._host_group)
        return "; ".join(filter(None, comm.all_gather(error))) if flag else ""

    def _before_update(
        self, batch: Any, data_time: float, parts: list[Part], losses: Mapping[str, Tensor]
    ) -> Tensor | None:
        """Record, check and clip the gradients of a batch before the optimizer uses them.

        Returns:
            What :func:`training_step` skips the update by; None if it is checked already.
        """
        self.after_backward()
        if self.iter == self.start_iter:
            self._check_gradients()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        total = torch.nn.utils.get_total_norm(gradients)
        norm = total.full_tensor() if isinstance(total, DTensor) else total
        fp16 = self.grad_scaler.is_enabled()
        record = StepRecord(
            iteration=self.iter,
            data_time=data_time,
            parts=parts,
            losses=losses,
            norm=norm,
            images=image_names(batch),
            loss_scale=self.grad_scaler.scale(torch.ones_like(norm)) if fp16 else None,
        )
        self._confirm()  # the step before this one, while the device is busy with this one
        self._unread = record
        if not self.reads_later:
            self._confirm()
        else:
            self._undo = self._undo_of_step()
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.clip_norm, total)
        return record.skip if self.reads_later else None

    def _confirm(self) -> None:
        """Read what the last step measured; see :meth:`settle` for the errors."""
        record, self._unread = self._unread, None
        actions, self._actions = self._actions, []
        if record is None:
            return
        if message := record.failure():
            self._undo()
            raise self._failure(record.iteration, message)
        self._confirmed.append(record)
        for action in actions:
            action()

    def _undo_of_step(self) -> Callable[[], None]:
        """What restores the learning rates and the gradient scaler as they are now."""
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        scaler = self.grad_scaler
        tensors: list[Any] = []
        if scaler.is_enabled():
            # Its state_dict would wait for the device.
            tensors = [scaler._scale, scaler._growth_tracker]
        copies = [tensor.clone() for tensor in tensors]

        def undo() -> None:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.copy_(copy)

        return undo

    def _failure(self, iteration: int, message: str) -> NonFiniteError:
        """The error for an iteration, which becomes the current one again."""
        self.iter = iteration
        return NonFiniteError(f"training stopped at iteration {iteration}: {message}")

    def _write_confirmed(self) -> None:
        """Put the metrics of the confirmed steps into the storage: the means over all processes."""
        records, self._confirmed = self._confirmed, []
        if not records:
            return
        rows = comm.gather([(record.data_time, record.losses) for record in records])
        for index, record in enumerate(records):
            iteration = record.iteration
            self.storage.put_scalar("grad_norm", record.norm, cur_iter=iteration)
            self.storage.put_scalar("rank_data_time", record.data_time, cur_iter=iteration)
            if not comm.is_main_process():
                continue
            times, losses = zip(*(row[index] for row in rows), strict=True)
            means = {name: np.mean([part[name] for part in losses]) for name in losses[0]}
            self.storage.put_scalar("data_time", np.max(times), cur_iter=iteration)
            self.storage.put_scalar("total_loss", sum(means.values()), cur_iter=iteration)
            if len(means) > 1:
                self.storage.put_scalars(cur_iter=iteration, **means)

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

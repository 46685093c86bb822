"""Loading weights into a model: every tensor is accounted for, or nothing is changed.

A file holds either the whole model that it is loaded into, or a trunk, in any layout that
:mod:`~crossmae_det.checkpoint.published` knows: alone, in a pretraining model, or in a detector.
The trunk of any of these fits the trunk of any model.
"""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from crossmae_det.checkpoint.inspection import describe_trunk
from crossmae_det.checkpoint.mapped import release
from crossmae_det.checkpoint.names import OLD_BUFFERS, TITLES
from crossmae_det.checkpoint.parts import Parts
from crossmae_det.checkpoint.published import Native, translate
from crossmae_det.checkpoint.reading import extract_state_dict, read_checkpoint
from crossmae_det.checkpoint.report import Report
from crossmae_det.checkpoint.resizing import resized, saved_grid
from crossmae_det.checkpoint.sharded import distribute_like
from crossmae_det.modeling import ViT

# Layers of a detector that have a row for every class.
CLASS_DEPENDENT = re.compile(r"roi_heads\.(box_predictor(s\.\d+)?|mask_head\.predictor)\.")


def load(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    content: Mapping[str, Any] | None = None,
    whole: bool = False,
    exact: bool = False,
    weights: str = "model",
    prefix: str = "",
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> Report:
    """Load a checkpoint into a model, strictly.

    The file's trunk is loaded into the model's trunk. From a file of the same kind of model (a
    detector into a detector), so is every other part of that name, but for the last layers where
    the classes are others. The rest of the model stays as it is and is listed as initialised, the
    rest of the file is listed as dropped. Position embeddings, relative-position tables and patch
    kernels of another size are resampled. The grid of a position embedding is what the file says,
    as the checkpoints of runs do; without that, a number of positions that is a square is taken for
    a square grid (but for the sine-cosine table of the model's own grid), and of others only the
    number that the model has is loaded.

    Args:
        model: the model, in place. It must contain one ViT where the file is not the whole model's.
        path: what :func:`read_checkpoint` reads.
        content: what it has read there, where the caller needs more of it; None reads the file.
        whole: refuse a file that does not hold the whole model, as evaluation needs.
        exact: refuse to resample as well, as resuming needs.
        weights: "model", or "ema" for the averaged weights of a run.
        prefix: the part of the file to take, such as "teacher."; it may follow the path as well:
            see :func:`~crossmae_det.checkpoint.reading.extract_state_dict`.
        allow_missing: patterns as of a shell (``*``, ``?``, ``[...]``) of names in the model that
            the file may lack; they are listed as initialised.
        allow_unexpected: patterns of names in the file that may have no place in the model. A
            tensor of another shape that both allow is left as the model has it.

    Returns:
        What was loaded, resampled, initialised, dropped and unexpected.

    Raises:
        FileNotFoundError, OSError: the file is not there, or cannot be fetched.
        ValueError: the file cannot be read, or something in it is missing, unexpected or of another
            shape; the model is then unchanged.
    """
    if content is None:
        content = read_checkpoint(path)
    state = extract_state_dict(content, path, weights, prefix)
    plan = _Plan(model, path, allow_missing, allow_unexpected, saved_grid(content))
    new = plan.match(state, whole=whole, exact=exact)
    # Only now, when everything fits: a refused file leaves the model as it was.
    with torch.no_grad():
        for name, tensor in new.items():
            plan.target[name].copy_(distribute_like(tensor, plan.target[name]))
            release(tensor)
    return plan.report


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name is one of those that patterns as of a shell stand for."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


class _Plan:
    """Which tensor of a file goes where in a model; for the arguments see :func:`load`."""

    def __init__(
        self,
        model: nn.Module,
        path: str | PathLike[str],
        allow_missing: Sequence[str],
        allow_unexpected: Sequence[str],
        file_grid: tuple[int, int] | None,
    ):
        self.path = path
        self.file_grid = file_grid
        self.target: dict[str, Tensor] = model.state_dict()
        self.trunks = [
            f"{name}." if name else ""
            for name, module in model.named_modules()
            if isinstance(module, ViT)
        ]
        # (H, W) in patches of every table of positions, of a trunk or of a decoder, by its name.
        self.grids: dict[str, tuple[int, int]] = {
            f"{name}.pos_embed".lstrip("."): module.pos_grid
            for name, module in model.named_modules()
            if hasattr(module, "pos_grid")
        }
        self.allow_missing = allow_missing
        self.allow_unexpected = allow_unexpected
        self.report = Report(str(path))

    def match(self, state: dict[str, Tensor], *, whole: bool, exact: bool) -> dict[str, Tensor]:
        """The new value of every tensor of the model that the file has one for, in its shape."""
        native = self._translate(state)
        self.report.layout = TITLES.get(native.layout, native.layout)
        self.report.unexpected = native.unexpected
        parts = None
        if native.layout in TITLES:
            parts = Parts.of(native.tensors, native.trunk, self.target, self.trunks[0])
        sources: dict[str, str] = {}  # name in the model -> native name
        other_classes, strangers = set(), []
        for name, tensor in native.tensors.items():
            place = name if parts is None else parts.place(name)
            theirs = native.sources[name]
            if place in self.target:
                other_shape = tensor.shape != self.target[place].shape
                known = matches(place, self.allow_missing) and matches(
                    theirs, self.allow_unexpected
                )
                if other_shape and known:
                    self.report.unexpected.append(theirs)
                elif CLASS_DEPENDENT.match(place) and other_shape and not whole:
                    other_classes.add(place)
                    self.report.dropped.append(theirs)
                else:
                    sources[place] = name
            elif OLD_BUFFERS.match(name) or (
                parts is not None and parts.may_be_dropped(name) and not whole
            ):
                self.report.dropped.append(theirs)
            elif matches(theirs, self.allow_unexpected):
                self.report.unexpected.append(theirs)
            else:
                strangers.append(name)
        for name, tensor in self.target.items():
            if name in sources:
                continue
            usual = parts is not None and parts.may_be_missing(name) and not whole
            if not (usual or name in other_classes or matches(name, self.allow_missing)):
                raise self._refusal(
                    native,
                    f"the file has nothing for '{name}' {tuple(tensor.shape)} of the model",
                    "take the checkpoint of a whole model"
                    if whole
                    else f"--allow-missing '{name}' keeps its initial values",
                )
            self.report.initialised.append(name)
        if strangers:
            theirs = native.sources[strangers[0]]
            raise self._refusal(
                native,
                f"the model has no place for '{theirs}'"
                f" {tuple(native.tensors[strangers[0]].shape)}",
                f"--allow-unexpected '{theirs}' leaves it out",
            )
        return {name: self._fit(native, name, source, exact) for name, source in sources.items()}

    def _translate(self, state: dict[str, Tensor]) -> Native:
        """The file under native names; as it is where its names are the model's."""
        if state.keys() == self.target.keys():
            return Native("this model", state, {name: name for name in state})
        if len(self.trunks) != 1:
            first = min(state.keys() ^ self.target.keys())
            raise ValueError(
                f"{self.path} does not hold this model (only one of them has '{first}'), and the"
                f" model has {len(self.trunks)} plain ViTs to take a trunk, not one"
            )
        try:
            return translate(state, lambda name: matches(name, self.allow_unexpected))
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def _fit(self, native: Native, name: str, source: str, exact: bool) -> Tensor:
        """A tensor of the file in the shape of the model's, and an entry in the report."""
        tensor, target = native.tensors[source].detach(), self.target[name]
        new = None
        if tensor.is_floating_point() == target.is_floating_point() and not tensor.is_complex():
            grid = self.grids.get(name)
            file_grid = self.file_grid or (grid if exact else None)
            new = resized(name, tensor, target, grid, file_grid)
        if new is None or (exact and new is not tensor):
            kind = "" if tensor.is_floating_point() else f" of {tensor.dtype}"
            raise self._refusal(
                native,
                f"'{native.sources[source]}' is {tuple(tensor.shape)}{kind} in the file and"
                f" {tuple(target.shape)} in the model",
                f"take a checkpoint of this model, or name both: --allow-missing '{name}'"
                f" --allow-unexpected '{native.sources[source]}'",
            )
        if new is tensor:
            self.report.loaded.append(name)
        else:
            self.report.resampled.append(name)
            self.report.shapes[name] = (tuple(tensor.shape), tuple(target.shape))
        return new

    def _refusal(self, native: Native, problem: str, advice: str) -> ValueError:
        """One line: the file and what it was taken for, the first problem, and what would do."""
        taken_for = TITLES.get(native.layout)
        if taken_for:
            theirs = describe_trunk(native.tensors, native.trunk)
            ours = describe_trunk(self.target, self.trunks[0])
            if theirs != ours:
                advice = (
                    f"the file's trunk is {theirs} and the model's {ours}: make the model of that"
                    " size, or take a checkpoint of the model's"
                )
        return ValueError(
            f"{self.path}{f' (taken for: {taken_for})' if taken_for else ''}: {problem}; {advice}"
        )

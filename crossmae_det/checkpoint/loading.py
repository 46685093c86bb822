"""What a load did with every tensor.

How the parts of a checkpoint lie to the parts of a model, which may be of another kind.

Memory of tensors that lie in a mapped file.

Tensors that are spread over processes: whole in a file, in parts in a model.

Tensors of a checkpoint in the sizes of a model.

Legend: L patches on a grid, C channels of the backbone, B channels of an image.

Loading weights into a model: every tensor is accounted for, or nothing is changed.

A file holds either the whole model that it is loaded into, or a backbone, in any layout that
:mod:`~crossmae_det.checkpoint.layouts` knows: alone, in a pretraining model, or in a detector.
The backbone of any of these fits the backbone of any model.
"""

import ctypes
import mmap
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from os import PathLike
from typing import Any

import torch
from tabulate import tabulate
from timm.layers.patch_embed import resample_patch_embed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from crossmae_det.checkpoint.layouts import (
    OLD_BUFFERS,
    RELATIVE_POSITION,
    TITLES,
    Native,
    describe_backbone,
    square_side,
    translate,
    with_class_row,
)
from crossmae_det.checkpoint.reading import extract_state_dict, read_checkpoint
from crossmae_det.layers.attention_backends import resample_table
from crossmae_det.layers.position_embedding import (
    resample_position_embedding,
    sincos_position_embedding,
)
from crossmae_det.modeling import ViT


@dataclass
class Report:
    """Names of the tensors, by what became of them.

    Attributes:
        path: the file.
        layout: what it was taken for.
        loaded: names in the model.
        resampled: names in the model of what was loaded at another size.
        initialized: names in the model of what is not in the file, and stays as the model had it.
        dropped: names in the file of what the model has no use for.
        unexpected: names in the file that have no place, and that the caller allowed.
        shapes: of each resampled tensor, its shape in the file and in the model.
    """

    path: str
    layout: str = ""
    loaded: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)
    initialized: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    def __str__(self) -> str:
        table = [
            (label, len(names), _summary(names))
            for label, names in (
                ("loaded", self.loaded),
                ("resampled", self.resampled),
                ("initialized", self.initialized),
                ("dropped", self.dropped),
                ("unexpected", self.unexpected),
            )
        ]
        lines = [
            f"weights from {self.path} ({self.layout})",
            tabulate(table, headers=["", "tensors", "names"], tablefmt="simple"),
            *(f"resampled {name}: {old} -> {new}" for name, (old, new) in self._first_shapes()),
        ]
        return "\n".join(lines)

    def _first_shapes(self) -> list[tuple[str, tuple]]:
        """One tensor of each kind of resampling: a table of every block would fill the screen."""
        first: dict[tuple, str] = {}
        for name, shapes in self.shapes.items():
            first.setdefault((name.rpartition(".")[2], shapes), name)
        return [(name, shapes) for (_, shapes), name in first.items()]

    def to_dict(self) -> dict[str, Any]:
        """The whole report in types that JSON has."""
        return asdict(self)


def _summary(names: Sequence[str], longest: int = 5) -> str:
    """The first parts that the names share, so that a line tells 200 tensors from one another."""
    groups = list(dict.fromkeys(".".join(name.split(".")[:3]) for name in names))
    shown = ", ".join(groups[:longest])
    return f"{shown}, and {len(groups) - longest} more" if len(groups) > longest else shown


# Beside a backbone: detectron2's parts have two names ("roi_heads.mask_head"), a decoder has one.
# The norm after MAE's encoder is a part of its own: files of encoders have it, and no decoder.
PART = re.compile(r"decoder\.encoder_norm|decoder|[^.]+(\.[^.]+)?")


@dataclass(frozen=True)
class Parts:
    """Where tensors of a file go in a model. Names are native.

    Attributes:
        source: prefix of the backbone in the file.
        target: prefix of the backbone in the model.
        inside: names inside the model's backbone.
        same_kind: whether what is beside the backbone means the same in both: only then is it
            loaded.
        in_file: parts beside the backbone that the file has.
        in_model: parts beside the backbone that the model has.
    """

    source: str
    target: str
    inside: frozenset[str]
    same_kind: bool
    in_file: frozenset[str]
    in_model: frozenset[str]

    @classmethod
    def of(
        cls, file: Mapping[str, Tensor], source: str, model: Mapping[str, Tensor], target: str
    ) -> "Parts":
        """The parts of a file and a model, by their names and the prefixes of their backbones."""
        return cls(
            source,
            target,
            frozenset(_backbone_names(model, target)),
            source == target and _decoder_kind(file) in (_decoder_kind(model), None),
            frozenset(_part(name) for name in file if not name.startswith(source)),
            frozenset(_part(name) for name in model if not name.startswith(target)),
        )

    def place(self, name: str) -> str | None:
        """The name in the model of a tensor of the file; None where there is none."""
        if name.startswith(self.source):
            inside = name.removeprefix(self.source)
            return self.target + inside if inside in self.inside else None
        return name if self.same_kind else None

    def may_be_dropped(self, name: str) -> bool:
        """Whether the model's lack of a tensor of the file is in the nature of the two.

        A model for maps has no class token; what is beside the backbone is of use to the same kind
        of model only, and there if it has that part at all.
        """
        if name.startswith(self.source):
            return name == f"{self.source}cls_token"
        return not (self.same_kind and _part(name) in self.in_model)

    def may_be_missing(self, name: str) -> bool:
        """Whether the file's lack of a tensor of the model is in the nature of the two.

        Relative positions start from zeros after pretraining, which has none.
        """
        if name.startswith(self.target) and name.removeprefix(self.target) in self.inside:
            return RELATIVE_POSITION.search(name) is not None
        return not (self.same_kind and _part(name) in self.in_file)


def _backbone_names(model: Mapping[str, Tensor], prefix: str) -> Iterable[str]:
    inside = re.compile(r"(cls_token|pos_embed|patch_embed\..+|blocks\..+)$")
    names = (name.removeprefix(prefix) for name in model if name.startswith(prefix))
    return (name for name in names if inside.match(name))


def _part(name: str) -> str:
    match = PART.match(name)
    return match[0] if match else name


def _decoder_kind(state: Mapping[str, Tensor]) -> str | None:
    """CrossMAE's decoder and MAE's share names, but not what they stand for."""
    for kind, mark in (("crossmae", "decoder.feature_"), ("mae", "decoder.embed.")):
        if any(name.startswith(mark) for name in state):
            return kind
    return None


# <linux/mman.h>, since Linux 5.4. It moves memory out and never changes what is read.
MADV_PAGEOUT = 21


def release(tensor: Tensor) -> None:
    """Give back the memory that holds what has been read of a tensor in a mapped file.

    It would count as this process's for as long as the file is mapped: at the end of a load, the
    whole file beside the model. Read again, it comes from the file again. An advice: where the
    system does not know it, nothing happens.
    """
    if not sys.platform.startswith("linux") or not tensor.is_contiguous():
        return
    begin, page = tensor.data_ptr(), mmap.PAGESIZE
    first, last = -(-begin // page) * page, (begin + tensor.nbytes) // page * page  # whole pages
    if first < last:
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_PAGEOUT
        )


def gather(content: Any) -> Any:
    """What a checkpoint holds, with whole tensors in place of those that are spread.

    Every process of the job must call it, with the same content. One tensor at a time is whole on
    the device.

    Args:
        content: dicts, lists, tensors and plain values, nested.

    Returns:
        The same, with tensors that were spread on the CPU.
    """
    if isinstance(content, DTensor):
        return content.full_tensor().cpu()
    if isinstance(content, dict):
        return {key: gather(value) for key, value in content.items()}
    if isinstance(content, list):
        return [gather(value) for value in content]
    return content


def distribute_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor in the parts that ``like`` is in; as it is where that is whole.

    Every process of the job must call it, with the same whole tensor of the shape of ``like``.
    """
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device, like.dtype), like.device_mesh, like.placements)


# Where a checkpoint tells the grid (H, W) in patches of its position embeddings.
POSITION_GRID = "position_grid"

Grid = tuple[int, int]


def position_grid(model: nn.Module) -> dict[str, list[int]]:
    """The entry of a checkpoint that tells the grid of the model's position embeddings.

    A table of 36 positions does not tell 6 x 6 from 4 x 9. Empty for a model without a ViT.
    """
    for module in model.modules():
        if (grid := getattr(module, "pos_grid", None)) is not None:
            return {POSITION_GRID: list(grid)}
    return {}


def saved_grid(content: Mapping[str, Any]) -> Grid | None:
    """The grid that a checkpoint tells with :func:`position_grid`; None where it does not."""
    match content.get(POSITION_GRID):
        case [int(height), int(width)] if height > 0 and width > 0:
            return height, width
    return None


def resized(
    name: str, tensor: Tensor, target: Tensor, grid: Grid | None, file_grid: Grid | None
) -> Tensor | None:
    """A tensor in the shape of ``target``.

    Position embeddings are resampled bicubically, relative positions linearly, and patch kernels so
    that an enlarged patch is embedded as the patch was (FlexiViT,
    https://arxiv.org/abs/2212.08013).

    Args:
        name: of the tensor in the model.
        tensor: of the file.
        target: of the model.
        grid: (H, W) in patches where the tensor is a position embedding (1, 1 + L, C), else None.
        file_grid: the grid of the file's position embeddings where it is known. Else it is the
            model's, if the table is the sine-cosine table of that; then a square one, if the number
            of positions allows it; then the model's, if that has as many positions.

    Returns:
        The tensor itself where it has that shape, and None where it is nothing that can be resized.
    """
    if grid is not None and _is_table(tensor) and tensor.shape[-1] == target.shape[-1]:
        return _resized_positions(tensor, grid, file_grid)
    if tensor.shape == target.shape:
        return tensor
    if tensor.ndim != target.ndim or 0 in tensor.shape:
        return None
    if name.endswith("patch_embed.proj.weight"):
        same_channels = tensor.shape[:2] == target.shape[:2]
        return (
            resample_patch_embed(tensor.float(), list(target.shape[2:])) if same_channels else None
        )
    if tensor.shape[-1] != target.shape[-1]:
        return None
    if RELATIVE_POSITION.search(name) and tensor.ndim == 2:
        return resample_table(tensor.float(), (len(target) + 1) // 2)
    return None


def _is_table(tensor: Tensor) -> bool:
    return tensor.ndim == 3 and len(tensor) == 1 and 0 not in tensor.shape


def _resized_positions(tensor: Tensor, grid: Grid, file_grid: Grid | None) -> Tensor | None:
    """A position embedding (1, L, C) or (1, 1 + L, C) of a file on the grid of a model."""
    length = grid[0] * grid[1]
    told = 0 if file_grid is None else file_grid[0] * file_grid[1]
    table = tensor
    if tensor.shape[1] == length and told != length - 1:
        table = with_class_row(tensor.float())
    count, side = table.shape[1] - 1, square_side(table)
    if file_grid is not None and told == count:
        old = file_grid
    elif count == length and (side is None or _is_sincos(table, grid)):
        old = grid
    elif side is not None:
        old = (side, side)
    else:
        return None
    return table if old == grid else resample_position_embedding(table.float(), old, grid)


def _is_sincos(table: Tensor, grid: Grid) -> bool:
    """Whether a table (1, 1 + H * W, C) is that of a pretraining run, which is never trained."""
    if table.shape[-1] % 4:
        return False
    expected = sincos_position_embedding(table.shape[-1], grid)
    return torch.allclose(table[:, 1:].float(), expected[:, 1:], atol=0.01)  # also from bf16


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

    The file's backbone is loaded into the model's backbone. From a file of the same kind of model
    (a detector into a detector), so is every other part of that name, but for the last layers where
    the classes are others. The rest of the model stays as it is and is listed as initialized, the
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
            the file may lack; they are listed as initialized.
        allow_unexpected: patterns of names in the file that may have no place in the model. A
            tensor of another shape that both allow is left as the model has it.

    Returns:
        What was loaded, resampled, initialized, dropped and unexpected.

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
        self.backbones = [
            f"{name}." if name else ""
            for name, module in model.named_modules()
            if isinstance(module, ViT)
        ]
        # (H, W) in patches of every table of positions, of a backbone or of a decoder, by its name.
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
            parts = Parts.of(native.tensors, native.backbone, self.target, self.backbones[0])
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
            self.report.initialized.append(name)
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
        if len(self.backbones) != 1:
            first = min(state.keys() ^ self.target.keys())
            raise ValueError(
                f"{self.path} does not hold this model (only one of them has '{first}'), and the"
                f" model has {len(self.backbones)} plain ViTs to take a backbone, not one"
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
            theirs = describe_backbone(native.tensors, native.backbone)
            ours = describe_backbone(self.target, self.backbones[0])
            if theirs != ours:
                advice = (
                    f"the file's backbone is {theirs} and the model's {ours}: make the model of"
                    " that size, or take a checkpoint of the model's"
                )
        return ValueError(
            f"{self.path}{f' (taken for: {taken_for})' if taken_for else ''}: {problem}; {advice}"
        )

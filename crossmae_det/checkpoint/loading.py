"""Loading weights into a model: every tensor is accounted for, or nothing changes.

A file holds either the whole model, or a backbone in any layout of
:mod:`~crossmae_det.checkpoint.layouts`: alone, in a pretraining model, or in a detector. The
backbone of any of these fits the backbone of any model. Keys in a file are source keys, those in
the model target keys.

Legend: L patches on a grid, C channels.
"""

import ctypes
import mmap
import re
import sys
from collections.abc import Mapping, Sequence
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
    LAYOUTS,
    RELATIVE_POSITION,
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

Grid = tuple[int, int]  # (H, W) in patches

# The entry of a checkpoint with the grid of its position embeddings.
POSITION_GRID = "position_grid"

# Keys of a plain ViT, below the prefix of the backbone.
BACKBONE_KEY = re.compile(r"(cls_token|pos_embed|patch_embed\..+|blocks\..+)$")

# A part outside of the backbone: two components of a key in detectron2 ("roi_heads.mask_head"), one
# for a decoder. The norm after MAE's encoder is a separate part, which encoder files have, too.
PART = re.compile(r"decoder\.encoder_norm|decoder|[^.]+(\.[^.]+)?")

# Layers of a detector with a row for every class.
CLASS_DEPENDENT = re.compile(r"roi_heads\.(box_predictor(s\.\d+)?|mask_head\.predictor)\.")

# Buffers that detectron2 no longer saves; they are not learned.
OLD_BUFFERS = re.compile(
    r"pixel_(mean|std)$|proposal_generator\.anchor_generator\.cell_anchors\.\d+$"
)

MADV_PAGEOUT = 21  # <linux/mman.h>, since Linux 5.4


@dataclass
class Report:
    """What happened to every tensor.

    Attributes:
        path: the file.
        layout: the layout that was recognized.
        loaded: target keys with the values of the file.
        resampled: target keys with resampled values of the file.
        initialized: target keys that the file lacks; they keep the values of the model.
        dropped: source keys that the model does not use.
        unexpected: source keys that the model does not have, and that the caller allowed.
        shapes: target key -> shapes in the file and in the model, of resampled tensors.
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
        names = ("loaded", "resampled", "initialized", "dropped", "unexpected")
        rows = [(name, len(keys := getattr(self, name)), _summary(keys)) for name in names]
        # One tensor of each kind of resampling: not a line for every block.
        first = {(k.rpartition(".")[2], shapes): k for k, shapes in reversed(self.shapes.items())}
        resampled = [k for k in self.shapes if k in first.values()]
        return "\n".join(
            [
                f"weights from {self.path} ({self.layout})",
                tabulate(rows, headers=["", "tensors", "names"], tablefmt="simple"),
                *(f"resampled {k}: {' -> '.join(map(str, self.shapes[k]))}" for k in resampled),
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """All attributes as JSON-compatible types."""
        return asdict(self)


def _summary(keys: Sequence[str], longest: int = 5) -> str:
    """The first components of keys, once each, so that one line describes hundreds of keys."""
    groups = list(dict.fromkeys(".".join(key.split(".")[:3]) for key in keys))
    shown = ", ".join(groups[:longest])
    return f"{shown}, and {len(groups) - longest} more" if len(groups) > longest else shown


def matches(key: str, patterns: Sequence[str]) -> bool:
    """Whether a key matches one of several shell patterns (``*``, ``?``, ``[...]``)."""
    return any(fnmatchcase(key, pattern) for pattern in patterns)


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

    The backbone of the file is loaded into the backbone of the model. From a file of the same kind
    of model (a detector into a detector), so are all parts that both have, except for the last
    layers where the number of classes differs. The rest of the model is listed as initialized, the
    rest of the file as dropped.

    Position embeddings, relative-position tables and patch kernels of another size are resampled.
    Checkpoints of runs record the grid of their position embeddings. Without that record, a square
    number of positions is taken as a square grid, unless the table is the sine-cosine table of the
    model's grid; any other number must be that of the model.

    Args:
        model: changed in place. It must have one ViT, unless the file holds the whole model.
        path: see :func:`~crossmae_det.checkpoint.read_checkpoint`; a prefix may follow it.
        content: what :func:`read_checkpoint` returned for ``path``; None reads it.
        whole: reject a file that lacks a part of the model, as evaluation needs.
        exact: reject resampling, as resuming needs.
        weights: "model", or "ema" for the averaged weights of a run.
        prefix: the part of the file to load, such as "teacher.", see
            :func:`~crossmae_det.checkpoint.extract_state_dict`.
        allow_missing: shell patterns of target keys that the file may lack.
        allow_unexpected: shell patterns of source keys that the model may lack. A tensor of another
            shape that both patterns allow keeps the values of the model.

    Raises:
        FileNotFoundError, OSError: the file does not exist, or cannot be downloaded.
        ValueError: the file cannot be read, or a tensor is missing, unexpected or of another shape;
            the model is unchanged.
    """
    if content is None:
        content = read_checkpoint(path)
    state = extract_state_dict(content, path, weights, prefix)
    matcher = _Matcher(model, path, state, allow_missing, allow_unexpected)
    values = matcher.match(saved_grid(content), whole=whole, exact=exact)
    # After all checks: an error leaves the model unchanged.
    with torch.no_grad():
        for key, value in values.items():
            matcher.target[key].copy_(distribute_like(value, matcher.target[key]))
            _release(value)
    return matcher.report


class _Matcher:
    """Finds the target key of every tensor of a file; for the arguments see :func:`load`."""

    def __init__(
        self,
        model: nn.Module,
        path: str | PathLike[str],
        state: dict[str, Tensor],
        allow_missing: Sequence[str],
        allow_unexpected: Sequence[str],
    ):
        self.path = path
        self.allow_missing, self.allow_unexpected = allow_missing, allow_unexpected
        self.report = Report(str(path))
        self.target: dict[str, Tensor] = model.state_dict()
        modules = dict(model.named_modules())
        self.grids: dict[str, Grid] = {
            f"{name}.pos_embed".lstrip("."): module.pos_grid
            for name, module in modules.items()
            if hasattr(module, "pos_grid")
        }
        self.source_prefix, self.target_prefix = "", ""
        # Whether parts beside the backbone mean the same in both, and which parts they have.
        self.same_kind = self.same_model = state.keys() == self.target.keys()
        self.file_parts, self.target_parts = set[str](), set[str]()
        if self.same_model:
            self.native = Native("", state, {key: key for key in state})
            self.report.layout = "this model"
            return
        vits = [f"{name}." if name else "" for name, m in modules.items() if isinstance(m, ViT)]
        if len(vits) != 1:
            first = min(state.keys() ^ self.target.keys())
            raise ValueError(
                f"{path} is not a checkpoint of this model (only one of them has '{first}'), and"
                f" loading a backbone needs one plain ViT in the model, not {len(vits)}: use a"
                " checkpoint of the whole model"
            )
        try:
            self.native = translate(state, lambda key: matches(key, allow_unexpected))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        self.report.layout = LAYOUTS[self.native.layout].title
        self.report.unexpected = self.native.unexpected
        self.source_prefix, self.target_prefix = self.native.backbone, vits[0]
        file_decoder, decoder = _decoder_kind(self.native.tensors), _decoder_kind(self.target)
        self.same_kind = self.source_prefix == vits[0] and file_decoder in (decoder, None)
        self.file_parts = _parts(self.native.tensors, self.source_prefix)
        self.target_parts = _parts(self.target, self.target_prefix)

    def match(self, file_grid: Grid | None, *, whole: bool, exact: bool) -> dict[str, Tensor]:
        """Target key -> new value, for every tensor of the model that the file has."""
        native, report = self.native, self.report
        found: dict[str, str] = {}  # target key -> native key
        other_classes, unexpected = set(), []
        for key, tensor in native.tensors.items():
            target, source = self._target_key(key), native.sources[key]
            is_allowed = matches(source, self.allow_unexpected)
            if target in self.target:
                other_shape = tensor.shape != self.target[target].shape
                if other_shape and is_allowed and matches(target, self.allow_missing):
                    report.unexpected.append(source)
                elif other_shape and CLASS_DEPENDENT.match(target) and not whole:
                    other_classes.add(target)
                    report.dropped.append(source)
                else:
                    found[target] = key
            elif OLD_BUFFERS.match(key) or (self._may_be_dropped(key) and not whole):
                report.dropped.append(source)
            elif is_allowed:
                report.unexpected.append(source)
            else:
                unexpected.append(key)
        for target, tensor in self.target.items():
            if target in found:
                continue
            usual = target in other_classes or (self._may_be_missing(target) and not whole)
            if not usual and not matches(target, self.allow_missing):
                raise self._error(
                    f"the file lacks '{target}' {tuple(tensor.shape)} of the model",
                    "use a checkpoint of a whole model"
                    if whole
                    else f"--allow-missing '{target}' keeps its initial values",
                )
            report.initialized.append(target)
        if unexpected:
            source = native.sources[unexpected[0]]
            shape = tuple(native.tensors[unexpected[0]].shape)
            raise self._error(
                f"the model lacks '{source}' {shape} of the file",
                f"--allow-unexpected '{source}' leaves it out",
            )
        return {t: self._fitted(t, key, file_grid, exact) for t, key in found.items()}

    def _target_key(self, key: str) -> str | None:
        """The target key of a native key, None if there is none."""
        if self.same_kind:
            return key
        inside = key.removeprefix(self.source_prefix)
        in_backbone = key.startswith(self.source_prefix) and BACKBONE_KEY.match(inside)
        return self.target_prefix + inside if in_backbone else None

    def _may_be_dropped(self, key: str) -> bool:
        """Whether the model lacks a tensor of the file by its nature.

        The feature-map path has no class token. Parts outside of the backbone are used only by the
        same kind of model, if it has them.
        """
        if key.startswith(self.source_prefix):
            return key == f"{self.source_prefix}cls_token"
        return not (self.same_kind and _part(key) in self.target_parts)

    def _may_be_missing(self, target: str) -> bool:
        """Whether the file lacks a tensor of the model by its nature.

        Pretraining has no relative positions, which start from zeros.
        """
        inside = target.removeprefix(self.target_prefix)
        if target.startswith(self.target_prefix) and BACKBONE_KEY.match(inside):
            return RELATIVE_POSITION.search(target) is not None
        return not (self.same_kind and _part(target) in self.file_parts)

    def _fitted(self, target_key: str, key: str, file_grid: Grid | None, exact: bool) -> Tensor:
        """A tensor of the file in the shape of the model's, listed in the report."""
        tensor, target = self.native.tensors[key].detach(), self.target[target_key]
        new, grid = None, self.grids.get(target_key)
        if tensor.is_floating_point() == target.is_floating_point() and not tensor.is_complex():
            known_grid = file_grid or (grid if exact else None)
            new = _resized(target_key, tensor, target, grid, known_grid)
        if new is None or (exact and new is not tensor):
            source = self.native.sources[key]
            kind = "" if tensor.is_floating_point() else f" of {tensor.dtype}"
            raise self._error(
                f"'{source}' is {tuple(tensor.shape)}{kind} in the file and"
                f" {tuple(target.shape)} in the model",
                f"use a checkpoint of this model, or keep the initial values with --allow-missing"
                f" '{target_key}' --allow-unexpected '{source}'",
            )
        if new is tensor:
            self.report.loaded.append(target_key)
        else:
            self.report.resampled.append(target_key)
            self.report.shapes[target_key] = (tuple(tensor.shape), tuple(target.shape))
        return new

    def _error(self, problem: str, advice: str) -> ValueError:
        """One line: the file and its layout, the problem, and what to do."""
        if self.same_model:
            return ValueError(f"{self.path}: {problem}: {advice}")
        in_file = describe_backbone(self.native.tensors, self.source_prefix)
        in_model = describe_backbone(self.target, self.target_prefix)
        if in_file != in_model:
            advice = (
                f"the file's backbone is {in_file} and the model's {in_model}, use a model or a"
                " checkpoint of the other size"
            )
        return ValueError(f"{self.path} (layout: {self.report.layout}): {problem}: {advice}")


def _parts(state: Mapping[str, Tensor], prefix: str) -> set[str]:
    """The parts outside of a backbone."""
    return {_part(key) for key in state if not key.startswith(prefix)}


def _part(key: str) -> str:
    match = PART.match(key)
    return match[0] if match else key


def _decoder_kind(state: Mapping[str, Tensor]) -> str | None:
    """Which decoder a model has; CrossMAE's and MAE's share keys of different meanings."""
    for kind, start in (("crossmae", "decoder.feature_"), ("mae", "decoder.embed.")):
        if any(key.startswith(start) for key in state):
            return kind
    return None


# Position grids and resampling


def position_grid(model: nn.Module) -> dict[str, list[int]]:
    """The entry of a checkpoint that records the grid of the model's position embeddings.

    Their number does not determine it: 36 may be 6 x 6 or 4 x 9. Empty for a model without a ViT.
    """
    for module in model.modules():
        if (grid := getattr(module, "pos_grid", None)) is not None:
            return {POSITION_GRID: list(grid)}
    return {}


def saved_grid(content: Mapping[str, Any]) -> Grid | None:
    """The grid that a checkpoint records with :func:`position_grid`, None without a record."""
    match content.get(POSITION_GRID):
        case [int(height), int(width)] if height > 0 and width > 0:
            return height, width
    return None


def _resized(
    key: str, tensor: Tensor, target: Tensor, grid: Grid | None, file_grid: Grid | None
) -> Tensor | None:
    """A tensor resampled to the shape of ``target``; unchanged if it fits, None if impossible.

    Position embeddings are resampled bicubically, relative positions linearly, and patch kernels so
    that an enlarged patch has the same embedding (FlexiViT, https://arxiv.org/abs/2212.08013).

    ``grid`` is that of the model, None unless ``key`` is a position embedding (1, 1 + L, C);
    ``file_grid`` is that of the file, if known.
    """
    is_position = grid is not None and tensor.ndim == 3 and len(tensor) == 1
    if is_position and 0 not in tensor.shape and tensor.shape[-1] == target.shape[-1]:
        return _resized_position(tensor, grid, file_grid)  # type: ignore[arg-type]
    if tensor.shape == target.shape:
        return tensor
    if tensor.ndim != target.ndim or 0 in tensor.shape:
        return None
    if key.endswith("patch_embed.proj.weight") and tensor.shape[:2] == target.shape[:2]:
        return resample_patch_embed(tensor.float(), list(target.shape[2:]))
    if RELATIVE_POSITION.search(key) and tensor.ndim == 2 and tensor.shape[1] == target.shape[1]:
        return resample_table(tensor.float(), (len(target) + 1) // 2)
    return None


def _resized_position(tensor: Tensor, grid: Grid, file_grid: Grid | None) -> Tensor | None:
    """A position embedding (1, L, C) or (1, 1 + L, C) of a file, on the grid of a model.

    The grid of the file is the first of these that has as many positions: ``file_grid``; the
    model's, if the table is its sine-cosine table; a square; the model's.
    """
    length = grid[0] * grid[1]
    file_length = 0 if file_grid is None else file_grid[0] * file_grid[1]
    table = tensor
    if tensor.shape[1] == length and file_length != length - 1:
        table = with_class_row(tensor.float())
    count, side = table.shape[1] - 1, square_side(table)
    if file_grid is not None and file_length == count:
        old = file_grid
    elif count == length and (side is None or _is_sincos(table, grid)):
        old = grid
    elif side is not None:
        old = (side, side)
    else:
        return None
    return table if old == grid else resample_position_embedding(table.float(), old, grid)


def _is_sincos(table: Tensor, grid: Grid) -> bool:
    """Whether a table (1, 1 + L, C) is the sine-cosine one, which pretraining does not train."""
    if table.shape[-1] % 4:
        return False
    expected = sincos_position_embedding(table.shape[-1], grid)
    return torch.allclose(table[:, 1:].float(), expected[:, 1:], atol=0.01)  # also from bf16


# Memory and processes


def _release(tensor: Tensor) -> None:
    """Page out a tensor of a memory-mapped file after it has been read.

    Otherwise its pages count as memory of this process until the file is unmapped: in the end, the
    whole file in addition to the model. They are read again if needed; systems may ignore this.
    """
    if not sys.platform.startswith("linux") or not tensor.is_contiguous():
        return
    start, page = tensor.data_ptr(), mmap.PAGESIZE
    first, last = -(-start // page) * page, (start + tensor.nbytes) // page * page  # whole pages
    if first < last:
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_PAGEOUT
        )


def gather(content: Any) -> Any:
    """Replace sharded tensors in a checkpoint by whole ones on the CPU.

    Every process must call it with the same content. One tensor at a time is whole on the device.

    Args:
        content: dicts, lists, tensors and plain values, nested.
    """
    if isinstance(content, DTensor):
        return content.full_tensor().cpu()
    if isinstance(content, dict):
        return {key: gather(value) for key, value in content.items()}
    if isinstance(content, list):
        return [gather(value) for value in content]
    return content


def distribute_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a whole tensor as ``like`` is sharded; if ``like`` is whole, return it unchanged.

    Every process must call it with the same tensor of the shape of ``like``.
    """
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device, like.dtype), like.device_mesh, like.placements)

"""Inspecting a checkpoint without building a model, and writing it in another layout or format."""

import pickle
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from tabulate import tabulate
from torch import Tensor

from crossmae_det.checkpoint.layouts import (
    LAYOUTS,
    depth_of,
    export,
    size_of,
    square_side,
    translate,
)
from crossmae_det.checkpoint.loading import POSITION_GRID, Report, matches, saved_grid
from crossmae_det.checkpoint.reading import (
    checkpoint_files,
    extract_state_dict,
    read_checkpoint,
)
from crossmae_det.modeling import SIZES
from crossmae_det.utils.files import atomic_path, save_checkpoint

# Layouts to convert to. "safetensors" is the native layout in a file of that format.
TARGETS = ("native", "published", "timm", "vitdet", "huggingface", "safetensors")

# Layouts whose readers expect the tensors at the top level of a file, not under "model".
FLAT_LAYOUTS = ("timm", "huggingface")

# Types that numpy lacks; float32 represents all their values.
NOT_IN_NUMPY = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)

# Options of a pretraining command line that are worth showing, in :class:`CheckpointInfo`.
TRAINING_OPTIONS = ("model", "mask_ratio", "kept_mask_ratio", "epochs", "norm_pix_loss")


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint holds; None where the file does not tell.

    Attributes:
        layout: the naming scheme of the tensors, a title in
            :data:`~crossmae_det.checkpoint.layouts.LAYOUTS`.
        size: name in :data:`~crossmae_det.modeling.SIZES`.
        embed_dim: channels of the backbone.
        depth: blocks of the backbone.
        num_heads: attention heads; known only from relative positions or a named size.
        mlp_ratio: hidden channels of the MLPs over ``embed_dim``.
        patch_size: (H, W) in pixels.
        in_chans: channels of an image.
        class_token: whether the backbone has a class token.
        positions: rows of the position embedding, including that of the class token.
        img_size: (H, W) in pixels of the images that the position embedding covers.
        rel_pos_sizes: sides in patches that the relative-position tables cover, ascending.
        decoder: "CrossMAE" or "MAE".
        decoder_dim: channels of the decoder.
        decoder_depth: blocks of the decoder.
        decoder_features: encoder features that CrossMAE's decoder combines.
        decoder_self_attention: whether CrossMAE's decoder has it.
        classifier_rows: outputs of a classifier or of a detector's box classifier.
        parts: top-level names beside the backbone and the decoder.
        tensors: number of tensors.
        parameters: number of values in all tensors.
        backbone_parameters: number of values in the tensors of the backbone.
        dtypes: types of the tensors.
        entries: top-level entries of the file, where it holds more than tensors.
        options: recorded command-line options of the pretraining run.
        unexpected: tensors that a plain ViT does not have.
    """

    layout: str
    size: str | None = None
    embed_dim: int
    depth: int
    num_heads: int | None = None
    mlp_ratio: float | None = None
    patch_size: tuple[int, int]
    in_chans: int
    class_token: bool
    positions: int | None = None
    img_size: tuple[int, int] | None = None
    rel_pos_sizes: list[int] | None = None
    decoder: str | None = None
    decoder_dim: int | None = None
    decoder_depth: int | None = None
    decoder_features: int | None = None
    decoder_self_attention: bool | None = None
    classifier_rows: int | None = None
    parts: list[str]
    tensors: int
    parameters: int
    backbone_parameters: int
    dtypes: list[str]
    entries: list[str]
    options: dict[str, str]
    unexpected: list[str]

    def to_dict(self) -> dict[str, Any]:
        """All attributes as JSON-compatible types."""
        return asdict(self)

    def __str__(self) -> str:
        """The known attributes as a table, for the terminal."""
        rows = []
        for name, value in asdict(self).items():
            if isinstance(value, dict):
                value = [f"{key}={option}" for key, option in value.items()]
            if isinstance(value, list | tuple):
                value = ", ".join(map(str, value[:8])) + (", ..." if len(value) > 8 else "")
            elif isinstance(value, bool):
                value = "yes" if value else "no"
            elif isinstance(value, int):
                value = f"{value:,}"
            if value not in (None, ""):
                rows.append((name.replace("_", " "), value))
        return tabulate(rows, tablefmt="plain", disable_numparse=True)


def inspect(
    path: str | PathLike[str], *, weights: str = "model", prefix: str = ""
) -> CheckpointInfo:
    """Describe a checkpoint from its tensors; no model is built.

    Args:
        path: see :func:`~crossmae_det.checkpoint.read_checkpoint`.
        weights, prefix: the part to describe, see
            :func:`~crossmae_det.checkpoint.extract_state_dict`.

    Raises:
        FileNotFoundError, OSError, ValueError: the file cannot be read, or holds no plain ViT.
    """
    content = read_checkpoint(path)
    state = extract_state_dict(content, path, weights, prefix)
    try:
        native = translate(state, lambda name: True)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    prefix, tensors = native.backbone, native.tensors
    backbone = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    rest = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
    classifiers = (
        len(v) for k, v in rest.items() if re.fullmatch(r"head\.weight|.*cls_score\.weight", k)
    )
    entries = sorted(key[:80] for key in content if isinstance(key, str) and key.isprintable())
    args = content.get("args")
    options = vars(args) if isinstance(args, Namespace) else {}
    return CheckpointInfo(
        layout=LAYOUTS[native.layout].title,
        **_backbone_sizes(backbone, saved_grid(content)),
        **_decoder_sizes(rest),
        classifier_rows=next(classifiers, None),
        parts=sorted({key.partition(".")[0] for key in rest} - {"decoder"}),
        tensors=len(state),
        parameters=sum(tensor.numel() for tensor in state.values()),
        backbone_parameters=sum(tensor.numel() for tensor in backbone.values()),
        dtypes=sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}),
        entries=[] if content.keys() == state.keys() else entries,
        options={
            name: str(options[name])[:80]
            for name in TRAINING_OPTIONS
            if isinstance(options.get(name), str | int | float)
        },
        unexpected=native.unexpected,
    )


def _backbone_sizes(backbone: Mapping[str, Tensor], grid: tuple[int, int] | None) -> dict[str, Any]:
    """The backbone's attributes; ``grid`` is the (H, W) grid of its positions, if known."""
    kernel, position = backbone["patch_embed.proj.weight"], backbone.get("pos_embed")
    hidden = backbone.get("blocks.0.mlp.fc1.weight")
    embed_dim, depth = len(kernel), depth_of(backbone, "blocks")
    patch_size = tuple(kernel.shape[2:])
    size = size_of(embed_dim, depth)
    tables = [table for key, table in backbone.items() if re.search(r"rel_pos_[hw]$", key)]
    num_heads = SIZES[size].num_heads if size else None
    if tables:
        num_heads = embed_dim // tables[0].shape[-1]
    if position is None:
        grid = None
    elif grid is None and (side := square_side(position)):
        grid = (side, side)
    return {
        "size": size,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": None if hidden is None else len(hidden) / embed_dim,
        "patch_size": patch_size,
        "in_chans": kernel.shape[1],
        "class_token": "cls_token" in backbone,
        "positions": None if position is None else position.shape[1],
        "img_size": grid and (grid[0] * patch_size[0], grid[1] * patch_size[1]),
        "rel_pos_sizes": sorted({(len(table) + 1) // 2 for table in tables}) or None,
    }


def _decoder_sizes(rest: Mapping[str, Tensor]) -> dict[str, Any]:
    """The decoder's attributes; empty without a decoder."""
    weights, token = rest.get("decoder.feature_weights"), rest.get("decoder.mask_token")
    if token is None or (weights is None and "decoder.embed.weight" not in rest):
        return {}
    sizes = {"decoder_dim": token.shape[-1], "decoder_depth": depth_of(rest, "decoder.blocks")}
    if weights is None:
        return {"decoder": "MAE", **sizes}
    return {
        "decoder": "CrossMAE",
        **sizes,
        "decoder_features": weights.shape[1],
        "decoder_self_attention": "decoder.blocks.0.self_attn.qkv.weight" in rest,
    }


def convert(
    source: str | PathLike[str],
    output: str | PathLike[str],
    to: str,
    *,
    weights: str = "model",
    prefix: str = "",
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> Report:
    """Write a checkpoint in another layout; the suffix of ``output`` selects the file format.

    Args:
        source: see :func:`~crossmae_det.checkpoint.read_checkpoint`.
        output: ``.pth``, ``.pt`` or ``.bin`` (``torch.save``), ``.safetensors``, or for ViTDet and
            the native layout ``.pkl`` (a pickle of numpy arrays, as in detectron2's zoo).
        to: one of :data:`TARGETS`.
        weights: "model", or "ema" for the averaged weights of a run.
        prefix: the part of the file to take, see
            :func:`~crossmae_det.checkpoint.extract_state_dict`.
        allow_missing: patterns of native keys that the layout needs and the file may lack.
        allow_unexpected: patterns of keys to leave out: source keys that a plain ViT does not have,
            and native keys that the layout cannot represent.

    Returns:
        ``loaded`` are the keys written; ``dropped`` and ``unexpected`` those left out.

    Raises:
        FileNotFoundError, OSError: the source does not exist, or the output cannot be written.
        ValueError: the source cannot be read, or does not fit the layout; nothing is written.
    """
    output = Path(output)
    if to not in TARGETS:
        raise ValueError(f"unknown layout '{to}': use {', '.join(TARGETS)}")
    suffixes = [".safetensors"]
    if to != "safetensors":
        suffixes += [".pth", ".pt", ".bin"] + [".pkl"] * (to in ("vitdet", "native"))
    if output.suffix not in suffixes:
        raise ValueError(f"{output}: unknown suffix for layout {to}: use {', '.join(suffixes)}")
    if output.exists() and any(map(output.samefile, checkpoint_files(source))):
        raise ValueError(f"{output}: the output is the source file: choose another output file")

    def allowed(name: str) -> bool:
        return matches(name, allow_unexpected)

    content = read_checkpoint(source)
    grid = saved_grid(content)
    try:
        native = translate(extract_state_dict(content, source, weights, prefix), allowed)
        tensors, dropped = export(
            native.tensors,
            "native" if to == "safetensors" else to,
            allowed,
            lambda name: matches(name, allow_missing),
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    with atomic_path(output) as temporary:
        _write(temporary, tensors, {POSITION_GRID: list(grid)} if grid else {}, to in FLAT_LAYOUTS)
    unexpected = [name for name in dropped if allowed(name)]
    return Report(
        str(source),
        LAYOUTS[native.layout].title,
        loaded=list(tensors),
        dropped=[native.sources.get(name, name) for name in dropped if name not in unexpected],
        unexpected=native.unexpected + unexpected,
    )


def _write(
    path: Path, tensors: Mapping[str, Tensor], entries: Mapping[str, Any], flat: bool
) -> None:
    """Write tensors in the format of the suffix, and ``entries`` if the format can hold them."""
    if path.suffix == ".safetensors":
        # safetensors accepts neither views nor tensors that share memory.
        plain = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
        try:
            safetensors.torch.save_file(plain, path, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            raise OSError(f"cannot write the checkpoint: {error}") from error
    elif path.suffix == ".pkl":
        arrays = {
            name: (tensor.float() if tensor.dtype in NOT_IN_NUMPY else tensor).detach().numpy()
            for name, tensor in tensors.items()
        }
        with path.open("wb") as file:
            pickle.dump({"model": arrays, "__author__": "crossmae_det", **entries}, file)
    else:
        save_checkpoint(tensors if flat else {"model": tensors, **entries}, path)

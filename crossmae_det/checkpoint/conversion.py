"""What a checkpoint holds, from its tensors alone: no model is built.

Legend: C channels of the backbone, D channels of a decoder.

From one checkpoint file to another, in any layout and format.
"""

import pickle
import re
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from tabulate import tabulate
from torch import Tensor

from crossmae_det.checkpoint.layouts import (
    TITLES,
    depth_of,
    export,
    size_of,
    square_side,
    translate,
)
from crossmae_det.checkpoint.loading import POSITION_GRID, Report, matches, saved_grid
from crossmae_det.checkpoint.reading import extract_state_dict, read_checkpoint
from crossmae_det.modeling import SIZES
from crossmae_det.utils.files import atomic_path, save_checkpoint


def inspect(
    path: str | PathLike[str], *, weights: str = "model", prefix: str = ""
) -> dict[str, Any]:
    """What a checkpoint holds.

    Args:
        path: what :func:`read_checkpoint` reads.
        weights, prefix: the part of it to look at: see :func:`extract_state_dict`.

    Returns:
        Facts by name, in types that JSON has: the layout, the sizes of the backbone and of a
            decoder,
        numbers of tensors and parameters, and what lies beside the weights. What the file does not
        tell is not there: the number of attention heads, say, unless the size is a usual one or
        there are relative positions. A side of an image is that of its position embedding.

    Raises:
        FileNotFoundError, OSError, ValueError: the file cannot be read, or is not that of a ViT.
    """
    content = read_checkpoint(path)
    state = extract_state_dict(content, path, weights, prefix)
    try:
        native = translate(state, lambda name: True)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    tensors, prefix = native.tensors, native.backbone
    backbone = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    beside = {n: t for n, t in tensors.items() if not n.startswith(prefix)}
    facts: dict[str, Any] = {"format": TITLES[native.layout]}
    facts |= _backbone(backbone, saved_grid(content))
    facts |= _decoder(beside, content)
    if classes := [
        t for n, t in beside.items() if re.fullmatch(r"head\.weight|.*cls_score\.weight", n)
    ]:
        facts["rows of the classifier"] = len(classes[0])
    if parts := sorted({n.partition(".")[0] for n in beside} - {"decoder"}):
        facts["parts beside the backbone"] = parts
    facts["tensors"] = len(state)
    facts["parameters"] = sum(tensor.numel() for tensor in state.values())
    facts["parameters of the backbone"] = sum(tensor.numel() for tensor in backbone.values())
    facts["types"] = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()})
    if content.keys() != state.keys():
        names = (key for key in content if isinstance(key, str) and key.isprintable())
        facts["beside the weights"] = sorted(name[:80] for name in names)
    if native.unexpected:
        facts["no place in a plain ViT"] = native.unexpected
    return facts


def format_facts(facts: Mapping[str, Any]) -> str:
    """The facts as a table for the terminal."""
    rows = []
    for name, value in facts.items():
        if isinstance(value, list):
            shown = ", ".join(map(str, value[:8])) + (", ..." if len(value) > 8 else "")
        elif isinstance(value, bool):
            shown = "yes" if value else "no"
        else:
            shown = f"{value:,}" if isinstance(value, int) else str(value)
        rows.append((name, shown))
    return tabulate(rows, tablefmt="plain", disable_numparse=True)


def _backbone(backbone: Mapping[str, Tensor], grid: tuple[int, int] | None) -> dict[str, Any]:
    kernel = backbone["patch_embed.proj.weight"]
    width, depth = len(kernel), depth_of(backbone, "blocks")
    size = size_of(width, depth)
    facts: dict[str, Any] = {"size": size or "none of the usual", "width": width, "depth": depth}
    tables = {
        name: tensor for name, tensor in backbone.items() if re.search(r"rel_pos_[hw]$", name)
    }
    if tables:
        facts["heads"] = width // next(iter(tables.values())).shape[-1]
    elif size:
        facts["heads"] = SIZES[size].num_heads
    hidden = backbone.get("blocks.0.mlp.fc1.weight")
    if hidden is not None:
        facts["MLP ratio"] = len(hidden) / width
    facts["patch"] = list(kernel.shape[2:])
    facts["channels of an image"] = kernel.shape[1]
    facts["class token"] = "cls_token" in backbone
    position = backbone.get("pos_embed")
    if position is not None:
        side = square_side(position)
        if grid is None and side is not None:
            grid = (side, side)
        if grid is not None:
            facts["image size"] = [
                side * patch for side, patch in zip(grid, kernel.shape[2:], strict=True)
            ]
        facts["positions"] = position.shape[1]
    if tables:
        sides = sorted({(len(table) + 1) // 2 for table in tables.values()})
        facts["sides of relative positions"] = sides
    return facts


def _decoder(beside: Mapping[str, Tensor], content: Mapping[str, Any]) -> dict[str, Any]:
    weights, embed = beside.get("decoder.feature_weights"), beside.get("decoder.embed.weight")
    token = beside.get("decoder.mask_token")
    if token is None or (weights is None and embed is None):
        return {"decoder": "none"}
    facts: dict[str, Any] = {
        "decoder": "CrossMAE" if weights is not None else "MAE",
        "decoder width": token.shape[-1],
        "decoder depth": depth_of(beside, "decoder.blocks"),
    }
    if weights is not None:
        facts["features that the decoder reads"] = weights.shape[1]
        facts["decoder self-attention"] = "decoder.blocks.0.self_attn.qkv.weight" in beside
    arguments = content.get("args")
    if isinstance(arguments, Namespace):
        for name in ("model", "mask_ratio", "kept_mask_ratio", "epochs", "norm_pix_loss"):
            value = vars(arguments).get(name)
            if isinstance(value, str | int | float):
                facts[f"trained with {name}"] = str(value)[:80]
    return facts


# What a file may be converted to; "safetensors" is the native layout in a file of that format.
TARGETS = ("native", "published", "timm", "vitdet", "huggingface", "safetensors")

NUMPY_LACKS = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)

# What others read from the top of a file, not from under "model".
FLAT = ("timm", "huggingface")


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
    """Write a checkpoint in another layout, in the format that the suffix of ``output`` names.

    Args:
        source: what :func:`read_checkpoint` reads.
        output: ``.pth`` or ``.pt`` (``torch.save``), ``.safetensors``, or for ViTDet ``.pkl``
            (a pickle of numpy arrays, as detectron2's zoo has).
        to: one of :data:`TARGETS`.
        weights: "model", or "ema" for the averaged weights of a run.
        prefix: the part of the file to take: see :func:`extract_state_dict`.
        allow_missing: patterns of native names that the layout needs and the file may lack.
        allow_unexpected: patterns of names that may be left out: of the file where a plain ViT has
            no place for them, native ones where the layout has none.

    Returns:
        ``loaded`` are the names written, ``dropped`` and ``unexpected`` those left out.

    Raises:
        FileNotFoundError, OSError: the file is not there, or the output cannot be written.
        ValueError: the file cannot be read, or does not go into the layout; nothing is written.
    """
    output = Path(output)
    if to not in TARGETS:
        raise ValueError(f"there is no layout '{to}' to convert to; take {', '.join(TARGETS)}")
    if output.exists() and Path(source).exists() and output.samefile(source):
        raise ValueError(f"{output} is the file to convert: name another one for the result")
    layout = "native" if to == "safetensors" else to
    write = _writer(output, layout)
    if to == "safetensors" and output.suffix != ".safetensors":
        raise ValueError(f"{output} does not end in .safetensors")

    def allowed(name: str) -> bool:
        return matches(name, allow_unexpected)

    content = read_checkpoint(source)
    grid = saved_grid(content)
    beside = {POSITION_GRID: list(grid)} if grid else {}
    state = extract_state_dict(content, source, weights, prefix)
    try:
        native = translate(state, allowed)
        tensors, dropped = export(
            native.tensors, layout, allowed, lambda n: matches(n, allow_missing)
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    with atomic_path(output) as temporary:
        write(tensors, beside, temporary)
    unexpected = [name for name in dropped if allowed(name)]
    return Report(
        str(source),
        TITLES[native.layout],
        loaded=list(tensors),
        dropped=[native.sources.get(name, name) for name in dropped if name not in unexpected],
        unexpected=native.unexpected + unexpected,
    )


def _writer(
    output: Path, layout: str
) -> Callable[[Mapping[str, Tensor], Mapping[str, Any], Path], None]:
    """What writes a file of a suffix: of weights, and of entries beside them if there is room.

    Raises:
        ValueError: the suffix is none that the layout's readers know.
    """
    if output.suffix == ".safetensors":
        return _write_safetensors
    if output.suffix == ".pkl" and layout in ("vitdet", "native"):
        return _write_pickle
    if output.suffix in (".pth", ".pt", ".bin"):
        return lambda tensors, beside, path: save_checkpoint(
            tensors if layout in FLAT else {"model": tensors, **beside}, path
        )
    known = ".pth, .pt, .safetensors" + (", .pkl" if layout in ("vitdet", "native") else "")
    raise ValueError(f"{output}: the suffix names the format, and {layout} knows {known}")


def _write_safetensors(
    tensors: Mapping[str, Tensor], beside: Mapping[str, Any], path: Path
) -> None:
    # The format holds neither views nor one memory under two names.
    plain = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    try:
        safetensors.torch.save_file(plain, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(f"cannot write the checkpoint: {error}") from error


def _write_pickle(tensors: Mapping[str, Tensor], beside: Mapping[str, Any], path: Path) -> None:
    # numpy has neither bfloat16 nor float8; float32 holds every value of theirs.
    arrays = {
        name: (tensor.float() if tensor.dtype in NUMPY_LACKS else tensor).detach().numpy()
        for name, tensor in tensors.items()
    }
    content: dict[str, Any] = {"model": arrays, "__author__": "crossmae_det", **beside}
    with path.open("wb") as file:
        pickle.dump(content, file)

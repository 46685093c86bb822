"""What a checkpoint holds, from its tensors alone: no model is built.

Legend: C channels of the trunk, D channels of a decoder.
"""

import re
from argparse import Namespace
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

from tabulate import tabulate
from torch import Tensor

from crossmae_det.checkpoint.names import TITLES
from crossmae_det.checkpoint.published import translate
from crossmae_det.checkpoint.reading import extract_state_dict, read_checkpoint
from crossmae_det.checkpoint.resizing import saved_grid
from crossmae_det.checkpoint.structure import square_side
from crossmae_det.modeling import SIZES


def inspect(
    path: str | PathLike[str], *, weights: str = "model", prefix: str = ""
) -> dict[str, Any]:
    """What a checkpoint holds.

    Args:
        path: what :func:`read_checkpoint` reads.
        weights, prefix: the part of it to look at: see :func:`extract_state_dict`.

    Returns:
        Facts by name, in types that JSON has: the layout, the sizes of the trunk and of a decoder,
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
    tensors, prefix = native.tensors, native.trunk
    trunk = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    beside = {n: t for n, t in tensors.items() if not n.startswith(prefix)}
    facts: dict[str, Any] = {"format": TITLES[native.layout]}
    facts |= _trunk(trunk, saved_grid(content))
    facts |= _decoder(beside, content)
    if classes := [
        t for n, t in beside.items() if re.fullmatch(r"head\.weight|.*cls_score\.weight", n)
    ]:
        facts["rows of the classifier"] = len(classes[0])
    if parts := sorted({n.partition(".")[0] for n in beside} - {"decoder"}):
        facts["parts beside the trunk"] = parts
    facts["tensors"] = len(state)
    facts["parameters"] = sum(tensor.numel() for tensor in state.values())
    facts["parameters of the trunk"] = sum(tensor.numel() for tensor in trunk.values())
    facts["types"] = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()})
    if content.keys() != state.keys():
        names = (key for key in content if isinstance(key, str) and key.isprintable())
        facts["beside the weights"] = sorted(name[:80] for name in names)
    if native.unexpected:
        facts["no place in a plain ViT"] = native.unexpected
    return facts


def describe_trunk(state: Mapping[str, Tensor], prefix: str = "") -> str:
    """The sizes of a trunk in a few words.

    Args:
        state: weights under native keys.
        prefix: of the trunk's names.
    """
    kernel = state.get(f"{prefix}patch_embed.proj.weight")
    width = len(kernel) if kernel is not None else 0
    depth = _depth(state, f"{prefix}blocks")
    name = _size(width, depth)
    return f"{f'ViT-{name[0].upper()}, ' if name else ''}{width} wide with {depth} blocks"


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


def _trunk(trunk: Mapping[str, Tensor], grid: tuple[int, int] | None) -> dict[str, Any]:
    kernel = trunk["patch_embed.proj.weight"]
    width, depth = len(kernel), _depth(trunk, "blocks")
    size = _size(width, depth)
    facts: dict[str, Any] = {"size": size or "none of the usual", "width": width, "depth": depth}
    tables = {name: tensor for name, tensor in trunk.items() if re.search(r"rel_pos_[hw]$", name)}
    if tables:
        facts["heads"] = width // next(iter(tables.values())).shape[-1]
    elif size:
        facts["heads"] = SIZES[size].num_heads
    hidden = trunk.get("blocks.0.mlp.fc1.weight")
    if hidden is not None:
        facts["MLP ratio"] = len(hidden) / width
    facts["patch"] = list(kernel.shape[2:])
    facts["channels of an image"] = kernel.shape[1]
    facts["class token"] = "cls_token" in trunk
    position = trunk.get("pos_embed")
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
        "decoder depth": _depth(beside, "decoder.blocks"),
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


def _depth(names: Iterable[str], stem: str) -> int:
    pattern = re.compile(rf"{re.escape(stem)}\.(\d+)\.")
    return 1 + max((int(match[1]) for name in names if (match := pattern.match(name))), default=-1)


def _size(width: int, depth: int) -> str | None:
    fitting = (n for n, size in SIZES.items() if (size.embed_dim, size.depth) == (width, depth))
    return next(fitting, None)

"""From one checkpoint file to another, in any layout and format."""

import pickle
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from crossmae_det.checkpoint.files import atomic_path, save_checkpoint
from crossmae_det.checkpoint.loading import matches
from crossmae_det.checkpoint.names import TITLES
from crossmae_det.checkpoint.published import export, translate
from crossmae_det.checkpoint.reading import extract_state_dict, read_checkpoint
from crossmae_det.checkpoint.report import Report
from crossmae_det.checkpoint.resizing import POSITION_GRID, saved_grid

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

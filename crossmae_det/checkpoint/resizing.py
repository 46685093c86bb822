"""Tensors of a checkpoint in the sizes of a model.

Legend: L patches on a grid, C channels of the trunk, B channels of an image.
"""

from timm.layers.patch_embed import resample_patch_embed
from torch import Tensor

from crossmae_det.checkpoint.names import RELATIVE_POSITION
from crossmae_det.checkpoint.structure import square_side, with_class_row
from crossmae_det.layers.position_embedding import resample_position_embedding
from crossmae_det.layers.relative_position import resample_table


def resized(
    name: str, tensor: Tensor, target: Tensor, grid: tuple[int, int] | None
) -> Tensor | None:
    """A tensor in the shape of ``target``.

    Position embeddings are resampled bicubically, relative positions linearly, and patch kernels so
    that an enlarged patch is embedded as the patch was (FlexiViT, https://arxiv.org/abs/2212.08013).

    Args:
        name: of the tensor in the model.
        tensor: of the file.
        target: of the model.
        grid: (H, W) in patches where the tensor is a position embedding (1, 1 + L, C), else None.

    Returns:
        The tensor itself where it has that shape, and None where it is nothing that can be resized.
    """
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
    if grid is not None and len(tensor) == 1:
        if tensor.shape[1] == grid[0] * grid[1]:
            return with_class_row(tensor.float())
        # Of another grid a file does not tell the sides: only a square one is beyond doubt.
        side = square_side(tensor)
        if side is not None:
            return resample_position_embedding(tensor.float(), (side, side), grid)
    return None

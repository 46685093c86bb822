"""The one table of model sizes."""

from dataclasses import dataclass


def spread_global_blocks(depth: int, count: int = 4) -> list[int]:
    """The blocks that keep global attention: the last one of each of ``count`` equal groups.

    ViTDet, section 3: four of them, evenly spaced. 12 blocks give [2, 5, 8, 11].
    """
    count = min(count, depth)
    return [(group + 1) * depth // count - 1 for group in range(count)]


@dataclass(frozen=True)
class Size:
    """Width, depth and heads of a trunk, and its patch side in pixels as pretrained."""

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int = 16

    @property
    def global_blocks(self) -> list[int]:
        """Indices of the blocks with global attention where the others have windows."""
        return spread_global_blocks(self.depth)


SIZES: dict[str, Size] = {
    "tiny": Size(embed_dim=192, depth=12, num_heads=3),
    "small": Size(embed_dim=384, depth=12, num_heads=6),
    "base": Size(embed_dim=768, depth=12, num_heads=12),
    "large": Size(embed_dim=1024, depth=24, num_heads=16),
    # Pretrained at patch 14. A pyramid needs a power of two: detection runs it at 16.
    "huge": Size(embed_dim=1280, depth=32, num_heads=16, patch_size=14),
}

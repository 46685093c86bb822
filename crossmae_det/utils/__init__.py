"""What every package uses: files, image reading, messages, plots."""

from crossmae_det.utils.files import atomic_path, save_checkpoint
from crossmae_det.utils.image_reading import ImageError, UndecodableImageError

__all__ = ["ImageError", "UndecodableImageError", "atomic_path", "save_checkpoint"]

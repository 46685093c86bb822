"""CrossMAE pretraining and plain-ViT backbones for detectron2.

Where detectron2 is installed, importing the package registers its backbones and built-in dataset
in detectron2 and the resolvers of its configs in OmegaConf. Without detectron2, ``utils``,
``layers``, ``modeling``, ``data``, ``pretraining`` and ``classification`` still import.
"""

from importlib.util import find_spec

from crossmae_det.utils.messages import ignore_library_warnings

__version__ = "0.1.0"

ignore_library_warnings()
if find_spec("detectron2") is not None:
    from crossmae_det import detection as detection
    from crossmae_det import model_zoo as model_zoo
    from crossmae_det.model_zoo import resolvers as _  # noqa: F401  (registers them)

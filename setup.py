"""Packaging of crossmae_det. Imports neither torch nor detectron2.

pip install .                                               # then crossmae-det install-detectron2
CROSSMAE_DET_OPENCV=opencv-python-headless pip install .    # on a machine without libGL.so.1
"""

import os
import re
from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup

HERE = Path(__file__).resolve().parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "crossmae_det/__init__.py").read_text(encoding="utf-8"), re.M
)[1]

# As in detectron2, the configs are installed inside model_zoo. crossmae_det.model_zoo finds them
# there, or next to the package in a source checkout.
CONFIGS = "crossmae_det.model_zoo.configs"
CONFIG_PACKAGES = [
    CONFIGS,
    *(
        f"{CONFIGS}.{name}"
        for name in find_namespace_packages("configs", exclude=["*__pycache__*"])
    ),
]

# One module in two builds, of which an environment should have one. The headless build needs no
# libGL.so.1 and has no windows, which this project never opens.
OPENCV = os.environ.get("CROSSMAE_DET_OPENCV", "opencv-python")

setup(
    name="crossmae_det",
    version=VERSION,
    description="CrossMAE pretraining and plain-ViT backbones for detectron2",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["crossmae_det", "crossmae_det.*"]), *CONFIG_PACKAGES],
    package_dir={CONFIGS: "configs"},
    package_data={
        **{name: ["*.yaml"] for name in CONFIG_PACKAGES},
        "crossmae_det": ["py.typed"],
        "crossmae_det.model_zoo": ["data/*.json", "data/*.j2"],
        "crossmae_det.report": ["data/*"],
    },
    # detectron2 is required as well but is not on PyPI: see `crossmae-det install-detectron2`.
    install_requires=[
        "torch>=2.7",
        "torchvision>=0.22",  # detectron2's NMS and ROIAlign
        "timm>=1.0",
        "braceexpand>=0.1.7",
        "numpy>=1.24",
        "pillow>=9.1",
        "matplotlib>=3.6",
        f"{OPENCV}>=4.6",
        "pycocotools>=2.0.6",
        "hotcoco>=1.3,<2",
        "shapely>=2.0",  # detectron2 crops polygon masks with it
        "fvcore>=0.1.5,<0.1.6",
        "iopath>=0.1.7,<0.2",
        "omegaconf>=2.1,<2.4",
        "hydra-core>=1.1",
        "huggingface-hub>=0.20",
        "jinja2>=3.0",  # MODEL_ZOO.md
        "markupsafe>=2.0",
        "packaging>=21.0",
        "pyyaml>=6.0",
        "safetensors>=0.4",
        "tabulate>=0.8",
        "tensorboard>=2.10",  # torch.utils.tensorboard writes with it
        "tqdm>=4.60",
        "scikit-learn>=1.2",
        "scipy>=1.9",
        "setuptools<82",  # detectron2.model_zoo imports pkg_resources
    ],
    extras_require={
        "dev": [
            "mkdocs-material>=9",
            "mkdocstrings[python]>=1",
            "mypy",
            "pre-commit",
            "pytest>=7",
            "pytest-xdist",
            "ruff",
            "wandb>=0.19",  # its logger is tested offline
        ]
    },
    entry_points={"console_scripts": ["crossmae-det = crossmae_det.__main__:main"]},
    zip_safe=False,
)

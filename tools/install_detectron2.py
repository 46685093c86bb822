#!/usr/bin/env python3
"""Install detectron2 without a compiler: ``crossmae-det install-detectron2``.

The module is run from its file: importing the package would need libraries that may be missing.
"""

import runpy
from pathlib import Path

MODULE = Path(__file__).resolve().parents[1] / "crossmae_det" / "tools" / "install_detectron2.py"

if __name__ == "__main__":
    runpy.run_path(str(MODULE), run_name="__main__")

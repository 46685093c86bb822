"""Running tools: in the process of a test, or in processes of their own."""

import os
import runpy
import subprocess
import sys

# Makes libraries look as if they were not installed, then is the console script.
WITHOUT = """
import importlib.abc, importlib.util, sys
missing = {missing}
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named '{{name}}'", name=name)
sys.meta_path.insert(0, Block())
find = importlib.util.find_spec
importlib.util.find_spec = lambda n, p=None: None if n in missing else find(n, p)
sys.argv[0] = "/usr/bin/crossmae-det"
from crossmae_det.__main__ import main
main()
"""


def call_tool(repo, monkeypatch, name, *arguments):
    """Run tools/NAME.py with arguments, as from the command line."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    runpy.run_path(str(repo / "tools" / f"{name}.py"), run_name="__main__")


def command(*arguments, missing=(), **options):
    """Run ``crossmae-det`` in a process of its own, as if some libraries were not installed."""
    start = ["-c", WITHOUT.format(missing={*missing})] if missing else ["-m", "crossmae_det"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    defaults = {"capture_output": True, "text": True, "env": environment}
    return subprocess.run([sys.executable, *start, *map(str, arguments)], **defaults | options)

"""Running tools in the process of a test."""

import runpy
import sys
from types import SimpleNamespace


def load_tool(repo, name):
    """tools/NAME.py; its ``main`` runs it as a program."""
    path = str(repo / "tools" / f"{name}.py")
    return SimpleNamespace(main=lambda *_: runpy.run_path(path, run_name="__main__"))


def call_tool(main, monkeypatch, name, *arguments):
    """Run a tool with arguments as from the command line."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    main()

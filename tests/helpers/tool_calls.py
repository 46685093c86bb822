"""Running tools in the process of a test."""

import importlib.util
import sys

from crossmae_det.engine import run_tool


def load_tool(repo, name):
    """The module of tools/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, repo / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call_tool(main, monkeypatch, name, *arguments):
    """Run the main function of a tool as from the command line."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    run_tool(main)

"""Differences between configs: a run and its recipe, or several runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

# They differ between any two runs, or record what follows from other keys.
NOT_COMPARED = ("train.output_dir", "dataloader.recorded")

ABSENT = "(not set)"
LONGEST = 400  # characters of a value


def flatten(config: Mapping[str, Any]) -> dict[str, str]:
    """The values of a config as text, by their keys with dots.

    Elements of a list of dicts have their index in the key. Yaml text with several lines, in which
    a model keeps the keys of a yaml config, is taken apart like a dict. Keys of
    :data:`NOT_COMPARED` are left out.
    """
    flat: dict[str, str] = {}

    def visit(node: Any, key: str) -> None:
        if key in NOT_COMPARED:
            return
        if isinstance(node, str) and "\n" in node:
            try:
                parsed = yaml.safe_load(node)
            except yaml.YAMLError:
                parsed = None
            node = parsed if isinstance(parsed, dict) else node
        if isinstance(node, Mapping) and node:
            for name, value in node.items():
                visit(value, f"{key}.{name}" if key else str(name))
        elif isinstance(node, list) and any(isinstance(value, Mapping) for value in node):
            for index, value in enumerate(node):
                visit(value, f"{key}.{index}")
        else:
            flat[key] = _text(node)

    visit(config, "")
    return flat


def _text(value: Any) -> str:
    if isinstance(value, str):
        text = value or "''"
    elif value is None:
        text = "null"
    else:
        text = yaml.safe_dump(
            value, default_flow_style=True, width=10_000, allow_unicode=True, sort_keys=False
        )
        text = text.removesuffix("\n").removesuffix("\n...").strip()
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def differences(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The keys whose values are not the same in all configs, sorted, with the value in each."""
    flat = [flatten(config) for config in configs]
    keys = sorted({key for values in flat for key in values})
    rows = [(key, [values.get(key, ABSENT) for values in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]

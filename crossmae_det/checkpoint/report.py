"""What a load did with every tensor."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tabulate import tabulate


@dataclass
class Report:
    """Names of the tensors, by what became of them.

    Attributes:
        path: the file.
        layout: what it was taken for.
        loaded: names in the model.
        resampled: names in the model of what was loaded at another size.
        initialised: names in the model of what is not in the file, and stays as the model had it.
        dropped: names in the file of what the model has no use for.
        unexpected: names in the file that have no place, and that the caller allowed.
        shapes: of each resampled tensor, its shape in the file and in the model.
    """

    path: str
    layout: str = ""
    loaded: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    def __str__(self) -> str:
        table = [
            (label, len(names), _summary(names))
            for label, names in (
                ("loaded", self.loaded),
                ("resampled", self.resampled),
                ("initialised", self.initialised),
                ("dropped", self.dropped),
                ("unexpected", self.unexpected),
            )
        ]
        lines = [
            f"weights from {self.path} ({self.layout})",
            tabulate(table, headers=["", "tensors", "names"], tablefmt="simple"),
            *(f"resampled {name}: {old} -> {new}" for name, (old, new) in self._first_shapes()),
        ]
        return "\n".join(lines)

    def _first_shapes(self) -> list[tuple[str, tuple]]:
        """One tensor of each kind of resampling: a table of every block would fill the screen."""
        first: dict[tuple, str] = {}
        for name, shapes in self.shapes.items():
            first.setdefault((name.rpartition(".")[2], shapes), name)
        return [(name, shapes) for (_, shapes), name in first.items()]

    def to_dict(self) -> dict[str, Any]:
        """The whole report in types that JSON has."""
        return asdict(self)


def _summary(names: Sequence[str], longest: int = 5) -> str:
    """The first parts that the names share, so that a line tells 200 tensors from one another."""
    groups = list(dict.fromkeys(".".join(name.split(".")[:3]) for name in names))
    shown = ", ".join(groups[:longest])
    return f"{shown}, and {len(groups) - longest} more" if len(groups) > longest else shown

"""What a load did with every tensor."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tabulate import tabulate


@dataclass
class Report:
    """Names of the tensors, by what became of them.

    ``loaded`` and ``resampled`` (loaded at another size) and ``initialised`` (not in the file, left
    as the model had them) are names in the model; ``dropped`` (in the file, of no use to the model)
    are names in the file.
    """

    path: str
    loaded: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [
            (label, len(names), _summary(names))
            for label, names in (
                ("loaded", self.loaded),
                ("resampled", self.resampled),
                ("initialised", self.initialised),
                ("dropped", self.dropped),
            )
        ]
        table = tabulate(rows, headers=["", "tensors", "names"], tablefmt="simple")
        return f"weights from {self.path}\n{table}"


def _summary(names: Sequence[str], longest: int = 5) -> str:
    """The first parts that the names share, so that a line tells 200 tensors from one another."""
    groups = list(dict.fromkeys(".".join(name.split(".")[:3]) for name in names))
    shown = ", ".join(groups[:longest])
    return f"{shown}, and {len(groups) - longest} more" if len(groups) > longest else shown

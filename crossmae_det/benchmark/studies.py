"""The same job from different starts, over several seeds, side by side."""

import json
import os
import statistics
from collections.abc import Mapping, Sequence

from tabulate import tabulate

METRICS = {
    "box AP": ("bbox", "AP"),
    "box AP50": ("bbox", "AP50"),
    "mask AP": ("segm", "AP"),
    "mask AP50": ("segm", "AP50"),
}


def read_metrics(path: str | os.PathLike[str]) -> dict[str, float]:
    """The summary metrics of a results file that ``write_results`` wrote, by their names here.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none, or has no number for any of the metrics.
    """
    with open(path, encoding="utf-8") as file:
        results = json.load(file)["results"]
    found = {name: results.get(task, {}).get(key) for name, (task, key) in METRICS.items()}
    metrics = {name: value for name, value in found.items() if value is not None}
    if not metrics:
        raise ValueError(f"{path} has none of {', '.join(METRICS)}")
    return metrics


def summarize(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Mean and spread of every metric, and the lead of each start over the last one.

    Args:
        runs: start -> the metrics of its runs, one for each seed, in the same order of seeds.

    Returns:
        start -> {metric: mean, "metric std": standard deviation over the seeds (0 for one),
        "metric lead": mean over the seeds of the difference to the last start, "metric lead std"}.

    Raises:
        ValueError: the runs do not have the same metrics.
    """
    kinds = {tuple(result) for results in runs.values() for result in results}
    if len(kinds) > 1:
        raise ValueError(f"the runs have different metrics: {' and '.join(map(str, kinds))}")
    *_, reference = runs.values()
    summary: dict[str, dict[str, float]] = {}
    for start, results in runs.items():
        summary[start] = {}
        for metric in results[0]:
            values = [result[metric] for result in results]
            pairs = zip(results, reference, strict=True)
            leads = [result[metric] - other[metric] for result, other in pairs]
            for name, numbers in ((metric, values), (f"{metric} lead", leads)):
                summary[start][name] = statistics.fmean(numbers)
                summary[start][f"{name} std"] = statistics.stdev(numbers) if numbers[1:] else 0.0
    return summary


def comparison_table(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """:func:`summarize` as a table in Markdown: a row for each start, then its lead."""
    summary = summarize(runs)
    metrics = list(next(iter(runs.values()))[0])
    *starts, last = summary

    def row(title: str, numbers: Mapping[str, float], suffix: str, sign: str) -> list[str]:
        return [
            title,
            *(
                f"{numbers[metric + suffix]:{sign}.1f} ± {numbers[f'{metric}{suffix} std']:.1f}"
                for metric in metrics
            ),
        ]

    rows = [row(start, numbers, "", "") for start, numbers in summary.items()]
    rows += [row(f"{start} - {last}", summary[start], " lead", "+") for start in starts]
    return tabulate(rows, headers=["", *metrics], tablefmt="pipe", disable_numparse=True)

"""The command demo: pretraining without labels, then a detector, with the progress of the whole.

Each stage is the command ``train`` in a process of its own, which logs into the folder of its run.
The progress is read from the metrics there.
"""

import json
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate
from tqdm import tqdm

from crossmae_det.engine.config import is_run_of, resolve
from crossmae_det.engine.hooks import METRICS
from crossmae_det.engine.launch import PAGE
from crossmae_det.model_zoo import get_config

# The last checkpoint of a run.
FINAL = "model_final.pth"

RESULTS = Path("inference", "results.json")

# Seconds between two looks at the metrics of a stage.
POLL = 0.2

# Lines of progress per stage where the output is not a terminal.
LINES = 10

# Time of a stage relative to that of its iterations: start, evaluation, drawings.
WHOLE = 1.15

BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


@dataclass
class Stage:
    """One training run of the demo.

    Attributes:
        title: for the user.
        config: of the run.
        folder: of the run.
        overrides: of the config.
        cost: its time relative to the other stages, to estimate it before it runs.
        product: file in the folder that exists when the stage is complete.
        seconds: it took; None before it has run.
    """

    title: str
    config: str
    folder: Path
    overrides: list[str]
    cost: float
    product: str | Path
    seconds: float | None = None

    @property
    def options(self) -> list[str]:
        """All overrides of the config."""
        return [*self.overrides, f"train.output_dir={self.folder}"]


def demo(parser: ArgumentParser) -> None:
    """Pretrain a small ViT without labels, train Mask R-CNN from it, and print its AP.

    The data are the built-in shapes, generated on first use; the AP is that on held-out images. Run
    it again to continue a demo that was interrupted.

    Example:
      crossmae-det demo --output output
    """
    parser.add_argument(
        "--output", default="output", help="folder of the two runs (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="start over")
    for name in ("pretraining", "detector"):
        what = f"overrides of the config of the {name}"
        parser.add_argument(f"--{name}", nargs="*", default=[], metavar="KEY=VALUE", help=what)
    args = parser.parse_args()
    pretraining = Stage(
        title="pretraining (no labels)",
        config="demo/pretrain.py",
        folder=Path(args.output, "demo_pretrain"),
        overrides=args.pretraining,
        cost=1.0,
        product=FINAL,
    )
    detector = Stage(
        title="training the detector",
        config="demo/mask_rcnn.py",
        folder=Path(args.output, "demo"),
        overrides=[*args.detector, f"train.init_checkpoint={pretraining.folder / FINAL}"],
        cost=1.0,
        product=RESULTS,
    )
    stages = [pretraining, detector]
    # As on an interruption from the keyboard: the process of the stage ends as well.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for index in range(len(stages)):
            run_stage(stages, index, overwrite=args.overwrite)
    except KeyboardInterrupt:
        print("\nInterrupted: run it again to continue", file=sys.stderr)
        sys.exit(130)
    print_report(stages)


def run_stage(stages: Sequence[Stage], index: int, *, overwrite: bool) -> None:
    """Run a stage, or what is left of it, and show its progress and when all of them will end.

    Args:
        stages: in their order.
        index: of the one to run.
        overwrite: start over, even if it is complete.
    """
    stage, later = stages[index], stages[index + 1 :]
    cfg = get_config(stage.config, stage.options)
    resolved = resolve(cfg)  # generates the dataset
    title = f"{index + 1}/{len(stages)} {stage.title}"
    same = not overwrite and is_run_of(stage.folder, cfg)
    if same and (stage.folder / stage.product).exists():
        print(f"{title}: complete, in {stage.folder}")
        return
    progress = Progress(
        title,
        int(resolved.train.max_iter),
        remaining_stages=sum(other.cost for other in later) / stage.cost,
    )
    command = [sys.executable, "-m", "crossmae_det", "train"]
    command += ["--resume" if same else "--overwrite", "--config-file", stage.config]
    started = time.time()
    with progress, _process([*command, *stage.options]) as process:
        while process.poll() is None:
            time.sleep(POLL)
            if record := last_record(stage.folder / METRICS, since=started):
                progress.update(int(record["iteration"]) + 1, record["total_loss"])
    if process.returncode:
        sys.exit(process.returncode)
    stage.seconds = time.time() - started


@contextmanager
def _process(command: Sequence[str]) -> Iterator[subprocess.Popen]:
    """Run a command without its standard output, and end it with this block.

    Ctrl-C reaches this process only: the trainer would answer with a traceback.
    """
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited
    try:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    finally:
        signal.signal(signal.SIGINT, handler)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def last_record(metrics_json: Path, since: float) -> dict[str, float] | None:
    """The last metrics of the iterations of a run; None if it has written none since a time.

    Args:
        metrics_json: one JSON object per line.
        since: in seconds since the epoch.
    """
    try:
        if metrics_json.stat().st_mtime < since:
            return None
        lines = metrics_json.read_text(encoding="utf-8").splitlines()
    except OSError:  # not written yet, or removed as a new run starts
        return None
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:  # cut short: still being written
            continue
        if "total_loss" in record:
            return record
    return None


class Progress:
    """A progress bar of a stage on a terminal, elsewhere a line for every tenth of it.

    Args:
        title: of the stage.
        steps: iterations of its run.
        remaining_stages: expected time of the stages after it, relative to its own.
    """

    def __init__(self, title: str, steps: int, remaining_stages: float):
        self.title = title
        self.steps = steps
        self.remaining_stages = remaining_stages
        self.done = 0
        self.first: tuple[float, int] | None = None  # time and iterations of the first record
        self.lines = 0
        self.bar = tqdm(
            desc=title,
            total=steps,
            bar_format=BAR,
            disable=not sys.stdout.isatty(),
            file=sys.stdout,
        )

    def __enter__(self) -> "Progress":
        if self.bar.disable:
            print(f"{self.title}: {self.steps:,} iterations", flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self, done: int, loss: float | None) -> None:
        """Show that ``done`` iterations are complete, and the last loss; None if not finite."""
        if done == self.done:
            self.bar.refresh()  # the elapsed time
            return
        self.done = done
        now = time.monotonic()
        if self.first is None:
            self.first = now, done
        text = "" if loss is None else f"loss {loss:.3f}"
        if (left := self.seconds_left(now)) is not None:
            text += f", demo ends in {clock(left)}"
        self.bar.n = done
        self.bar.set_postfix_str(text)
        tenth = done * LINES // self.steps
        if self.bar.disable and tenth > self.lines:
            self.lines = tenth
            print(f"{self.title}: {done}/{self.steps}, {text}", flush=True)

    def seconds_left(self, now: float) -> float | None:
        """Estimated time to the end of the last stage; None before there is anything to go by."""
        assert self.first is not None
        time_of_first, first = self.first
        if self.done <= first:
            return None
        step = (now - time_of_first) / (self.done - first)
        whole = WHOLE * self.steps * step
        return whole - self.done * step + self.remaining_stages * whole


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def print_report(stages: Sequence[Stage]) -> None:
    """Print the AP of the last stage, where its drawings are, and the time of each stage."""
    folder = stages[-1].folder
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["results"]
    names = {"bbox": "box", "segm": "mask"}
    rows = [
        [names[task], *(f"{values[key]:.1f}" for key in ("AP", "AP50", "AP75"))]
        for task, values in results.items()
        if task in names
    ]
    print("\nOn held-out images:")
    print(tabulate(rows, headers=["", "AP", "AP50", "AP75"], disable_numparse=True))
    print(f"\nReconstructions of masked images: {stages[0].folder / 'reconstructions'}")
    print(f"Detections beside the ground truth: {folder / 'predictions.png'}")
    reports = [str(path) for stage in stages if (path := stage.folder / PAGE).is_file()]
    if reports:  # train.report=null writes none
        print(f"Reports, to open in a browser: {', '.join(reports)}")
    ran = [stage for stage in stages if stage.seconds is not None]
    if ran:
        parts = ", ".join(f"{stage.title} {clock(stage.seconds or 0)}" for stage in ran)
        print(f"Minutes: {parts}, together {clock(sum(stage.seconds or 0 for stage in ran))}")
    else:
        print("Everything was complete already; --overwrite trains again.")

"""Training steps on a CPU beside a busy process: what sharing the cores costs.

Each setting of the threads runs in a process of its own, since the OpenMP library reads it when it
is loaded. The processes take turns, one step each, with and without a process beside them that
keeps one core busy; all others sleep meanwhile.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage

from crossmae_det.__main__ import WAITING
from crossmae_det.benchmark.measuring import Spread, check_repeats, ratios
from crossmae_det.benchmark.report import Column, Section
from crossmae_det.engine import keep_freed_memory
from crossmae_det.engine.config import build_model, resolve
from crossmae_det.engine.precision import amp_dtype, autocast
from crossmae_det.engine.train import build_optimizer
from crossmae_det.engine.trainer import training_step
from crossmae_det.model_zoo import get_config

# Variables of the environment by the name of a setting.
SETTINGS: dict[str, Mapping[str, str]] = {
    "crossmae-det": WAITING,
    "OpenMP's default": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")

BUSY = "while True: pass"

COLUMNS = (
    Column("threads", "name"),
    Column("alone [s]", "alone"),
    Column("beside one busy process [s]", "beside"),
    Column("beside / alone", "ratio", ".2f"),
    Column("CPU time beside / alone", "cpu_ratio", ".2f"),
)


def measure_sharing(config: str, overrides: Sequence[str], repeats: int) -> Section:
    """Time steps of a config with each of ``SETTINGS``, alone and beside a busy process.

    Args:
        config: name or path of a config; its training set must exist.
        overrides: of the config.
        repeats: steps of each setting and situation that count.

    Raises:
        ValueError: ``repeats`` out of range, or a process failed.
    """
    check_repeats(repeats)
    times: dict[str, dict[str, list[list[float]]]] = {
        name: {"alone": [], "beside": []} for name in SETTINGS
    }
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(_worker(config, overrides, variables))
            for name, variables in SETTINGS.items()
        }
        busy = stack.enter_context(_process([sys.executable, "-c", BUSY]))
        for situation in ("alone", "beside") * repeats:
            busy.send_signal(signal.SIGSTOP if situation == "alone" else signal.SIGCONT)
            for name, worker in workers.items():
                times[name][situation].append(_step(worker))
    records = []
    for name in SETTINGS:
        alone, beside = (list(zip(*times[name][key], strict=True)) for key in ("alone", "beside"))
        records.append(
            {
                "name": name,
                "alone": Spread.of(alone[0]),
                "beside": Spread.of(beside[0]),
                "ratio": ratios(beside[0], alone[0]),
                "cpu_ratio": ratios(beside[1], alone[1]),
            }
        )
    notes = [
        f"{repeats} interleaved steps of each; median, lowest and highest. {os.cpu_count()} cores.",
        "crossmae-det is what the commands set: "
        + ", ".join(f"{name}={value}" for name, value in WAITING.items())
        + ".",
    ]
    return Section("sharing", f"Steps of {config} beside a busy process", COLUMNS, records, notes)


@contextlib.contextmanager
def _process(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(command, **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


@contextlib.contextmanager
def _worker(
    config: str, overrides: Sequence[str], variables: Mapping[str, str]
) -> Iterator[subprocess.Popen]:
    """A process that takes a step for each line of its input, after a first one."""
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-m", __name__, config, *overrides]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with _process(command, env={**inherited, **variables}, **pipes) as worker:
        _step(worker)
        yield worker


def _step(worker: subprocess.Popen) -> list[float]:
    """Seconds, and seconds of CPU time, of a step."""
    assert worker.stdin and worker.stdout
    with contextlib.suppress(BrokenPipeError):  # it has ended: there is no answer either
        worker.stdin.write("\n")
        worker.stdin.flush()
    for line in worker.stdout:
        if line.startswith("step "):
            return [float(value) for value in line.split()[1:]]
    raise ValueError("a process that takes training steps has failed: see its message above")


def main(config: str, *overrides: str) -> None:
    """What a worker runs: a training step for each line of the input."""
    cfg = resolve(get_config(config, ["dataloader.train.num_workers=0", *overrides]))
    keep_freed_memory(torch.device("cpu"))
    torch.manual_seed(0)
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg.optimizer, model)
    batch = next(iter(instantiate(cfg.dataloader.train)))
    precision = amp_dtype(cfg.train, torch.device("cpu"))

    def forward(part: Any) -> Mapping[str, torch.Tensor]:
        with autocast(torch.device("cpu"), precision):
            return model(part)

    with EventStorage():
        for _ in sys.stdin:
            start = time.perf_counter(), time.process_time()
            training_step(batch, forward, optimizer)
            seconds = time.perf_counter() - start[0], time.process_time() - start[1]
            print("step", *seconds, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

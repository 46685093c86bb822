"""The command doctor: the facts about the environment that an issue report needs.

The module imports the standard library only. Every section imports the libraries that it reports
on, so that a missing or broken one costs one line, not the report.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import crossmae_det
from crossmae_det.tools.install_detectron2 import InstallError, existing_detectron2

# Instruction sets that determine the speed on x86 and ARM, and variables that limit threads.
CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
THREADS = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
    *("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"),
)
OPENCV = (
    *("opencv-python", "opencv-python-headless"),
    *("opencv-contrib-python", "opencv-contrib-python-headless"),
)
# Compiled libraries: an import shows whether they fit together.
IMPORTS = ("torch", "torchvision", "timm", "cv2", "pycocotools.mask", "hotcoco")
# When an attention backend is chosen automatically.
REASONS = {
    "chunked": "more query-key pairs than fit into the cache",
    "eager": "few query-key pairs, with gradients",
    "sdpa": "fused attention, without gradients of the mask",
    "folded": "plain attention, for the flash kernels",
    "flex": "too many channels for the flash kernels",
}

Lines = Iterator[tuple[str, str]]


def doctor(parser: argparse.ArgumentParser) -> int:
    """Report versions, devices, precision and attention backends, datasets and free disk space.

    Add the report to an issue. The exit code is 1 if a required library is missing or broken.
    """
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args()
    problems: list[str] = []
    sections: dict[str, Callable[[list[str]], Lines]] = {
        "Versions": versions,
        "CPU and threads": cpu,
        "GPU": gpu,
        "Chosen automatically": choices,
        "Datasets": datasets,
        "Free disk space": disks,
    }
    report = {title: dict(_degraded(section, problems)) for title, section in sections.items()}
    report["Problems"] = {str(number): text for number, text in enumerate(problems, 1)}
    if args.json:
        print(json.dumps(report, indent=2))
        return int(bool(problems))
    for title, lines in report.items():
        print(f"{title}:" if lines else f"{title}: none")
        for name, text in lines.items():
            print(f"  {name:<26}{text}")
    return int(bool(problems))


def _degraded(section: Callable[[list[str]], Lines], problems: list[str]) -> Lines:
    """A section up to the first error, which becomes its last line."""
    try:
        yield from section(problems)
    except Exception as error:  # whatever a missing or broken library raises
        yield "not available", _one_line(error)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def versions(problems: list[str]) -> Lines:
    """Versions of Python, this package and all that it requires, each checked."""
    yield "crossmae_det", f"{crossmae_det.__version__}, in {Path(crossmae_det.__file__).parent}"
    yield "Python", f"{platform.python_version()}, {sys.executable}"
    yield "system", platform.platform()
    try:
        found = existing_detectron2() or "not installed: run 'crossmae-det install-detectron2'"
    except InstallError as error:
        found = f"not usable: {error}"
    yield "detectron2", found
    if found.startswith("not "):
        problems.append(f"detectron2 is {found}")
    from packaging.requirements import Requirement

    for requirement in map(Requirement, importlib.metadata.requires("crossmae_det") or ()):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        names = OPENCV if requirement.name in OPENCV else (requirement.name,)
        installed = {name: version for name in names if (version := _version(name))}
        text = ", ".join(f"{name} {version}" for name, version in installed.items())
        yield requirement.name, text.removeprefix(f"{requirement.name} ") or "missing"
        if not installed:
            problems.append(f"{requirement.name} is missing: run 'pip install \"{requirement}\"'")
        if len(installed) > 1:
            problems.append(f"{text} overwrite each other's files: keep one of them")
        if not all(requirement.specifier.contains(v, prereleases=True) for v in installed.values()):
            problems.append(f"{text} is outside of the supported range: {requirement}")
    for module in IMPORTS:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError:
            pass  # reported as missing
        except Exception as error:
            problems.append(f"{module} does not import: {_one_line(error)}")


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def cpu(problems: list[str]) -> Lines:
    """Cores, instruction sets, and the threads that torch and OpenCV use."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    yield "model", model[1] if model else platform.processor() or platform.machine()
    if flags := re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.M):
        yield "instruction sets", " ".join(f for f in CPU_FLAGS if f in flags[1].split()) or "-"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "cores", f"{usable} usable of {os.cpu_count()}"
    for name in THREADS:
        yield name, os.environ.get(name, "not set")
    import torch

    yield "torch threads", f"{torch.get_num_threads()} ({torch.backends.cpu.get_cpu_capability()})"
    import cv2

    yield "OpenCV threads", f"{cv2.getNumThreads()}"


def gpu(problems: list[str]) -> Lines:
    """The GPUs that torch sees, and the driver."""
    import torch

    yield "torch built for CUDA", f"{torch.version.cuda or 'no'}"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True)
        yield "driver", (done.stdout or done.stderr).strip().partition("\n")[0]
    if not torch.cuda.is_available():
        yield "devices", "none"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        yield f"cuda:{index}", f"{device.name}, {memory:.0f} GiB, sm_{device.major}{device.minor}"


def choices(problems: list[str]) -> Lines:
    """The choices of ``auto`` on this machine: device, precision, attention backends."""
    import torch

    from crossmae_det.layers import attention_backends as backends

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    usable = [b for b in REASONS if backends.DEVICES.get(b, device.type) == device.type]
    yield "device", device.type
    yield "attention backends", f"{', '.join(usable)} run on {device.type}"
    crossmae_det.register()
    from crossmae_det.engine.precision import amp_dtype

    precision = amp_dtype({"amp": {"enabled": True, "dtype": "auto"}}, device)
    has_bf16 = f"bf16 instructions: {'yes' if precision == 'bf16' else 'no'}"
    yield "precision", f"{precision or 'float32'} ({device.type}, {has_bf16})"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision or "", torch.float32)
    # ViT-B on 1024 pixels: 12 heads of 64 channels, 64 x 64 patches or 25 windows of 14 x 14.
    for name, side, matrices in (("global", 64, 12), ("windowed", 14, 12 * 25)):
        rel_pos = torch.empty(1, matrices, side * side, side, device="meta")
        for mode, grad in (("training", True), ("inference", False)):
            choice = backends.choose_backend(device.type, dtype, 64, (rel_pos, rel_pos), grad)
            yield f"{name} block, {mode}", f"{choice} ({REASONS[choice]})"


def datasets(problems: list[str]) -> Lines:
    """The folder of datasets, and the known datasets in it."""
    root = os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    source = "DETECTRON2_DATASETS" if "DETECTRON2_DATASETS" in os.environ else "default"
    state = source if os.path.isdir(root) else f"{source}, missing"
    yield "folder", f"{os.path.abspath(root)} ({state})"
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from crossmae_det.model_zoo.resolvers import IMAGE_FOLDERS

    found = {name for name, (path, *_) in IMAGE_FOLDERS.items() if Path(root, path).is_dir()}
    for name in DatasetCatalog.list():
        metadata = MetadataCatalog.get(name)
        if os.path.isfile(metadata.get("json_file") or ""):
            images = metadata.get("image_root") or ""
            found.add(name if os.path.isdir(images) else f"{name} (without images: {images})")
    yield "found", ", ".join(sorted(found)) or "none of the known datasets"


def disks(problems: list[str]) -> Lines:
    """Free space where runs, datasets and downloads are written."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    folders = {
        "output": "output",
        "datasets": os.environ.get("DETECTRON2_DATASETS", "datasets"),
        "Hugging Face cache": os.environ.get("HF_HOME", f"{cache}/huggingface"),
        "download cache": os.environ.get("FVCORE_CACHE", "~/.torch/iopath_cache"),
        "temporary files": tempfile.gettempdir(),
    }
    for name, folder in folders.items():
        path = Path(folder).expanduser().absolute()
        existing = next(parent for parent in (path, *path.parents) if parent.is_dir())
        usage = shutil.disk_usage(existing)
        writable = "" if os.access(existing, os.W_OK) else ", not writable"
        yield name, f"{usage.free / 1e9:.1f} of {usage.total / 1e9:.1f} GB in {path}{writable}"

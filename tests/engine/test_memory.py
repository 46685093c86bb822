import platform
import subprocess
import sys

import pytest
import torch

from crossmae_det.engine import keep_freed_memory

FAULTS = """
import resource, sys
import torch
from crossmae_det.engine import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory(torch.device("cpu"))

def step():
    tensors = [torch.ones(2**23) for _ in range(8)]  # 256 MiB, or 65,536 pages of 4 KiB

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(3):
    step()
before = faults()
for _ in range(5):
    step()
print(faults() - before)
"""


def count_page_faults(mode: str) -> int:
    command = [sys.executable, "-c", FAULTS, mode]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(result.stdout.split()[-1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_memory_that_is_kept_is_not_faulted_in_again():
    assert count_page_faults("keep") < 0.1 * count_page_faults("leave")


def test_memory_is_left_to_torch_on_a_gpu():
    assert not keep_freed_memory(torch.device("cuda"))

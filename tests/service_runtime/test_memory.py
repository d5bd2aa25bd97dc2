"""Memory of messages is faulted in once; what was there at the start is no work for garbage collection."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from vitrine_vlm.service_runtime.memory import reuse_message_memory
if sys.argv[1] == "reuse":
    reuse_message_memory()
def fill(count):
    for _ in range(count):
        held = [bytes(1 << 20) + b"1" for _ in range(4)]
fill(4)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill(50)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def num_faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_blocks_of_a_megabyte_are_used_again() -> None:
    assert num_faults("plain") > 10_000, "glibc keeps them by itself: the setting is not needed any more"
    assert num_faults("reuse") < 1_000


RETURNED = """
import asyncio, ctypes
from vitrine_vlm.service_runtime import memory
from vitrine_vlm.service_runtime.byte_budget import ByteBudget
from vitrine_vlm.service_runtime.supervisor import Supervisor
memory._SETTLE_S = 0.1
def resident_mib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024
async def main():
    memory.reuse_message_memory()
    budget, supervisor = ByteBudget(1 << 30), Supervisor()
    memory.return_memory_after_peaks(budget, supervisor)
    with budget.item() as item:
        item.reserve(256 << 20)
        pieces = [bytes(64 * 1024) for _ in range(4096)]
        kept = pieces[::128]
        garbage = [pieces]
        garbage.append(garbage)  # as an error and the frames of its traceback
        del pieces, garbage
        before = resident_mib()
    await asyncio.sleep(0.5)
    print(before - resident_mib())
    await supervisor.close()
asyncio.run(main())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_what_is_freed_between_other_blocks_is_returned_after_a_peak_and_garbage_is_collected() -> None:
    done = subprocess.run([sys.executable, "-c", RETURNED], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 150


COLLECTED = """
import gc
from vitrine_vlm.service_runtime.memory import freeze_gc
loaded = [[number] for number in range(100_000)]
freeze_gc()
loop = []
loop.append(loop)
del loop
print(len(gc.get_objects()), gc.collect() > 0)
"""


def test_collections_pass_over_what_was_there_and_still_find_garbage() -> None:
    done = subprocess.run([sys.executable, "-c", COLLECTED], capture_output=True, text=True, check=True)
    num_tracked, found = done.stdout.split()
    assert int(num_tracked) < 1_000
    assert found == "True"


WITH_A_LIBRARY = """
import gc, triton
from vitrine_vlm.service_runtime.memory import freeze_gc
freeze_gc()
assert gc.get_freeze_count() > 10_000
"""


def test_libraries_find_no_leaks_at_the_end() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    ended = subprocess.run([sys.executable, "-c", WITH_A_LIBRARY], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")

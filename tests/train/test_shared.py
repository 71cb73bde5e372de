"""What a process does between the trials that it runs."""

import subprocess
import sys

import pytest

PROGRAM = """
import threading
from pathlib import Path
import torch
from clippo.train.shared import give_back_memory

def held():
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1]) >> 20

small = []

def trial():
    freed = []
    for _ in range(300):
        freed += [torch.ones(1 << 14) for _ in range(16)]  # 1 MiB in pieces that are never mapped alone
        small.append(torch.ones(1 << 10))  # stays, so that what lies below cannot go by itself

before = held()
thread = threading.Thread(target=trial)
thread.start()
thread.join()
kept = held()
give_back_memory()
print(kept - before, held() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")
def test_memory_that_trials_have_freed_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    kept, left = map(int, done.stdout.split())  # [MiB]
    assert kept > 200, "or there is nothing to give back"
    assert left < 50

"""What a process does between the trials that it runs."""

import subprocess
import sys
from pathlib import Path

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


UNKNOWN = """
import ray
from clippo.config import ModelConfig, TrainConfig
from clippo.errors import ClippoError
from clippo.prepared import Location
from clippo.train.ray_train import measure_reference
from clippo.train.shared import Shared

ray.init("local", num_cpus=1, num_gpus=1, include_dashboard=False, log_to_driver=False)
shared = Shared(
    model=ModelConfig(name="ViT-B-33"), train=TrainConfig(), prepared="none", location=Location(FOLDER)
)
try:
    measure_reference(shared, gpus=1.0)
except ClippoError as error:
    print(error)
ray.shutdown()
"""


def test_what_is_wrong_on_the_gpus_is_said_in_one_line(tmp_path: Path) -> None:
    program = UNKNOWN.replace("FOLDER", repr(str(tmp_path)))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "ViT-B-33" in done.stdout
    assert done.stdout.count("\n") == 1, done.stdout

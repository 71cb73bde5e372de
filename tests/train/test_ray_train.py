"""What a trial through Ray Train says of what is wrong."""

import subprocess
import sys
from pathlib import Path

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

"""The sweep against typographic attacks, on the bundled model and pictures unless told otherwise.

    python sweeps/typo_sweep.py                                            # laptop
    python sweeps/typo_sweep.py --model.name ViT-B-32 --model.pretrained openai \
        --data.source folder:PICTURES --workers 1 --gpus-per-worker 1      # your model, data and GPUs
    ray job submit --working-dir . -- python sweeps/typo_sweep.py --results s3://bucket/prefix

The defaults: 16 trials of 1 or 2 epochs over 1,024 preference pairs of 64 classes, two at a time. The front
leads from the untouched model (robustness about 0.3) to models that read the picture and not the word; what
they pay with is reading, least of all clean accuracy.
"""

from clippo.cli import sweep_main
from clippo.config import SweepConfig


def typo_sweep() -> SweepConfig:
    """The configuration whose fields are this program's flags."""
    return SweepConfig()


if __name__ == "__main__":
    sweep_main(typo_sweep(), __doc__)

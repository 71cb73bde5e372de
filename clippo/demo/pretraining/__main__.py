"""Pretrains the bundled model from scratch: ``python -m clippo.demo.pretraining`` (or ``make pretrain``).

Needs the extra ``pretrain`` and npm; takes an hour and a half on two busy cores; run again, it resumes.
``--small`` does everything in about two minutes and writes nothing into the package, to see that the program
works. It resumes what has the same seed, in ``build/pretraining``; delete that after a change of the recipe,
the pictures or the fonts.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import math
import os
import shutil
from importlib import resources
from pathlib import Path

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torch.multiprocessing.spawn import spawn

from clippo.demo import CLASSES, HERE, MODEL_NAME, WEIGHTS, register
from clippo.demo.pretraining import material, measure, train

MERGES = 1000


def write_merges(path: Path) -> None:
    """CLIP's first byte-pair merges, from the file that open_clip ships (MIT)."""
    with gzip.open(str(resources.files("open_clip").joinpath("bpe_simple_vocab_16e6.txt.gz")), "rt") as full:
        lines = list(itertools.islice(full, MERGES + 1))
    # A line break at the end would count as one more merge.
    path.write_bytes(gzip.compress("".join(lines).rstrip("\n").encode(), mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=Path("build/pretraining"), help="where it keeps its state"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a short run that ships nothing")
    parser.add_argument("--port", type=int, default=29511, help="loopback port of the two processes")
    args = parser.parse_args()
    scale = "small" if args.small else "full"
    work: Path = args.work / scale / str(args.seed)
    work.mkdir(parents=True, exist_ok=True)

    modules = material.fetch(Path("build/material"))
    begins = not (work / "captions.pt").exists()
    if (begins and not args.small) or not (HERE / "merges.txt.gz").exists():
        material.write_bundle(modules)
        write_merges(HERE / "merges.txt.gz")
    register()
    if begins:
        torch.manual_seed(args.seed)
        model = open_clip.create_model(MODEL_NAME)
        train.pretrain_text(model, train.TEXT_STEPS[scale], args.seed)
        model.eval()
        n = len(CLASSES)
        with torch.no_grad():
            single = torch.stack([train.encode(model, [t.format(c) for c in CLASSES]) for t in train.SINGLE])
            double = torch.stack([
                train.encode(model, [t.format(a, b) for a in CLASSES for b in CLASSES]).unflatten(0, (n, n))
                for t in train.DOUBLE
            ])  # fmt: skip
        torch.save(model.state_dict(), work / "text.pt")
        torch.save((single, double), work / "captions.tmp")
        os.replace(work / "captions.tmp", work / "captions.pt")
    pools = material.build_pools(modules, seed=args.seed, small=args.small)
    spawn(train.run_rank, args=(pools, work, scale, args.seed, args.port), nprocs=train.WORLD)

    model = open_clip.create_model(MODEL_NAME)
    model.load_state_dict(torch.load(work / "text.pt", weights_only=True))
    state = torch.load(work / "checkpoint.pt", weights_only=True)
    model.visual.load_state_dict(state["visual"])
    with torch.no_grad():
        model.logit_scale.copy_(state["logit_scale"])
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    weights = work / "model.safetensors" if args.small else WEIGHTS
    save_file({k: v.contiguous() for k, v in half.items()}, weights)
    scale_now = math.exp(float(np.float32(state["logit_scale"])))
    if not args.small:
        shutil.copy(work / "log.jsonl", material.HERE / "log.jsonl")
        measure.main()
    print(f"wrote {weights}: {sum(v.numel() for v in half.values()):,} numbers, logit scale {scale_now:.1f}")


if __name__ == "__main__":
    main()

"""The configuration of a sweep: frozen dataclasses whose defaults run on a laptop.

Every field is a flag of ``sweeps/typo_sweep.py``; the docstring under a field is its help text.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from clippo.errors import ConfigError

Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is tuned, and how much of it."""

    name: str = "clippo-demo"
    """open_clip model name; clippo-demo is the bundled one."""
    pretrained: str | None = None
    """Pretrained tag or checkpoint file; the bundled model needs none."""
    trainable: str = "last:2"
    """image (the whole image tower), last:K (its last K blocks) or transform (a linear map of both
    embeddings); what lies before is computed once."""
    prompt: str = "a photo of a {}"
    """Prompt of a class, {} being its name; or the name of ready templates (imagenet, pets, ...), or a file
    with one template a line, whose embeddings are averaged."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The labelled pictures, their attacked twins, and how many of each."""

    source: str = "demo"
    """demo (the bundled pictures), folder:PATH, table:PATH (CSV or Parquet), webdataset:PATH or
    torchvision:NAME:PATH, each local or s3://."""
    class_names: str = ""
    """Readable names of the source's classes: a file (a name a line in the order of the classes, or CSV or
    JSON from class to name), or imagenet for classes 0 to 999; WordNet ids (n01440764) need neither."""
    picture_size: int = 0
    """Task typographic: side that a picture is resized and cropped to before a word is drawn on it, and from
    there to the model's size; 0: the model's own [pixels]."""
    test_sets: tuple[str, ...] = ()
    """More test sets: rta-100:PATH, paint:PATH, disentangling:PATH, scam:PATH with words on real objects, or
    any source (its pictures clean and attacked); NAME=SOURCE names one."""
    seen_share: float = 0.5
    """Share of the classes that tuning sees; the others are held out and only measured."""
    train_pictures: int = 1024
    """Pictures that preference pairs are made from [count]."""
    attacked_copies: int = 1
    """Task typographic: attacked copies of each of them, the word of each drawn anew [count]."""
    kept_source: str = ""
    """Task gender: labelled pictures of another kind whose reading must be kept, a source as above; empty:
    none."""
    top_k: int = 24
    """Task gender: the top of a ranking that is looked at [count]."""
    folds: int = 0
    """Task gender: the seen concepts are dealt into so many folds. Each trial is also tuned once without the
    pairs of each, and these weights are measured on what they never saw, so that settings win whose effect
    carries over (cross-validation); 0: none [count]."""
    eval_pictures: int = 384
    """Pictures of each evaluation set [count]."""
    max_unreadable: float = 0.01
    """Share of pictures that may be left out because they cannot be decoded."""
    train_fonts: tuple[str, ...] = ()
    """Task typographic: font files of the words on tuning pictures; none: the bundled ones."""
    validation_fonts: tuple[str, ...] = ()
    """Task typographic: font files of the words on validation pictures; none: the bundled ones."""
    test_fonts: tuple[str, ...] = ()
    """Task typographic: font files of the words on test pictures; none: the bundled ones."""
    font_size: Range = (0.12, 0.18)
    """Task typographic: font size of the attack before it is reduced to fit [share of the picture's shorter
    side]."""
    mirrored_words: bool = False
    """Task typographic: also measure test pictures whose word is mirrored: the same ink, hardly read. As
    nonsense words do, they tell what covering the picture costs."""
    split_seed: int = 0
    """Seed of the class split, of the pictures and of the words drawn on them."""

    def __post_init__(self) -> None:
        _require(
            0 < self.seen_share < 1, "data.seen_share", self.seen_share, "between 0 and 1, both excluded"
        )
        _require(self.train_pictures >= 2, "data.train_pictures", self.train_pictures, "at least 2")
        _require(self.attacked_copies >= 1, "data.attacked_copies", self.attacked_copies, "at least 1")
        _require(self.eval_pictures >= 1, "data.eval_pictures", self.eval_pictures, "at least 1")
        _require(self.top_k >= 1, "data.top_k", self.top_k, "at least 1")
        _require(self.folds == 0 or self.folds >= 2, "data.folds", self.folds, "0 or at least 2")
        _require(self.picture_size >= 0, "data.picture_size", self.picture_size, "at least 0")
        _require(0 <= self.max_unreadable < 1, "data.max_unreadable", self.max_unreadable, "in [0, 1)")
        check_seed("data.split_seed", self.split_seed)
        low, high = self.font_size
        _require(0 < low <= high <= 1, "data.font_size", self.font_size, "two shares, 0 < low <= high <= 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What is the same in every trial."""

    batch_size: int = 64
    """Pairs per optimizer step, over all workers [count]."""
    optimizer: Literal["adamw", "adamax"] = "adamw"
    """adamax is what the published code uses; AdamW is stronger at an equal learning rate."""
    weight_decay: float = 0.0
    """Weight decay of the optimizer."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 autocast where the device computes it natively, else fp32; fp16 scales the loss."""
    micro_batch: int = 0
    """Pairs that a worker's memory must hold at once; gradients are added up over them, with the result of
    whole batches; 0: all of a batch [count]."""
    compile: bool = False
    """torch.compile what is trained: up to 15 % faster on CPUs, after a minute; not measured on GPUs."""
    label_smoothing: float = 0.0
    """Label smoothing of DPO."""
    average_beta: float = 0.7
    """Both parameters of the Beta density that weights the moving average of the weights."""
    alphas: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """Points of a trial's curve that are measured: weights between the untouched model (0) and its averaged
    ones (1)."""
    powers: tuple[float, ...] = (-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    """The same for a trained transform: powers t of its singular values; 0 is the untouched model."""
    epochs_between_checkpoints: int = 1
    """A dead worker or driver repeats at most this many epochs, and no more training than the minutes of the
    next flag [count]."""
    minutes_between_checkpoints: float = 5.0
    """Long epochs are kept every so often in their middle, and whenever Ray says that a machine of the trial
    is about to go or that there will be more workers; 0: only then [minutes]."""

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, "train.batch_size", self.batch_size, "at least 1")
        _require(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "at least 0")
        _require(
            0 <= self.label_smoothing < 0.5, "train.label_smoothing", self.label_smoothing, "in [0, 0.5)"
        )
        _require(self.average_beta > 0, "train.average_beta", self.average_beta, "above 0")
        _require(self.micro_batch >= 0, "train.micro_batch", self.micro_batch, "at least 0")
        _require(all(0 <= a <= 1 for a in self.alphas), "train.alphas", self.alphas, "shares in [0, 1]")
        _require(
            self.epochs_between_checkpoints >= 1,
            "train.epochs_between_checkpoints",
            self.epochs_between_checkpoints,
            "at least 1",
        )
        _require(
            self.minutes_between_checkpoints >= 0,
            "train.minutes_between_checkpoints",
            self.minutes_between_checkpoints,
            "at least 0",
        )


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """What is searched, and for how long."""

    trials: int = 16
    """Trials of the sweep, finished ones of an earlier run included [count]."""
    concurrency: int = 2
    """Trials at once [count]."""
    losses: tuple[str, ...] = ("dpo", "ipo", "kto")
    """Loss types to choose from."""
    beta_dpo: Range = (0.02, 1.0)
    """Preference temperature of DPO, log scale."""
    beta_ipo: Range = (0.02, 0.2)
    """Preference temperature of IPO (the paper's tau), log scale."""
    beta_kto: Range = (0.02, 1.0)
    """Preference temperature of KTO, log scale."""
    kl_weight: Range = (0.1, 30.0)
    """Weight of KL(reference || policy) on clean pictures, log scale."""
    learning_rate: Range = (3e-5, 5e-4)
    """Learning rate, log scale."""
    orthogonality: Range = (0.01, 1.0)
    """Weight of the penalty ||I - W W'|| of a trained transform, log scale."""
    epochs: tuple[int, int] = (1, 2)
    """Epochs, both ends included [count]."""
    baselines: tuple[str, ...] = ("cross_entropy",)
    """Trials besides the search, to compare with: cross_entropy is plain fine-tuning on the attacked pictures
    without a KL term, and its curve of interpolated weights is PAINT. It has the first of the pairs that do
    not compare two pictures."""
    sampler: Literal["tpe", "nsga2", "nsga3", "gp", "qmc", "random"] = "tpe"
    """How settings are proposed: tree-structured Parzen estimators, evolution (nsga2, nsga3), Gaussian
    processes, quasi-random or random points."""
    objectives: tuple[str, ...] = ()
    """What the search weighs against each other, two or three of: the task's goal (such as robustness),
    retention, accuracy:SET and attack_success_rate:SET of any evaluation set (such as reading/held_out),
    device_s (seconds of device time of a trial). The last two are minimised. None: goal and retention."""
    pairs: tuple[str, ...] = ()
    """Kinds of the task's preference pairs to choose from. None: its first."""
    min_retention: float = 0.0
    """Retention below this counts as infeasible to the sampler, however robust; 0: no bound [share]."""
    replicates: int = 1
    """Trials of each setting, with a seed each; the sampler is told their mean [count]."""
    stopping: Literal["none", "no_better", "halving"] = "none"
    """Which trials are stopped early, by their objectives: no_better stops one that came no farther than
    another one, or itself before, with no more epochs; halving (asynchronous successive halving by
    non-dominated rank) those that are not among the best when they reach a rung. What is stopped offers the
    averaged weights that it had by then; for trials of many epochs (docs/EXPERIMENTS.md)."""
    min_epochs: int = 3
    """With stopping: epochs that every trial gets; the first rung of halving [count]."""
    min_gain: float = 0.01
    """With no_better: how much farther, in one objective at least, a trial must have come."""
    reduction_factor: int = 2
    """With halving: at each rung the best 1 / reduction_factor go on, to as many times the epochs."""
    confirm: int = 1
    """Settings of the front that are trained once more after the search, with a fresh seed and two workers
    where there are two cores, since a search's own best numbers are optimistic [count]."""
    warm_start: tuple[str, ...] = ()
    """Earlier sweeps whose finished trials the sampler learns from: STORE or STORE/SWEEP."""
    mirror: str = ""
    """Optuna storage that shows the running sweep in optuna-dashboard: a database URL such as
    sqlite:///sweeps.db, or journal:FILE."""
    device_hours: float = 0.0
    """Start no trial when all trials together have taken this [hours of device time]; 0: no bound."""
    wall_hours: float = 0.0
    """Start no trial after this time [hours]; 0: no bound."""
    patience: int = 0
    """Start no trial when the hypervolume of goal and retention has not grown for this many trials [count];
    0: no bound."""
    seed: int = 0
    """Seed of the sampler and of every trial."""

    def __post_init__(self) -> None:
        _require(len(self.losses) >= 1, "search.losses", self.losses, "at least one loss")
        for name in ("trials", "concurrency", "replicates", "min_epochs"):
            _require(getattr(self, name) >= 1, f"search.{name}", getattr(self, name), "at least 1")
        for name in ("confirm", "device_hours", "wall_hours", "patience", "min_gain"):
            _require(getattr(self, name) >= 0, f"search.{name}", getattr(self, name), "at least 0")
        check_seed("search.seed", self.seed)
        _require(self.reduction_factor >= 2, "search.reduction_factor", self.reduction_factor, "at least 2")
        _require(
            self.stopping == "none" or self.replicates == 1,
            "search.replicates",
            self.replicates,
            "1 with stopping, or the mean would be of the seeds that were not stopped",
        )
        _require(
            0 <= self.min_retention <= 1, "search.min_retention", self.min_retention, "a share in [0, 1]"
        )
        _require(
            not self.objectives or 2 <= len(set(self.objectives)) == len(self.objectives) <= 3,
            "search.objectives",
            self.objectives,
            "two or three different ones",
        )
        ranges = ("beta_dpo", "beta_ipo", "beta_kto", "kl_weight", "learning_rate", "orthogonality", "epochs")
        for name in ranges:
            low, high = getattr(self, name)
            finite = 0 < low <= high < math.inf
            _require(finite, f"search.{name}", (low, high), "a range with 0 < low <= high, both finite")

    @property
    def may_stop_after(self) -> int | None:
        """The first epoch after which trials may be stopped; None: they are not."""
        return None if self.stopping == "none" else self.min_epochs


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A whole sweep."""

    task: str = "typographic"
    """What is measured and tuned against."""
    name: str = ""
    """Name of the sweep; an existing one is resumed. Default: date and digest of the configuration."""
    results: str = "./results"
    """Where results go: a folder or s3://bucket/prefix."""
    workers: int | str = 0
    """Worker processes of each trial, such as 2; 1:4 starts with what is there and grows up to 4; 0 runs a
    trial in its own process [count]."""
    worker_timeout: float = 300.0
    """A worker process that gives no sign for so long is taken for lost, and the trial goes on from its
    checkpoint with others [seconds]."""
    gpus_per_worker: float = 0.0
    """GPUs of each worker process, or of the trial itself when workers is 0."""
    autoscaling: bool = False
    """The cluster adds machines when they are asked for: wait for CPUs and GPUs that it does not have yet, up
    to what its launcher's configuration or KubeRay's allows."""
    dry_run: bool = False
    """Print the configuration, the search space, the resources, an estimate and what is missing, and run
    nothing."""
    verbose: bool = False
    """Show the logs of Ray and of the trials instead of the progress view."""
    track: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    """Also log settings and the numbers of every epoch to these; where, say their environment variables (such
    as MLFLOW_TRACKING_URI), else beside local results."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    retention_sets: tuple[str, ...] = ()
    """Evaluation sets whose accuracy must be kept; retention is the mean over them of policy / reference.
    None: the task's."""
    goal_sets: tuple[str, ...] = ()
    """Evaluation sets of the task's goal; robustness is the share correct over all their pictures. None: the
    task's."""

    def __post_init__(self) -> None:
        _require(
            self.workers >= 0
            if isinstance(self.workers, int)
            else re.fullmatch(r"[0-9]+:[0-9]+", self.workers) is not None
            and 1 <= self.min_workers <= self.max_workers,
            "workers",
            self.workers,
            "a number, at least 0, or FEWEST:MOST such as 1:4",
        )
        _require(self.worker_timeout > 0, "worker_timeout", self.worker_timeout, "above 0")
        _require(self.gpus_per_worker >= 0, "gpus_per_worker", self.gpus_per_worker, "at least 0")
        _require(
            self.train.batch_size >= max(1, self.max_workers),
            "train.batch_size",
            self.train.batch_size,
            f"at least the number of workers ({self.max_workers})",
        )

    @property
    def min_workers(self) -> int:
        """Worker processes that a trial starts with at the least."""
        return int(str(self.workers).partition(":")[0])

    @property
    def max_workers(self) -> int:
        """Worker processes that a trial may grow to.

        >>> SweepConfig(workers=2).max_workers, SweepConfig(workers="1:4").max_workers
        (2, 4)
        """
        return int(str(self.workers).rpartition(":")[2])

    @property
    def is_elastic(self) -> bool:
        """Whether the number of a trial's workers may change while it runs."""
        return self.min_workers < self.max_workers


def absolute(config: SweepConfig) -> SweepConfig:
    """The configuration with absolute paths, since trials run in other folders than the sweep.

    >>> absolute(SweepConfig(data=DataConfig(source="folder:/pictures"))).data.source
    'folder:/pictures'
    """

    def file(name: str) -> str:
        # A folder that happens to be called like a tag is none.
        there = os.path.expanduser(name)
        return os.path.realpath(there) if os.path.isfile(there) else name

    def place(spec: str) -> str:
        # KIND:PATH or KIND:NAME:PATH, perhaps with a name before it
        before, colon, path = spec.rpartition(":")
        if not colon or "//" in path:
            return spec
        there = os.path.expanduser(path)
        return before + colon + (os.path.abspath(there) if "{" in path or os.path.exists(there) else path)

    data, model = config.data, config.model
    data = replace(
        data,
        source=place(data.source),
        kept_source=place(data.kept_source),
        class_names=file(data.class_names),
        test_sets=tuple(map(place, data.test_sets)),
        train_fonts=tuple(map(file, data.train_fonts)),
        validation_fonts=tuple(map(file, data.validation_fonts)),
        test_fonts=tuple(map(file, data.test_fonts)),
    )
    pretrained = file(model.pretrained) if model.pretrained else None
    name = place(model.name) if model.name.startswith("local-dir:") else model.name
    model = replace(model, name=name, pretrained=pretrained)
    return replace(config, data=data, model=model)


def digest(*parts: Any) -> str:
    """A short content address of dataclasses, strings and plain values: equal parts, equal digest.

    >>> digest(ModelConfig()) == digest(ModelConfig(name="clippo-demo"))
    True
    >>> digest(ModelConfig()) == digest(ModelConfig(name="ViT-B-32"))
    False
    """
    plain = [
        dataclasses.asdict(p) if dataclasses.is_dataclass(p) and not isinstance(p, type) else p for p in parts
    ]
    text = json.dumps(plain, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_seed(name: str, seed: int) -> None:
    """Whether all generators take it.

    Raises:
        ConfigError: it is out of its bounds.
    """
    _require(0 <= seed < 2**31, name, seed, "in [0, 2^31)")


def _require(condition: bool, name: str, value: Any, bound: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {value!r}; it must be {bound}")

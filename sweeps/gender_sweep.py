"""The sweep for what a model reads as gender, on bundled drawings of people unless told otherwise.

    python sweeps/gender_sweep.py                                          # laptop, two minutes
    python sweeps/gender_sweep.py --preset tower                           # the image tower instead
    python sweeps/gender_sweep.py --model.name ViT-B-32 --model.pretrained openai \
        --data.source grouped:people.csv --data.test-sets fairface:PATH    # your model and data

docs/GENDER.md says what is measured, what it does not say, and what it must not be used for.

The defaults (--preset transform): 32 trials of a linear map of both embeddings, whose power t turns the
preference up and down, cross-validated over the seen occupations. Expected: MaxSkew@24 of these from .43 to
.09 to .21, of held-out ones from .5 to .22 to .33, with occupations and minority gender of seen ones mostly
read as well as before (docs/EXPERIMENTS.md).

--preset tower: 16 trials of the last two blocks of the image tower, four minutes. Expected: MaxSkew@24 of
seen occupations from .43 to .14 to .18, of held-out ones from .51 to .44 to .45, so it carries over little.
"""

from dataclasses import replace

from clippo.cli import sweep_main
from clippo.config import DataConfig, ModelConfig, SearchConfig, SweepConfig, TrainConfig

PEOPLE = DataConfig(
    source="people",
    kept_source="demo",
    seen_share=0.6,
    folds=3,
    train_pictures=960,
    eval_pictures=576,
)


def gender_sweep() -> SweepConfig:
    """A linear map of both embeddings; seconds a trial.

    Batches are large, since what small ones do to all rankings at once differs from seed to seed
    (docs/EXPERIMENTS.md).
    """
    return SweepConfig(
        task="gender",
        model=ModelConfig(pretrained="people", trainable="transform"),
        data=PEOPLE,
        train=TrainConfig(batch_size=512, powers=(-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)),
        search=SearchConfig(
            trials=32,
            losses=("dpo", "kto"),
            pairs=("counter+image", "image"),
            beta_dpo=(0.2, 1.0),
            beta_kto=(0.05, 0.5),
            kl_weight=(5.0, 60.0),
            learning_rate=(1.5e-3, 6e-3),
            orthogonality=(0.002, 0.05),
            epochs=(12, 32),
            min_retention=0.985,  # of five capped ratios noise alone takes about .01
            baselines=(),  # a pair of two pictures has no one right answer to be tuned on plainly
        ),
    )


def tower_sweep() -> SweepConfig:
    """The last blocks of the image tower."""
    return SweepConfig(
        task="gender",
        model=ModelConfig(pretrained="people"),
        data=replace(PEOPLE, folds=0),  # each fold would take as long as a trial
        search=SearchConfig(
            pairs=("correct", "image", "correct+image"),
            kl_weight=(1.0, 100.0),
            epochs=(1, 3),
            baselines=(),
        ),
    )


if __name__ == "__main__":
    sweep_main({"transform": gender_sweep, "tower": tower_sweep}, __doc__)

"""The sweep against typographic attacks, on the bundled model and pictures unless told otherwise.

    python sweeps/typo_sweep.py                                            # laptop
    python sweeps/typo_sweep.py --model.name ViT-B-32 --model.pretrained openai \
        --data.source folder:PICTURES --learning-rate 5e-6 1e-4 \
        --workers 1 --gpus-per-worker 1                                    # your model, data and GPUs
    python sweeps/typo_sweep.py --preset paper --dry-run                   # the published setting
    python sweeps/typo_sweep.py --preset transform                         # a linear map of the embeddings
    ray job submit --working-dir . -- python sweeps/typo_sweep.py --results s3://bucket/prefix

A flag may go without its group where its own name is enough: --precision bf16, --trials 64.

The defaults (--preset demo): 16 trials of 1 or 2 epochs over 1,024 preference pairs of 64 classes, two at a
time, and one of plain fine-tuning to compare with. The front leads from the untouched model (robustness about
0.4) to models that read the picture and not the word; what they pay with is reading, least of all clean
accuracy.
"""

from clippo.cli import sweep_main
from clippo.config import DataConfig, ModelConfig, SearchConfig, SweepConfig, TrainConfig


def typo_sweep() -> SweepConfig:
    """The bundled model and pictures, on a laptop."""
    return SweepConfig()


def transform_sweep() -> SweepConfig:
    """A linear map of both embeddings, whose power t turns the preference up and down; seconds a trial."""
    return SweepConfig(
        model=ModelConfig(trainable="transform"),
        search=SearchConfig(learning_rate=(1e-3, 1e-2), kl_weight=(0.1, 10.0), epochs=(4, 16)),
    )


def paper_sweep() -> SweepConfig:
    """The setting of Afzali et al., ICLR 2025 (arXiv 2411.08923), with a joint search within its grids.

    The README says what is downloaded and where it goes. Tuning: ImageNet-100, 168-pixel pictures, batches of
    512, Adamax at 2e-5 with cosine, 3 epochs, the Beta(0.7, 0.7)-weighted average of the weights. Unlike the
    published code this trains the image tower alone, holds half of the classes out, and never evaluates on
    pictures that choose anything.
    """
    data = DataConfig(
        source="folder:data/imagenet100",
        class_names="imagenet",
        picture_size=168,
        font_size=(20 / 224, 40 / 224),
        train_pictures=100_000,
        eval_pictures=2_000,
        test_sets=(
            "rta-100:data/rta-100",
            "paint:data/paint",
            "disentangling:data/disentangling",
            "caltech101=torchvision:Caltech101:data",
            "oxford_pets=torchvision:OxfordIIITPet:data",
            "stanford_cars=torchvision:StanfordCars:data",
            "flowers102=torchvision:Flowers102:data",
            "food101=torchvision:Food101:data",
            "fgvc_aircraft=torchvision:FGVCAircraft:data",
            "dtd=torchvision:DTD:data",
            "sun397=torchvision:SUN397:data",
            "eurosat=torchvision:EuroSAT:data",
        ),
    )
    search = SearchConfig(
        trials=64,
        beta_dpo=(0.01, 1.5),
        beta_ipo=(0.01, 1.5),
        beta_kto=(0.01, 1.5),
        kl_weight=(0.01, 2.0),
        learning_rate=(2e-5, 2e-5),
        epochs=(3, 3),
        concurrency=1,
    )
    return SweepConfig(
        workers=1,
        gpus_per_worker=1.0,
        model=ModelConfig(name="ViT-B-32", pretrained="openai", trainable="image", prompt="a photo of a {}."),
        data=data,
        train=TrainConfig(batch_size=512, optimizer="adamax"),
        search=search,
    )


if __name__ == "__main__":
    sweep_main({"demo": typo_sweep, "transform": transform_sweep, "paper": paper_sweep}, __doc__)

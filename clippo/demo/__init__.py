"""The bundled model and pictures, so that a sweep runs on a laptop with nothing else.

``register()`` makes the model known to open_clip under ``MODEL_NAME``; ``WEIGHTS`` is its checkpoint. The tag
``people`` is another, which went on from it: it reads people at work, with a bias.

>>> import open_clip
>>> from clippo import demo
>>> demo.register()
>>> model = open_clip.create_model(demo.MODEL_NAME, pretrained=str(demo.WEIGHTS))
>>> tokenizer = open_clip.get_tokenizer(demo.MODEL_NAME)
>>> tokenizer(["a photo of a cat"]).shape
torch.Size([1, 16])
"""

from importlib import resources
from pathlib import Path

HERE = Path(__file__).parent
MODEL_NAME = "clippo-demo"
WEIGHTS = HERE / "model.safetensors"
PEOPLE_WEIGHTS = HERE / "people.safetensors"
CLASSES: tuple[str, ...] = tuple(resources.files(__name__).joinpath("classes.txt").read_text().split())

# A ModifiedResNet of 2 M parameters with CLIP's first 1,000 byte-pair merges. open_clip wants the merges'
# path absolute, which is why the model is registered by a call and not by a config file.
MODEL_CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 96, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 1514,
        "width": 128,
        "heads": 4,
        "layers": 2,
        "tokenizer_kwargs": {"bpe_path": str((HERE / "merges.txt.gz").resolve())},
    },
}


def register() -> None:
    """Makes the bundled model and its tag known to open_clip; calling it again is harmless."""
    from open_clip import factory, pretrained  # heavy, and not needed by who only wants the class names

    factory._MODEL_CONFIGS[MODEL_NAME] = MODEL_CONFIG
    pretrained._PRETRAINED[MODEL_NAME] = {"people": {"file": str(PEOPLE_WEIGHTS)}}

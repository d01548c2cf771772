"""Other projects' latents, each opened as a `Source` of arrays and labels: `open_source(path)`.

What each project's own scripts write, and how its training reads it (K = kind, s = scale, b = bias of encoding.py):

    maskdit_lmdb   data.mdb with z-<i>, y-<i>, length; raw float32                       K moments_logvar, s SD's
    maskdit_wds    tars of <key>.latent (a pickled array) and <key>.cls                  K moments_logvar, s SD's
    repa           vae-sd/<5 digits>/img-mean-std-<8>.npy and dataset.json               K mean_std, s SD's
    edm2           the same names in a folder or zip; the VAE saw [0, 1], not [-1, 1]    K mean_std, s, b per channel
    speedrundit    vae-in/<5 digits>/img-latents-<8>.npy (1, C, h, w) and dataset.json   K sample_raw, s 0.3099
    fastdit        <name>_features/<i>.npy (1, C, h, w) and <name>_labels/<i>.npy        K sample_scaled
    lightningdit   *.safetensors with latents, latents_flip, labels; latents_stats.pt    K sample_raw, s, b per channel
    npy            any folder of .npy, class by top folder or dataset.json               K to be given
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch

from autoencoder import SD_SCALE
from data.archives import dataset_json, holds_pictures, members, open_tree, parse_number, split_name
from data.encoding import Channels
from data.foreign.pickled import read_pickled_array
from system import UserError

INVAE_SCALE = 0.3099
EDM2_MEAN, EDM2_STD, EDM2_FINAL_STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28), 0.5


@dataclass
class Source:
    """Another project's latents: `count` images; with flip "both", each has a second array, its mirror image's."""

    format: str
    count: int
    array: Callable[[int, bool], np.ndarray]  # (image, mirrored) -> (C or 2C, h, w), float16 or float32
    label: Callable[[int], int]
    kind: str | None = None  # None: the format leaves it open
    scale: Channels | None = None
    bias: Channels | None = None
    codec: dict | None = None
    flip: str = "none"


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
            return source
    pictures = "; pictures become latents by scripts/encode_latents.py" if holds_pictures(path) else ""
    raise UserError(f"{path} holds no latents {'of format ' + format if format else 'of a known format'}{pictures}")


def _maskdit_lmdb(path: Path) -> Source | None:
    folder = next((p for p in (path, path / "train") if (p / "data.mdb").is_file()), None)
    if folder is None:
        return None
    environment = _lmdb_environment(folder)

    def get(key: str) -> bytes:
        with environment.begin() as transaction:
            value = transaction.get(key.encode())
        if value is None:
            raise UserError(f"{folder}/data.mdb has no key {key!r}")
        return value

    def array(i: int) -> np.ndarray:
        numbers = np.frombuffer(get(f"z-{i}"), np.float32)
        side = int(round((numbers.size / 8) ** 0.5))  # (8, side, side)
        if numbers.size != 8 * side * side:
            raise UserError(f"{folder}/data.mdb: z-{i} has {numbers.size} numbers, not 8 channels of a square")
        return numbers.reshape(8, side, side)

    def label(i: int) -> int:
        return parse_number(get(f"y-{i}"), f"{folder}/data.mdb: y-{i}")

    count = parse_number(get("length"), f"{folder}/data.mdb: length")
    half = count // 2
    mirrored = count >= 2 and count % 2 == 0 and _is_mirrored(array, label, half)
    source = _of_moments("maskdit_lmdb", count, lambda i, flip: array(i + half if flip else i), label)
    return replace(source, count=half, flip="both") if mirrored else source


def _of_moments(format: str, count: int, array: Callable, label: Callable) -> Source:
    return Source(format, count, array, label, "moments_logvar", SD_SCALE, codec=_sd_codec("ema"))


@lru_cache(maxsize=1)  # lmdb refuses to open a folder twice in a process
def _lmdb_environment(folder: Path):
    try:
        import lmdb
    except ImportError:
        raise UserError(f"{folder}/data.mdb needs the package lmdb: pip install lmdb") from None
    try:
        return lmdb.open(str(folder), readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise UserError(f"{folder}/data.mdb cannot be opened: {error}") from None


def _is_mirrored(array: Callable, label: Callable, half: int) -> bool:
    """Whether entries half.. are the mirror images of 0..: equal labels, and means closer when flipped back."""
    probes = np.unique(np.linspace(0, half - 1, 32).astype(int)).tolist()
    if any(label(i) != label(i + half) for i in probes):
        return False
    plain, other = (np.stack([array(i + shift)[:4] for i in probes]) for shift in (0, half))
    return np.abs(plain - other[..., ::-1]).mean() < 0.8 * np.abs(plain - other).mean()


def _maskdit_wds(path: Path) -> Source | None:
    shards = sorted(path.glob("*.tar")) if path.is_dir() else [path] if path.suffix == ".tar" else []
    files = [open(shard, "rb") for shard in shards]  # stay open as long as the closures below live
    pairs: dict[str, dict[str, tuple[int, int, int]]] = {}  # {shard/key: {extension: (file, size, offset)}}
    for number, shard in enumerate(shards):
        faults: list[str] = []
        for member in members(files[number], faults):
            key, extension = split_name(member.name)
            if extension in ("latent", "cls"):
                place = (number, member.size, member.offset)
                pairs.setdefault(f"{shard.name}/{key}", {})[extension] = place
        if faults:
            raise UserError(f"{shard} {faults[0]}")
        if not any("latent" in pair for pair in pairs.values()):
            return None  # not even in the first shard
    keys = sorted(pairs)

    def read(i: int, extension: str) -> bytes:
        if extension not in pairs[keys[i]]:
            raise UserError(f"{path}: {keys[i]} has no .{extension}")
        number, size, offset = pairs[keys[i]][extension]
        return os.pread(files[number].fileno(), size, offset)

    def array(i: int, mirrored: bool) -> np.ndarray:
        try:
            return _latent(read_pickled_array(read(i, "latent")))
        except UserError as error:
            raise UserError(f"{path}: {keys[i]}.latent: {error}") from None

    return _of_moments(
        "maskdit_wds", len(keys), array, lambda i: parse_number(read(i, "cls"), f"{path}: {keys[i]}.cls")
    )


def _repa(path: Path) -> Source | None:
    root = path if path.name == "vae-sd" else path / "vae-sd"
    if not root.is_dir():
        return None
    return replace(_numbered(root, "img-mean-std-", "repa", "mean_std", SD_SCALE), codec=_sd_codec("mse"))


def _edm2(path: Path) -> Source | None:
    if not _holds(path, "img-mean-std-"):
        return None
    scale = [EDM2_FINAL_STD / std for std in EDM2_STD]
    bias = [-mean * EDM2_FINAL_STD / std for mean, std in zip(EDM2_MEAN, EDM2_STD)]
    return replace(_numbered(path, "img-mean-std-", "edm2", "mean_std", scale), bias=bias)


def _speedrundit(path: Path) -> Source | None:
    root = path if path.name == "vae-in" else path / "vae-in"
    return _numbered(root, "", "speedrundit", "sample_raw", INVAE_SCALE) if root.is_dir() else None


def _holds(path: Path, prefix: str) -> bool:
    """Whether files of a folder of folders, or of a zip, begin like this."""
    if path.is_dir():
        return any(path.glob(f"*/{prefix}*.npy"))
    return path.suffix == ".zip" and any(Path(name).name.startswith(prefix) for name in open_tree(path).names)


def _numbered(root: Path, prefix: str, format: str, kind: str, scale: Channels) -> Source:
    """`.npy` files with a dataset.json beside them; without labels in it every class is 0."""
    tree = open_tree(root)
    names = [n for n in tree.names if n.endswith(".npy") and n.rpartition("/")[2].startswith(prefix)]
    labels = dataset_json(root, tree) or dict.fromkeys(names, 0)
    unlabelled = next((name for name in names if name not in labels), None)
    if unlabelled is not None:
        raise UserError(f"{root}/dataset.json has no label for {unlabelled}")
    return Source(
        format, len(names), lambda i, mirrored: _npy(root, names[i], tree.read), lambda i: labels[names[i]], kind, scale
    )


def _fastdit(path: Path) -> Source | None:
    features = next(iter(sorted(path.glob("*_features"))), None) if path.is_dir() else None
    if features is None:
        return None
    labels = path / features.name.replace("_features", "_labels")
    names, label_names = (sorted(p.name for p in folder.glob("*.npy")) for folder in (features, labels))
    if names != label_names:
        raise UserError(f"{features} has {len(names)} arrays and {labels} {len(label_names)}; needed: the same names")

    def label(i: int) -> int:
        return int(_load_npy(labels / names[i], (labels / names[i]).read_bytes()).reshape(()))

    source = Source("fastdit", len(names), lambda i, mirrored: _npy(features, names[i]), label, "sample_scaled")
    return replace(source, codec=_sd_codec("ema"))


def _lightningdit(path: Path) -> Source | None:
    shards = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if not shards:
        return None
    from safetensors import safe_open

    files = [safe_open(shard, "pt") for shard in shards]
    labels = [file.get_tensor("labels") for file in files]
    ends, all_labels = np.cumsum([len(part) for part in labels]), torch.cat(labels)
    both = all("latents_flip" in file.keys() for file in files)

    def array(i: int, mirrored: bool) -> np.ndarray:
        shard = int(np.searchsorted(ends, i, side="right"))
        latents = files[shard].get_slice("latents_flip" if mirrored else "latents")
        row = i - int(ends[shard]) + len(labels[shard])
        return _latent(latents[row : row + 1].float().numpy())

    source = Source("lightningdit", int(ends[-1]), array, lambda i: int(all_labels[i]))
    source.kind, source.flip = "sample_raw", "both" if both else "none"
    if (stats := path / "latents_stats.pt").is_file():
        values = torch.load(stats, weights_only=True, map_location="cpu")
        mean, std = (values[key].double().flatten() for key in ("mean", "std"))
        source.scale, source.bias = (1 / std).tolist(), (-mean / std).tolist()
    return source


def _npy_folder(path: Path) -> Source | None:
    if not path.is_dir():
        return None
    tree = open_tree(path)
    names = [name for name in tree.names if name.endswith(".npy")]
    folders = {folder: i for i, folder in enumerate(sorted({_top(name) for name in names}))}
    labels = dataset_json(path, tree) or {name: folders[_top(name)] for name in names}
    return Source("npy", len(names), lambda i, mirrored: _npy(path, names[i]), lambda i: labels[names[i]])


def _top(name: str) -> str:
    return name.partition("/")[0] if "/" in name else ""


def _npy(root: Path, name: str, read: Callable[[str], bytes] | None = None) -> np.ndarray:
    array = _load_npy(root / name, read(name) if read else (root / name).read_bytes())
    try:
        return _latent(array)
    except UserError as error:
        raise UserError(f"{root / name}: {error}") from None


def _load_npy(path: Path, contents: bytes) -> np.ndarray:
    try:
        return np.load(BytesIO(contents), allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, TokenError) as error:  # numpy parses the header as Python
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None


def _latent(array: np.ndarray) -> np.ndarray:
    """(C, h, w) float16 or float32 from an array that may have a leading 1 or be float64."""
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim != 3 or array.dtype.kind != "f":
        raise UserError(f"holds {array.dtype} {array.shape}; needed: floating point (C, h, w)")
    return array if array.dtype in (np.float16, np.float32) else array.astype(np.float32)


def _sd_codec(name: str) -> dict:
    return {"_target_": "autoencoder.VAECodec", "path": f"stabilityai/sd-vae-ft-{name}", "scale": SD_SCALE}


FORMATS = {
    "maskdit_lmdb": _maskdit_lmdb,
    "lightningdit": _lightningdit,
    "maskdit_wds": _maskdit_wds,
    "fastdit": _fastdit,
    "repa": _repa,
    "speedrundit": _speedrundit,
    "edm2": _edm2,
    "npy": _npy_folder,
}

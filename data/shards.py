"""A folder of shards and its meta.json: opened, written and completed.

meta.json is written last, so that where it exists the shards are complete. Its keys:

kind, scale, bias     the latent encoding (encoding.py); scale and bias are null for sample_scaled
codec, codec_sha256   what turns latents into pixels, and the hash of its weights; null if unknown
shape, dtype          of each stored array
condition             "class", "text" or "none": what samples hold beside latents; class where the key is missing
num_classes           labels are 0..num_classes-1; null without labels
classes               their names, where they are known
text_width, _dtype    texts are (tokens, text_width) of text_dtype; null without texts, as is the next
text_length           tokens of the longest text; of those that an encoder has made, what it pads to
text_count            the most texts of a sample; null = 1
text_encoder, _sha256 what made the texts (texts.py), and the hash of its weights; null if unknown
text_stats            the hash of texts.safetensors, what texts are normalised by; null = they stay as they are
feature_shape         (N, D_t) of a teacher's features beside each latent, row by row, in float16; null without them
teacher               which network they are of
flip                  "none", or "both": every image has a second entry, the latent of its mirror image
counts                {split: entries}
mean, std             of each channel of the model's input
shards                [{name, split, n, sha256}]
"""

import json
import re
import shlex
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from safetensors.torch import save

from conditions import KINDS, TextStats, load_stats
from data.archives import ARRAY, CAPTIONS, FEATURES, LABEL, TEXT
from data.encoding import LatentEncoding
from data.index import Layout, build_index, find_layout, load_index, save_index
from data.latents import Latents, channel_stats, text_stats
from system import UserError, warn
from system.files import atomic_file, check_name, read_json, sha256_of, write_text_atomic
from system.settings import Count, Kind, PerChannel, parse_known
from system.tensors import read_safetensors

SPLITS = ("train", "val")
FILE_NAME, STATS_NAME = "meta.json", "texts.safetensors"
KEYS = "kind scale bias codec codec_sha256 shape dtype num_classes flip counts mean std shards".split()


class Captions(NamedTuple):
    """The texts of a sample: as they read, and their states (T_i, D), float16 or float32, not padded."""

    captions: Sequence[str]
    states: Sequence[np.ndarray]


class TextSource(NamedTuple):
    """What made the texts of a set: an encoder (texts.py), its hash and the length that it pads to, where known.

    null: (T, D), the states of the empty caption.
    """

    null: np.ndarray
    encoder: str | None = None
    sha256: str | None = None
    length: int | None = None


@dataclass(frozen=True)
class Shard:
    name: str
    split: Literal["train", "val"]
    n: Count
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Meta(Layout):
    """What meta.json may say."""

    kind: Kind
    scale: PerChannel | None
    bias: PerChannel | None
    codec: dict[str, Any] | None
    codec_sha256: str | None
    flip: Literal["none", "both"]
    counts: dict[str, Count] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    shards: tuple[Shard, ...]
    classes: tuple[str, ...] | None = None
    text_encoder: str | None = None
    text_sha256: str | None = None
    text_stats: str | None = None
    teacher: str | None = None


IMPLIED = {field.name: field.default for field in fields(Meta) if field.default is not MISSING}  # where keys are absent


def open_latents(
    path: str | Path, *, split: str = "train", kind: str | None = None, on_error: str = "stop",
    condition: str = "class", features: bool = False,
) -> Latents:  # fmt: skip
    """The latents of one split of a data folder: shards with a meta.json, or CompVis's without one.

    kind: None = meta.json's, or sample_scaled without one. on_error: "stop" raises at damage; "skip" leaves damaged
    shards and samples out, with a line for each in `Latents.faults`, and replaces a sample found damaged later by the
    next good one. condition: class, text or none, which ignores what else the shards hold. features: a teacher's are
    read too. Raises UserError for a folder without shards, for damage, and for what the shards do not hold.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"no data folder {folder}; needed: a folder of latent shards, see docs/data.md")
    manifest = read_manifest(folder)
    shards = split_shards(folder, split, manifest)
    if not shards:
        told = f"python -m data inspect {shlex.quote(str(folder))} says what is there"
        raise UserError(f"no {split} shards in {folder}; {told}")
    encoding = read_encoding(folder, manifest, kind)
    _check_condition(folder, manifest.get("condition", condition), condition)
    index = load_index(folder, split, shards, manifest)
    if index.faults and on_error == "stop" or not len(index.entries):
        more = f" (and {len(index.faults) - 1} more faults)" if len(index.faults) > 1 else ""
        raise UserError(f"damaged data in {folder}: {index.faults[0]}{more}")
    _check_condition(folder, index.layout.condition, condition)
    if features and index.layout.feature_shape is None:
        raise UserError(f"{folder} holds no features of a teacher; needed: latents with them, see docs/data.md")
    latents = Latents(folder, manifest, index, encoding, on_error, condition, features)
    if condition == "text" and (recorded := manifest.get("text_stats")):
        path = folder / STATS_NAME
        if not path.is_file() or sha256_of(path) != recorded:
            raise UserError(f"{path} is missing or has changed: its sha256 is not the one in {FILE_NAME}")
        stats = load_stats(read_safetensors(path)[0])
        if stats is None or len(stats.mean) != latents.text_width:
            raise UserError(f"{path} is of other texts; needed: statistics of width {latents.text_width}")
        latents.set_stats(stats)
    return latents


def _check_condition(folder: Path, held: str, wanted: str) -> None:
    if wanted not in ("none", held):
        needed = "data.condition=none" if held == "none" else f"data.condition={held}, or none"
        raise UserError(f"{folder} holds {KINDS[held]} beside its latents, not {KINDS[wanted]}; needed: {needed}")


def has_split(path: str | Path, split: str) -> bool:
    """Whether a data folder has shards of this split."""
    return Path(path).is_dir() and bool(split_shards(Path(path), split, read_manifest(Path(path))))


def split_shards(folder: Path, split: str, manifest: dict) -> list[str]:
    """Names of a split's shards: those that the manifest lists, or without one every tar with the split in its name.

    A name such as pretrain-val-0.tar goes by its words. Raises UserError if they do not tell either.
    """
    if manifest:
        return [shard["name"] for shard in manifest["shards"] if shard["split"] == split]
    shards = []
    for path in sorted(folder.glob("*.tar")):
        words = re.findall("[A-Za-z]+", path.name)
        named = [s for s in SPLITS if s in words] or [s for s in SPLITS if s in path.name]
        if len(named) > 1:
            raise UserError(f"{path} may be of the split {' or '.join(named)}; needed: one in its name")
        shards += [path.name] if named == [split] else []
    return shards


def read_encoding(folder: Path, manifest: dict, kind: str | None = None) -> LatentEncoding:
    """The latent encoding in meta.json, whose kind `kind` overrides. Raises UserError if the scale is missing."""
    recorded = manifest.get("kind", "sample_scaled")
    if manifest and kind not in (None, recorded):
        warn(f"data.kind={kind} overrides {recorded} of {folder}/meta.json")
    kind = kind or recorded
    if kind == "sample_scaled":
        return LatentEncoding(kind)
    if kind in get_args(Kind) and manifest.get("scale") is None:
        cure = f"python -m data index {shlex.quote(str(folder))} kind={kind} scale=... writes one"
        raise UserError(f"{folder} is to be read as {kind} and no meta.json says the scale; {cure}")
    return LatentEncoding(kind, manifest.get("scale"), manifest.get("bias"))


def read_manifest(folder: Path) -> dict:
    """The contents of a data folder's meta.json, {} if there is none. Raises UserError if it is no manifest."""
    path = folder / FILE_NAME
    if not path.exists():
        return {}
    manifest = read_json(path)
    if missing := [key for key in KEYS if key not in manifest]:
        cure = f"remove it, and python -m data index {shlex.quote(str(folder))} writes a new one"
        raise UserError(f"{path} does not say {missing[0]}; {cure}")
    meta = parse_known(Meta, manifest, path)
    for shard in meta.shards:
        check_name(shard.name, path)
    if meta.condition == "text" and not (meta.text_width and meta.text_dtype and meta.text_length):
        raise UserError(f"{path} does not say text_width, text_dtype or text_length; needed: all three")
    if meta.classes and len(meta.classes) != meta.num_classes:
        raise UserError(f"{path} names {len(meta.classes)} classes; needed: num_classes, {meta.num_classes}")
    layout = json.loads(json.dumps({name: getattr(meta, name) for name in Layout.__annotations__}))  # 4.0 is 4
    return IMPLIED | manifest | layout


def write_manifest(folder: Path, manifest: dict) -> None:
    assert manifest.keys() >= set(KEYS), sorted(manifest)
    write_text_atomic(folder / FILE_NAME, json.dumps(manifest, indent=1) + "\n")


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def write_shard(path: Path, samples: Iterable[tuple]) -> None:
    """A tar of (key, array, condition) samples: written whole or not at all, and to the same bytes every time.

    condition: a label; a text's states (T_i, D), float16 or float32, not padded; several with their captions; or None.
    A fourth: a teacher's features (N, D_t), float16.
    """
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):  # of a writer that was killed
        leftover.unlink(missing_ok=True)
    with atomic_file(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, array, condition, *features in samples:
            for part in features:  # first, so that the beginning of a shard shows whether the set has features
                _add(tar, f"{key}.{FEATURES}", part)
            _add(tar, f"{key}.{ARRAY}", array)
            if isinstance(condition, Captions):
                for i, states in enumerate(condition.states):
                    _add(tar, f"{key}.{f'text.{i}.npy' if i else TEXT}", states)
                if condition.captions:
                    _add(tar, f"{key}.{CAPTIONS}", "\n".join(condition.captions) + "\n")
            elif condition is not None:
                _add(tar, f"{key}.{TEXT if isinstance(condition, np.ndarray) else LABEL}", condition)


def _add(tar: tarfile.TarFile, name: str, part: np.ndarray | int | str) -> None:
    contents = BytesIO()
    if isinstance(part, np.ndarray):
        np.save(contents, np.ascontiguousarray(part), allow_pickle=False)
    else:
        contents.write(str(part).encode())
    info = tarfile.TarInfo(name)  # mode 644, owner 0, time 0: nothing of this machine
    info.size = contents.tell()
    contents.seek(0)
    try:
        tar.addfile(info, contents)
    except ValueError:  # of a key of another's shard
        raise UserError(f"the name {name!r:.60} does not fit into a tar; needed: a key of at most 80 letters") from None


def reserve(folder: Path, recipe: dict) -> None:
    """Makes the folder and records what it is for, so that a job can resume. UserError where it holds another's."""
    folder.mkdir(parents=True, exist_ok=True)
    note, text = folder / ".recipe.json", json.dumps(recipe, sort_keys=True)
    if note.exists():
        before, now = read_json(note), json.loads(text)
        if key := next((key for key in recipe if now[key] != before.get(key)), None):
            found = f"{folder} was begun with {key}={before.get(key)}, not {now[key]}"
            raise UserError(f"{found}; needed: the same settings, or an empty folder")
    elif any(folder.glob("*.tar")):
        raise UserError(f"{folder} holds other shards; needed: an empty folder")
    else:
        write_text_atomic(note, text)


def finalize(
    folder: Path, encoding: LatentEncoding, *, codec: dict | None = None, codec_sha256: str | None = None,
    flip: str = "none", num_classes: int | Sequence[str] | None = None, condition: str | TextSource | None = None,
) -> dict:  # fmt: skip
    """Reads back the shards in a folder, writes meta.json and the index of each split; returns the manifest.

    If there is a meta.json already, the shards are checked against it instead, and the other arguments have no effect.
    num_classes: or the classes' names; None = largest label + 1. condition: None = what the first shard holds: labels,
    or else texts, or none; or what made the texts, which are then normalised. Raises UserError for damaged or missing
    shards.
    """
    source, condition = (condition, "text") if isinstance(condition, TextSource) else (None, condition)
    names = None if isinstance(num_classes, int) else num_classes
    num_classes = len(names) if names else num_classes
    if existing := read_manifest(folder):
        for split in existing["counts"] or ():
            open_latents(folder, split=split, condition="none")
        return existing
    found = {split: shards for split in SPLITS if (shards := split_shards(folder, split, {}))}
    if not found:
        raise UserError(f"no shards train-*.tar in {folder}")
    paths = [folder / name for shards in found.values() for name in shards]
    manifest = asdict(find_layout(paths, condition, num_classes)) | {"shards": []}
    indices = {split: build_index(folder, shards, manifest) for split, shards in found.items()}
    for split, index in indices.items():
        if index.faults:
            raise UserError(f"damaged data in {folder}: {index.faults[0]}")
        for name, n in zip(index.shards, np.diff(index.ends, prepend=0).tolist()):
            manifest["shards"].append({"name": name, "split": split, "n": n, "sha256": sha256_of(folder / name)})
    entries = [index.entries for index in indices.values()]
    if manifest["condition"] == "class":
        manifest["num_classes"] = num_classes or 1 + max(int(part["label"].max()) for part in entries)
    elif num_classes is not None:
        raise UserError(f"{folder} holds {KINDS[manifest['condition']]}; needed: num_classes=null, not {num_classes}")
    if manifest["condition"] == "text":
        longest = max(int(part["length"].max()) for part in entries)
        manifest["text_length"] = source.length if source and source.length else longest
    manifest |= {"classes": list(names)} if names else {}
    manifest |= asdict(encoding) | {"codec": codec, "codec_sha256": codec_sha256, "flip": flip}
    manifest["counts"] = {split: len(index.entries) for split, index in indices.items()}
    latents = Latents(folder, manifest, next(iter(indices.values())), encoding, "stop", "none")
    manifest["mean"], manifest["std"] = channel_stats(latents)
    if source is not None:
        manifest |= {"text_encoder": source.encoder, "text_sha256": source.sha256}
        texts = Latents(folder, manifest, next(iter(indices.values())), encoding, "stop", "text")
        stats = TextStats(*text_stats(texts), torch.tensor(source.null))
        with atomic_file(folder / STATS_NAME) as file:
            file.write(save(stats._asdict()))
        manifest["text_stats"] = sha256_of(folder / STATS_NAME)
    for split, index in indices.items():
        save_index(folder, split, index, manifest)
    write_manifest(folder, manifest)
    return manifest

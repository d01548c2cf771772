"""Converts other projects' latents into our shards, in parallel; after an interruption, finished shards are kept.

Images are taken in the windowed order of loader.py, which reads the source mostly in sequence and mixes it well; the
last `val` of them become the validation split.
"""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from data.encoding import LatentEncoding, guess_kind, model_shape
from data.foreign import Source, open_source
from data.loader import Order
from data.shards import Captions, TextSource, finalize, reserve, shard_name, write_shard
from system import UserError
from system.files import locked
from system.launchers import usable_cpus
from system.settings import Count, Kind, Names, PerChannel, Positive


@dataclass(frozen=True)
class Conversion:
    """The settings in configs/convert.yaml."""

    format: str | None = None
    kind: Kind | None = None
    scale: PerChannel | None = None
    bias: PerChannel | None = None
    flip: Literal["none", "both"] | None = None
    num_classes: Positive | None = None
    classes: Names | None = None
    dtype: Literal["float16", "float32"] | None = None
    shard_size: Positive = 10000
    val: Count = 0
    workers: Positive | None = None


def convert(source_path: str, target: str, settings: Conversion) -> dict:
    """Writes the latents at `source_path` as shards into the folder `target`; returns its manifest.

    After an interruption the same call resumes; the bytes depend neither on that nor on `workers`. Raises UserError for
    a source that is unknown, damaged or lacks a kind, a scale or mirror images, and for a target that holds something
    else.
    """
    source = open_source(source_path, settings.format)
    if source.val and settings.val:
        raise UserError(f"val={settings.val}, and {source_path} has {source.val} images for validation; needed: val=0")
    encoding, flip = choose_encoding(source, settings), settings.flip or source.flip
    if flip == "both" != source.flip:
        raise UserError(f"flip=both, and {source_path} has no mirror images; needed: null or none")
    named = settings.classes or source.classes
    if settings.classes and settings.num_classes not in (None, len(named)):
        raise UserError(f"{len(named)} classes, and num_classes={settings.num_classes}; needed: as many, or one")
    shards = plan_shards(source.count, settings.shard_size, settings.val, source.val)
    recipe = {"source": os.path.realpath(source_path), "format": source.format, "images": source.count}
    recipe |= asdict(encoding) | {"codec": source.codec, "flip": flip}
    recipe |= {key: getattr(settings, key) for key in ("num_classes", "classes", "dtype", "shard_size", "val")}
    folder = Path(target)
    reserve(folder, recipe)
    with locked(folder / ".convert.lock"):
        missing = [name for name in shards if not (folder / name).exists()]
        jobs = [(source_path, source.format, flip, settings.dtype, folder / name, shards[name]) for name in missing]
        workers = max(1, min(settings.workers or usable_cpus(), len(jobs)))
        context = multiprocessing.get_context("spawn")  # a fork could inherit locks that torch's threads hold
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            done = map(_write, jobs) if workers == 1 else pool.map(_write, jobs)
            for _ in tqdm(done, total=len(jobs), unit="shard", disable=None):  # None: only on a terminal
                pass
        texts = TextSource(source.null_text) if source.texts else None
        classes = named if settings.num_classes in (None, len(named)) and named else settings.num_classes
        about = dict(codec=source.codec, flip=flip, num_classes=classes, condition=texts)
        return finalize(folder, encoding, **about)


def choose_encoding(source: Source, settings: Conversion) -> LatentEncoding:
    """The source's encoding, which the settings override. Raises UserError if it is incomplete or does not fit."""
    kind, scale, bias = settings.kind or source.kind, settings.scale, settings.bias
    if kind is None:
        sample = np.stack([source.array(i, False) for i in range(0, source.count, -(-source.count // 64))])
        guess, reason = guess_kind(torch.from_numpy(sample))
        raise UserError(f"format {source.format} leaves the kind open: add kind=..., perhaps {guess} ({reason})")
    if kind != "sample_scaled":  # which has neither, whatever the format has
        scale = source.scale if scale is None else scale
        bias = source.bias if bias is None else bias
    encoding = LatentEncoding(kind, scale, bias)
    encoding.check_channels(model_shape(kind, source.array(0, False).shape)[0])
    return encoding


def plan_shards(count: int, shard_size: int, val: int, own_val: int = 0) -> dict[str, np.ndarray]:
    """{shard name: indices of its images} for `count` images, the last `val` of them in shuffled order in val shards.

    own_val: so many of the last are the source's validation split, in the place of `val`. Raises UserError if that
    leaves nothing to train on.
    """
    if val >= count:
        raise UserError(f"val={val} of {count} images; needed: fewer than there are")
    order = Order(count - own_val, seed=0)(np.arange(count - own_val))
    if own_val:
        val, order = own_val, np.r_[order, count - own_val + Order(own_val, seed=0)(np.arange(own_val))]
    return {
        shard_name(split, number): images[start : start + shard_size]
        for split, images in (("train", order[: count - val]), ("val", order[count - val :]))
        for number, start in enumerate(range(0, len(images), shard_size))
    }


def entries(image: int, flip: str) -> list[tuple[str, bool]]:
    """(key, mirrored) of the entries that an image becomes: one, or two with flip "both"."""
    plain, mirrored = (f"{image:08d}", False), (f"{image:08d}-flip", True)
    return [plain, mirrored] if flip == "both" else [plain]


_open_source = lru_cache(maxsize=1)(open_source)  # once in each process


def _write(job: tuple) -> None:
    source_path, format, flip, dtype, path, images = job
    source = _open_source(source_path, format)

    def samples() -> Iterator[tuple[str, np.ndarray, int | Captions]]:
        for image in images.tolist():
            for key, mirrored in entries(image, flip):
                array = source.array(image, mirrored)
                array = array.astype(dtype or array.dtype.newbyteorder("="))
                if not np.isfinite(array).all():
                    raise UserError(f"{source_path}: image {image} has numbers that are not finite in {array.dtype}")
                if source.texts:
                    texts = (text.astype(dtype or text.dtype.newbyteorder("=")) for text in source.texts(image))
                    yield key, array, Captions([], list(texts))
                else:
                    yield key, array, source.label(image)

    write_shard(path, samples())

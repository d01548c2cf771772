"""Converts other projects' latents into our shards, in parallel; after an interruption, finished shards are kept.

Images are taken in the windowed order of loader.py, which reads the source mostly in sequence and mixes it well; the
last `val` of them become the validation split.
"""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.encoding import Channels, LatentEncoding, check_kind, guess_kind, model_shape
from data.foreign import Source, open_source
from data.index import DTYPES
from data.loader import Order
from data.shards import FLIPS, finalize, reserve, shard_name, write_shard
from system import UserError
from system.files import locked
from system.launchers import usable_cpus


@dataclass(frozen=True)
class Conversion:
    """The settings in configs/convert.yaml. Raises UserError for counts and dtypes that cannot be.

    format .. flip: None = as the source has it. num_classes: None = largest label + 1. dtype: None = as stored.
    shard_size, val: in images. workers: processes, None = one per core.
    """

    format: str | None = None
    kind: str | None = None
    scale: Channels | None = None
    bias: Channels | None = None
    flip: str | None = None
    num_classes: int | None = None
    dtype: str | None = None
    shard_size: int = 10000
    val: int = 0
    workers: int | None = None

    def __post_init__(self):
        check_counts({key: getattr(self, key) for key in ("num_classes", "shard_size", "workers")})
        if self.dtype not in (None, *DTYPES):
            raise UserError(f"dtype={self.dtype}; needed: {', '.join(DTYPES)}, or null for the stored one")


def convert(source_path: str, target: str, settings: Conversion) -> dict:
    """Writes the latents at `source_path` as shards into the folder `target`; returns its manifest.

    After an interruption the same call resumes; the bytes depend neither on that nor on `workers`. Raises UserError for
    a source that is unknown, damaged or lacks a kind or scale, and for a target that holds something else.
    """
    source = open_source(source_path, settings.format)
    encoding, flip = choose_encoding(source, settings), choose_flip(source, settings.flip)
    shards = plan_shards(source.count, settings.shard_size, settings.val)
    recipe = {"source": os.path.realpath(source_path), "format": source.format, "images": source.count}
    recipe |= asdict(encoding) | {"codec": source.codec, "flip": flip, "num_classes": settings.num_classes}
    recipe |= {"dtype": settings.dtype, "shard_size": settings.shard_size, "val": settings.val}
    folder = Path(target)
    reserve(folder, recipe)
    with locked(folder / ".convert.lock"):
        missing = [name for name in shards if not (folder / name).exists()]
        jobs = [(source_path, source.format, flip, settings.dtype, folder / name, shards[name]) for name in missing]
        _run(jobs, settings.workers or usable_cpus())
        return finalize(folder, encoding, codec=source.codec, flip=flip, num_classes=settings.num_classes)


def check_counts(counts: dict[str, int | None]) -> None:
    """Raises UserError for a setting that is neither null nor a whole number of at least 1."""
    for name, number in counts.items():
        if number is not None and not (isinstance(number, int) and number > 0):
            raise UserError(f"{name}={number}; needed: a whole number, at least 1")


def choose_encoding(source: Source, settings: Conversion) -> LatentEncoding:
    """The source's encoding, which the settings override. Raises UserError if it is incomplete or does not fit."""
    kind = settings.kind or source.kind
    if kind is None:
        sample = np.stack([source.array(i, False) for i in range(0, source.count, -(-source.count // 64))])
        guess, reason = guess_kind(torch.from_numpy(sample))
        raise UserError(f"format {source.format} leaves the kind open: add kind=..., perhaps {guess} ({reason})")
    check_kind(kind)
    scale, bias = settings.scale, settings.bias
    if kind != "sample_scaled":  # which has neither, whatever the format has
        scale = source.scale if scale is None else scale
        bias = source.bias if bias is None else bias
    encoding = LatentEncoding(kind, scale, bias)
    encoding.check_channels(model_shape(kind, source.array(0, False).shape)[0])
    return encoding


def choose_flip(source: Source, flip: str | None) -> str:
    """`flip`, or the source's if None. Raises UserError for "both" if the source lacks the mirror images."""
    if flip not in (None, *FLIPS) or (flip == "both" and source.flip == "none"):
        raise UserError(f"flip={flip}; needed: null, none, or both if the source has the mirror images too")
    return flip or source.flip


def plan_shards(count: int, shard_size: int, val: int) -> dict[str, np.ndarray]:
    """{shard name: indices of its images} for `count` images, the last `val` of them in shuffled order in val shards.

    Raises UserError if that leaves nothing to train on.
    """
    if not 0 <= val < count:
        raise UserError(f"val={val} of {count} images; needed: at least 0, and fewer than there are")
    order = Order(count, seed=0)(np.arange(count))
    return {
        shard_name(split, number): images[start : start + shard_size]
        for split, images in (("train", order[: count - val]), ("val", order[count - val :]))
        for number, start in enumerate(range(0, len(images), shard_size))
    }


def entries(image: int, flip: str) -> list[tuple[str, bool]]:
    """(key, mirrored) of the entries that an image becomes: one, or two with flip "both"."""
    plain, mirrored = (f"{image:08d}", False), (f"{image:08d}-flip", True)
    return [plain, mirrored] if flip == "both" else [plain]


def _run(jobs: list[tuple], workers: int) -> None:
    progress = tqdm(total=len(jobs), unit="shard", disable=None)  # None: only on a terminal
    with progress:
        if workers == 1 or len(jobs) < 2:
            for job in jobs:
                _write(job)
                progress.update()
            return
        context = multiprocessing.get_context("spawn")  # a fork could inherit locks that torch's threads hold
        with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
            for done in as_completed([pool.submit(_write, job) for job in jobs]):
                done.result()
                progress.update()


_open_source = lru_cache(maxsize=1)(open_source)  # once in each process


def _write(job: tuple) -> None:
    source_path, format, flip, dtype, path, images = job
    source = _open_source(source_path, format)

    def samples() -> Iterator[tuple[str, np.ndarray, int]]:
        for image in images.tolist():
            for key, mirrored in entries(image, flip):
                array = source.array(image, mirrored)
                array = array.astype(dtype or array.dtype.newbyteorder("="))
                if not np.isfinite(array).all():
                    raise UserError(f"{source_path}: image {image} has numbers that are not finite in {array.dtype}")
                yield key, array, source.label(image)

    write_shard(path, samples())

"""Other projects' latents into our shards: in parallel, and shard by shard, so that what is done stays done.

Images are taken in the windowed order of order.py, which reads the source mostly in sequence and mixes it well; the
last `val` of them become the validation split.
"""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import kinds
from data.files import locked
from data.formats import Source, open_source
from data.kinds import Channels
from data.manifest import FLIPS
from data.order import Order
from data.publish import claim, publish
from data.scan import DTYPES
from data.writer import shard_name, write_shard


def convert(
    source_path: str,
    target: str,
    *,
    format: str | None = None,
    kind: str | None = None,
    scale: Channels | None = None,
    bias: Channels | None = None,
    flip: str | None = None,
    num_classes: int | None = None,
    dtype: str | None = None,
    shard_size: int = 10000,
    val: int = 0,
    workers: int | None = None,
) -> dict:
    """Writes the latents at `source_path` as shards into the folder `target`; returns its manifest.

    format .. flip: None = as the source says. dtype: None = as stored. num_classes: None = largest label + 1.
    shard_size, val: in images. workers: processes, None = one a core. After an interruption the same call goes on; the
    bytes depend neither on that nor on workers. Raises ValueError for a source that is unknown, damaged or lacks a kind
    or scale, and for a target that holds something else.
    """
    check_counts({"num_classes": num_classes, "shard_size": shard_size, "workers": workers})
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype={dtype}; needed: {', '.join(DTYPES)}, or null for what is stored")
    source = settle(open_source(source_path, format), kind, scale, bias, flip)
    shards = plan_shards(source.count, shard_size, val)
    settings = {
        "kind": source.kind,
        "scale": source.scale,
        "bias": source.bias,
        "codec": source.codec,
        "flip": source.flip,
    }
    what = {"source": os.path.realpath(source_path), "format": source.format, "images": source.count, **settings}
    folder = Path(target)
    claim(folder, {**what, "num_classes": num_classes, "dtype": dtype, "shard_size": shard_size, "val": val})
    with locked(folder / ".convert.lock"):
        missing = [name for name in shards if not (folder / name).exists()]
        jobs = [(source_path, source.format, source.flip, dtype, folder / name, shards[name]) for name in missing]
        _run(jobs, workers or os.cpu_count() or 1)
        return publish(folder, num_classes=num_classes, **settings)


def check_counts(counts: dict[str, int | None]) -> None:
    """Raises ValueError for a setting that is neither null nor a whole number of at least 1."""
    for name, number in counts.items():
        if number is not None and not (isinstance(number, int) and number > 0):
            raise ValueError(f"{name}={number}; needed: a whole number, at least 1")


def settle(source: Source, kind: str | None, scale: Channels | None, bias: Channels | None, flip: str | None) -> Source:
    """The source with what the user knows better, complete; ValueError where something is missing or does not fit."""
    if kind is None and source.kind is None:
        sample = np.stack([source.array(i, False) for i in range(0, source.count, -(-source.count // 64))])
        looks, reason = kinds.guess_kind(torch.from_numpy(sample))
        raise ValueError(f"format {source.format} leaves the kind open: add kind=..., perhaps {looks} ({reason})")
    source.kind = kind or source.kind
    if source.kind != "sample_scaled":  # else what the format has does not count
        scale = source.scale if scale is None else scale
        bias = source.bias if bias is None else bias
    source.scale, source.bias = kinds.settled(source.kind, scale, bias)
    channels = kinds.model_shape(source.kind, source.array(0, False).shape)[0]
    kinds.check_channels("scale", source.scale, channels)
    kinds.check_channels("bias", source.bias, channels)
    if flip not in (None, *FLIPS) or (flip == "both" and source.flip == "none"):
        raise ValueError(f"flip={flip}; needed: null, none, or both where the source has the mirror images too")
    source.flip = flip or source.flip
    return source


def plan_shards(count: int, shard_size: int, val: int) -> dict[str, np.ndarray]:
    """{shard name: numbers of its images} for `count` images, of which the last `val` in shuffled order are val shards.

    Raises ValueError where nothing would be left to train on.
    """
    if not 0 <= val < count:
        raise ValueError(f"val={val} of {count} images; needed: at least 0, and fewer than there are")
    order = Order(count, seed=0)(np.arange(count))
    return {
        shard_name(split, number): images[start : start + shard_size]
        for split, images in (("train", order[: count - val]), ("val", order[count - val :]))
        for number, start in enumerate(range(0, len(images), shard_size))
    }


def entries(image: int, flip: str) -> list[tuple[str, bool]]:
    """(key, mirrored) of what an image becomes: one entry, or two with flip "both"."""
    plain, mirrored = (f"{image:08d}", False), (f"{image:08d}-flip", True)
    return [plain, mirrored] if flip == "both" else [plain]


def _run(jobs: list[tuple], workers: int) -> None:
    progress = tqdm(total=len(jobs), unit="shard", disable=None)  # None: not where nobody watches
    with progress:
        if workers == 1 or len(jobs) < 2:
            for job in jobs:
                _write(job)
                progress.update()
            return
        context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads in mid-air
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
                    raise ValueError(f"{source_path}: image {image} has numbers that are not finite in {array.dtype}")
                yield key, array, source.label(image)

    write_shard(path, samples())

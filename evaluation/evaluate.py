"""A run, scored: images are generated and scored on all processes, batch by batch."""

import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load, save

import conditions
from checkpoints.config import Scoring
from checkpoints.generate import count_calls, generate, load_weak, progress
from checkpoints.load import Run
from checkpoints.naming import digest, settings_name, shortened
from conditions import Condition, labels_of
from evaluation.clip import Clip
from evaluation.features import CLASSIFIERS, Extractor, Features, load_extractor
from evaluation.reference import Reference, check_size, read_reference, shipped_reference
from evaluation.score import choose_metrics, describe_scoring, distance_name, score, shard_range
from system import UserError
from system.files import atomic_file
from system.processes import start_processes

# Left out of folders' names: what changes no score, and what `score_name` adds in its own way.
UNNAMED = (
    "ckpt", "images", "out", "batch_size", "digits", "fashion", "every", "extractor", "extractor_weights",
    "extractor_sha256", "ref", "metrics", "precision", "compile", "clip", "clip_sha256",
)  # fmt: skip


def extractor_and_reference(settings: Scoring) -> tuple[Extractor, Reference]:
    """The extractor and the reference of a row, loaded once for all rows. Raises UserError, as choose_metrics too."""
    extractor = cached_extractor(settings.extractor, settings.extractor_weights, settings.extractor_sha256)
    if settings.ref is not None:
        reference = cached_reference(settings.ref)
    elif extractor.name not in CLASSIFIERS:
        raise UserError(f"extractor={extractor.name} needs ref=FILE.npz, made by `python fid.py ref`")
    else:
        with start_processes().main_process_first():  # the others read what it has made
            path = settings.digits if extractor.name == "mnist" else settings.fashion
            reference = cached_shipped_reference(extractor, path)
    choose_metrics(settings.metrics, extractor, reference)
    return extractor, reference


@functools.cache
def cached_extractor(name: str, weights: str | None, sha256: str | None) -> Extractor:
    with start_processes().main_process_first():  # one download
        return load_extractor(name, weights, sha256, device=start_processes().device)


cached_reference = functools.cache(read_reference)
cached_shipped_reference = functools.cache(shipped_reference)


def evaluate(
    run: Run, settings: Scoring, extractor: Extractor, reference: Reference, parts: Path | None = None,
    clip: Clip | None = None,
) -> dict:  # fmt: skip
    """Generates images with a run and scores them -> metrics.json; an empty dict on every process but the first.

    parts: a folder for the features of each finished batch, from which an interrupted call continues. clip: what scores
    how images fit their captions, those of the run's pool.
    """
    check_run_size(run, reference)
    started, n = time.time(), len(settings.all_seeds)
    condition, captions = conditions.choose(settings.labels, settings.all_seeds, run.pool), None
    if clip is not None:
        rows = conditions.choose(settings.labels, settings.all_seeds, torch.arange(len(run.captions)))
        captions = [run.captions[i] for i in rows.tolist()]
    about, rows = describe_run(run, settings, clip), shard_range(n)
    if parts is not None:
        asked = json.dumps([about, extractor.name, extractor.sha256], sort_keys=True)
        parts = parts / digest(asked)[:16]

    def features_of(images: torch.Tensor, rows: range) -> Features:
        found = extractor(images)
        return found if clip is None else found._replace(clip=clip(images, [captions[i] for i in rows]))

    batches, labels = generate_features(run, settings, condition, rows, features_of, parts), labels_of(condition)
    with progress(run, settings, len(rows), settings.steps):
        scores = score(batches, n, extractor, reference, labels=labels, metrics=settings.metrics)
    seconds = time.time() - started
    calls, macs = count_calls(run, settings, settings.steps)
    return scores and {
        **scores, **about,
        "network_calls": calls, "gmacs_per_image": macs / 1e9,
        "seconds": round(seconds, 3), "images_per_s": round(n / seconds, 3),
        **describe_scoring(extractor, reference, settings.metrics),
        "config": asdict(run.settings),
    }  # fmt: skip


def check_scoring(run: Run, settings: Scoring) -> None:
    """Raises UserError, before anything is generated, where `evaluate` would."""
    check_run_size(run, extractor_and_reference(settings)[1])


def check_run_size(run: Run, reference: Reference) -> None:
    """Raises UserError for a run whose images have another size than the reference's."""
    if reference.height is not None:
        check_size(reference, *run.codec.decode(torch.zeros(1, *run.model.latent_shape, device=run.device)).shape[2:])


def generate_features(
    run: Run, settings: Scoring, condition: Condition, rows: range, features_of: Callable, parts: Path | None
) -> Iterator[Features]:
    """features_of(images, rows) of the images `rows`, batch by batch; those in the folder `parts` are read back."""
    seeds, size = settings.all_seeds, settings.batch_size
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    files = [parts and parts / f"{batch.start:07d}-{batch.stop:07d}.safetensors" for batch in batches]
    there = [bool(file) and is_whole_part(file) for file in files]
    chosen = [i for batch, made in zip(batches, there) if not made for i in batch]
    some = conditions.rows(condition, chosen)
    images = generate(run, settings, [seeds[i] for i in chosen], some, size, steps=settings.steps)
    for batch, file, made in zip(batches, files, there):
        features = read_part(file, run.device) if made else features_of(next(images), batch)
        if file and not made:
            write_part(file, features)
        yield features


def write_part(path: Path, features: Features) -> None:
    """Keeps one batch's features: a safetensors file's bytes, then their sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = save({key: part.contiguous().cpu() for key, part in features._asdict().items() if part is not None})
    with atomic_file(path) as file:
        file.write(kept + hashlib.sha256(kept).digest())


def is_whole_part(path: Path) -> bool:
    """Whether a part is there and as `write_part` wrote it; any other is made again."""
    held = path.read_bytes() if path.is_file() else b""
    return hashlib.sha256(held[:-32]).digest() == held[-32:]


def read_part(path: Path, device: torch.device) -> Features:
    """What `write_part` has kept."""
    return Features(**{key: part.to(device) for key, part in load(path.read_bytes()[:-32]).items()})


def describe_run(run: Run, settings: Scoring, clip: Clip | None = None) -> dict:
    """Everything that the images and their CLIP scores depend on."""
    weak, told = load_weak(run, settings), {}
    if run.captions:
        told = {"prompts": len(run.captions), "prompts_sha256": digest("\n".join(run.captions))}
    elif conditions.kind_of(run.pool) == "text":  # those that it has kept, or another set's
        told = {"texts_sha256": hashlib.sha256(save(conditions.save(run.pool))).hexdigest()}
    return {
        "n": len(settings.all_seeds), "seeds": str(settings.seeds),
        "labels": settings.labels,
        "objective": run.settings.objective["_target_"],
        "sampler": run.settings.sampler | ({"num_steps": settings.steps} if settings.steps else {}),
        **asdict(settings.alone),
        "step": run.step, "weights": run.weights, **({} if run.ema_width is None else {"ema_width": run.ema_width}),
        "dtype": run.precision,  # "precision" is a score
        "compile": run.compile,
        "checkpoint": str(run.checkpoint) if run.checkpoint else None,
        "checkpoint_sha256": run.sha256 if run.checkpoint else None,
        "weak_sha256": weak.sha256 if weak is not run else None,
        "codec": run.settings.data.codec, "rounding": "nearest",
        **told,
        **({"clip": clip.name, "clip_sha256": clip.sha256} if clip is not None else {}),
    }  # fmt: skip


def score_name(settings: Scoring, extractor: Extractor, n: int, precision: str = "fp32", compile: str = "off") -> str:
    """<distance>-<settings>: equal names, equal scores. precision, compile: what the run is generated with."""
    parts = [distance_name(extractor, n)]
    parts += [extractor.sha256[:6]] if settings.extractor_weights is not None else []
    parts += [cached_reference(settings.ref).sha256[:6]] if settings.ref is not None else []
    parts += ["_".join(settings.metrics)] if settings.metrics is not None else []
    parts += [precision] if precision != "fp32" else []
    parts += ["compiled"] if compile != "off" else []
    return shortened("-".join([*parts, settings_name(settings, UNNAMED)]))

"""Images into scores: `score` for features of any images, `evaluate` for a run, which generates them first.

Training and the command line share this code. On several processes each takes the block of images that `share` names,
one message adds the statistics up, and the first process makes the scores of them.
"""

import dataclasses
import hashlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open
from safetensors.torch import save
from tqdm import tqdm

import checkpoint
import inception
import sample
from data.files import atomic_file
from features import Extractor, Features
from guidance import Guidance
from metrics import (
    FeatureStats,
    all_reduce,
    frechet_distance,
    gather_rows,
    inception_score,
    kernel_distance,
    precision_recall,
)
from processes import start_processes
from reference import Reference, check_extractor

METRICS = ("fd", "sfid", "is", "pr", "kid")


class Measured(NamedTuple):
    """Features of the images of all processes, as scores need them."""

    stats: FeatureStats
    spatial: FeatureStats | None
    logits: torch.Tensor | None                     # (N, K)
    pool: torch.Tensor | None                       # (M, D), of the images that were to be kept


def share(n: int) -> range:
    """Rows of n images that this process takes: one block, so that the blocks of all processes are the n in order."""
    state = start_processes()
    if n < max(2, state.num_processes):
        raise ValueError(f"{n} images on {state.num_processes} processes; needed: at least 2, and one each")
    first, after = (n * i // state.num_processes for i in (state.process_index, state.process_index + 1))
    return range(first, after)


def measure(
    batches: Iterable[Features], extractor: Extractor, *, spatial: bool, logits: bool, keep: torch.Tensor | None
) -> Measured:
    """Statistics over all processes' batches, on every process; each brings its `share`.

    keep: (n,) bool, which images of this process's share keep their features; None = none.
    """
    on = extractor.device if extractor.device.type == "cuda" else "cpu"  # float64 is not everywhere
    stats = FeatureStats(extractor.num_features, on)
    spatial_stats = FeatureStats(extractor.num_spatial, on) if spatial else None
    all_logits, kept, seen = [], [], 0
    for features in batches:
        stats.update(features.pool)
        if spatial:
            spatial_stats.update(features.spatial)
        if logits:
            all_logits.append(features.logits)
        if keep is not None:
            kept.append(features.pool[keep[seen : seen + len(features.pool)].to(features.pool.device)])
        seen += len(features.pool)
    all_reduce([stats, spatial_stats] if spatial else [stats])
    return Measured(
        stats,
        spatial_stats,
        gather_rows(torch.cat(all_logits)) if logits else None,
        gather_rows(torch.cat(kept)) if keep is not None else None,
    )


def score(
    batches: Iterable[Features],
    n: int,
    extractor: Extractor,
    reference: Reference,
    *,
    labels: torch.Tensor | None = None,
    metrics: Sequence[str] | None = None,
) -> dict[str, float]:
    """Scores of n images against a reference; on every process but the first an empty dict.

    batches: features of this process's `share(n)`, in order. labels: (n,) int64 of all images, for class_accuracy.
    metrics: of fd, sfid, is, pr, kid; None = all that the extractor and the reference allow.
    Raises ValueError for a reference of another extractor and for metrics that the two do not allow.
    """
    check_extractor(reference, extractor)
    metrics = choose_metrics(metrics, extractor, reference)
    with_classes = labels is not None and extractor.name == "mnist"
    keep = torch.ones(len(share(n)), dtype=torch.bool) if {"pr", "kid"} & set(metrics) else None
    measured = measure(batches, extractor, spatial="sfid" in metrics, logits="is" in metrics or with_classes, keep=keep)
    if not start_processes().is_main_process:
        return {}
    assert measured.stats.count == n, f"{measured.stats.count} images, {n} were announced"
    if n <= extractor.num_features:
        few = f"{n} images are too few for {extractor.num_features} features: distances come out too large"
        print(f"warning: {few}", file=sys.stderr)
    scores = scores_of(measured, metrics, reference, distance_name(extractor, n), extractor.device)
    if with_classes:
        scores["class_accuracy"] = (measured.logits.argmax(1) == labels).double().mean().item()
    return scores


def scores_of(
    measured: Measured, metrics: Sequence[str], reference: Reference, distance: str, device: torch.device
) -> dict[str, float]:
    """The metrics by name. distance: what the Frechet distance is called here."""
    scores, stats, spatial = {}, measured.stats, measured.spatial
    if "fd" in metrics:
        scores[distance] = frechet_distance(stats.mu, stats.sigma, reference.mu, reference.sigma)
    if "sfid" in metrics:
        scores[f"s{distance}"] = frechet_distance(spatial.mu, spatial.sigma, reference.mu_s, reference.sigma_s)
    if "is" in metrics:
        scores["inception_score"], scores["inception_score_std"] = inception_score(measured.logits)
    if measured.pool is not None:
        generated = measured.pool.to(device)
        real = torch.from_numpy(reference.features).to(generated)
    if "pr" in metrics:
        scores["precision"], scores["recall"] = precision_recall(generated, real)
    if "kid" in metrics:
        scores["kid"], scores["kid_std"] = kernel_distance(generated, real)
    return scores


def choose_metrics(wanted: Sequence[str] | None, extractor: Extractor, reference: Reference) -> list[str]:
    """The metrics to make. Raises ValueError where one is unknown or lacks what it needs."""
    lacking = {
        "sfid": reference.mu_s is None and "a reference with mu_s and sigma_s (extractor=inception)",
        "is": extractor.name != "inception" and "extractor=inception",
        "pr": reference.features is None and "a reference with features (`fid.py ref` keeps them)",
        "kid": reference.features is None and "a reference with features (`fid.py ref` keeps them)",
    }
    for name in wanted or ():
        if name not in METRICS:
            raise ValueError(f"metrics={name}; needed: of {', '.join(METRICS)}")
        if lacking.get(name):
            raise ValueError(f"metric {name} needs {lacking[name]}")
    return [name for name in METRICS if (name in wanted if wanted is not None else not lacking.get(name))]


def distance_name(extractor: Extractor, n: int) -> str:
    """fid50k, fid5k, fid1234 in Inception's features with their true weights; fd_<extractor> in all others."""
    if extractor.name != "inception" or extractor.sha256 not in inception.TRUE_WEIGHTS:
        return f"fd_{extractor.name}"
    return f"fid{n // 1000}k" if n % 1000 == 0 else f"fid{n}"


def evaluate(
    run: sample.Run, settings: DictConfig, extractor: Extractor, reference: Reference, parts: Path | None = None
) -> dict:
    """Generates images with a run and scores them: what metrics.json holds; on processes but the first an empty dict.

    settings: keys of configs/fid.yaml: the guidance, seeds, labels, steps, batch_size, metrics.
    parts: a folder that keeps the features of each finished batch, so that a call cut short goes on where it was.
    """
    started = time.time()
    guidance, seeds = sample.guidance_from(settings), sample.parse_seeds(settings.seeds)
    labels = sample.labels_for(run.num_classes, seeds, settings.labels)
    about = describe_run(run, settings, guidance)
    if parts is not None:
        asked = json.dumps([about, str(settings.seeds), extractor.name, extractor.sha256], sort_keys=True)
        parts = parts / hashlib.sha256(asked.encode()).hexdigest()[:16]
    rows = share(len(seeds))
    batches = generate_features(run, guidance, seeds, labels, rows, settings, extractor, parts)
    scores = score(
        with_progress(batches, len(rows)), len(seeds), extractor, reference, labels=labels, metrics=settings.metrics
    )
    seconds = time.time() - started
    return scores and {
        **scores,
        "n": len(seeds), "seeds": str(settings.seeds), **about,
        "network_calls": run.calls, "gmacs_per_image": run.macs / 1e9,
        "seconds": round(seconds, 3), "images_per_s": round(len(seeds) / seconds, 3),
        **describe_scoring(extractor, reference),
        "config": OmegaConf.to_container(run.config),
    }  # fmt: skip


def generate_features(
    run: sample.Run, guidance: Guidance, seeds: Sequence[int], labels: torch.Tensor, rows: range,
    settings: DictConfig, extractor: Extractor, parts: Path | None,
) -> Iterator[Features]:  # fmt: skip
    """Features of the images rows, rows + 1, ... of the seeds, batch by batch; what lies in `parts` is read back."""
    size = settings.batch_size
    batches = {range(start, min(start + size, rows.stop)): None for start in range(rows.start, rows.stop, size)}
    if parts is not None:
        batches = {batch: parts / f"{batch.start:07d}-{batch.stop:07d}.safetensors" for batch in batches}
    missing = [i for batch, part in batches.items() if part is None or not part.is_file() for i in batch]
    images = sample.generate(run, guidance, [seeds[i] for i in missing], labels[missing], size, steps=settings.steps)
    for part in batches.values():
        if part is not None and part.is_file():
            features, run.calls, run.macs = read_part(part, extractor.device)
        else:
            features = extractor(next(images))
            if part is not None:
                write_part(part, features, run)
        yield features


def write_part(path: Path, features: Features, run: sample.Run) -> None:
    tensors = {name: tensor.contiguous().cpu() for name, tensor in features._asdict().items() if tensor is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(save(tensors, {"network_calls": str(run.calls), "macs": str(run.macs)}))


def read_part(path: Path, device: torch.device) -> tuple[Features, int, int]:
    """Features, network calls and multiply-adds an image."""
    with safe_open(path, "pt", device=str(device)) as file:
        features = Features(**{name: file.get_tensor(name) for name in file.keys()})
        return features, int(file.metadata()["network_calls"]), int(file.metadata()["macs"])


def describe_run(run: sample.Run, settings: DictConfig, guidance: Guidance) -> dict:
    """All that an image depends on beside its seed."""
    config, weak = run.config, sample.load_weak(run, guidance)
    return {
        "labels": settings.labels,
        "objective": config.objective._target_,
        "sampler": OmegaConf.to_container(config.sampler) | ({"num_steps": settings.steps} if settings.steps else {}),
        **dataclasses.asdict(guidance),
        "step": run.step, "weights": run.weights, "dtype": run.precision,  # "precision" is a score
        "compile": run.compile,
        "checkpoint": str(run.checkpoint) if run.checkpoint else None,
        "checkpoint_sha256": run.sha256 if run.checkpoint else None,
        "weak_sha256": weak.sha256 if weak is not run else None,
        "codec": OmegaConf.to_container(config.data.codec), "rounding": "nearest",
    }  # fmt: skip


def describe_scoring(extractor: Extractor, reference: Reference) -> dict:
    return {
        "extractor": extractor.name, "extractor_sha256": extractor.sha256,
        "reference": reference.source, "reference_sha256": reference.sha256, "reference_n": reference.n,
        "processes": start_processes().num_processes, "commit": commit(),
    }  # fmt: skip


def write_metrics(result: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text_atomic(folder / "metrics.json", json.dumps(finite(result), indent=2, allow_nan=False) + "\n")


def finite(value):
    """JSON knows no infinity: S_max=inf becomes "inf"."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def commit() -> str | None:
    """The version of this code, "-dirty" where files differ from it; None outside of git."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def with_progress(batches: Iterable[Features], total: int) -> Iterator[Features]:
    shown = sys.stderr.isatty() and start_processes().is_main_process
    with tqdm(total=total, unit="img", desc="scoring", disable=not shown) as bar:
        for features in batches:
            yield features
            bar.update(len(features.pool))

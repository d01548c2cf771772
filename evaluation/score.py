"""Scores of images' features against a reference: `score`, for training and the command line alike.

On several processes each takes one block of the images (`shard_range`), one message sums the statistics, and the first
process computes the scores.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import torch
import torch.distributed as dist
from tqdm import tqdm

from checkpoints.config import Metrics
from evaluation import inception
from evaluation.features import CLASSIFIERS, Extractor, Features
from evaluation.metrics import FeatureStats, frechet_distance, inception_score, kernel_distance, precision_recall
from evaluation.reference import Reference, check_extractor
from evaluation.table import finite
from system import UserError, warn
from system.files import commit, write_text_atomic
from system.processes import start_processes, together

METRICS = get_args(get_args(Metrics)[0])  # names: fd, sfid, is, pr, kid


class Measured(NamedTuple):
    """What scores are computed from, over the images of all processes."""

    stats: FeatureStats
    spatial: FeatureStats | None
    logits: torch.Tensor | None  # (N, K)
    pool: torch.Tensor | None  # (M, D), of the images selected by `keep`
    clip: torch.Tensor | None  # (N,), where the batches have it


def shard_range(n: int) -> range:
    """This process's block of n images; the blocks of all processes, in order, are all n. Raises UserError."""
    state = start_processes()
    if n < max(2, state.num_processes):
        raise UserError(f"{n} images on {state.num_processes} processes; needed: at least 2, and one each")
    first, after = (n * i // state.num_processes for i in (state.process_index, state.process_index + 1))
    return range(first, after)


def measure(
    batches: Iterable[Features], extractor: Extractor, *, spatial: bool, logits: bool, keep: torch.Tensor | None
) -> Measured:
    """Statistics over the batches of all processes, the same on each; a process brings its `shard_range`.

    keep: (n,) bool, which of this process's images keep their features; None = none.
    """
    on = extractor.device if extractor.device.type == "cuda" else "cpu"  # Apple's GPUs lack float64
    stats = FeatureStats(extractor.num_features, on)
    spatial_stats = FeatureStats(extractor.num_spatial, on) if spatial else None
    all_logits, kept, clips, seen = [], [], [], 0
    with together():  # one that failed alone would leave the others waiting in the sums
        for features in batches:
            stats.update(features.pool)
            if spatial:
                spatial_stats.update(features.spatial)
            if logits:
                all_logits.append(features.logits)
            if keep is not None:
                kept.append(features.pool[keep[seen : seen + len(features.pool)].to(features.pool.device)])
            if features.clip is not None:
                clips.append(features.clip)
            seen += len(features.pool)
        own = [torch.cat(parts) if parts else None for parts in (all_logits, kept, clips)]
    for sums in (stats, spatial_stats)[: 1 + spatial]:
        sums.all_reduce()
    return Measured(stats, spatial_stats, *(None if rows is None else gather_rows(rows) for rows in own))


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """(n, D) of each process -> (N, D) of all, in the order of the processes, on the CPU."""
    parts = [rows.cpu()] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(parts, parts[0])
    return torch.cat(parts)


def score(
    batches: Iterable[Features], n: int, extractor: Extractor, reference: Reference, *,
    labels: torch.Tensor | None = None, metrics: Sequence[str] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Scores of n images against a reference; an empty dict on every process but the first.

    batches: features of this process's `shard_range(n)`, in order. labels: (n,) int64 of all images, for
    class_accuracy. metrics: of fd, sfid, is, pr, kid; None = all that the extractor and the reference allow.
    Raises UserError for a reference of another extractor and for metrics that the two do not allow.
    """
    metrics = choose_metrics(metrics, extractor, reference)
    with_classes = labels is not None and extractor.name in CLASSIFIERS
    keep = torch.ones(len(shard_range(n)), dtype=torch.bool) if {"pr", "kid"} & set(metrics) else None
    measured = measure(batches, extractor, spatial="sfid" in metrics, logits="is" in metrics or with_classes, keep=keep)
    for name, least in (("pr", 4), ("kid", 2)):
        if name in metrics and (fewest := min(n, len(reference.features))) < least:
            raise UserError(f"{fewest} images are too few for metric {name}; needed: {least}, or metrics= without it")
    if not start_processes().is_main_process:
        return {}
    stats, spatial, logits, pool, clip = measured
    assert stats.count == n, f"{stats.count} images instead of {n}"
    if n <= extractor.num_features:
        few = f"{n} images are too few for {extractor.num_features} features: distances are overestimated"
        warn(few)
    scores, distance = {}, distance_name(extractor, n)
    if "fd" in metrics:
        scores[distance] = frechet_distance(stats.mu, stats.sigma, reference.mu, reference.sigma)
    if "sfid" in metrics:
        scores[f"s{distance}"] = frechet_distance(spatial.mu, spatial.sigma, reference.mu_s, reference.sigma_s)
    if "is" in metrics:
        scores["inception_score"], scores["inception_score_std"] = inception_score(logits)
    if pool is not None:
        generated = pool.to(extractor.device)
        real = torch.from_numpy(reference.features).to(generated)
    if "pr" in metrics:
        scores["precision"], scores["recall"] = precision_recall(generated, real)
    if "kid" in metrics:
        scores["kid"], scores["kid_std"] = kernel_distance(generated, real)
    if clip is not None:
        scores["clip_score"] = clip.double().mean().item()
    if with_classes:
        scores["class_accuracy"] = (logits.argmax(1) == labels).double().mean().item()
    return scores


def choose_metrics(wanted: Sequence[str] | None, extractor: Extractor, reference: Reference) -> list[str]:
    """The metrics to compute. Raises UserError for one that lacks what it needs, and as `check_extractor`."""
    check_extractor(reference, extractor)
    no_features = reference.features is None and "a reference with features (`fid.py ref` keeps them)"
    lacking = {
        "sfid": reference.mu_s is None and "a reference with mu_s and sigma_s (extractor=inception)",
        "is": extractor.name != "inception" and "extractor=inception",
        "pr": no_features,
        "kid": no_features,
    }
    for name in wanted or ():
        if lacking.get(name):
            raise UserError(f"metric {name} needs {lacking[name]}")
    return [name for name in METRICS if (name in wanted if wanted is not None else not lacking.get(name))]


def distance_name(extractor: Extractor, n: int) -> str:
    """fid50k, fid5k, fid1234, ... with the published Inception weights; fd_<extractor> with all others."""
    if extractor.name != "inception" or extractor.sha256 not in inception.TRUE_WEIGHTS:
        return f"fd_{extractor.name}"
    return f"fid{n // 1000}k" if n % 1000 == 0 else f"fid{n}"


def describe_scoring(extractor: Extractor, reference: Reference, metrics: Sequence[str] | None) -> dict:
    return {
        "metrics": choose_metrics(metrics, extractor, reference),
        "extractor": extractor.name, "extractor_sha256": extractor.sha256,
        "reference": reference.source, "reference_sha256": reference.sha256, "reference_n": reference.n,
        "processes": start_processes().num_processes, "commit": commit(),
    }  # fmt: skip


def write_metrics(result: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / "metrics.json", json.dumps(finite(result), indent=2, allow_nan=False) + "\n")


def with_progress(batches: Iterable[Features], total: int) -> Iterator[Features]:
    hidden = None if start_processes().is_main_process else True  # None = shown on terminals
    with tqdm(total=total, unit="img", desc="scoring", disable=hidden) as bar:
        for features in batches:
            yield features
            bar.update(len(features.pool))

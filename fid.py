"""Scores of images: from a trained run, which generates them here, or from a folder, .zip or .npz.

    python fid.py calc ckpt=runs/mnist-tread-edm
    python fid.py calc ckpt=runs/mnist-tread-edm guidance=cfg scale=1.0,1.5,2.0
    python fid.py calc images=samples.npz extractor=inception ref=imagenet256.npz
    python fid.py ref images=FOLDER extractor=inception out=ref.npz

A Frechet distance is called FID (`fid50k`, `fid5k`) only in Inception features with their true weights; in others it bears
their name (`fd_mnist`). Everything that a number depends on stands beside it in metrics.json.
"""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

import checkpoint
import cli
import sample
from features import Extractor, Features, digits, load_extractor
from images import open_images
from metrics import FeatureStats, all_reduce, frechet_distance, gather_rows
from reference import Reference, check_extractor, read_reference, write_reference

USAGE = """
python fid.py calc ckpt=RUN | images=FOLDER|ZIP|NPZ [key=value ...]     keys: configs/fid.yaml
python fid.py ref images=FOLDER|ZIP|NPZ out=FILE.npz [key=value ...]    keys: configs/fid_ref.yaml
"""

log = logging.getLogger(__name__)


@dataclass
class Measured:
    """Features of all images, of all processes after `measure`."""

    stats: FeatureStats
    logits: torch.Tensor | None                     # (N, K)


def measure(batches: Iterable[Features], extractor: Extractor) -> Measured:
    """Statistics over the batches of all processes; each brings its own share, `share(n)`, in order."""
    stats = FeatureStats(extractor.num_features, extractor.device)
    logits = []
    for features in batches:
        stats.update(features.pool)
        logits.append(features.logits)
    all_reduce([stats])
    return Measured(stats, gather_rows(torch.cat(logits)))


def share(n: int) -> range:
    """Which of n images this process takes: a block of rows, so that all blocks in turn are the n in order."""
    state = PartialState()
    if n < max(2, state.num_processes):
        raise ValueError(f"{n} images for {state.num_processes} processes; needed: at least 2, and one each")
    return range(n * state.process_index // state.num_processes, n * (state.process_index + 1) // state.num_processes)


def score(
    batches: Iterable[Features], extractor: Extractor, reference: Reference, labels: torch.Tensor | None = None
) -> dict[str, float]:
    """Scores of features against a reference; on every process but the first an empty dict.

    batches: this process's share, in order. labels: of all n images, (n,) int64, for class_accuracy.
    Raises ValueError for a reference of another extractor and for fewer than two images.
    """
    check_extractor(reference, extractor)
    measured = measure(batches, extractor)
    if not PartialState().is_main_process:
        return {}
    stats = measured.stats
    if stats.count <= len(stats.mu):
        log.warning("%d images are too few for %d features: the distance is biased upwards", stats.count, len(stats.mu))
    scores = {distance_name(extractor, stats.count): frechet_distance(stats.mu, stats.sigma, reference.mu, reference.sigma)}
    if labels is not None and extractor.name == "mnist":
        scores["class_accuracy"] = (measured.logits.argmax(1) == labels).double().mean().item()
    return scores


def distance_name(extractor: Extractor, n: int) -> str:
    """fid50k, fid5k, fid1234 for true Inception features; fd_<extractor> for all else."""
    if extractor.name != "inception":
        return f"fd_{extractor.name}"
    return f"fid{n // 1000}k" if n % 1000 == 0 else f"fid{n}"


def digits_reference(extractor: Extractor, path: str | Path = "datasets/mnist") -> Reference:
    """The 4,500 embedded digits that train; `path`: where they lie, or are put."""
    images, _ = digits("train", path)
    stats = FeatureStats(extractor.num_features)
    for batch in images.split(500):
        stats.update(extractor(batch).pool)
    about = {"n": stats.count, "extractor": extractor.name, "extractor_sha256": extractor.sha256}
    return Reference(stats.mu, stats.sigma, **about, source="the embedded digits, train split")


def evaluate(run: sample.Run, settings: DictConfig, extractor: Extractor, reference: Reference) -> dict:
    """Generates images with a run and scores them: what goes into metrics.json; on other processes an empty dict.

    settings: the keys of configs/fid.yaml that say how to generate. The same code serves training and the command line.
    """
    started = time.time()
    guidance, seeds = sample.guidance_from(settings), sample.parse_seeds(settings.seeds)
    labels = sample.labels_for(run.num_classes, seeds, settings.labels)
    rows = share(len(seeds))
    batches = sample.generate(
        run, guidance, seeds[rows.start : rows.stop], labels[rows.start : rows.stop], settings.batch_size, steps=settings.steps
    )
    scores = score(with_progress(map(extractor, batches), rows), extractor, reference, labels)
    if not scores:
        return {}
    seconds = time.time() - started
    config = run.config
    return {
        **scores,
        "n": len(seeds), "seeds": str(settings.seeds), "labels": settings.labels,
        "objective": config.objective._target_,
        "sampler": OmegaConf.to_container(config.sampler) | ({"num_steps": settings.steps} if settings.steps else {}),
        "scale": guidance.scale, "interval": guidance.interval, "gamma_strong": guidance.gamma_strong,
        "gamma_weak": guidance.gamma_weak, "weak_label": guidance.weak_label,
        "step": run.step, "weights": run.weights, "precision": run.precision,
        "checkpoint": str(run.checkpoint) if run.checkpoint else None,
        "checkpoint_sha256": run.sha256 if run.checkpoint else None,
        "codec": OmegaConf.to_container(config.data.codec), "rounding": "nearest",
        **provenance(extractor, reference),
        "network_calls": run.calls, "gmacs_per_image": run.macs / 1e9,
        "seconds": round(seconds, 3), "images_per_s": round(len(seeds) / seconds, 3),
        "config": OmegaConf.to_container(config),
    }  # fmt: skip


def provenance(extractor: Extractor, reference: Reference) -> dict:
    return {
        "extractor": extractor.name, "extractor_sha256": extractor.sha256,
        "reference": reference.source, "reference_sha256": reference.sha256, "reference_n": reference.n,
        "processes": PartialState().num_processes, "commit": commit(),
    }  # fmt: skip


def commit() -> str | None:
    """The version of this code, with "-dirty" where files differ from it; None outside of git."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_metrics(result: dict, folder: Path) -> Path:
    """metrics.json in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text_atomic(folder / "metrics.json", json.dumps(result, indent=2) + "\n")
    return folder / "metrics.json"


def eval_folder(run: sample.Run, settings: DictConfig, distance: str) -> Path:
    """<run folder>/eval/<step>-<what was scored and how>."""
    guidance = sample.settings_name(sample.guidance_from(settings), settings.steps)
    return run.folder / "eval" / f"{run.step:07d}-{distance}-{guidance}-{run.weights}-{settings.labels}-{settings.seeds}"


def with_progress(batches: Iterable[Features], rows: range) -> Iterator[Features]:
    shown = sys.stderr.isatty() and PartialState().is_main_process
    with tqdm(total=len(rows), unit="img", desc="scoring", disable=not shown) as bar:
        for features in batches:
            yield features
            bar.update(len(features.pool))


def calc(config: DictConfig) -> dict:
    """One row: generate or read, score, write metrics.json, say where."""
    if (config.ckpt is None) == (config.images is None):
        raise ValueError("needed: ckpt=RUN or images=FOLDER|ZIP|NPZ, one of the two")
    extractor = load_extractor(config.extractor, device=PartialState().device)
    images = open_images(config.images) if config.images else None
    run = sample.load_run(config.ckpt, config.weights, precision=config.precision) if config.ckpt else None
    reference = reference_for(config, extractor)
    if run:
        result = evaluate(run, config, extractor, reference)
        folder = eval_folder(run, config, distance_name(extractor, result.get("n", 0)))
    else:
        rows = share(len(images))
        batches = map(extractor, images.batches(config.batch_size, rows))
        result = score(with_progress(batches, rows), extractor, reference)
        result |= {"n": len(images), "images": str(images.path), **provenance(extractor, reference)} if result else {}
        folder = images.path.parent / f"{images.path.stem}-scores"
    if result:
        path = write_metrics(result, Path(config.out) if config.out else folder)
        print("  ".join(f"{key} {value:.4f}" for key, value in result.items() if isinstance(value, float) and key != "seconds"))
        print(path)
    return result


def reference_for(config: DictConfig, extractor: Extractor) -> Reference:
    if config.ref is not None:
        return read_reference(config.ref)
    if extractor.name != "mnist":
        raise ValueError(f"extractor={extractor.name} needs ref=FILE.npz, made by `python fid.py ref`")
    return digits_reference(extractor, config.digits)


def main(argv: Sequence[str]) -> None:
    verb, overrides = cli.verb(argv, USAGE, ("calc", "ref"))
    if verb == "calc":
        calc(cli.load_config("fid", overrides))


if __name__ == "__main__":
    with cli.user_errors():
        main(sys.argv[1:])

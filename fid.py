"""Scores of images: of a run, which generates them here, or of a folder, .zip, .tar or .npz.

    python fid.py calc ckpt=runs/mnist-tread-XS4-edm
    python fid.py calc 'ckpt=runs/mnist-tread-XS4-edm/checkpoints/step_*' guidance=cfg scale=1.0,1.5 weights=ema,raw
    python fid.py calc ckpt=runs/mnist-tread-XS4-edm ema_width=0.03,0.05,0.08,0.12     of a run with ema=power
    python fid.py calc images=samples.npz extractor=inception ref=imagenet256.npz
    python fid.py ref images=FOLDER extractor=inception out=ref.npz
    python fid.py ref from=VIRTUAL_imagenet256_labeled.npz out=imagenet256.npz

Every row writes a metrics.json with everything that its numbers depend on. On several GPUs: `accelerate launch fid.py`
or `torchrun`. An interrupted call continues where it stopped.
"""

import dataclasses
import functools
import glob
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

import sample
from checkpoints.power_ema import check_reconstruction
from checkpoints.run_folder import find_checkpoint
from data.images import Images, open_images
from evaluation import table
from evaluation.features import CLASSIFIERS, Extractor, Features, load_extractor
from evaluation.metrics import frechet_distance  # noqa: F401  the name that users import it by
from evaluation.reference import (
    MAX_FEATURES,
    Reference,
    check_extractor,
    read_reference,
    reference_from,
    shipped_reference,
    write_reference,
)
from evaluation.score import (
    choose_metrics,
    describe_scoring,
    distance_name,
    measure,
    read_part,
    score,
    shard_range,
    with_progress,
    write_metrics,
    write_part,
)
from guidance import guidance_from
from randomness import seeded_generator
from system import UserError, cli
from system.compiling import pays_to_compile
from system.launchers import own_process
from system.processes import start_processes

USAGE = """
python fid.py calc ckpt=RUN | images=FOLDER|ZIP|TAR|NPZ [key=value ...]          keys: configs/fid.yaml
python fid.py ref images=FOLDER|ZIP|TAR|NPZ | from=NPZ out=FILE.npz [key=value]  keys: configs/fid_ref.yaml
"""
SCORING_KEYS = {  # all others are about generating
    "ckpt", "images", "batch_size", "out",
    "extractor", "extractor_weights", "extractor_sha256", "ref", "digits", "fashion", "metrics",
}  # fmt: skip


def main(argv: Sequence[str]) -> None:
    verb, overrides = cli.verb(argv, USAGE, ("calc", "ref"))
    start_processes(timeout_s=4 * 3600)  # precision and recall may keep the first one busy for long
    if verb == "ref":
        ref(cli.load_config("fid_ref", overrides))
    else:
        calc(overrides)


def calc(overrides: Sequence[str]) -> None:
    """One row per combination of comma-separated values, then a table of all rows."""
    configs = [cli.load_config("fid", row) for row in cli.combinations(overrides)]
    configs = [row for config in configs for row in checkpoints_of(config)]
    for config in configs:
        check(config, {override.partition("=")[0] for override in overrides})
    results = [calc_row(config, alone=len(configs) == 1) for config in configs]
    if start_processes().is_main_process:
        out = Path(configs[0].out) if configs[0].out else Path(results[0]["folder"]).parent
        table.show(results, out)


def checkpoints_of(config: DictConfig) -> list[DictConfig]:
    """One row per checkpoint that a pattern such as `ckpt=RUN/checkpoints/step_*` matches. Raises UserError."""
    if config.ckpt is None or "*" not in config.ckpt:
        return [config]
    paths = sorted(glob.glob(config.ckpt))
    if not paths:
        raise UserError(f"ckpt={config.ckpt} matches nothing")
    return [OmegaConf.merge(config, {"ckpt": path}) for path in paths]


def check(config: DictConfig, given: set[str]) -> None:
    """Raises UserError for every mistake that can be found before the slow part."""
    if (config.ckpt is None) == (config.images is None):
        raise UserError("needed: ckpt=RUN or images=FOLDER|ZIP|TAR|NPZ, one of the two")
    if config.images is not None and given - SCORING_KEYS:
        names = ", ".join(sorted(given - SCORING_KEYS))
        raise UserError(f"{names}: only with ckpt=; images=... are scored as they are")
    extractor, reference = extractor_and_reference(config)
    check_extractor(reference, extractor)
    choose_metrics(config.metrics, extractor, reference)
    if config.ckpt is not None:
        checkpoint = find_checkpoint(config.ckpt)
        if config.ema_width is not None:
            check_reconstruction(checkpoint, config.weights, config.ema_width)
        guidance_from(config)
        if config.compile not in ("auto", "blocks", "off"):
            raise UserError(f"compile={config.compile}; needed: auto, blocks or off")
        shard_range(len(sample.parse_seeds(config.seeds)))


def extractor_and_reference(config: DictConfig) -> tuple[Extractor, Reference]:
    """The extractor and the reference of a row, loaded once for all rows. Raises UserError."""
    extractor = cached_extractor(config.extractor, config.extractor_weights, config.extractor_sha256)
    if config.ref is not None:
        return extractor, cached_reference(config.ref)
    if extractor.name not in CLASSIFIERS:
        raise UserError(f"extractor={extractor.name} needs ref=FILE.npz, made by `python fid.py ref`")
    return extractor, cached_shipped_reference(
        extractor, config.digits if extractor.name == "mnist" else config.fashion
    )


@functools.cache
def cached_extractor(name: str, weights: str | None, sha256: str | None) -> Extractor:
    with start_processes().main_process_first():  # one download
        return load_extractor(name, weights, sha256, device=start_processes().device)


cached_reference = functools.cache(read_reference)


@functools.cache
def cached_shipped_reference(extractor: Extractor, path: str) -> Reference:
    with start_processes().main_process_first():  # the others read what it has made
        return shipped_reference(extractor, path)


def calc_row(config: DictConfig, alone: bool) -> dict:
    """Scores a run or images and writes metrics.json -> its contents, with "folder", "run" and "guidance"."""
    extractor, reference = extractor_and_reference(config)
    if config.ckpt is not None:
        run = sample.load_run(config.ckpt, config.weights, ema_width=config.ema_width, precision=config.precision)
        run.config.sampler = config.get("sampler") or run.config.sampler
        sample.set_codec(run, config.codec)
        run.compile_as(compile_for(run, config))
        source = f"{run.folder.name}-{run.sha256[:6]}"
        folder = row_folder(config, run.folder / "eval", source, row_name(run, config, extractor), alone)
        result = evaluate(run, config, extractor, reference, folder / "parts")
        names = {"run": run.folder.name, "guidance": sample.settings_name(guidance_from(config), config.steps)}
    else:
        images, names = open_images(config.images), {}
        source = hashlib.sha256(str(images.path.absolute()).encode()).hexdigest()[:6]
        name = f"{images.path.name}-{scoring_name(config, extractor, len(images))}"
        folder = row_folder(config, images.path.parent, source, name, alone)
        result = evaluate_images(images, config, extractor, reference)
    if result:
        write_metrics(result, folder)
        shutil.rmtree(folder / "parts", ignore_errors=True)
    return result | names | {"folder": str(folder)}


def compile_for(run: sample.Run, config: DictConfig) -> str:
    """blocks or off. auto counts all images of the call, so that an interrupted one makes the same choice again."""
    if config.compile != "auto":
        return config.compile
    sampler, processes = run.config.sampler, start_processes().num_processes
    calls = (config.steps or sampler.num_steps) * (2 if sampler.get("solver") == "heun" else 1)
    calls *= 2 if guidance_from(config).on else 1
    images = math.ceil(len(sample.parse_seeds(config.seeds)) / processes)
    width = run.model.pos_embed.shape[-1]
    return "blocks" if pays_to_compile(run.device, images * calls * run.model.macs(), width) else "off"


def evaluate(
    run: sample.Run, settings: DictConfig, extractor: Extractor, reference: Reference, parts: Path | None = None
) -> dict:
    """Generates images with a run and scores them -> metrics.json; an empty dict on every process but the first.

    settings: keys of configs/fid.yaml: the guidance, seeds, labels, steps, batch_size, metrics.
    parts: a folder for the features of each finished batch, from which an interrupted call continues.
    """
    started = time.time()
    guidance, seeds = guidance_from(settings), sample.parse_seeds(settings.seeds)
    labels = sample.labels_for(run.num_classes, seeds, settings.labels)
    about = describe_run(run, settings)
    if parts is not None:
        asked = json.dumps([about, str(settings.seeds), extractor.name, extractor.sha256], sort_keys=True)
        parts = parts / hashlib.sha256(asked.encode()).hexdigest()[:16]

    def generate(chosen: list[int]) -> Iterator[torch.Tensor]:
        size, steps = settings.batch_size, settings.steps
        return sample.generate(run, guidance, [seeds[i] for i in chosen], labels[chosen], size, steps=steps)

    rows = shard_range(len(seeds))
    batches = generate_features(run, generate, rows, settings.batch_size, extractor, parts)
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
    run: sample.Run,
    generate: Callable,  # indices of images -> batches of uint8 (B, 3, H, W)
    rows: range,
    batch_size: int,
    extractor: Extractor,
    parts: Path | None,
) -> Iterator[Features]:
    """Features of the images `rows`, batch by batch; those in the folder `parts` are read back."""
    batches = [range(start, min(start + batch_size, rows.stop)) for start in range(rows.start, rows.stop, batch_size)]
    files = [parts and parts / f"{batch.start:07d}-{batch.stop:07d}.safetensors" for batch in batches]
    images = generate([i for batch, file in zip(batches, files) if not (file and file.is_file()) for i in batch])
    for file in files:
        if file and file.is_file():
            features, run.calls, run.macs = read_part(file, extractor.device)
        else:
            features = extractor(next(images))
            if file:
                write_part(file, features, run.calls, run.macs)
        yield features


def describe_run(run: sample.Run, settings: DictConfig) -> dict:
    """Everything that an image depends on besides its seed."""
    config, guidance = run.config, guidance_from(settings)
    weak = sample.load_weak(run, guidance)
    return {
        "labels": settings.labels,
        "objective": config.objective._target_,
        "sampler": OmegaConf.to_container(config.sampler) | ({"num_steps": settings.steps} if settings.steps else {}),
        **dataclasses.asdict(guidance),
        "step": run.step, "weights": run.weights, **({} if run.ema_width is None else {"ema_width": run.ema_width}),
        "dtype": run.precision,  # "precision" is a score
        "compile": run.compile,
        "checkpoint": str(run.checkpoint) if run.checkpoint else None,
        "checkpoint_sha256": run.sha256 if run.checkpoint else None,
        "weak_sha256": weak.sha256 if weak is not run else None,
        "codec": OmegaConf.to_container(config.data.codec), "rounding": "nearest",
    }  # fmt: skip


def evaluate_images(images: Images, config: DictConfig, extractor: Extractor, reference: Reference) -> dict:
    """Scores images as they are -> metrics.json; an empty dict on every process but the first."""
    started, rows = time.time(), shard_range(len(images))
    batches = with_progress(map(extractor, images.batches(config.batch_size, rows)), len(rows))
    scores = score(batches, len(images), extractor, reference, metrics=config.metrics)
    about = {"n": len(images), "images": str(images.path), "seconds": round(time.time() - started, 3)}
    return scores and scores | about | describe_scoring(extractor, reference)


def row_name(run: sample.Run, config: DictConfig, extractor: Extractor) -> str:
    """<step>-<extractor>-<settings>: equal names, equal scores."""
    guidance = sample.settings_name(guidance_from(config), config.steps)
    scoring = scoring_name(config, extractor, len(sample.parse_seeds(config.seeds)))
    weights = run.weights if run.ema_width is None else f"ema{run.ema_width:g}"
    parts = [f"{run.step:07d}", scoring, guidance, weights, config.labels, config.seeds]
    parts += [run.precision] if run.precision != "fp32" else []
    parts += ["compiled"] if run.compile != "off" else []
    parts += [sample.sampler_name(config.sampler)] if config.get("sampler") is not None else []
    codec = sample.given_codec(config.codec) if "codec" in config else {}  # training has its own
    parts += [f"codec_{sample.digest(codec)}"] if codec else []
    return "-".join(map(str, parts))


def scoring_name(config: DictConfig, extractor: Extractor, n: int) -> str:
    """The distance's name, with the reference, the extractor's weights and the metrics where they are given."""
    parts = [distance_name(extractor, n)]
    parts += [extractor.sha256[:6]] if config.extractor_weights is not None else []
    if config.ref is not None:
        parts += [f"{Path(config.ref).stem}_{cached_reference(config.ref).sha256[:6]}"]
    parts += ["_".join(config.metrics)] if config.metrics is not None else []
    return "-".join(parts)


def row_folder(config: DictConfig, default: Path, source: str, name: str, alone: bool) -> Path:
    """out= is the folder of a single row, and the parent of those of several, which say what was scored."""
    if config.out is None:
        return default / name
    return Path(config.out) if alone else Path(config.out) / f"{source}-{name}"


def ref(config: DictConfig) -> None:
    """Writes a reference: an extractor's statistics of images, or those in an ADM file. Raises UserError."""
    if (config.images is None) == (config["from"] is None):
        raise UserError("needed: images=FOLDER|ZIP|TAR|NPZ or from=VIRTUAL_*.npz, one of the two")
    if config.images is not None:
        reference = make_reference(config.images, config, MAX_FEATURES if config.features is None else config.features)
    else:
        reference = read_reference(config["from"])
        if config.features:
            made = make_reference(config["from"], config, config.features)
            if made.extractor != reference.extractor:
                raise UserError(f"{config['from']} is for extractor={reference.extractor}, not {made.extractor}")
            reference = dataclasses.replace(reference, features=made.features, extractor_sha256=made.extractor_sha256)
    if start_processes().is_main_process:
        write_reference(Path(config.out), reference)
        kept = 0 if reference.features is None else len(reference.features)
        print(f"{config.out}: {len(reference.mu)} {reference.extractor} features, and those of {kept} single images")


def make_reference(source: str, config: DictConfig, wanted: int) -> Reference:
    """The statistics of all images of `source`, and the features of `wanted` of them, drawn uniformly."""
    extractor = cached_extractor(config.extractor, config.extractor_weights, config.extractor_sha256)
    images = open_images(source)
    rows, keep = shard_range(len(images)), torch.zeros(len(images), dtype=torch.bool)
    keep[torch.randperm(len(images), generator=seeded_generator("reference"))[:wanted]] = True
    batches = with_progress(map(extractor, images.batches(config.batch_size, rows)), len(rows))
    kept = keep[rows.start : rows.stop] if wanted else None
    measured = measure(batches, extractor, spatial=extractor.num_spatial is not None, logits=False, keep=kept)
    return reference_from(measured.stats, measured.spatial, measured.pool, extractor, str(images.path))


if __name__ == "__main__":
    with cli.user_errors():
        own_process()
        main(sys.argv[1:])

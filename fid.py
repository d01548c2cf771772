"""Scores of images: of a run, which generates them here, or of a folder, .zip, .tar or .npz.

    python fid.py calc ckpt=runs/mnist-tread-edm
    python fid.py calc 'ckpt=runs/mnist-tread-edm/checkpoints/step_*' guidance=cfg scale=1.0,1.5 weights=ema,raw
    python fid.py calc images=samples.npz extractor=inception ref=imagenet256.npz
    python fid.py ref images=FOLDER extractor=inception out=ref.npz
    python fid.py ref from=VIRTUAL_imagenet256_labeled.npz out=imagenet256.npz

Every row ends in a metrics.json with all that its numbers depend on. On many GPUs: `accelerate launch fid.py ...` or
`torchrun`. A call that was cut short goes on where it was.
"""

import functools
import glob
import itertools
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

import checkpoint
import cli
import sample
import scoreboard
from features import Extractor, load_extractor
from images import Images, open_images
from metrics import FeatureStats, frechet_distance  # noqa: F401  fid.frechet_distance is what users import
from processes import start_processes
from randomness import seeded_generator
from reference import (
    MAX_FEATURES,
    Reference,
    check_extractor,
    digits_reference,
    read_reference,
    reference_from,
    write_reference,
)
from scoring import (
    choose_metrics,
    describe_scoring,
    distance_name,
    evaluate,
    measure,
    score,
    share,
    with_progress,
    write_metrics,
)

USAGE = """
python fid.py calc ckpt=RUN | images=FOLDER|ZIP|TAR|NPZ [key=value ...]          keys: configs/fid.yaml
python fid.py ref images=FOLDER|ZIP|TAR|NPZ | from=NPZ out=FILE.npz [key=value]  keys: configs/fid_ref.yaml
"""
SCORING_KEYS = {                                    # all others say how to generate
    "ckpt", "images", "batch_size", "out",
    "extractor", "extractor_weights", "extractor_sha256", "ref", "digits", "metrics",
}  # fmt: skip


def main(argv: Sequence[str]) -> None:
    verb, overrides = cli.verb(argv, USAGE, ("calc", "ref"))
    processes = start_processes(timeout_s=4 * 3600)  # precision and recall may keep the first one busy for long
    if verb == "ref":
        ref(cli.load_config("fid_ref", overrides))
    else:
        calc(overrides)
    processes.wait_for_everyone()  # none leaves while another still talks to it
    processes.destroy_process_group()


def calc(overrides: Sequence[str]) -> None:
    """One row for each combination of values that are given with commas, then a table of them."""
    configs = [cli.load_config("fid", row) for row in combinations(overrides)]
    configs = [row for config in configs for row in checkpoints(config)]
    for config in configs:
        check(config, {override.partition("=")[0] for override in overrides})
    results = [calc_row(config, alone=len(configs) == 1) for config in configs]
    if start_processes().is_main_process:
        out = Path(configs[0].out) if configs[0].out else Path(results[0]["folder"]).parent
        scoreboard.show(results, out)


def combinations(overrides: Sequence[str]) -> list[list[str]]:
    """`a=1,2 b=3` -> [[a=1, b=3], [a=2, b=3]]: Hydra's own grammar, as in `train.py -m`."""
    choices = [
        [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [override.input_line]
        for override in OverridesParser.create().parse_overrides(list(overrides))
    ]
    return [list(row) for row in itertools.product(*choices)]


def checkpoints(config: DictConfig) -> list[DictConfig]:
    """A row for each checkpoint that a pattern such as `ckpt=RUN/checkpoints/step_*` means."""
    if config.ckpt is None or "*" not in config.ckpt:
        return [config]
    paths = sorted(glob.glob(config.ckpt))
    if not paths:
        raise ValueError(f"ckpt={config.ckpt} matches nothing")
    return [OmegaConf.merge(config, {"ckpt": path}) for path in paths]


def check(config: DictConfig, given: set[str]) -> None:
    """Raises ValueError for all that can be known to be wrong before the slow part."""
    if (config.ckpt is None) == (config.images is None):
        raise ValueError("needed: ckpt=RUN or images=FOLDER|ZIP|TAR|NPZ, one of the two")
    if config.images is not None and given - SCORING_KEYS:
        names = ", ".join(sorted(given - SCORING_KEYS))
        raise ValueError(f"{names}: only with ckpt=; images=... are scored as they are")
    extractor, reference = tools(config)
    check_extractor(reference, extractor)
    choose_metrics(config.metrics, extractor, reference)
    if config.ckpt is not None:
        checkpoint.find(config.ckpt)
        sample.guidance_from(config)
        share(len(sample.parse_seeds(config.seeds)))


def tools(config: DictConfig) -> tuple[Extractor, Reference]:
    """The extractor and the reference of a row, loaded once for all rows."""
    extractor = extractor_of(config.extractor, config.extractor_weights, config.extractor_sha256)
    if config.ref is None and extractor.name != "mnist":
        raise ValueError(f"extractor={extractor.name} needs ref=FILE.npz, made by `python fid.py ref`")
    return extractor, reference_of(config.ref, config.digits, extractor)


@functools.cache
def extractor_of(name: str, weights: str | None, sha256: str | None) -> Extractor:
    with start_processes().main_process_first():  # one download
        return load_extractor(name, weights, sha256, device=start_processes().device)


@functools.cache
def reference_of(ref: str | None, digits: str, extractor: Extractor) -> Reference:
    return digits_reference(extractor, digits) if ref is None else read_reference(ref)


def calc_row(config: DictConfig, alone: bool) -> dict:
    """Generates or reads, scores, writes metrics.json; what it holds, and "folder", "run" and "guidance"."""
    extractor, reference = tools(config)
    if config.ckpt is not None:
        run = sample.load_run(config.ckpt, config.weights, precision=config.precision, compile=config.compile)
        run.config.sampler = config.get("sampler") or run.config.sampler
        folder = row_folder(config, run.folder / "eval", run_name(run, config, extractor), alone)
        result = evaluate(run, config, extractor, reference, folder / "parts")
        names = {"run": run.folder.name, "guidance": sample.settings_name(sample.guidance_from(config), config.steps)}
    else:
        images, names = open_images(config.images), {}
        name = f"{images.path.stem}-{distance_name(extractor, len(images))}"
        folder = row_folder(config, images.path.parent, name, alone)
        result = evaluate_images(images, config, extractor, reference)
    if result:
        write_metrics(result, folder)
        shutil.rmtree(folder / "parts", ignore_errors=True)
    return result | names | {"folder": str(folder)}


def evaluate_images(images: Images, config: DictConfig, extractor: Extractor, reference: Reference) -> dict:
    """Scores images as they are: what metrics.json holds; on processes but the first an empty dict."""
    started, rows = time.time(), share(len(images))
    batches = with_progress(map(extractor, images.batches(config.batch_size, rows)), len(rows))
    scores = score(batches, len(images), extractor, reference, metrics=config.metrics)
    about = {"n": len(images), "images": str(images.path), "seconds": round(time.time() - started, 3)}
    return scores and scores | about | describe_scoring(extractor, reference)


def run_name(run: sample.Run, config: DictConfig, extractor: Extractor) -> str:
    """<step>-<what is scored and how>: equal names, equal scores."""
    guidance = sample.settings_name(sample.guidance_from(config), config.steps)
    distance = distance_name(extractor, len(sample.parse_seeds(config.seeds)))
    parts = [f"{run.step:07d}", distance, guidance, run.weights, config.labels, config.seeds]
    parts += [config.precision] if config.precision != "fp32" else []
    parts += ["compiled"] if run.compile != "off" else []
    parts += [sample.sampler_name(config.sampler)] if config.get("sampler") is not None else []
    return "-".join(map(str, parts))


def row_folder(config: DictConfig, default: Path, name: str, alone: bool) -> Path:
    """out= is the folder of a row that is alone and holds the folders of several."""
    if config.out is None:
        return default / name
    return Path(config.out) if alone else Path(config.out) / name


def ref(config: DictConfig) -> None:
    """Writes a reference: of images through an extractor, or what an ADM file holds."""
    if (config.images is None) == (config["from"] is None):
        raise ValueError("needed: images=FOLDER|ZIP|TAR|NPZ or from=VIRTUAL_*.npz, one of the two")
    if config.images is not None:
        reference = make_reference(config.images, config, MAX_FEATURES if config.features is None else config.features)
    else:
        reference = read_reference(config["from"])
        if config.features:
            made = make_reference(config["from"], config, config.features)
            if made.extractor != reference.extractor:
                raise ValueError(f"{config['from']} is for extractor={reference.extractor}, not {made.extractor}")
            reference = replace(reference, features=made.features, extractor_sha256=made.extractor_sha256)
    if start_processes().is_main_process:
        write_reference(Path(config.out), reference)
        kept = 0 if reference.features is None else len(reference.features)
        print(f"{config.out}: {len(reference.mu)} {reference.extractor} features, and those of {kept} single images")


def make_reference(source: str, config: DictConfig, wanted: int) -> Reference:
    """Of the images at hand: statistics of all, features of `wanted` of them, drawn evenly."""
    extractor = extractor_of(config.extractor, config.extractor_weights, config.extractor_sha256)
    images = open_images(source)
    rows, keep = share(len(images)), torch.zeros(len(images), dtype=torch.bool)
    keep[torch.randperm(len(images), generator=seeded_generator("reference"))[:wanted]] = True
    batches = with_progress(map(extractor, images.batches(config.batch_size, rows)), len(rows))
    kept = keep[rows.start : rows.stop] if wanted else None
    measured = measure(batches, extractor, spatial=extractor.num_spatial is not None, logits=False, keep=kept)
    return reference_from(measured.stats, measured.spatial, measured.pool, extractor, str(images.path))


if __name__ == "__main__":
    with cli.user_errors():
        main(sys.argv[1:])

"""Scores of images: of a run, which generates them here, or of a folder, .zip, .tar or .npz.

    python fid.py calc ckpt=runs/mnist-tread-XS4-edm
    python fid.py calc 'ckpt=runs/mnist-tread-XS4-edm/checkpoints/step_*' guidance=cfg scale=1.0,1.5 weights=ema,raw
    python fid.py calc ckpt=runs/mnist-tread-XS4-edm ema_width=0.03,0.05,0.08,0.12     of a run with ema=power
    python fid.py calc images=samples.npz extractor=inception ref=imagenet256.npz
    python fid.py ref images=FOLDER extractor=inception out=ref.npz
    python fid.py ref from=VIRTUAL_imagenet256_labeled.npz out=imagenet256.npz

The keys: configs/fid.yaml and configs/fid_ref.yaml. Every row writes a metrics.json with everything that its numbers
depend on. On several GPUs: `accelerate launch fid.py` or `torchrun`. An interrupted call continues where it stopped.
"""

import dataclasses
import glob
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import sample
from checkpoints import config
from checkpoints.config import Count, Positive, Scoring, Width
from checkpoints.gallery import MANIFEST
from checkpoints.load import Run, load_run
from checkpoints.naming import digest, shortened
from checkpoints.run_folder import find_checkpoint
from data.images import Images, open_images
from evaluation import table
from evaluation.clip import load_clip
from evaluation.evaluate import cached_extractor, describe_run, evaluate, extractor_and_reference, score_name
from evaluation.features import Extractor
from evaluation.metrics import frechet_distance  # noqa: F401  the name that users import it by
from evaluation.reference import MAX_FEATURES, Reference, check_size, read_reference, reference_from, write_reference
from evaluation.score import describe_scoring, measure, score, shard_range, with_progress, write_metrics
from randomness import seeded_generator
from system import UserError, cli
from system.compiling import pays_to_compile
from system.files import read_json
from system.processes import from_first, start_processes
from system.settings import parse
from training import ema

SCORING_KEYS = {  # all others are about generating
    "ckpt", "images", "crop", "batch_size", "out",
    "extractor", "extractor_weights", "extractor_sha256", "ref", "digits", "fashion", "metrics",
}  # fmt: skip


@dataclass(frozen=True)
class Calc(Scoring):
    """The keys of configs/fid.yaml."""

    ckpt: str | None = None
    images: str | None = None
    crop: Positive | None = None
    out: str | None = None
    ema_width: Width | None = None
    prompts: str | None = None
    clip: str | None = None
    clip_sha256: str | None = None
    compile: Literal["auto", "blocks", "off"] = "auto"
    codec: config.Codec = config.Codec()
    sampler: dict[str, Any] | None = None
    data: sample.Source = sample.Source()

    def __post_init__(self):
        super().__post_init__()
        if (self.ckpt is None) == (self.images is None):
            raise UserError("needed: ckpt=RUN or images=FOLDER|ZIP|TAR|NPZ, one of the two")
        if self.crop is not None and self.images is None:
            raise UserError(f"crop={self.crop} is for images=; a run's have one size")
        if self.clip is not None and self.prompts is None:
            raise UserError(f"clip={self.clip} compares images with what was asked for; needed: prompts=FILE, too")
        self.data.check(self.prompts)


@dataclass(frozen=True)
class Ref:
    """The keys of configs/fid_ref.yaml."""

    out: str
    images: str | None = None
    crop: Positive | None = None
    from_: str | None = None
    extractor: config.Extractor = "inception"
    extractor_weights: str | None = None
    extractor_sha256: str | None = None
    features: Count | None = None
    batch_size: Positive = 64

    def __post_init__(self):
        if (self.images is None) == (self.from_ is None):
            raise UserError("needed: images=FOLDER|ZIP|TAR|NPZ or from=VIRTUAL_*.npz, one of the two")
        if self.crop is not None and self.images is None:
            raise UserError(f"crop={self.crop} is for images=; those of {self.from_} have one size")


def main(argv: Sequence[str]) -> None:
    verb, overrides = cli.verb(argv, __doc__, ("calc", "ref"))
    start_processes(timeout_s=4 * 3600)  # precision and recall may keep the first one busy for long
    if verb == "ref":
        ref(parse(Ref, cli.load_config("fid_ref", overrides)))
    else:
        calc(overrides)


def calc(overrides: Sequence[str]) -> None:
    """One row per combination of comma-separated values, then a table of all rows."""
    rows = [parse(Calc, cli.load_config("fid", row)) for row in cli.combinations(overrides)]
    rows = [row for settings in rows for row in checkpoints_of(settings)]
    for settings in rows:
        check(settings, {override.partition("=")[0] for override in overrides})
    results = [calc_row(settings, alone=len(rows) == 1) for settings in rows]
    if start_processes().is_main_process:
        out = Path(rows[0].out) if rows[0].out else Path(results[0]["folder"]).parent
        table.show(results, out)


def checkpoints_of(settings: Calc) -> list[Calc]:
    """One row per checkpoint that a pattern such as `ckpt=RUN/checkpoints/step_*` matches. Raises UserError."""
    if settings.ckpt is None or "*" not in settings.ckpt:
        return [settings]
    paths = sorted(glob.glob(settings.ckpt))
    if not paths:
        raise UserError(f"ckpt={settings.ckpt} matches nothing")
    return [dataclasses.replace(settings, ckpt=path) for path in paths]


def check(settings: Calc, given: set[str]) -> None:
    """Raises UserError for every mistake that can be found before the slow part."""
    if settings.images is not None and given - SCORING_KEYS:
        names = ", ".join(sorted(given - SCORING_KEYS))
        raise UserError(f"{names}: only with ckpt=; images=... are scored as they are")
    extractor_and_reference(settings)
    if settings.ckpt is not None:
        checkpoint = find_checkpoint(settings.ckpt)
        if settings.ema_width is not None:
            ema.check_reconstruction(checkpoint, settings.weights, settings.ema_width)
        shard_range(len(settings.all_seeds))
    if settings.prompts is not None:
        sample.read_prompts(settings.prompts)
    if settings.clip is not None:
        load_clip(settings.clip, settings.clip_sha256)


def calc_row(settings: Calc, alone: bool) -> dict:
    """Scores a run or images and writes metrics.json -> its contents, with "folder", "run" and "guidance"."""
    extractor, reference = extractor_and_reference(settings)
    if settings.ckpt is not None:
        run = load_scored(settings)
        told = score_name(settings, extractor, len(settings.all_seeds), run.precision, run.compile)
        name = f"{run.step:07d}-{told}"
        folder = row_folder(settings, run.place("eval"), f"{run.folder.name}-{run.sha256[:6]}", name, alone)
        clip = None if settings.clip is None else load_clip(settings.clip, settings.clip_sha256)
        about = describe_run(run, settings, clip) | describe_scoring(extractor, reference, settings.metrics)
        names = {"run": run.folder.name, "guidance": sample.settings_name(settings.alone), "folder": str(folder)}
        if before := from_first(lambda: scored_before(folder, about)):
            if start_processes().is_main_process:
                print(f"{folder} was scored before; to score it again, delete it")
            return json.loads(before) | names
        result = evaluate(run, settings, extractor, reference, folder / "parts", clip)
    else:
        images = open_folder(settings.images)
        source = digest(str(images.path.absolute()))[:6]
        name = shortened(f"{images.path.name}-{score_name(settings, extractor, len(images))}")
        folder = row_folder(settings, images.path.parent, source, name, alone)
        names, result = {"folder": str(folder)}, evaluate_images(images, settings, extractor, reference)
    if result:
        write_metrics(result, folder)
        shutil.rmtree(folder / "parts", ignore_errors=True)
    return result | names


def scored_before(folder: Path, about: dict) -> str:
    """The metrics.json of an earlier call with the same images, extractor, reference, metrics and code; "" = none.

    about: of `describe_run` and `describe_scoring`.
    """
    about = json.loads(json.dumps(table.finite(about | {"processes": None})))
    path = folder / "metrics.json"
    before = read_json(path) if path.is_file() else {}
    same = about == {**{key: before.get(key) for key in about}, "processes": None}
    same = same and all(isinstance(before[key], (int, float)) for key in before if key.startswith(table.SCORES))
    return json.dumps(before) if same and not str(about["commit"]).endswith("-dirty") else ""


def load_scored(settings: Calc) -> Run:
    """The run of a row, with the row's average, sampler and codec."""
    average = None
    if settings.ema_width is not None:
        average = ema.reconstruct(find_checkpoint(settings.ckpt), settings.ema_width)
    run = load_run(settings.ckpt, settings.weights, tensors=average, precision=settings.precision)
    run.ema_width = settings.ema_width
    sample.adjust(run, settings)
    if settings.prompts is not None:
        run.captions = sample.read_prompts(settings.prompts)
        run.pool = sample.encode_prompts(run, run.captions, settings.data.text_encoder)
    run.compile_as(compile_for(run, settings))
    return run


def compile_for(run: Run, settings: Calc) -> str:
    """blocks or off. auto counts all images of the call, so that an interrupted one makes the same choice again."""
    if settings.compile != "auto":
        return settings.compile
    sampler, processes = run.settings.sampler, start_processes().num_processes
    calls = (settings.steps or sampler.get("num_steps") or 50) * (2 if sampler.get("solver") == "heun" else 1)
    calls *= 2 if settings.on else 1
    images = math.ceil(len(settings.all_seeds) / processes)
    parameters = sum(p.numel() for p in run.model.parameters())
    return "blocks" if pays_to_compile(run.device, images * calls * run.model.macs(), parameters) else "off"


def open_folder(path: str) -> Images:
    """The pictures at a path; of a folder that sample.py wrote, the samples without their grid."""
    return open_images(Path(path) / "images" if (Path(path) / MANIFEST).is_file() else path)


def evaluate_images(images: Images, settings: Calc, extractor: Extractor, reference: Reference) -> dict:
    """Scores images as they are -> metrics.json; an empty dict on every process but the first."""
    check_size(reference, *images.size(settings.crop))
    started, rows = time.time(), shard_range(len(images))
    batches = with_progress(map(extractor, images.batches(settings.batch_size, rows, settings.crop)), len(rows))
    scores = score(batches, len(images), extractor, reference, metrics=settings.metrics)
    about = {"n": len(images), "images": str(images.path), "crop": settings.crop}
    about |= {"seconds": round(time.time() - started, 3)}
    return scores and scores | about | describe_scoring(extractor, reference, settings.metrics)


def row_folder(settings: Calc, default: Path, source: str, name: str, alone: bool) -> Path:
    """out= is the folder of a single row, and the parent of those of several, which say what was scored."""
    if settings.out is None:
        if (folder := default / name).is_symlink():  # beside somebody's images
            raise UserError(f"{folder} is a link; needed: out=, another folder")
        return folder
    return Path(settings.out) if alone else Path(settings.out) / shortened(f"{source}-{name}")


def ref(settings: Ref) -> None:
    """Writes a reference: an extractor's statistics of images, or those in an ADM file. Raises UserError."""
    if settings.images is not None:
        wanted = MAX_FEATURES if settings.features is None else settings.features
        reference = make_reference(settings.images, settings, wanted)
    else:
        reference = read_reference(settings.from_)
        if settings.features:
            made = make_reference(settings.from_, settings, settings.features)
            if made.extractor != reference.extractor:
                raise UserError(f"{settings.from_} is for extractor={reference.extractor}, not {made.extractor}")
            own = {key: getattr(made, key) for key in ("features", "extractor_sha256", "height", "width")}
            reference = dataclasses.replace(reference, **own)
    if start_processes().is_main_process:
        write_reference(Path(settings.out), reference)
        kept = 0 if reference.features is None else len(reference.features)
        print(f"{settings.out}: {len(reference.mu)} {reference.extractor} features, and those of {kept} single images")


def make_reference(source: str, settings: Ref, wanted: int) -> Reference:
    """The statistics of all images of `source`, and the features of `wanted` of them, drawn uniformly."""
    extractor = cached_extractor(settings.extractor, settings.extractor_weights, settings.extractor_sha256)
    images = open_folder(source)
    rows, keep = shard_range(len(images)), torch.zeros(len(images), dtype=torch.bool)
    keep[torch.randperm(len(images), generator=seeded_generator("reference"))[:wanted]] = True
    batches = with_progress(map(extractor, images.batches(settings.batch_size, rows, settings.crop)), len(rows))
    kept = keep[rows.start : rows.stop] if wanted else None
    measured = measure(batches, extractor, spatial=extractor.num_spatial is not None, logits=False, keep=kept)
    made = reference_from(measured.stats, measured.spatial, measured.pool, extractor, str(images.path))
    height, width = images.size(settings.crop)
    return dataclasses.replace(made, height=height, width=width)


if __name__ == "__main__":
    cli.command(main, __doc__)

"""Images from a trained run: a grid, one PNG per seed and, with npz=true, samples.npz (`arr_0`, uint8, NHWC).

    python sample.py ckpt=runs/mnist-tread-XS4-edm
    python sample.py ckpt=runs/mnist-tread-XS4-edm guidance=cfg scale=2.0 seeds=0-9 class_idx=7
    python sample.py ckpt=runs/emoji-tread-XS4-edm prompt="woman firefighter" seeds=0-3      or prompts=FILE, one a line
    accelerate launch sample.py ckpt=... seeds=0-49999              on several processes; a second start continues

An image depends on its seed and its label or prompt alone, whatever the batch size and the number of processes.
"""

import io
import itertools
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import conditions
import data
from checkpoints import config, gallery
from checkpoints.config import Count, Generation, Seeds
from checkpoints.generate import count_calls, generate, progress
from checkpoints.load import Run, build_codec, load_run
from checkpoints.naming import settings_name  # noqa: F401
from conditions import Condition
from data.texts import load_encoder
from system import UserError, cli
from system.files import read_small
from system.processes import start_processes
from system.settings import parse

SHIPPED = Path(__file__).resolve().parent / "assets"
KEPT = 64  # texts that data.path= gives


@dataclass(frozen=True)
class Source:
    """path: a data set whose conditions are drawn, in place of those that the run has kept. text_encoder: where the
    encoder of the run's texts is on this machine."""

    path: str | None = None
    text_encoder: str | None = None

    def check(self, asked: str | None) -> None:
        """Raises UserError where there is nothing that this is the source of. asked: the prompt or the file of prompts,
        if any."""
        if asked is not None and self.path is not None:
            raise UserError(f"prompts and data.path={self.path} both say what to draw; needed: one of them")
        if asked is None and self.text_encoder is not None:
            raise UserError(f"data.text_encoder={self.text_encoder} is for prompts, and there are none; needed: both")


@dataclass(frozen=True)
class Sampling(Generation):
    """The keys of configs/sample.yaml."""

    ckpt: str | None = None
    seeds: Seeds = "0-19"
    labels: Literal["balanced", "random"] | Count = "balanced"
    class_idx: Count | str | None = None
    prompt: str | None = None
    prompts: str | None = None
    compile: Literal["blocks", "off"] = "off"
    out: str | None = None
    npz: bool = False
    codec: config.Codec = config.Codec()
    sampler: dict[str, Any] | None = None
    data: Source = Source()

    def __post_init__(self):
        super().__post_init__()
        told = {"labels": None if self.labels == "balanced" else self.labels, "class_idx": self.class_idx}
        told |= {"prompt": self.prompt, "prompts": self.prompts}
        if len(given := [f"{key}={value}" for key, value in told.items() if value is not None]) > 1:
            raise UserError(f"{' and '.join(given)} both say what to draw; needed: one of them")
        self.data.check(self.prompt or self.prompts)

    @property
    def rule(self) -> str | int:
        """Which condition a seed has."""
        return self.labels if self.class_idx is None else self.class_idx


def load_given(
    ckpt: str | None, shipped: str, weights: str = "ema", *, precision: str = "fp32", compile: str = "off"
) -> Run:
    """The run of `ckpt`; None = assets/<shipped>, which writes to runs/<shipped>."""
    run = load_run(ckpt or SHIPPED / shipped, weights, precision=precision, compile=compile)
    if ckpt is None:
        run.folder = Path("runs") / shipped
    return run


def adjust(run: Run, settings: Any) -> None:
    """Puts a command's sampler, codec (path, scale, bias) and source of conditions in the place of the run's own.

    settings: with the fields sampler, codec and data, as Sampling has them. Files of other projects do not say their
    VAE. Raises UserError for a codec that cannot be.
    """
    given = {key: value for key, value in asdict(settings.codec).items() if value is not None}
    codec = run.settings.data.codec | ({"_target_": "autoencoder.VAECodec"} if "path" in given else {}) | given
    if given:
        run.codec = build_codec(codec, run.device)
    sampler = settings.sampler or run.settings.sampler
    run.settings = replace(run.settings, sampler=sampler, data=replace(run.settings.data, codec=codec))
    if settings.data.path is not None:
        if (kind := conditions.kind_of(run.model.null_condition)) != "text":
            found = f"data.path={settings.data.path} is for its texts, and the network takes {conditions.KINDS[kind]}"
            raise UserError(f"{found}; needed: without data.path")
        split = "val" if data.has_split(settings.data.path, "val") else "train"
        kept = open_conditions(run, settings.data.path, split).conditions(KEPT)
        conditions.check(kept, run.model.null_condition)
        run.pool = conditions.pool(run.model.null_condition, kept)


def open_conditions(run: Run, path: str, split: str) -> data.Latents:
    """A data set whose conditions a run's network is to be given. Raises UserError for texts of another encoder."""
    latents = data.open_latents(path, split=split, condition=run.settings.data.condition)
    found, wanted = latents.meta.get("text_sha256"), run.settings.data.text_sha256
    if latents.condition == "text" and found != wanted:
        raise UserError(f"{path} has texts of an encoder with the sha256 {found}; the run's has {wanted}")
    latents.text_stats = run.text_stats  # the network knows no others
    return latents


def read_prompts(path: str) -> list[str]:
    """The lines of a file, without empty ones. Raises UserError where there are none, and where they are no text."""
    try:
        text = io.StringIO(read_small(Path(path)).decode("utf-8-sig"), newline=None)  # ends of lines of any system
        lines = [" ".join(line.split()) for line in text]
    except UnicodeDecodeError:
        raise UserError(f"prompts={path} is no UTF-8 text; needed: a file with a prompt in each line") from None
    if not any(lines):
        raise UserError(f"prompts={path} is empty; needed: a file with a prompt in each line")
    return list(filter(None, lines))


def encode_prompts(run: Run, prompts: Sequence[str], text_encoder: str | None = None) -> conditions.Text:
    """The condition of each prompt, by the encoder that the run's texts were made with, or its copy `text_encoder`.

    Too long a prompt is cut, with a warning. Raises UserError where the network takes no texts, and for no encoder, or
    another than the run's.
    """
    null, wanted = run.model.null_condition, run.settings.data
    if (kind := conditions.kind_of(null)) != "text":
        labels = "; needed: class_idx=, or labels=" if kind == "class" else "; needed: seeds= alone"
        raise UserError(f"a prompt is given, and the network takes {conditions.KINDS[kind]}{labels}")
    if (name := text_encoder or wanted.text_encoder) is None:
        raise UserError(f"{run.checkpoint} does not say what made its texts; needed: data.text_encoder=NAME or FOLDER")
    text = load_encoder(name, wanted.text_sha256, wanted.text_length, run.device)(prompts)
    text = conditions.normalize(text, run.text_stats)
    conditions.check(text, null)
    return text


def class_number(run: Run, class_idx: int | str) -> int:
    """The number of a class, which the run's settings may name. Raises UserError for other names, and for networks that
    take no class."""
    if (kind := conditions.kind_of(run.model.null_condition)) != "class":
        texts = "labels=balanced, random or the number of a text, or prompt=" if kind == "text" else "seeds= alone"
        raise UserError(f"class_idx={class_idx}, and the network takes {conditions.KINDS[kind]}; needed: {texts}")
    if isinstance(class_idx, int):
        return class_idx
    names = run.settings.data.classes or ()
    if class_idx not in names:
        told = f"one of {', '.join(names)}"[:300] if names else f"a number: {run.checkpoint} names no classes"
        raise UserError(f"class_idx={class_idx}; needed: {told}")
    return names.index(class_idx)


def what_to_draw(run: Run, settings: Sampling) -> tuple[list[gallery.Key], Condition, list[str]]:
    """The images' keys, their conditions, and the prompts if there are any: one after another, each with all seeds."""
    seeds = settings.all_seeds
    prompts = [settings.prompt] if settings.prompt else read_prompts(settings.prompts) if settings.prompts else []
    if not prompts:
        return seeds, conditions.choose(settings.rule, seeds, run.pool), prompts
    texts = encode_prompts(run, prompts, settings.data.text_encoder)
    keys = [(number, seed) for number in range(len(prompts)) for seed in seeds]
    return keys, conditions.rows(texts, [number for number, _ in keys]), prompts


def settings_of(run: Run, settings: Sampling, prompts: Sequence[str] = ()) -> dict:
    """Everything that an image depends on besides its seed, and its prompt among these."""
    given = {f"codec_{key}": value for key, value in asdict(settings.codec).items() if value is not None}
    return {
        "checkpoint_sha256": run.sha256, "step": run.step, "weights": run.weights, "precision": run.precision,
        "compile": run.compile, "labels": settings.rule, **asdict(settings.alone), "sampler": run.settings.sampler,
        **given, **({} if settings.data.path is None else {"data": settings.data.path}),
        **({"prompts": list(prompts), "text_sha256": run.settings.data.text_sha256} if prompts else {}),
    }  # fmt: skip


def default_folder(run: Run, settings: Sampling) -> Path:
    """<run folder>/samples/step_<step>-<settings>: the settings that differ from their defaults."""
    named = replace(settings, precision="auto" if run.precision == "fp32" else run.precision, compile=run.compile)
    name = settings_name(named, ("ckpt", "out", "npz", "seeds", "batch_size"))
    return run.place("samples") / f"step_{run.step:07d}-{name}"


def main(overrides: Sequence[str], *, shipped: str = "mnist-tread-edm") -> None:
    """The command line. shipped: the run in assets/ that is sampled where no ckpt is given."""
    settings, dist = parse(Sampling, cli.load_config("sample", overrides)), start_processes()
    precision = settings.precision
    if precision == "auto":  # an interrupted call may go on where it would be chosen otherwise
        precision = gallery.begun_precision(settings.out) or "auto"
    run = load_given(settings.ckpt, shipped, settings.weights, precision=precision, compile=settings.compile)
    adjust(run, settings)
    if settings.steps is not None:
        run.settings = replace(run.settings, sampler=run.settings.sampler | {"num_steps": settings.steps})
    if settings.class_idx is not None:
        settings = replace(settings, class_idx=class_number(run, settings.class_idx))
    keys, condition, prompts = what_to_draw(run, settings)
    seeds = [seed for _, seed in keys] if prompts else keys
    out = Path(settings.out) if settings.out else default_folder(run, settings)
    manifest = gallery.reserve(out, settings_of(run, settings, prompts)) | {"checkpoint": str(run.checkpoint)}

    missing = gallery.missing(out, keys)
    rows = missing[dist.process_index :: dist.num_processes]
    asked = conditions.rows(condition, rows)
    batches = generate(run, settings.alone, [seeds[i] for i in rows], asked, settings.batch_size)
    if dist.is_main_process:
        print(f"{run.checkpoint}, {run.weights} weights of step {run.step}: {len(missing)} of {len(keys)} to make")
    started = time.time()
    with progress(run, settings.alone, len(rows)):
        first = list(itertools.islice(batches, 1))  # what cannot be sampled fails here, before the folder is claimed
        dist.wait_for_everyone()  # every process lists what is missing before the first image is written
        if dist.is_main_process:
            gallery.write_manifest(out, manifest)
        dist.wait_for_everyone()  # no image is there without the settings that it was made with
        gallery.store(out, [keys[i] for i in rows], itertools.chain(first, batches))
    dist.wait_for_everyone()
    if not dist.is_main_process:
        return
    calls, macs = count_calls(run, settings.alone)
    manifest |= {"network_calls": calls, "gmacs_per_image": macs / 1e9}
    if missing:
        seconds = time.time() - started
        pace = {"seconds": round(seconds, 3), "images_per_s": round(len(missing) / seconds, 3)}
        manifest |= {"processes": dist.num_processes, **pace}
    if settings.npz:
        gallery.write_npz(out, keys)
    named, each = gallery.class_names(condition, run.settings.data.classes), 1
    if prompts:
        named, each = [prompts[number] for number, _ in keys], len(settings.all_seeds)
    gallery.finish(out, keys, manifest | {"n": len(keys), "seeds": str(settings.seeds)}, named, each)
    pace = f", {manifest['images_per_s']:.1f} images/s" if missing else ""
    print(f"{len(keys)} images, {calls} network calls and {macs / 1e9:.1f} GMACs each{pace}")
    print(f"{out}: grid.png, images/, {gallery.MANIFEST}{', samples.npz' if settings.npz else ''}")
    if (name := run.settings.data.name) in ("mnist", "fashion"):  # whose scores need nothing else
        ckpt = shlex.quote(str(settings.ckpt or run.checkpoint))
        print(f"next       python fid.py calc ckpt={ckpt} extractor={name}")


if __name__ == "__main__":
    cli.command(main, __doc__)

"""Images from a trained run: a grid, one PNG per seed and, with npz=true, samples.npz (`arr_0`, uint8, NHWC).

    python sample.py ckpt=runs/mnist-tread-XS4-edm
    python sample.py ckpt=runs/mnist-tread-XS4-edm guidance=cfg scale=2.0 seeds=0-9 class_idx=7
    accelerate launch sample.py ckpt=... seeds=0-49999              on several processes; a second start continues

An image depends on its seed and label alone: its noise, label and routing masks come from generators keyed by the seed,
whatever the batch size and the number of processes.
"""

import hashlib
import itertools
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from checkpoints import gallery
from checkpoints.load import Run, load_run
from checkpoints.run_folder import complete_checkpoints, step_of
from guidance import Branch, Guidance, check_networks, guidance_from, guide, pair
from randomness import normal, seeded_generator, uniform
from solvers import flow_time, solve
from system import UserError, cli
from system.instantiate import instantiate
from system.launchers import own_process
from system.processes import start_processes

SHIPPED = Path(__file__).resolve().parent / "assets"


def load_given(
    ckpt: str | None, shipped: str, weights: str = "ema", *, precision: str = "fp32", compile: str = "off"
) -> Run:
    """The run of `ckpt`; None = assets/<shipped>, which writes to runs/<shipped>."""
    run = load_run(ckpt or SHIPPED / shipped, weights, precision=precision, compile=compile)
    if ckpt is None:
        run.folder = Path("runs") / shipped
    return run


load_cached = lru_cache(maxsize=1)(load_run)  # evaluation generates batch by batch


def load_weak(run: Run, guidance: Guidance) -> Run:
    """The weak branch's run: `run` itself, or that of weak_ckpt. Raises UserError where the two do not fit."""
    if not guidance.on or guidance.weak_ckpt is None:
        return run
    ckpt = guidance.weak_ckpt
    if ckpt == "earliest":
        kept = complete_checkpoints(run.folder) if run.folder else []
        if not kept or step_of(kept[0]) >= run.step:
            raise UserError(
                f"step {run.step} of {run.folder} has no earlier checkpoint beside it for the weak branch; "
                f"needed: weak_ckpt="
            )
        ckpt = kept[0]
    weak = load_cached(str(ckpt), run.weights, device=run.device, precision=run.precision, compile=run.compile)
    for what, wanted, found in zip(("latents (C, h, w)", "classes", "predictions"), interface(run), interface(weak)):
        if wanted != found:
            raise UserError(f"weak_ckpt={ckpt} is for other {what}: {found}; needed: {wanted}, as in the run")
    return weak


def interface(run: Run) -> tuple:
    """What two networks must have in common for one to guide the other."""
    model = run.model
    return (model.in_channels, model.input_size, model.input_size), model.num_classes, run.objective.predicts


def set_codec(run: Run, settings: DictConfig) -> None:
    """Replaces what is given of the run's codec: path, and scale and bias, one number or one per channel.

    Files of other projects do not say their VAE.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    if given:
        target = {"_target_": "autoencoder.VAECodec"} if "path" in given else {}
        run.config.data.codec = OmegaConf.merge(run.config.data.codec, target, given)
        run.codec = instantiate(run.config.data.codec).to(run.device)


def generate(
    run: Run,
    guidance: Guidance,
    seeds: Sequence[int],
    labels: torch.Tensor | None = None,  # (n,) int64; None = drawn from the seeds
    batch_size: int = 64,
    *,
    steps: int | None = None,  # None = the run's own
) -> Iterator[torch.Tensor]:
    """Images of the given seeds, in order: batches of uint8 (B, 3, H, W) on the run's device.

    The sampler is run.config.sampler (configs/sampler/). Raises UserError, before the first batch, for guidance that
    the model was not trained for, for a weak branch that does not fit, and for labels outside the classes.
    """
    weak = load_weak(run, guidance)
    labels = labels_for(run.num_classes, seeds, "random") if labels is None else labels
    check_request(run, guidance, labels, batch_size, weak)
    run.codec.check(run.model.in_channels)  # or decoding would fail after all steps
    sampler = OmegaConf.to_container(run.config.sampler) | ({} if steps is None else {"num_steps": steps})
    batches = [slice(start, start + batch_size) for start in range(0, len(seeds), batch_size)]
    return (run.codec.decode(generate_latents(run, guidance, seeds[b], labels[b], sampler, weak=weak)) for b in batches)


def check_request(run: Run, guidance: Guidance, labels: torch.Tensor, batch_size: int, weak: Run | None = None) -> None:
    """Raises UserError for what cannot be drawn. weak: the weak branch's run; None = it is loaded here.

    A weak branch of the run's earliest checkpoint, of which there may be none yet, counts as one of the same network.
    """
    if weak is None:
        weak = run if guidance.weak_ckpt == "earliest" else load_weak(run, guidance)
    check_networks(guidance, run.model, weak.model)
    if len(labels) and not 0 <= labels.min() <= labels.max() < run.num_classes:
        raise UserError(f"labels {labels.min()}..{labels.max()}; the model has classes 0..{run.num_classes - 1}")
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}; needed: at least 1")
    if (guidance.cfg_channels or 0) > run.model.in_channels:
        raise UserError(f"cfg_channels {guidance.cfg_channels}; the latents have {run.model.in_channels}")


@torch.no_grad()
def generate_latents(
    run: Run, guidance: Guidance, seeds: Sequence[int], labels: torch.Tensor, sampler: dict, *, weak: Run | None = None
) -> torch.Tensor:
    """One batch: seeds (B), labels (B,) -> latents (B, C, h, w) float32. weak: the weak branch's run; None = `run`."""
    weak = weak or run
    strong_branch, weak_branch = branches(run, weak, guidance, seeds, labels.to(run.device))
    predict = guide(
        strong_branch, weak_branch, partial(setting, run, guidance, "scale"), guidance.interval,
        both=pair(strong_branch, weak_branch), channels=guidance.cfg_channels or run.model.in_channels,
    )  # fmt: skip
    size = run.model.input_size
    noise = normal((len(seeds), run.model.in_channels, size, size), streams(seeds, "noise"), device=run.device)
    for counter in (run, weak):
        counter.calls = counter.macs = 0
    latents = solve(run.objective, predict, noise, sampler, streams(seeds, "churn"))
    if weak is not run:
        run.calls, run.macs = run.calls + weak.calls, run.macs + weak.macs
    run.calls, run.macs = run.calls // len(seeds), run.macs // len(seeds)
    return latents


def branches(run: Run, weak: Run, guidance: Guidance, seeds: Sequence[int], y: torch.Tensor) -> tuple[Branch, Branch]:
    """The strong and the weak branch of the guidance rule for one batch: seeds (B), y (B,)."""
    draws = streams(seeds, "weak label")
    weak_label = {
        "same": lambda: y,
        "none": lambda: torch.full_like(y, run.num_classes),
        "random": lambda: (uniform(y.shape, draws, device=y.device) * run.num_classes).long(),  # new in each call
    }[guidance.weak_label]
    ratios = [partial(setting, run, guidance, name) for name in ("gamma_strong", "gamma_weak")]
    return (
        Branch(run.predict, lambda: y, ratios[0], streams(seeds, "strong")),
        Branch(weak.predict, weak_label, ratios[1], streams(seeds, "weak"), guidance.weak_path == "drop"),
    )


def setting(run: Run, guidance: Guidance, name: str, t: torch.Tensor) -> float:
    """A guidance setting at the run's own time t."""
    return guidance.at(name, flow_time(t, run.objective.predicts))


def streams(seeds: Sequence[int], purpose: str) -> list[torch.Generator]:
    """One generator per image, on the CPU, so that a seed gives the same image on every device."""
    return [seeded_generator("image", int(seed), purpose) for seed in seeds]


def labels_for(num_classes: int, seeds: Sequence[int], rule: str | int) -> torch.Tensor:
    """Labels (n,) int64: "balanced" = seed modulo classes, "random" = drawn from the seed, a number = that class."""
    if rule == "balanced":
        return torch.tensor([seed % num_classes for seed in seeds], dtype=torch.int64)
    if rule == "random":
        draws = [torch.randint(num_classes, (), generator=g) for g in streams(seeds, "label")]
        return torch.stack(draws) if draws else torch.zeros(0, dtype=torch.int64)
    if not str(rule).isdigit() or int(rule) >= num_classes:
        raise UserError(f"label {rule}; needed: balanced, random or a class 0..{num_classes - 1}")
    return torch.full((len(seeds),), int(rule))


def parse_seeds(seeds: str | int | Sequence) -> list[int]:
    """ "0-3" or ["0-3", 7] -> [0, 1, 2, 3, 7]. Raises UserError."""
    parsed = []
    for part in seeds if isinstance(seeds, Sequence) and not isinstance(seeds, str) else str(seeds).split(","):
        first, _, last = str(part).strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()) or int(last or first) < int(first):
            raise UserError(f"seeds={seeds}; needed: numbers and ranges, such as 0-63 or [1,5,9-12]")
        parsed += range(int(first), int(last or first) + 1)
    return parsed


def settings_name(guidance: Guidance, steps: int | None) -> str:
    """The settings as a folder name: unguided, cfg1.5, sparse1.5-0.2-0.7, auto1.5-weak_earliest, ..."""

    def path(name: str) -> str:
        return "to".join(f"{value:g}" for value in dict.fromkeys(guidance.ends(name)))

    if not guidance.on:
        parts = [f"routed{path('gamma_strong')}" if guidance.routed else "unguided"]
    else:
        method = {"none": "cfg", "random": "icg", "same": "sparse" if guidance.routed else "auto"}[guidance.weak_label]
        method = f"sparse{method}" if guidance.routed and guidance.weak_label != "same" else method
        parts = [method + path("scale")]
        parts += [path("gamma_strong"), path("gamma_weak")] if guidance.routed else []
        parts += [f"weak_{re.sub(r'[^A-Za-z0-9.]+', '_', guidance.weak_ckpt)}"] if guidance.weak_ckpt else []
        parts += ["pathdrop"] if guidance.weak_path else []
        parts += ["t{:g}-{:g}".format(*guidance.interval)] if guidance.interval else []
        parts += [f"channels{guidance.cfg_channels}"] if guidance.cfg_channels else []
    return "-".join(parts + ([] if steps is None else [f"steps{steps}"]))


def default_folder(run: Run, guidance: Guidance, config: DictConfig) -> Path:
    """<run folder>/samples/<step>-<settings>; gallery.reserve refuses what the name does not distinguish."""
    parts = [f"step_{run.step:07d}", settings_name(guidance, config.steps)]
    parts += [config.weights] if config.weights != "ema" else []
    parts += [run.precision] if run.precision != "fp32" else []
    parts += ["compiled"] if run.compile != "off" else []
    parts += [config.labels] if config.class_idx is None and config.labels != "balanced" else []
    parts += [f"class{config.class_idx}"] if config.class_idx is not None else []
    parts += [sampler_name(config.sampler)] if config.get("sampler") is not None else []
    parts += [f"codec_{digest(given_codec(config.codec))}"] if given_codec(config.codec) else []
    return run.folder / "samples" / "-".join(str(part) for part in parts)


def sampler_name(sampler: DictConfig) -> str:
    """<prediction>_<solver>_<digest of all settings>."""
    return f"{sampler.takes}_{sampler.solver}_{digest(sampler)}"


def digest(settings: DictConfig | dict) -> str:
    return hashlib.sha256(OmegaConf.to_yaml(settings, sort_keys=True).encode()).hexdigest()[:6]


def settings_of(run: Run, guidance: Guidance, rule: str | int) -> dict:
    """Everything that an image depends on besides its seed."""
    return {
        "checkpoint_sha256": run.sha256, "step": run.step, "weights": run.weights, "precision": run.precision,
        "compile": run.compile, "labels": rule,
        **asdict(guidance), "sampler": OmegaConf.to_container(run.config.sampler),
    }  # fmt: skip


def given_codec(settings: DictConfig) -> dict:
    return {f"codec_{key}": value for key, value in OmegaConf.to_container(settings).items() if value is not None}


def main(overrides: Sequence[str], *, shipped: str = "mnist-tread-edm") -> None:
    """The command line. shipped: the run in assets/ that is sampled where no ckpt is given."""
    config, dist = cli.load_config("sample", overrides), start_processes()
    seeds, guidance = parse_seeds(config.seeds), guidance_from(config)
    precision = config.precision
    if precision == "auto":  # an interrupted call may go on where it would be chosen otherwise
        precision = gallery.begun_precision(config.out) or "auto"
    run = load_given(config.ckpt, shipped, config.weights, precision=precision, compile=config.compile)
    run.config.sampler = config.get("sampler") or run.config.sampler
    set_codec(run, config.codec)
    if config.steps is not None:
        run.config.sampler.num_steps = config.steps
    rule = config.labels if config.class_idx is None else config.class_idx
    settings = settings_of(run, guidance, rule) | given_codec(config.codec)
    labels = labels_for(run.num_classes, seeds, rule)
    out = Path(config.out) if config.out else default_folder(run, guidance, config)
    manifest = gallery.reserve(out, settings) | {"checkpoint": str(run.checkpoint)}

    missing = gallery.missing(out, seeds)
    rows = missing[dist.process_index :: dist.num_processes]
    batches = generate(run, guidance, [seeds[i] for i in rows], labels[rows], config.batch_size)
    started = time.time()
    first = list(itertools.islice(batches, 1))  # what cannot be sampled fails here, before the folder is claimed
    dist.wait_for_everyone()  # every process lists what is missing before the first image is written
    if dist.is_main_process:
        print(f"{run.checkpoint}, {run.weights} weights of step {run.step}: {len(missing)} of {len(seeds)} to make")
        gallery.write_manifest(out, manifest)
    dist.wait_for_everyone()  # no image is there without the settings that it was made with
    images = itertools.chain(first, batches)
    gallery.store(out, [seeds[i] for i in rows], images, show=dist.is_main_process and sys.stderr.isatty())
    dist.wait_for_everyone()
    if not dist.is_main_process:
        return
    if missing:
        seconds = time.time() - started
        manifest |= {
            "network_calls": run.calls, "gmacs_per_image": run.macs / 1e9, "processes": dist.num_processes,
            "seconds": round(seconds, 3), "images_per_s": round(len(missing) / seconds, 3),
        }  # fmt: skip
    if config.npz:
        gallery.write_npz(out, seeds)
    gallery.finish(out, seeds, manifest | {"n": len(seeds), "seeds": str(config.seeds)})
    cost = f"{manifest['network_calls']} network calls and {manifest['gmacs_per_image']:.1f} GMACs each"
    print(f"{len(seeds)} images, {cost}, {manifest['images_per_s']:.1f} images/s: {out / 'grid.png'}")


if __name__ == "__main__":
    with cli.user_errors():
        own_process()
        main(sys.argv[1:])

"""Images from a trained run: a grid, one PNG a seed, and samples.npz (`arr_0`, uint8, NHWC).

    python sample.py ckpt=runs/mnist-tread-edm
    python sample.py ckpt=runs/mnist-tread-edm guidance=cfg scale=2.0 seeds=0-9 labels=7

An image depends on its seed and label alone: noise, label and routing masks come from streams keyed by the seed, one image
at a time, whatever the batch size.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import hydra
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torchvision.utils import make_grid
from tqdm import tqdm

import checkpoint
import cli
from guidance import Guidance, guide
from processes import start_processes
from randomness import normal, seeded_generator
from routing_module import Routing

# What a config that came with a checkpoint may build: ours, and nothing else.
ALLOWED_TARGETS = {"dit.build", "edm.EDM", "rf.RectifiedFlow", "autoencoder.PixelCodec", "autoencoder.VAECodec"}


@dataclass
class Run:
    """A network ready to sample: what `load_run` gives, or what training shows of itself."""

    model: torch.nn.Module
    objective: object
    codec: object
    config: DictConfig                              # resolved
    device: torch.device
    precision: str = "fp32"                         # fp32 or bf16 (autocast); the sampler's own state is float64
    step: int = 0
    weights: str = "ema"
    folder: Path | None = None                      # the run folder
    checkpoint: Path | None = None
    calls: int = field(default=0, init=False)       # network calls for one image of the last batch
    macs: int = field(default=0, init=False)        # and their multiply-adds

    @property
    def num_classes(self) -> int:
        return self.model.num_classes

    @property
    def sha256(self) -> str:
        """Of the weights file that was loaded."""
        return checkpoint.sha256(self.checkpoint / checkpoint.WEIGHTS_FILES[self.weights])


def load_run(ckpt: str | Path, weights: str = "ema", *, device=None, precision: str = "fp32") -> Run:
    """The network of a run folder or checkpoint folder, with its objective, codec and config.

    weights: "ema" or "raw". device: None = the process's own. Raises ValueError for what is no checkpoint or is damaged.
    """
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision={precision}; needed: fp32 or bf16")
    path = checkpoint.find(ckpt)
    checkpoint.verify(path)
    config = OmegaConf.load(path / "config.yaml")
    check_targets(config)
    device = torch.device(device) if device is not None else start_processes().device
    model = instantiate(config.model)
    checkpoint.load_weights(path, model, weights)
    return Run(
        model=model.to(device).eval().requires_grad_(False),
        objective=instantiate(config.objective),
        codec=instantiate(config.data.codec).to(device),
        config=config,
        device=device,
        precision=precision,
        step=checkpoint.step_of(path),
        weights=weights,
        folder=path.parent.parent,
        checkpoint=path,
    )


def instantiate(config: DictConfig):
    """The object that a config's `_target_` names. Raises ValueError for a target that is not one of ours."""
    check_targets(config)
    try:
        return hydra.utils.instantiate(config, _convert_="all")
    except hydra.errors.InstantiationException as error:
        raise error.__cause__ if isinstance(error.__cause__, ValueError) else error


def check_targets(config) -> None:
    """Raises ValueError where a config names anything to build outside ALLOWED_TARGETS."""
    values = OmegaConf.to_container(config, resolve=False) if isinstance(config, DictConfig) else config
    if isinstance(values, dict):
        if "_target_" in values and values["_target_"] not in ALLOWED_TARGETS:
            raise ValueError(f"the config wants to build {values['_target_']!r}; allowed: {', '.join(sorted(ALLOWED_TARGETS))}")
        values = list(values.values())
    for value in values if isinstance(values, list) else ():
        check_targets(value)


def generate(
    run: Run,
    guidance: Guidance,
    seeds: Sequence[int],
    labels: torch.Tensor | None = None,             # (n,) int64; None = drawn from the seeds
    batch_size: int = 64,
    *,
    steps: int | None = None,                       # None = the run's own
) -> Iterator[torch.Tensor]:
    """Images of the given seeds, in order: batches of uint8 (B, 3, H, W) on the run's device.

    Raises ValueError for guidance by routing on a model without routes, and for labels outside the classes.
    """
    if guidance.routed and not run.model.routes:
        raise ValueError("guidance by routing needs a model trained with routes (model=tread); this one has none")
    labels = labels_for(run.num_classes, seeds, "random") if labels is None else labels
    if len(labels) and not 0 <= labels.min() <= labels.max() < run.num_classes:
        raise ValueError(f"labels {labels.min()}..{labels.max()}; the model has classes 0..{run.num_classes - 1}")
    settings = OmegaConf.to_container(run.config.sampler)
    settings |= {"num_steps": steps} if steps is not None else {}
    for start in range(0, len(seeds), batch_size):
        latents = generate_latents(run, guidance, seeds[start : start + batch_size], labels[start : start + batch_size], settings)
        yield run.codec.decode(latents)


@torch.no_grad()
def generate_latents(run: Run, guidance: Guidance, seeds: Sequence[int], labels: torch.Tensor, sampler: dict) -> torch.Tensor:
    """One batch: seeds (B), labels (B,) -> latents (B, C, h, w) float32."""
    model, y = run.model, labels.to(run.device)
    null = torch.full_like(y, model.num_classes)
    noise = normal((len(seeds), model.in_channels, model.input_size, model.input_size), streams(seeds, "noise"), device=run.device)
    run.calls = run.macs = 0

    def branch(name: str, label: torch.Tensor, ratio: float):
        routing = Routing(ratio, streams(seeds, name)) if ratio > 0 else None
        net, macs = partial(model, routing=routing), model.macs(routing)

        def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            run.calls += 1
            run.macs += macs
            with torch.autocast(run.device.type, torch.bfloat16, enabled=run.precision == "bf16"):
                return run.objective.predict(net, x, t, label)

        return predict

    strong = branch("strong", y, guidance.gamma_strong)
    weak = branch("weak", y if guidance.weak_label == "same" else null, guidance.gamma_weak)
    predict = guide(strong, weak, guidance.scale, guidance.interval)
    stochastic = {"generators": streams(seeds, "churn")} if sampler.get("S_churn", 0) > 0 else {}
    return run.objective.sample(predict, noise, **sampler, **stochastic)


def streams(seeds: Sequence[int], purpose: str) -> list[torch.Generator]:
    """A generator for each image, on the CPU, so that a seed means the same image on every device."""
    return [seeded_generator("image", int(seed), purpose) for seed in seeds]


def labels_for(num_classes: int, seeds: Sequence[int], rule: str | int) -> torch.Tensor:
    """Labels (n,) int64 for seeds: "balanced" = seed modulo classes, "random" = drawn from each seed, a number = that class."""
    if rule == "balanced":
        return torch.tensor([seed % num_classes for seed in seeds], dtype=torch.int64)
    if rule == "random":
        draws = [torch.randint(num_classes, (), generator=g) for g in streams(seeds, "label")]
        return torch.stack(draws) if draws else torch.zeros(0, dtype=torch.int64)
    if not str(rule).isdigit() or int(rule) >= num_classes:
        raise ValueError(f"labels={rule}; needed: balanced, random or a class 0..{num_classes - 1}")
    return torch.full((len(seeds),), int(rule))


def parse_seeds(text: str | int) -> list[int]:
    """"0-3,7" -> [0, 1, 2, 3, 7]. Raises ValueError."""
    seeds = []
    for part in str(text).split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()) or int(last or first) < int(first):
            raise ValueError(f"seeds={text}; needed: numbers and ranges such as 0-63 or 1,5,9-12")
        seeds += range(int(first), int(last or first) + 1)
    return seeds


def guidance_from(config: DictConfig) -> Guidance:
    """The five guidance keys of a config, checked."""
    interval = None if config.interval is None else tuple(float(t) for t in config.interval)
    return Guidance(config.scale, interval, config.gamma_strong, config.gamma_weak, config.weak_label)


def save_grid(images: torch.Tensor, path: Path, columns: int) -> None:
    """uint8 (n, 3, H, W) => one PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = make_grid(images.cpu(), nrow=columns, padding=2)  # (3, H', W')
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path)


def main(overrides: Sequence[str], preset: str = "none", objective: str | None = None) -> None:
    """The command line. `objective` refuses runs of another one."""
    config = cli.load_config("sample", [f"guidance={preset}", *overrides])
    seeds, guidance = parse_seeds(config.seeds), guidance_from(config)
    run = load_run(config.ckpt, config.weights, precision=config.precision)
    if objective is not None and run.config.objective._target_ != objective:
        raise ValueError(f"{config.ckpt} was trained with {run.config.objective._target_}; python sample.py samples it")
    labels = labels_for(run.num_classes, seeds, config.labels)
    out = Path(config.out) if config.out else run.folder / "samples" / f"step_{run.step:07d}-{settings_name(guidance, config.steps)}"
    (out / "images").mkdir(parents=True, exist_ok=True)

    started, images = time.time(), []
    progress = tqdm(total=len(seeds), unit="img", desc="sampling", disable=not sys.stderr.isatty())
    for batch in generate(run, guidance, seeds, labels, config.batch_size, steps=config.steps):
        images.append(batch.cpu())
        progress.update(len(batch))
    progress.close()
    seconds, images = time.time() - started, torch.cat(images)

    for seed, image in zip(seeds, images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(out / "images" / f"{seed:06d}.png")
    np.savez(out / "samples.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    save_grid(images[:400], out / "grid.png", columns=10 if len(images) <= 100 else 20)
    manifest = {
        **OmegaConf.to_container(config),
        "checkpoint": str(run.checkpoint), "checkpoint_sha256": run.sha256, "step": run.step, "n": len(images),
        "sampler": {**OmegaConf.to_container(run.config.sampler), **({"num_steps": config.steps} if config.steps else {})},
        "network_calls": run.calls, "gmacs_per_image": run.macs / 1e9,
        "seconds": round(seconds, 3), "images_per_s": round(len(images) / seconds, 3),
    }  # fmt: skip
    (out / "samples.json").write_text(json.dumps(manifest, indent=2) + "\n")
    print(
        f"{len(images)} images, {run.calls} network calls and {run.macs / 1e9:.1f} GMACs each, "
        f"{len(images) / seconds:.1f} images/s: {out / 'grid.png'}"
    )


def settings_name(guidance: Guidance, steps: int | None) -> str:
    """A folder name that says what was set: unguided, cfg1.5, sparse1.5-0.2-0.7, ..."""
    if guidance.scale == 1:
        name = "unguided" if not guidance.gamma_strong else f"routed{guidance.gamma_strong:g}"
    elif guidance.routed:
        name = f"{'sparse' if guidance.weak_label == 'same' else 'sparsecfg'}{guidance.scale:g}-{guidance.gamma_strong:g}-{guidance.gamma_weak:g}"
    else:
        name = f"cfg{guidance.scale:g}"
    interval = "" if guidance.interval is None else "-t{:g}-{:g}".format(*guidance.interval)
    return name + interval + ("" if steps is None else f"-steps{steps}")


if __name__ == "__main__":
    with cli.user_errors():
        main(sys.argv[1:])

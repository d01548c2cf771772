"""Images of a run. An image depends on its seed and condition alone: its noise, condition and routing masks come from
generators keyed by the seed, whatever the batch size and the number of processes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial

import torch
from tqdm import tqdm

import conditions
from checkpoints.load import Run, load_run
from checkpoints.run_folder import complete_checkpoints, step_of
from contracts import Condition
from guidance import Branch, Guidance, check_networks, guide, pair
from randomness import normal, seeded_generator
from solvers import flow_time, solve
from system import UserError, warn
from system.processes import start_processes

load_cached = lru_cache(maxsize=1)(load_run)  # evaluation generates batch by batch


def load_weak(run: Run, guidance: Guidance) -> Run:
    """The weak branch's run: `run` itself, or that of weak_ckpt. Raises UserError where the two do not fit."""
    if not guidance.on or guidance.weak_ckpt is None:
        return run
    ckpt = guidance.weak_ckpt
    if ckpt == "earliest":
        kept = complete_checkpoints(run.folder) if run.folder else []
        if not kept or step_of(kept[0]) >= run.step:
            found = f"step {run.step} of {run.folder} has no earlier checkpoint beside it"
            raise UserError(f"{found} for the weak branch; needed: weak_ckpt=")
        ckpt = kept[0]
    weak = load_cached(str(ckpt), run.weights, device=run.device, precision=run.precision, compile=run.compile)
    found, needed = ((*each.model.latent_shape, each.objective.predicts) for each in (weak, run))
    encoders = {each.settings.data.text_sha256 for each in (weak, run)} - {None}
    alike = len(encoders) < 2 and conditions.alike(run.model.null_condition, weak.model.null_condition)
    if found != needed or not alike:
        what = f"latents, predictions {found}, conditions or text encoder"
        raise UserError(f"weak_ckpt={ckpt} is for other {what}; needed: those of the run, {needed}")
    return weak


def generate(
    run: Run,
    guidance: Guidance,
    seeds: Sequence[int],
    labels: Condition | Sequence[int] = None,  # of each seed; None = drawn from the seeds
    batch_size: int = 64,
    *,
    steps: int | None = None,  # None = the run's own
) -> Iterator[torch.Tensor]:
    """Images of the given seeds, in order: batches of uint8 (B, 3, H, W) on the run's device.

    labels: class labels (n,), or another condition that the network takes. Raises UserError, before the first batch,
    for what `check_request` refuses, and where there are not as many as seeds.
    """
    weak = load_weak(run, guidance)
    given = labels if labels is None or isinstance(labels, conditions.Text) else torch.as_tensor(labels)
    condition = conditions.choose("random", seeds, run.pool) if given is None else given
    if conditions.size(condition) not in (None, len(seeds)):
        raise UserError(f"{conditions.size(condition)} labels for {len(seeds)} seeds; needed: as many")
    check_request(run, guidance, condition, weak)
    run.codec.check(run.model.latent_shape[0])  # or decoding would fail after all steps
    sampler = sampler_of(run, steps)
    batches = [slice(start, start + batch_size) for start in range(0, len(seeds), batch_size)]
    latents = (generate_latents(run, guidance, seeds[b], conditions.rows(condition, b), sampler, weak) for b in batches)
    return (run.codec.decode(finite(run, batch)) for batch in latents)


@contextmanager
def progress(run: Run, guidance: Guidance, count: int, steps: int | None = None) -> Iterator[None]:
    """On a terminal, a bar of the network calls for the images that are drawn inside, which moves from the first on."""
    hidden = None if start_processes().is_main_process else True  # None = shown on terminals
    calls, _ = count_calls(run, guidance, steps)
    with tqdm(total=calls * count, unit="call", desc="sampling", disable=hidden) as bar:
        run.called = bar.update
        try:
            yield
        finally:
            run.called = None


def finite(run: Run, latents: torch.Tensor) -> torch.Tensor:
    """The latents. Raises UserError where some are not finite: they would be decoded to black images."""
    if not latents.isfinite().all():
        found = f"{run.checkpoint or 'this run'}, step {run.step}, samples latents that are not finite"
        raise UserError(f"{found}; needed: a checkpoint from before it diverged, precision=fp32, or other guidance")
    return latents


def sampler_of(run: Run, steps: int | None) -> dict:
    return run.settings.sampler | ({} if steps is None else {"num_steps": steps})


def check_request(run: Run, guidance: Guidance, condition: Condition, weak: Run | None = None) -> None:
    """Raises UserError for what cannot be drawn. weak: the weak branch's run; None = it is loaded here.

    A weak branch of the run's earliest checkpoint, of which there may be none yet, counts as one of the same network.
    """
    if weak is None:
        weak = run if guidance.weak_ckpt == "earliest" else load_weak(run, guidance)
    check_networks(guidance, run.model, weak.model)
    conditions.check(condition, run.model.null_condition)
    if guidance.on and guidance.weak_label != "same" and condition is None:
        raise UserError(f"weak_label={guidance.weak_label}: this network takes no condition; needed: weak_label=same")
    if guidance.on and guidance.weak_label == "none" and not weak.dropout_known:
        warn_once(f"{weak.checkpoint} does not say its label dropout; taken as trained with a null label")
    elif guidance.on and guidance.weak_label == "none" and weak.settings.train.label_dropout == 0:
        found = f"{weak.checkpoint or weak.folder} was never trained with a null label (label_dropout 0)"
        raise UserError(f"weak_label=none: {found}; needed: another guidance, such as icg or sparse")
    if (guidance.cfg_channels or 0) > run.model.latent_shape[0]:
        raise UserError(f"cfg_channels {guidance.cfg_channels}; the latents have {run.model.latent_shape[0]}")
    nothing = lambda x, t: torch.zeros_like(x).repeat(1, 2, 1, 1)
    solve(run.objective, nothing, torch.zeros(1, *run.model.latent_shape), sampler_of(run, None), streams([0], "churn"))


@lru_cache
def warn_once(text: str) -> None:
    if start_processes().is_main_process:
        warn(text)


@torch.no_grad()
def generate_latents(
    run: Run, guidance: Guidance, seeds: Sequence[int], condition: Condition, sampler: dict, weak: Run | None = None
) -> torch.Tensor:
    """One batch: seeds (B), their condition -> latents (B, C, h, w) float32. weak: the weak branch; None = `run`."""
    weak = weak or run
    weak.called = run.called  # both count for a bar, which may have come since the weak one was loaded
    strong_branch, weak_branch = branches(run, weak, guidance, seeds, conditions.to(condition, run.device))
    predict = guide(
        strong_branch, weak_branch, partial(setting, run, guidance, "scale"), guidance.interval,
        both=pair(strong_branch, weak_branch), channels=guidance.cfg_channels or run.model.latent_shape[0],
    )  # fmt: skip
    noise = normal((len(seeds), *run.model.latent_shape), streams(seeds, "noise"), device=run.device)
    return solve(run.objective, predict, noise, sampler, streams(seeds, "churn"))


def count_calls(run: Run, guidance: Guidance, steps: int | None = None) -> tuple[int, int]:
    """(network calls, their multiply-adds) for an image."""
    weak, macs = load_weak(run, guidance), []

    def counted(run: Run) -> Run:
        """The run, its network's calls being noted in place of made."""

        def predict(x, t, condition, routing, internal_scale=1.0) -> torch.Tensor:
            macs.extend([run.model.macs(routing)] * len(x))
            return torch.zeros_like(x).repeat(1, 2, 1, 1)  # as of a network that has learned its variance

        noting = replace(run, device=torch.device("cpu"))
        noting.predict = predict
        return noting

    first = counted(run)
    condition = conditions.repeat(run.model.null_condition, 1, "cpu")
    second = first if weak is run else counted(weak)
    generate_latents(first, guidance, [0], condition, sampler_of(run, steps), second)
    return len(macs), sum(macs)


def branches(
    run: Run, weak: Run, guidance: Guidance, seeds: Sequence[int], condition: Condition
) -> tuple[Branch, Branch]:
    """The strong and the weak branch of the guidance rule for one batch of seeds (B)."""
    draws, null = streams(seeds, "weak label"), run.model.null_condition
    weak_condition = {
        "same": lambda: condition,
        "none": lambda: conditions.repeat(null, len(seeds), run.device),
        "random": lambda: conditions.another(condition, run.pool, draws),  # new in each call
    }[guidance.weak_label]
    internal = () if guidance.internal_scale == 1 else (guidance.internal_scale,)
    ratios = [partial(setting, run, guidance, name) for name in ("gamma_strong", "gamma_weak")]
    return (
        Branch(run.predict, lambda: condition, ratios[0], streams(seeds, "strong"), internal=internal),
        Branch(weak.predict, weak_condition, ratios[1], streams(seeds, "weak"), guidance.weak_path == "drop", internal),
    )


def setting(run: Run, guidance: Guidance, name: str, t: torch.Tensor) -> float:
    """A guidance setting at the run's own time t."""
    return guidance.at(name, flow_time(t, run.objective.predicts))


def streams(seeds: Sequence[int], purpose: str) -> list[torch.Generator]:
    """One generator per image, on the CPU, so that a seed gives the same image on every device."""
    return [seeded_generator("image", int(seed), purpose) for seed in seeds]

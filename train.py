"""Training: `accelerate launch train.py model=tread`, `python train.py`, or `torchrun --nproc_per_node 2 train.py`.

One straight loop: batch, loss, backward, step, EMA, and every few steps a log line, a checkpoint, a validation, a
preview. Every random number comes from a generator keyed by (seed, purpose, step) and drawn for the whole global batch,
so a step is the same on any number of processes, and a checkpoint needs no random state.
"""

import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import hydra
import numpy as np
import torch
from accelerate import PartialState
from omegaconf import DictConfig, OmegaConf
from torch import nn

import checkpoint
import cli
import data
import fid
import scoreboard
import scoring
from compiling import compile_blocks, decide_compile
from cost import cost_table
from features import Extractor
from gallery import save_grid
from loading import Run, instantiate
from logger import Logger
from prepare import (
    BatchPlan,
    State,
    batch_plan,
    build,
    claim_run_folder,
    describe,
    find_resume,
    name_run,
    open_data,
    resolve_config,
    resume,
)  # fmt: skip
from processes import start_processes
from randomness import normal, seeded_generator, uniform
from reference import Reference
from routing_module import Routing
from sample import generate, guidance_from
from stopping import EXIT_NOT_FINITE, EXIT_START_AGAIN, Stopper, roll_call

VAL_BATCH = 50  # fixed, so that the validation noise is the same on any number of processes


@hydra.main(config_path="configs", config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> None:
    with cli.user_errors():  # inside Hydra's job, or Hydra adds lines of its own
        code = train(name_run(cfg))
    if code:
        sys.exit(code)


def train(cfg: DictConfig) -> int:
    """Trains as the config says -> exit code: 0 at the last step, stopping.EXIT_* otherwise. Raises ValueError,
    OSError."""
    dist = start_processes(cfg.train.timeout_s)
    cfg = resolve_config(cfg, dist)
    run_folder = Path(cfg.results_dir) / cfg.run_name
    plan = batch_plan(cfg.train, dist)
    if cfg.train.dry_run:
        return dry_run(cfg, dist, plan)
    resumed = find_resume(cfg, run_folder)
    latents, val_latents = open_data(cfg, dist)
    tools = fid.tools(cfg.eval) if cfg.eval.every else None

    state, objective = build(cfg, dist, new=resumed is None)
    model = state.model
    start_step = resume(resumed, state, cfg, latents) if resumed is not None else 0
    lock = claim_run_folder(run_folder, cfg, start_step) if dist.is_main_process else nullcontext()
    stopper = Stopper(dist, cfg.train.max_hours)
    with lock, contextlib.closing(stopper):
        dist.wait_for_everyone()
        torch.compiler.reset()  # a sweep trains several models in one process
        compiled, why_not = decide_compile(cfg.train.compile, dist.device)
        compile_blocks(model, compiled)
        compile_blocks(state.ema, compiled, dynamic=True)
        if dist.num_processes > 1:
            state.net = wrap(model)
        log = Logger(cfg, run_folder, start_step, dist)
        log.say(describe(cfg, model, latents, plan, resumed, compiled, why_not))
        if dist.is_main_process and (warning := data.scale_warning(latents, objective.sigma_data)):
            log.warn(warning)
        codec = instantiate(cfg.data.codec).to(dist.device)
        view = Run(state.ema, objective, codec, cfg, dist.device, cfg.train.precision, compiled)
        try:
            return run_steps(
                cfg, dist, run_folder, plan, latents, val_latents, state, view, tools, start_step, stopper, log
            )
        except RuntimeError as error:
            if dist.num_processes == 1:
                raise
            missing = roll_call(dist) or "none"
            print(
                f"error: process {dist.process_index} lost the others: {cli.one_line(error)}; not answering: {missing}",
                file=sys.stderr,
            )
            os._exit(1)  # the process group is broken: an orderly exit would wait for it


def dry_run(cfg: DictConfig, dist: PartialState, plan: BatchPlan) -> int:
    """Builds, counts and takes one step on made-up latents; reads no data and writes nothing -> exit code 0."""
    state, objective = build(cfg, dist, new=True)
    if dist.num_processes > 1:
        state.net = wrap(state.model)
    noise = seeded_generator(cfg.seed, "dry run", dist.process_index, device=dist.device)
    shape = (plan.micro_batch_size, cfg.data.channels, cfg.data.input_size, cfg.data.input_size)
    made_up = SimpleNamespace(to_model_input=lambda raw, rows: raw)
    no_label = torch.full(shape[:1], cfg.data.num_classes, device=dist.device)
    batches = ((normal(shape, noise), no_label) for _ in range(plan.accumulation))
    loss, grad_norm = train_step(state, objective, made_up, batches, 1, plan, cfg)
    if dist.is_main_process:
        print(f"model      {cfg.model.size}\n{cost_table(state.model, cfg)}")
        print(
            f"dry run    one step on noise: loss {loss:.4g}, gradient norm {grad_norm:.4g}; "
            "nothing was read or written"
        )
    return 0


def wrap(model: nn.Module) -> nn.Module:
    """DistributedDataParallel: gradients are the only thing that the processes exchange in a step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer releases call broadcast_buffers by another name
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def run_steps(
    cfg: DictConfig, dist: PartialState, run_folder: Path, plan: BatchPlan, latents: data.Latents,
    val_latents: data.Latents, state: State, view: Run, tools: tuple[Extractor, Reference] | None, start_step: int,
    stopper: Stopper, log: Logger,
) -> int:  # fmt: skip
    """The loop -> exit code."""
    batches = iter(
        data.make_loader(
            latents, global_batch_size=plan.global_batch_size, micro_batch_size=plan.micro_batch_size, rank=plan.rank,
            world_size=plan.world_size, seed=cfg.seed, start_step=start_step, num_steps=cfg.train.max_steps,
            num_workers=cfg.data.num_workers, pin_memory=dist.device.type == "cuda",
        )
    )  # fmt: skip
    def look(step: int) -> None:
        """What is due behind a step besides the log and the checkpoint. The save came first."""
        last = step == cfg.train.max_steps
        if every(cfg.train.val_every, step) or (last and cfg.train.val_every):
            with log.pause():
                log.write(step, validation_losses(view, val_latents, cfg, plan))
        if tools and (every(cfg.eval.every, step) or last):
            with log.pause(), log.survive("evaluation"):
                view.step = step
                log.write(step, evaluate(view, run_folder, cfg, *tools))
        if (every(cfg.preview.every, step) or (last and cfg.preview.every)) and dist.is_main_process:
            with log.pause(), log.survive("preview"):
                preview(view, run_folder / "samples" / f"step_{step:07d}.png", cfg.preview)

    if start_step:
        look(start_step)  # the run may have been stopped between its save and this
    for step in range(start_step + 1, cfg.train.max_steps + 1):
        lr = set_learning_rate(state.optimizer, step, cfg.train)
        loss, grad_norm = train_step(state, view.objective, latents, log.timed(batches), step, plan, cfg)
        update_ema(state.ema, state.model, min(cfg.train.ema_decay, (1 + step) / (10 + step)))
        log.add(loss)

        stop = stopper.should_stop(step)
        last = stop or step == cfg.train.max_steps
        if every(cfg.train.log_every, step) or every(cfg.train.save_every, step) or last:
            bad_step = log.train(step, grad_norm, lr, plan, state.guard, cfg.train.max_skipped, len(latents.faults))
            if bad_step:
                dump = dump_bad_step(run_folder, bad_step, latents, plan, cfg) if dist.is_main_process else None
                log.close(
                    f"error: a gradient of step {bad_step} was not finite; nothing was updated; samples in {dump}"
                )
                return EXIT_NOT_FINITE
        if every(cfg.train.check_replicas_every, step) and dist.num_processes > 1:
            check_replicas(state.model, step, dist)
        if every(cfg.train.save_every, step) or last:
            with log.pause():
                save(run_folder, step, state, cfg, latents, dist)
        if stop:
            log.close(f"stopped by {stopper.reason} behind step {step}, saved: the same command goes on from there")
            return EXIT_START_AGAIN
        look(step)
    log.close(f"{run_folder}: trained to step {cfg.train.max_steps}")
    dist.wait_for_everyone()
    return 0


def train_step(
    state: State, objective, latents: data.Latents, batches: Iterator, step: int, plan: BatchPlan, cfg: DictConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step on one global batch -> (mean loss of this process's rows, gradient norm), both () on the
    device.

    The host never waits for the device in here.
    """
    device = state.model.pos_embed.device
    total = torch.zeros((), device=device)
    for micro in range(plan.accumulation):
        raw, y = (tensor.to(device, non_blocking=True) for tensor in next(batches))
        rows = plan.rows(seeded_generator(cfg.seed, "train", step, device=device), micro)
        x = latents.to_model_input(raw, rows)  # (B, C, h, w)
        y = torch.where(uniform(y.shape, rows, device=device) < cfg.train.label_dropout, state.model.num_classes, y)
        net = partial(state.net, routing=Routing(generators=rows))
        last = micro == plan.accumulation - 1
        with nullcontext() if last or plan.world_size == 1 else state.net.no_sync():
            with torch.autocast(device.type, torch.bfloat16, enabled=cfg.train.precision == "bf16"):
                loss = objective.loss(net, x, y, rows).mean() / plan.accumulation
            loss.backward()
        total += loss.detach()
    grad_norm = nn.utils.get_total_norm([p.grad for p in state.model.parameters() if p.grad is not None])
    state.optimizer.grad_scale = (grad_norm / cfg.train.grad_clip).clamp(min=1)  # clips within the fused update
    good = state.guard.check(grad_norm, step)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return torch.where(good, total, 0), grad_norm


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, train: DictConfig) -> float:
    lr = learning_rate(step, train)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def learning_rate(step: int, train: DictConfig) -> float:
    """Of step 1..max_steps: linear warm-up from 0, constant, linear decay to 0 just past the last step."""
    warmup = min(1.0, step / train.warmup_steps) if train.warmup_steps else 1.0
    decay = min(1.0, (train.max_steps + 1 - step) / train.decay_steps) if train.decay_steps else 1.0
    return train.lr * warmup * decay


def every(interval: int | None, step: int) -> bool:
    return bool(interval) and step % interval == 0


@torch.no_grad()
def validation_losses(view: Run, latents: data.Latents, cfg: DictConfig, plan: BatchPlan) -> dict[str, float]:
    """Loss of the EMA weights on fixed samples, noise and labels, dense and as routed in training; means over
    samples."""
    modes = {"val/loss_dense": False} | ({"val/loss_routed": True} if view.model.routes else {})
    n = min(cfg.train.val_samples, len(latents))
    sums = torch.zeros(len(modes), device=view.device)
    for chunk in range(plan.rank * VAL_BATCH, n, plan.world_size * VAL_BATCH):
        raw, y = (tensor.to(view.device) for tensor in latents.read(range(chunk, min(chunk + VAL_BATCH, n))))
        for i, routed in enumerate(modes.values()):
            generator = seeded_generator(cfg.seed, "val", chunk, device=view.device)
            x = latents.to_model_input(raw, generator)
            net = partial(view.model, routing=Routing(generators=generator) if routed else None)
            with torch.autocast(view.device.type, torch.bfloat16, enabled=view.precision == "bf16"):
                sums[i] += view.objective.loss(net, x, y, generator).sum()
    if plan.world_size > 1:
        torch.distributed.all_reduce(sums)
    return {name: total / n for name, total in zip(modes, sums.tolist())}


@torch.no_grad()
def check_replicas(model: nn.Module, step: int, dist: PartialState) -> None:
    """Raises ValueError where the processes' weights are no longer the same, bit for bit."""
    own = torch.stack([p.view(torch.int32).sum(dtype=torch.int64) for p in model.parameters()])  # (parameters,)
    first = own.clone()
    torch.distributed.broadcast(first, 0)
    differs = torch.zeros(dist.num_processes, device=own.device)
    differs[dist.process_index] = (own != first).any()
    torch.distributed.all_reduce(differs)
    ranks = differs.nonzero().flatten().tolist()
    if ranks:
        raise ValueError(
            f"at step {step} the weights of processes {ranks} differ from process 0's: a machine computes wrongly"
        )


def dump_bad_step(run_folder: Path, step: int, latents: data.Latents, plan: BatchPlan, cfg: DictConfig) -> Path:
    """Writes what replays a step: its seed and the keys of its global batch."""
    positions = np.arange((step - 1) * plan.global_batch_size, step * plan.global_batch_size)
    keys = latents.keys(data.Order(len(latents), cfg.seed)(positions))
    path = run_folder / f"nonfinite_step_{step:07d}.json"
    checkpoint.write_text_atomic(path, json.dumps({"step": step, "seed": cfg.seed, "keys": keys}, indent=2) + "\n")
    return path


def evaluate(
    view: Run, run_folder: Path, cfg: DictConfig, extractor: Extractor, reference: Reference
) -> dict[str, float]:
    """Generates and scores images on all processes, as fid.py does -> the log's values; metrics.json has the rest."""
    result = scoring.evaluate(view, cfg.eval, extractor, reference)
    if result:
        scoring.write_metrics(result, run_folder / "eval" / fid.run_name(view, cfg.eval, extractor))
    return {f"eval/{name}": result[name] for name in result if name.startswith(scoreboard.SCORES)}


def preview(view: Run, path: Path, settings: DictConfig) -> None:
    """The grid of samples: EMA weights, the same seeds and labels each time."""
    seeds = range(settings.num_images)
    labels = torch.tensor([seed % view.num_classes for seed in seeds])
    save_grid(torch.cat(list(generate(view, guidance_from(settings), seeds, labels))), path, columns=10)


def save(run_folder: Path, step: int, state: State, cfg: DictConfig, latents: data.Latents, dist: PartialState) -> None:
    if dist.is_main_process:
        for pause in (1, 10, None):  # a full disk or a network file system may recover
            try:
                checkpoint.save(
                    run_folder, step, model=state.model, ema=state.ema, optimizer=state.optimizer,
                    state={"data": latents.fingerprint}, config=OmegaConf.to_yaml(cfg),
                )  # fmt: skip
                break
            except OSError as error:
                if pause is None:
                    raise
                reason = cli.one_line(error)
                print(f"warning: checkpoint of step {step}: {reason}; trying again in {pause} s", file=sys.stderr)
                time.sleep(pause)
        checkpoint.prune(run_folder, cfg.train.keep_last, cfg.train.keep_every)
    dist.wait_for_everyone()


if __name__ == "__main__":
    with cli.user_errors():
        main()

"""Training: `accelerate launch train.py model=tread`, `python train.py`, or `torchrun --nproc_per_node 2 train.py`.

One straight loop: batch, loss, backward, step, EMA, and every few steps a log line, a checkpoint, a validation, a preview.
Every random number comes from a generator keyed by (seed, purpose, step) and drawn for the whole global batch, so a step is
the same on any number of processes, and a checkpoint needs no random state.
"""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import hydra
import torch
from accelerate import PartialState
from omegaconf import DictConfig, OmegaConf
from torch import nn

import checkpoint
import cli
import data
from logger import Logger
from prepare import (
    BatchPlan, State, batch_plan, compile_blocks, describe, find_resume, make_optimizer, open_data, prepare_run_folder,
    resolve_config, resume,
)  # fmt: skip
from randomness import seeded_generator, uniform
from routing_module import Routing
from sample import Run, generate, guidance_from, instantiate, save_grid

VAL_BATCH = 50  # fixed, so that the validation noise is the same on any number of processes


@hydra.main(config_path="configs", config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> None:
    with cli.user_errors():  # inside Hydra's job, or Hydra adds lines of its own
        train(cfg)


def train(cfg: DictConfig) -> None:
    dist = PartialState(timeout=timedelta(minutes=10))
    cfg = resolve_config(cfg, dist)
    run_folder = Path(cfg.results_dir) / cfg.run_name
    plan = batch_plan(cfg.train, dist)
    resumed = find_resume(cfg, run_folder)
    latents, val_latents = open_data(cfg, dist)

    torch.manual_seed(cfg.seed)  # initial weights; the training maths never uses the global generator
    model = instantiate(cfg.model).to(dist.device)
    objective = instantiate(cfg.objective)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    state = State(model, model, ema, make_optimizer(model, cfg))
    start_step = 0
    if resumed is not None:
        start_step = resume(resumed, state, cfg)
    dist.wait_for_everyone()  # every process has looked at the run folder before the first one writes to it
    if dist.is_main_process:
        prepare_run_folder(run_folder, cfg, start_step)
    compiled = compile_blocks(model, cfg.train.compile, dist)
    if dist.num_processes > 1:
        state.net = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    log = Logger(cfg, run_folder, start_step, dist)
    log.say(describe(cfg, model, latents, plan, resumed, compiled))
    batches = iter(
        data.make_loader(
            latents, global_batch_size=plan.global_batch_size, micro_batch_size=plan.micro_batch_size, rank=plan.rank,
            world_size=plan.world_size, seed=cfg.seed, start_step=start_step, num_steps=cfg.train.max_steps,
            num_workers=cfg.data.num_workers, pin_memory=dist.device.type == "cuda",
        )
    )  # fmt: skip
    view = Run(ema, objective, instantiate(cfg.data.codec).to(dist.device), cfg, dist.device, cfg.train.precision)

    for step in range(start_step + 1, cfg.train.max_steps + 1):
        set_learning_rate(state.optimizer, learning_rate(step, cfg.train))
        loss, grad_norm = train_step(state, objective, latents, log.timed(batches), step, plan, cfg)
        update_ema(ema, model, min(cfg.train.ema_decay, (1 + step) / (10 + step)))
        log.add(loss)
        last = step == cfg.train.max_steps
        if step % cfg.train.log_every == 0 or last:
            log.train(step, grad_norm, learning_rate(step, cfg.train), plan.global_batch_size)
        if every(cfg.train.save_every, step) or last:
            with log.pause():
                save(run_folder, step, state, cfg, latents, dist)
        if every(cfg.train.val_every, step) or (last and cfg.train.val_every):
            with log.pause():
                log.write(step, validation_losses(view, val_latents, cfg, plan))
        if (every(cfg.preview.every, step) or (last and cfg.preview.every)) and dist.is_main_process:
            with log.pause():
                preview(view, run_folder / "samples" / f"step_{step:07d}.png", cfg.preview)
    log.close(f"{run_folder}: trained to step {cfg.train.max_steps}")
    dist.wait_for_everyone()


def train_step(
    state: State, objective, latents: data.Latents, batches: Iterator, step: int, plan: BatchPlan, cfg: DictConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step on one global batch -> (mean loss of this process's rows, gradient norm), both () on the device.

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
    grad_norm = nn.utils.clip_grad_norm_(state.model.parameters(), cfg.train.grad_clip)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return total, grad_norm


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def learning_rate(step: int, train: DictConfig) -> float:
    """Of step 1..max_steps: linear warm-up from 0, constant, linear decay to 0 just past the last step."""
    warmup = min(1.0, step / train.warmup_steps) if train.warmup_steps else 1.0
    decay = min(1.0, (train.max_steps + 1 - step) / train.decay_steps) if train.decay_steps else 1.0
    return train.lr * warmup * decay


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def every(interval: int | None, step: int) -> bool:
    return bool(interval) and step % interval == 0


@torch.no_grad()
def validation_losses(view: Run, latents: data.Latents, cfg: DictConfig, plan: BatchPlan) -> dict[str, float]:
    """Loss of the EMA weights on fixed samples, noise and labels, dense and as routed in training; means over samples."""
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


def preview(view: Run, path: Path, settings: DictConfig) -> None:
    """The grid of samples: EMA weights, the same seeds and labels each time."""
    seeds = range(settings.num_images)
    labels = torch.tensor([seed % view.num_classes for seed in seeds])
    save_grid(torch.cat(list(generate(view, guidance_from(settings.guidance), seeds, labels))), path, columns=10)


def save(run_folder: Path, step: int, state: State, cfg: DictConfig, latents: data.Latents, dist: PartialState) -> None:
    if dist.is_main_process:
        trainer_state = {"seed": cfg.seed, "global_batch_size": cfg.train.global_batch_size, "data": latents.fingerprint}
        checkpoint.save(
            run_folder, step, model=state.model, ema=state.ema, optimizer=state.optimizer, state=trainer_state,
            config=OmegaConf.to_yaml(cfg),
        )  # fmt: skip
        checkpoint.prune(run_folder, cfg.train.keep_last, cfg.train.keep_every)
    dist.wait_for_everyone()


if __name__ == "__main__":
    with cli.user_errors():
        main()

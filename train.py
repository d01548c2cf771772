"""Training: `accelerate launch train.py model=tread`, `python train.py`, or `torchrun --nproc_per_node 2 train.py`.

One straight loop: batch, loss, backward, step, EMA, and every few steps a log line, a checkpoint, validation, scores
and a preview. Every random number comes from a generator keyed by (seed, purpose, step) and is drawn for the whole
global batch, so a step is the same on any number of processes, and a checkpoint needs no random state.
"""

import contextlib
import json
import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import hydra
import numpy as np
import torch
from accelerate import PartialState
from omegaconf import DictConfig
from torch import nn

import data
import fid
from checkpoints import power_ema
from checkpoints.gallery import save_grid
from checkpoints.load import Run
from cost import cost_table, memory_table, out_of_memory
from data import BatchPlan
from evaluation.features import Extractor
from evaluation.reference import Reference
from evaluation.score import write_metrics
from evaluation.table import SCORES
from guidance import guidance_from
from randomness import BatchSlice, normal, seeded_generator, uniform
from sample import check_request, generate, labels_for, parse_seeds
from system import UserError, cli
from system.compiling import compile_blocks, decide_compile
from system.files import write_text_atomic
from system.instantiate import instantiate
from system.launchers import own_process, set_determinism
from system.processes import Preempted, agree, start_processes, together
from training.log import Log, TimedBatches
from training.naming import name_run
from training.prepare import TrainState, batch_plan, build, describe, open_data, resolve_config, settle_precision
from training.resuming import find_resume, reserve_run_folder, resume
from training.saving import Saver
from training.stopping import EXIT_NOT_FINITE, EXIT_START_AGAIN, START_AGAIN, PreemptionHandler

VAL_BATCH = 50  # fixed, so that the validation noise is the same on any number of processes


@dataclass
class TrainedEma(Run):
    """The EMA of a run in training, as sampling and evaluation take it: before each call it may be asked to stop."""

    preemption: PreemptionHandler | None = None

    def predict(self, *arguments) -> torch.Tensor:
        self.preemption.poll()
        return super().predict(*arguments)


@dataclass
class TrainContext:
    """Everything that the loop uses."""

    cfg: DictConfig
    dist: PartialState
    run_folder: Path
    plan: BatchPlan
    latents: data.Latents
    val_latents: data.Latents
    state: TrainState
    ema_run: TrainedEma
    saver: Saver
    scoring: tuple[Extractor, Reference] | None
    start_step: int
    preemption: PreemptionHandler
    log: Log


@hydra.main(config_path="configs", config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> None:
    with cli.user_errors():  # inside Hydra's job, or Hydra adds lines of its own
        code = train(name_run(cfg))
    if code:
        sys.exit(code)


def train(cfg: DictConfig) -> int:
    """Trains as the config says -> exit code: 0 after the last step, else EXIT_*. Raises UserError, OSError."""
    set_determinism(cfg.train.deterministic)
    dist = start_processes(cfg.train.timeout_s)
    cfg = resolve_config(cfg, dist)
    plan = batch_plan(cfg.train, dist)
    if cfg.train.dry_run:
        settle_precision(cfg, dist, plan.micro_batch_size)
        return dry_run(cfg, dist, plan)
    run_folder = Path(cfg.results_dir) / cfg.run_name
    if cfg.eval.every:
        parse_seeds(cfg.eval.seeds)
    resumed = find_resume(cfg, run_folder)
    settle_precision(cfg, dist, plan.micro_batch_size, resumed)
    latents, val_latents = open_data(cfg, dist)
    scoring = fid.extractor_and_reference(cfg.eval) if cfg.eval.every else None
    agree({
        "run_name": cfg.run_name, "train.precision": cfg.train.precision,
        "the checkpoint to resume from": resumed and resumed.name, "the data's fingerprint": latents.fingerprint,
    })  # fmt: skip

    state, objective = build(cfg, dist, new=resumed is None)
    check_sampling(state.ema, objective, cfg, dist.device)
    start_step = resume(resumed, state, cfg, latents) if resumed is not None else 0
    lock = reserve_run_folder(run_folder, cfg, start_step) if dist.is_main_process else nullcontext()
    preemption = PreemptionHandler(dist, cfg.train.max_hours)
    with lock, contextlib.closing(preemption):
        dist.wait_for_everyone()
        torch.compiler.reset()  # a sweep trains several models in one process
        compiled, why_not = decide_compile(cfg.train.compile, dist.device)
        if dist.num_processes > 1:
            state.net = wrap(state.model, objective)
        compile_blocks(state.model, compiled)
        compile_blocks(state.ema, compiled, dynamic=True)
        codec = instantiate(cfg.data.codec).to(dist.device)
        ema_run = TrainedEma(
            state.ema, objective, codec, cfg, dist.device, cfg.train.precision, compiled, folder=run_folder,
            preemption=preemption,
        )  # fmt: skip
        log = Log(cfg, run_folder, start_step, dist)
        log.say(describe(cfg, state.model, latents, plan, resumed, compiled, why_not))
        if dist.is_main_process and (warning := data.scale_warning(latents, objective.sigma_data)):
            log.warn(warning)
        saver = Saver(run_folder, cfg, {"data": latents.fingerprint})
        context = TrainContext(
            cfg, dist, run_folder, plan, latents, val_latents, state, ema_run,
            saver, scoring, start_step, preemption, log,
        )  # fmt: skip
        try:
            return run_steps(context)
        except Exception as error:
            saver.close()
            if isinstance(error, torch.OutOfMemoryError):
                limit = torch.cuda.get_device_properties(dist.device).total_memory
                rows = plan.micro_batch_size * plan.accumulation
                error = UserError(out_of_memory(cfg, plan.micro_batch_size, rows, limit, plan.world_size))
            if dist.num_processes == 1:
                raise error
            if preemption.alone:  # the launcher is gone, and process 0 has saved
                os._exit(EXIT_START_AGAIN)
            cli.leave(error)


def check_sampling(ema: nn.Module, objective, cfg: DictConfig, device: torch.device) -> None:
    """Raises UserError for previews and evaluations that could not be drawn, before the first step."""
    run = Run(ema, objective, instantiate(cfg.data.codec).to(device), cfg, device, cfg.train.precision)
    if cfg.preview.every:
        check_request(run, guidance_from(cfg.preview), torch.zeros(1), cfg.preview.num_images)
    if cfg.eval.every:
        labels = labels_for(run.num_classes, parse_seeds(cfg.eval.seeds)[:1], cfg.eval.labels)
        check_request(run, guidance_from(cfg.eval), labels, cfg.eval.batch_size)


def run_steps(run: TrainContext) -> int:
    """The loop -> exit code."""
    cfg, state, log = run.cfg, run.state, run.log
    loader = data.make_loader(
        run.latents, run.plan, seed=cfg.seed, start_step=run.start_step, num_steps=cfg.train.max_steps,
        num_workers=cfg.data.num_workers, pin_memory=run.dist.device.type == "cuda",
    )  # fmt: skip
    batches = TimedBatches(iter(loader))
    step = run.start_step
    # The run may have been stopped between its save and this.
    stop = bool(step) and periodic_work(run, step)
    while step < cfg.train.max_steps and not stop:
        step += 1
        lr = set_learning_rate(state.optimizer, step, cfg.train)
        loss, grad_norm = train_step(state, run.ema_run.objective, run.latents, batches, step, run.plan, cfg)
        update_ema(state.ema, state.model, ema_decay(step, cfg.train))
        for width, average in state.power.items():
            update_ema(average, state.model, power_ema.beta(width, step))
        log.add(loss)

        stop = run.preemption.stops_after(step)
        if stop and run.preemption.alone:
            return save_alone(run, step)
        last = stop or step == cfg.train.max_steps
        save_due = last or every(cfg.train.save_every, step) or (run.scoring and every(cfg.eval.every, step))
        if every(cfg.train.log_every, step) or save_due:
            bad_step = log.train(step, grad_norm, lr, state.guard, batches.waited, len(run.latents.faults))
            if bad_step:
                dump = dump_bad_step(run, bad_step) if run.dist.is_main_process else None
                log.close(
                    f"error: a gradient of step {bad_step} was not finite; nothing was updated; samples in {dump}"
                )
                return EXIT_NOT_FINITE
        if every(cfg.train.check_replicas_every, step) and run.dist.num_processes > 1:
            check_replicas(state.model, step, run.dist)
        run.saver.check()
        if save_due:
            save(run, step, wait=last)
        if not stop:
            stop = periodic_work(run, step, saved=save_due)
    if stop:
        if step > run.start_step:
            save(run, step, wait=True)
        return end_early(run, step)
    if step > cfg.train.max_steps:
        log.close(f"{run.run_folder} is at step {step}, past train.max_steps={cfg.train.max_steps}: nothing to do")
    else:
        log.close(f"{run.run_folder}: trained to step {step}")
    run.dist.wait_for_everyone()
    return 0


def train_step(
    state: TrainState, objective, latents: data.Latents, batches: Iterator, step: int, plan: BatchPlan, cfg: DictConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step on one global batch -> (mean loss of this process's rows, gradient norm), () on the device.

    The host never waits for the device here.
    """
    device = state.model.pos_embed.device
    total = torch.zeros((), device=device)
    for micro in range(plan.accumulation):
        raw, y = (tensor.to(device, non_blocking=True) for tensor in next(batches))
        rows = plan.slice(seeded_generator(cfg.seed, "train", step, device=device), micro)
        x = latents.to_model_input(raw, rows)  # (B, C, h, w)
        y = torch.where(uniform(y.shape, rows, device=device) < cfg.train.label_dropout, state.model.num_classes, y)
        last = micro == plan.accumulation - 1
        with nullcontext() if last or plan.world_size == 1 else state.net.no_sync():
            with torch.autocast(device.type, torch.bfloat16, enabled=cfg.train.precision == "bf16"):
                loss = state.model.training_loss(objective, state.net, x, y, rows).mean() / plan.accumulation
            loss.backward()
        total += loss.detach()
    grad_norm = nn.utils.get_total_norm([p.grad for p in state.model.parameters() if p.grad is not None])
    limit = cfg.train.grad_clip or math.inf
    state.optimizer.grad_scale = (grad_norm / limit).clamp(min=1)  # clips within the fused update
    good = state.guard.check(grad_norm, step)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return torch.where(good, total, 0), grad_norm


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def ema_decay(step: int, train: DictConfig) -> float:
    """train.ema_decay, from the first step on or, with ema_ramp, approached from below while the EMA is young."""
    return min(train.ema_decay, (1 + step) / (10 + step)) if train.ema_ramp else train.ema_decay


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, train: DictConfig) -> float:
    lr = learning_rate(step, train)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def learning_rate(step: int, train: DictConfig) -> float:
    """Of step 1..max_steps: linear warm-up from 0, constant, linear decay that reaches 0 one step after the last."""
    warmup = min(1.0, step / train.warmup_steps) if train.warmup_steps else 1.0
    decay = min(1.0, (train.max_steps + 1 - step) / train.decay_steps) if train.decay_steps else 1.0
    return train.lr * warmup * decay


def every(interval: int | None, step: int) -> bool:
    return bool(interval) and step % interval == 0


def periodic_work(run: TrainContext, step: int, saved: bool = True) -> bool:
    """Validation, scores and the preview that are due after a step -> whether it was left because the job has to stop.

    saved: the step has a checkpoint, as always before an evaluation.
    """
    cfg, log = run.cfg, run.log
    last = step == cfg.train.max_steps
    run.ema_run.step = step
    try:
        if saved:
            with together():
                run.preemption.poll()  # a save may take long
        if every(cfg.train.val_every, step) or (last and cfg.train.val_every):
            with log.pause():
                log.write(step, validation_losses(run))
        if run.scoring and (every(cfg.eval.every, step) or last):
            with log.pause(), log.survive("evaluation"), together():
                log.write(step, evaluate(run))
        if every(cfg.preview.every, step) or (last and cfg.preview.every):
            with log.pause(), log.survive("preview"), together():
                if run.dist.is_main_process:
                    preview(run.ema_run, run.run_folder / "samples" / f"step_{step:07d}.png", cfg.preview)
    except Preempted:
        return True
    return False


@torch.no_grad()
def validation_losses(run: TrainContext) -> dict[str, float]:
    """The EMA's mean loss on fixed samples, noise and labels, dense and as routed in training."""
    cfg, net, plan, latents = run.cfg, run.ema_run, run.plan, run.val_latents
    modes = {"val/loss_dense": False} | ({"val/loss_routed": True} if net.model.routes else {})
    n = min(cfg.train.val_samples, len(latents))
    sums = torch.zeros(len(modes), device=net.device)
    with together():
        for chunk in range(plan.rank * VAL_BATCH, n, plan.world_size * VAL_BATCH):
            raw, y = (tensor.to(net.device) for tensor in latents.read(range(chunk, min(chunk + VAL_BATCH, n))))
            for i, routed in enumerate(modes.values()):
                run.preemption.poll()
                generator = seeded_generator(cfg.seed, "val", chunk, device=net.device)
                x = latents.to_model_input(raw, generator)
                loss = partial(net.model.training_loss, net.objective) if routed else net.objective.loss
                with torch.autocast(net.device.type, torch.bfloat16, enabled=net.precision == "bf16"):
                    sums[i] += loss(net.model, x, y, generator).sum()
    if plan.world_size > 1:
        torch.distributed.all_reduce(sums)
    return {name: total / n for name, total in zip(modes, sums.tolist())}


def evaluate(run: TrainContext) -> dict[str, float]:
    """Generates and scores images on all processes, as fid.py does -> the log's values; metrics.json has the rest."""
    extractor, reference = run.scoring
    result = fid.evaluate(run.ema_run, run.cfg.eval, extractor, reference)
    if result:
        write_metrics(result, run.run_folder / "eval" / fid.row_name(run.ema_run, run.cfg.eval, extractor))
    return {f"eval/{name}": result[name] for name in result if name.startswith(SCORES)}


def preview(ema_run: Run, path: Path, settings: DictConfig) -> None:
    """A grid of samples of the EMA, with the same seeds and labels each time."""
    seeds = range(settings.num_images)
    labels = torch.tensor([seed % ema_run.num_classes for seed in seeds])
    save_grid(torch.cat(list(generate(ema_run, guidance_from(settings), seeds, labels))), path, columns=10)


def save(run: TrainContext, step: int, wait: bool) -> None:
    """The checkpoint of a step, unless it is there already. wait: until it is on disk, also with train.save=async."""
    with run.log.pause(), nullcontext() if run.preemption.alone else together():
        if run.dist.is_main_process:
            run.saver.save(step, run.state, wait)


def save_alone(run: TrainContext, step: int) -> int:
    """Process 0 after the launcher's end saves what its step left, without a word to the others -> exit code."""
    if run.state.guard.mode == "stop" and run.state.guard.count:
        return EXIT_NOT_FINITE
    run.saver.save(step, run.state, wait=True)
    return end_early(run, step)


def end_early(run: TrainContext, step: int) -> int:
    """Says that a saved run is to be started again -> exit code.

    <run folder>/start_again says it to job scripts: no launcher hands on the exit code that does.
    """
    if run.dist.is_main_process:
        with run.log.survive(START_AGAIN):
            write_text_atomic(run.run_folder / START_AGAIN, f"{run.preemption.reason} after step {step}\n")
    run.log.close(f"stopped by {run.preemption.reason} after step {step}, saved: the same command continues")
    return EXIT_START_AGAIN


@torch.no_grad()
def check_replicas(model: nn.Module, step: int, dist: PartialState) -> None:
    """Raises UserError where the processes' weights differ in any bit."""
    own = torch.stack([p.view(torch.int32).sum(dtype=torch.int64) for p in model.parameters()])  # (parameters,)
    first = own.clone()
    torch.distributed.broadcast(first, 0)
    differs = torch.zeros(dist.num_processes, device=own.device)
    differs[dist.process_index] = (own != first).any()
    torch.distributed.all_reduce(differs)
    ranks = differs.nonzero().flatten().tolist()
    if ranks:
        raise UserError(
            f"at step {step} the weights of processes {ranks} differ from process 0's: a machine computes wrongly"
        )


def dump_bad_step(run: TrainContext, step: int) -> Path:
    """Writes what replays a step: its seed and the keys of its global batch."""
    positions = np.arange((step - 1) * run.plan.global_batch_size, step * run.plan.global_batch_size)
    keys = run.latents.keys(data.Order(len(run.latents), run.cfg.seed)(positions))
    path = run.run_folder / f"nonfinite_step_{step:07d}.json"
    write_text_atomic(path, json.dumps({"step": step, "seed": run.cfg.seed, "keys": keys}, indent=2) + "\n")
    return path


def dry_run(cfg: DictConfig, dist: PartialState, plan: BatchPlan) -> int:
    """Builds the run, prints its cost and takes one step on noise; reads and writes no data -> exit code 0."""
    state, objective = build(cfg, dist, new=True)
    if dist.num_processes > 1:
        state.net = wrap(state.model, objective)
    noise = seeded_generator(cfg.seed, "dry run", dist.process_index, device=dist.device)
    shape = (plan.micro_batch_size, cfg.data.channels, cfg.data.input_size, cfg.data.input_size)
    no_data = SimpleNamespace(to_model_input=lambda raw, generators: raw)
    no_label = torch.full(shape[:1], cfg.data.num_classes, device=dist.device)
    batches = ((normal(shape, noise), no_label) for _ in range(plan.accumulation))
    loss, grad_norm = train_step(state, objective, no_data, batches, 1, plan, cfg)
    if dist.is_main_process:
        print(f"model      {cfg.model.size}\n{cost_table(state.model, cfg)}")
        print(memory_table(cfg, plan.micro_batch_size, device=dist.device.type, processes=plan.world_size))
        print(
            f"dry run    one step on noise: loss {loss:.4g}, gradient norm {grad_norm:.4g}; nothing was read or written"
        )
    return 0


def wrap(model: nn.Module, objective) -> nn.Module:
    """In DistributedDataParallel: gradients are all that the processes exchange in a step. Before `compile_blocks`.

    After its first backward pass DDP lays out its buckets anew, and with them the order in which three or more
    processes add up. The first step after a resume would round otherwise than the same step of a run without: hence a
    first pass here, of nothing.
    """
    torch._dynamo.config.optimize_ddp = False  # or its buckets would cut the compiled blocks in pieces
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer releases call broadcast_buffers by another name
        net = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    x = model.pos_embed.new_zeros(2, model.in_channels, model.input_size, model.input_size)  # (2, C, h, w)
    rows = BatchSlice(seeded_generator("first pass", device=x.device), 0, len(x))
    loss = model.training_loss(objective, net, x, torch.zeros(len(x), dtype=torch.int64, device=x.device), rows)
    (loss * 0).sum().backward()
    model.zero_grad(set_to_none=True)
    return net


if __name__ == "__main__":
    with cli.user_errors():
        own_process()
        sys.argv[1:] = cli.literal_paths(sys.argv[1:], sweep=bool({"-m", "--multirun"} & set(sys.argv)))
        main()

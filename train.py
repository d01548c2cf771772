"""Training: `accelerate launch train.py model=tread`, `python train.py`, or `torchrun --nproc_per_node 2 train.py`.

One straight loop: what is due after a step (log, checkpoint, validation, scores, preview), then the next step. Every
random number comes from a generator keyed by (seed, purpose, step) and is drawn for the whole global batch, so a step
is the same on any number of processes, and a checkpoint needs no random state.

Keys are in configs/; `--cfg job` prints them all, `train.dry_run=true` the cost, and `-m key=1,2` runs both.
"""

import contextlib
import json
import math
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import hydra
import numpy as np
import torch
from accelerate import PartialState
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from torch import nn

import conditions
import data
from checkpoints.config import Preview, Settings, Train
from checkpoints.gallery import class_names, save_grid
from checkpoints.generate import check_request, generate
from checkpoints.load import Run, build_network
from checkpoints.naming import run_name, sweep_name
from checkpoints.resuming import begin, find_resume, flat, lock_run_folder, resume
from checkpoints.run_folder import START_AGAIN, check_space, is_complete, save
from conditions import Condition
from cost import cost_table, memory_table, out_of_memory
from evaluation.evaluate import check_scoring, evaluate, extractor_and_reference, score_name
from evaluation.score import write_metrics
from evaluation.table import SCORES
from randomness import BatchSlice, normal, seeded_generator
from system import UserError, cli
from system.compiling import compile_blocks, decide_compile
from system.files import commit, write_text_atomic
from system.launchers import set_determinism
from system.processes import Preempted, agree, start_processes, together
from system.settings import parse
from training.ema import update_averages
from training.log import Log, TimedBatches, preview_path
from training.prepare import (
    TrainingData,
    TrainState,
    batch_plan,
    build_state,
    check_features,
    describe,
    open_data,
    settle_data,
    settle_positions,
    settle_precision,
    settle_texts,
)
from training.stopping import EXIT_NOT_FINITE, EXIT_START_AGAIN, Interrupted, PreemptionHandler
from training.trackers import check_trackers

PATHS = ("results_dir", "data.path", "data.source")  # which may differ between machines
VAL_BATCH = 50  # fixed, so that the validation noise is the same on any number of processes
BINS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the noise level in validation: their centres


@hydra.main(config_path="configs", config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> None:
    with cli.user_errors():  # inside Hydra's job, or Hydra adds lines of its own
        if cfg.data.prepare == "pictures":  # whose size sets the network's, too
            cfg.data = data.settle_pictures(cli.plain(cfg.data))
        settings = parse(Settings, cli.plain(cfg))
        code = train(replace(settings, run_name=name_of_job(settings)))
    if code:
        sys.exit(code)


def name_of_job(settings: Settings) -> str:
    """run_name, or a name made of what tells runs apart. A sweep's jobs go to <run_name or multirun>/<swept values>."""
    launched = HydraConfig.get()
    if launched.mode != RunMode.MULTIRUN:
        with torch.device("meta"):
            network = build_network(settings).name
        return settings.run_name or run_name({**launched.runtime.choices, "data": settings.data.name}, network)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("-m runs its jobs one after another in one process; needed: one launch per job")
    swept = cli.swept_keys(sys.argv[1:])
    chosen = [override for override in launched.overrides.task if override.partition("=")[0] in swept]
    return f"{settings.run_name or 'multirun'}/{sweep_name(chosen) or f'job{launched.job.num}'}"


def train(settings: Settings) -> int:
    """Trains as the settings say -> exit code: 0 after the last step, else EXIT_*. Raises UserError, OSError."""
    set_determinism(settings.train.deterministic)
    dist = start_processes(settings.train.timeout_s)
    check_trackers(settings.log)
    plan, run_folder = batch_plan(settings, dist), Path(settings.results_dir) / settings.run_name
    if settings.train.dry_run:
        return dry_run(settle_precision(settings, dist), dist, plan)
    processes = PreemptionHandler(dist, settings.train.max_hours)
    with contextlib.closing(processes), contextlib.ExitStack() as locks:
        try:
            if dist.is_main_process and run_folder.is_dir():
                locks.enter_context(lock_run_folder(run_folder))
            dist.wait_for_everyone()
            resumed = find_resume(settings, run_folder)
            return start(settle_precision(settings, dist, resumed), processes, plan, run_folder, resumed, locks)
        except Interrupted:  # of a process that is alone
            print(f"stopped by {processes.reason} before the first step was over: the same command starts again")
            run_folder.mkdir(parents=True, exist_ok=True)
            write_text_atomic(run_folder / START_AGAIN, f"{processes.reason} before the first step was over\n")
            return EXIT_START_AGAIN


def start(
    settings: Settings, processes: PreemptionHandler, plan: data.BatchPlan, run_folder: Path, resumed: Path | None,
    locks: contextlib.ExitStack,
) -> int:  # fmt: skip
    """Reads the data, builds or resumes the run, and trains it -> exit code. locks: the run folder's, if any."""
    dist, loaded = processes.dist, open_data(settings, processes.dist, plan)
    settings = settle_positions(settle_texts(settle_data(settings, loaded.train), loaded.train), resumed)
    check_features(loaded.train, settings)
    chosen = {"the checkpoint to resume from": resumed and resumed.name}
    same = {key: value for key, value in flat(settings).items() if key not in PATHS}
    agree(chosen | {f"the {name}'s fingerprint": found for name, found in loaded.fingerprints.items()} | same)
    agree({"torch": torch.__version__, "commit": commit(), "device": dist.device.type}, settings.train.deterministic)
    state = build_state(settings, dist, new=resumed is None)
    state.ema.folder, state.ema.pool = run_folder, conditions.pool(state.model.null_condition, loaded.kept)
    state.ema.preemption, state.ema.text_stats = processes, loaded.train.text_stats
    for module in state.modules.values() if state.ema.text_stats is not None else ():
        module.null_condition = conditions.empty_caption(state.ema.text_stats)
    check_sampling(settings, state.ema)
    if settings.eval.every or settings.preview.every and dist.is_main_process:
        state.ema.codec.check(state.model.latent_shape[0])  # a VAE that cannot be loaded is refused now
    if settings.eval.every:
        check_scoring(state.ema, settings.eval)
    if resumed is not None:
        state.step = resume(resumed, settings, state.modules, state.optimizer, loaded.fingerprints)
    if dist.is_main_process:
        if not run_folder.is_dir():  # nothing is written where something above is refused
            run_folder.mkdir(parents=True)
            locks.enter_context(lock_run_folder(run_folder))
        if state.step < settings.train.max_steps:
            check_space(run_folder, state.checkpoint_bytes)
        begin(run_folder, settings, state.step)
    dist.wait_for_everyone()
    torch.compiler.reset()  # a sweep trains several models in one process
    compiled, why_not = decide_compile(settings.train.compile, dist.device)
    if dist.num_processes > 1:
        state.net = wrap(state)
    compile_blocks(state.model.all_blocks, compiled)
    compile_blocks(state.ema.model.all_blocks, compiled, dynamic=True)
    state.ema.compile = compiled
    log = Log(settings, run_folder, state.step, dist, compiled)
    log.say(describe(settings, state, loaded, resumed, compiled, why_not))
    if log.compiling:
        log.say("compiling  the blocks, once: the first step waits for it")
    if dist.is_main_process and (warning := data.scale_warning(loaded.train, state.objective.sigma_data)):
        data.latents.warn(warning)
    try:
        return run_steps(settings, processes, loaded, state, run_folder, log)
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            limit = torch.cuda.get_device_properties(dist.device).total_memory
            rows = plan.micro_batch_size * plan.accumulation
            error = UserError(out_of_memory(settings, plan.micro_batch_size, rows, limit, plan.world_size))
        elif isinstance(error, RuntimeError):
            error = data.loader_died(error, settings.data.num_workers) or error
        if dist.num_processes == 1:
            raise error
        if processes.alone:  # the launcher is gone, and process 0 has saved
            os._exit(EXIT_START_AGAIN)
        cli.leave(error)


def check_sampling(settings: Settings, ema: Run) -> None:
    """Raises UserError before the first step for classes that the network lacks, the first of which it would take for
    "no label", and for previews and evaluations that could not be drawn."""
    if settings.data.condition == "class":
        conditions.check(torch.tensor([settings.data.num_classes - 1]), ema.model.null_condition)
    if settings.preview.every:
        check_request(ema, settings.preview, preview_condition(settings.preview, ema))
    if settings.eval.every:
        extractor_and_reference(settings.eval)
        condition = conditions.choose(settings.eval.labels, settings.eval.all_seeds[:1], ema.pool)
        check_request(ema, settings.eval, condition)


def run_steps(
    settings: Settings, processes: PreemptionHandler, loaded: TrainingData, state: TrainState, run_folder: Path,
    log: Log,
) -> int:  # fmt: skip
    """The loop -> exit code. At its head is what is due after a step; a resumed run does what is not there yet."""
    cfg, dist = settings.train, processes.dist
    loader = data.make_loader(
        loaded.train, loaded.plan, seed=settings.seed, start_step=state.step, num_steps=cfg.max_steps,
        num_workers=settings.data.num_workers, pin_memory=dist.device.type == "cuda",
    )  # fmt: skip
    batches, resumed_at, stop, grad_norm = TimedBatches(iter(loader)), state.step, False, None
    while True:
        trained = state.step > resumed_at
        stop = stop or trained and processes.stops_after(state.step)
        alone = stop and processes.alone  # process 0 after the launcher has died: it saves this step
        last = stop or state.step >= cfg.max_steps
        save_due = last or every(cfg.save_every, state.step) or every(settings.eval.every, state.step)
        if log.steps and not alone and (every(cfg.log_every, state.step) or save_due):
            bad_step = log.train(state, grad_norm, batches.waited, len(loaded.train.faults))
            if bad_step:
                dump = dump_bad_step(settings, loaded, run_folder, bad_step) if dist.is_main_process else None
                bad = f"a gradient of step {bad_step} was not finite; nothing was updated"
                log.close(f"error: {bad}; samples in {dump}")
                return EXIT_NOT_FINITE
        if alone and state.guard.mode == "stop" and state.guard.count:
            return EXIT_NOT_FINITE
        if trained and every(cfg.check_replicas_every, state.step) and dist.num_processes > 1 and not alone:
            check_replicas(state.net, state.step, dist)
        if trained and save_due:
            with log.pause(), nullcontext() if alone else together():
                save_state(settings, loaded, state, run_folder, dist)
        if state.step and not stop:
            try:
                between_steps(settings, processes, loaded, state, run_folder, log)
            except Preempted as preempted:  # on all processes; not all of them had a signal
                stop, processes.reason = True, processes.reason or str(preempted)
                continue
        if last:
            break
        state.step += 1
        try:
            loss, grad_norm = train_step(settings, loaded, state, batches)
        except UserError:  # damaged data, or a loader process that died: nothing is updated yet
            state.step -= 1
            if trained and not (state.guard.mode == "stop" and state.guard.count):
                save_state(settings, loaded, state, run_folder, dist)
            raise
        update_averages(state.averages, state.model, state.step, cfg.ema_decay, cfg.ema_ramp)
        log.add(loss)
    if stop:
        return end_early(processes, state.step, run_folder, log)
    past = f", past train.max_steps={cfg.max_steps}: nothing to do" if state.step > cfg.max_steps else ""
    then = f"next       python sample.py ckpt={shlex.quote(str(run_folder))}"
    log.close(f"{run_folder}: trained to step {state.step}{past}; checkpoints/, samples/, metrics.jsonl\n{then}")
    dist.wait_for_everyone()
    return 0


def save_state(
    settings: Settings, loaded: TrainingData, state: TrainState, run_folder: Path, dist: PartialState
) -> None:
    """The checkpoint of the present step, unless it is there."""
    if dist.is_main_process and not is_complete(run_folder, state.step):
        kept = conditions.save(loaded.kept, loaded.train.text_stats)
        save(run_folder, state.step, settings, state.modules, state.optimizer, loaded.fingerprints, kept)


def train_step(
    settings: Settings, loaded: TrainingData, state: TrainState, batches: Iterator
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step on one global batch -> (mean loss of this process's rows, gradient norm), () on the device.

    The host never waits for the device here.
    """
    cfg, model, plan, step = settings.train, state.model, loaded.plan, state.step
    device = state.ema.device
    total = torch.zeros((), device=device)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(step, cfg)
    for micro in range(plan.accumulation):
        raw, condition, *features = next(batches)
        rows = plan.slice(seeded_generator(settings.seed, "train", step, device=device), micro)
        x = loaded.train.to_model_input(raw.to(device, non_blocking=True), rows)  # (B, C, h, w)
        condition = conditions.drop(conditions.to(condition, device), model.null_condition, cfg.label_dropout, rows)
        routing = model.training_routing(len(x), rows, device) if step <= cfg.routed_steps else None
        last = micro == plan.accumulation - 1
        with nullcontext() if last or plan.world_size == 1 else state.net.no_sync():
            with torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
                features = [part.to(device, non_blocking=True) for part in features]
                loss = state.loss(x, condition, rows, routing, *features).mean() / plan.accumulation
            loss.backward()
        total += loss.detach()
    grad_norm = nn.utils.get_total_norm([p.grad for p in state.net.parameters() if p.grad is not None])
    state.optimizer.grad_scale = (grad_norm / (cfg.grad_clip or math.inf)).clamp(min=1)  # clips in the fused update
    good = state.guard.check(grad_norm, step)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return torch.where(good, total, 0), grad_norm


def learning_rate(step: int, train: Train) -> float:
    """Of step 1..max_steps: linear warm-up from 0, constant, linear decay that reaches 0 one step after the last."""
    warmup = min(1.0, step / train.warmup_steps) if train.warmup_steps else 1.0
    decay = min(1.0, (train.max_steps + 1 - step) / train.decay_steps) if train.decay_steps else 1.0
    return train.lr * warmup * decay


def every(interval: int | None, step: int) -> bool:
    return bool(interval) and step % interval == 0


def between_steps(
    settings: Settings, processes: PreemptionHandler, loaded: TrainingData, state: TrainState, run_folder: Path,
    log: Log,
) -> None:  # fmt: skip
    """Validation, scores and preview that are due after a step and not there yet. Raises Preempted."""
    step = state.ema.step = state.step
    intervals = {"val/": settings.train.val_every, "eval/": settings.eval.every, "preview": settings.preview.every}
    due = {name for name, n in intervals.items() if every(n, step) or n and step == settings.train.max_steps}
    due = {name for name in due if not log.has(step, name)}
    if "val/" in due:
        with log.pause(), log.survive("validation"), together():
            log.write(step, validation_losses(settings, processes, loaded, state))
    if "eval/" in due:
        with log.pause(), log.survive("evaluation"), together():
            log.write(step, score_ema(settings, state, run_folder))
    if "preview" in due:
        with log.pause(), log.survive("preview"), together():
            if processes.dist.is_main_process:
                preview(settings.preview, state.ema, path := preview_path(run_folder, step))
                log.track(step, {"preview": path})


@torch.no_grad()
def validation_losses(
    settings: Settings, processes: PreemptionHandler, loaded: TrainingData, state: TrainState
) -> dict[str, float]:
    """The EMA's mean loss on fixed samples, noise and conditions, dense and as routed in training.

    val/loss_dense is of all samples, val/loss_dense/0.1 and so on of those in one of BINS, if there are any.
    """
    ema, plan, latents = state.ema, loaded.plan, loaded.val
    modes = {"val/loss_dense": False} | ({"val/loss_routed": True} if ema.model.routes else {})
    n = min(settings.train.val_samples, len(latents))
    sums = torch.zeros(len(modes), device=ema.device)
    binned = torch.zeros(len(modes), 2, len(BINS), device=ema.device)  # losses, samples

    with together():
        for chunk in range(plan.rank * VAL_BATCH, n, plan.world_size * VAL_BATCH):
            raw, condition, *_ = latents.read(range(chunk, min(chunk + VAL_BATCH, n)))
            raw, condition = raw.to(ema.device), conditions.to(condition, ema.device)
            for i, routed in enumerate(modes.values()):
                processes.poll()
                generator = seeded_generator(settings.seed, "val", chunk, device=ema.device)
                x = latents.to_model_input(raw, generator)
                routing = ema.model.training_routing(len(x), generator, ema.device) if routed else None
                net = partial(ema.model, routing=routing)
                with torch.autocast(ema.device.type, torch.bfloat16, enabled=ema.precision == "bf16"):
                    errors = state.objective.errors(partial(noting, times := [], net), x, condition, generator)
                    loss = ema.model.reduce(*errors, routing)  # (B,)
                sums[i] += loss.sum()
                if (share := state.objective.noise_share(times[-1])) is not None:
                    bins = (share * len(BINS)).long().clamp(0, len(BINS) - 1)  # (B,)
                    inside = bins[:, None] == torch.arange(len(BINS), device=ema.device)  # (B, bins)
                    binned[i] += torch.stack([torch.where(inside, loss[:, None], 0), inside]).sum(dim=1)
    if plan.world_size > 1:
        torch.distributed.all_reduce(sums)
        torch.distributed.all_reduce(binned)
    values = {name: total / n for name, total in zip(modes, sums.tolist())}
    if binned.any():
        bins = [(name, centre) for name in modes for centre in BINS]
        totals, counts = binned.transpose(0, 1).flatten(1).tolist()
        values |= {f"{name}/{c}": total / n for (name, c), total, n in zip(bins, totals, counts) if n}
    return values


def noting(times: list, net: Callable, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
    """net(x, t, condition); t (B,) is appended to `times`."""
    times.append(t)
    return net(x, t, condition)


def score_ema(settings: Settings, state: TrainState, run_folder: Path) -> dict[str, float]:
    """Generates and scores images on all processes, as fid.py does -> the log's values; metrics.json has the rest."""
    extractor, reference = extractor_and_reference(settings.eval)
    result = evaluate(state.ema, settings.eval, extractor, reference)
    if result:
        ema, images = state.ema, len(settings.eval.all_seeds)
        name = score_name(settings.eval, extractor, images, ema.precision, ema.compile)
        write_metrics(result, run_folder / "eval" / f"{state.step:07d}-{name}")
    return {f"eval/{name}": result[name] for name in result if name.startswith(SCORES)}


def preview(settings: Preview, ema: Run, path: Path) -> None:
    """A grid of samples of the EMA, with the same seeds and conditions each time."""
    condition = preview_condition(settings, ema)
    images = generate(ema, settings, range(settings.num_images), condition)
    save_grid(torch.cat(list(images)), path, 10, class_names(condition, ema.settings.data.classes))


def preview_condition(settings: Preview, ema: Run) -> Condition:
    return conditions.choose("balanced", range(settings.num_images), ema.pool)


def end_early(processes: PreemptionHandler, step: int, run_folder: Path, log: Log) -> int:
    """Says that a saved run is to be started again -> exit code.

    <run folder>/start_again says it to job scripts: no launcher hands on the exit code that does.
    """
    if processes.dist.is_main_process:
        with log.survive(START_AGAIN):
            write_text_atomic(run_folder / START_AGAIN, f"{processes.reason} after step {step}\n")
    log.close(f"stopped by {processes.reason} after step {step}, saved: the same command continues")
    return EXIT_START_AGAIN


@torch.no_grad()
def check_replicas(model: nn.Module, step: int, dist: PartialState) -> None:
    """Raises UserError where the processes' weights differ in any bit."""
    differs = torch.zeros(dist.num_processes, device=dist.device)
    for own in model.parameters():
        first = own.clone()
        torch.distributed.broadcast(first, 0)
        differs[dist.process_index] += (own.view(torch.int32) != first.view(torch.int32)).any()
    torch.distributed.all_reduce(differs)
    ranks = differs.nonzero().flatten().tolist()
    if ranks:
        raise UserError(
            f"at step {step} the weights of processes {ranks} differ from process 0's: a machine computes wrongly"
        )


def dump_bad_step(settings: Settings, loaded: TrainingData, run_folder: Path, step: int) -> Path:
    """Writes what replays a step: its seed and the keys of its global batch."""
    size, latents = loaded.plan.global_batch_size, loaded.train
    keys = latents.keys(data.Order(len(latents), settings.seed)(np.arange((step - 1) * size, step * size)))
    path = run_folder / f"nonfinite_step_{step:07d}.json"
    write_text_atomic(path, json.dumps({"step": step, "seed": settings.seed, "keys": keys}, indent=2) + "\n")
    return path


def dry_run(settings: Settings, dist: PartialState, plan: data.BatchPlan) -> int:
    """Builds the run, prints its cost and takes one step on noise; reads and writes no data -> exit code 0."""
    state = build_state(settings, dist, new=True)
    state.ema.pool = conditions.pool(state.model.null_condition, kept=state.model.null_condition)
    check_sampling(settings, state.ema)
    if dist.num_processes > 1:
        state.net = wrap(state)
    noise = seeded_generator(settings.seed, "dry run", dist.process_index, device=dist.device)
    shape = (plan.micro_batch_size, *state.model.latent_shape)
    nothing = conditions.repeat(state.model.null_condition, plan.micro_batch_size, dist.device)
    no_data = SimpleNamespace(to_model_input=lambda raw, generators: raw)
    features = state.blank_features(plan.micro_batch_size)
    batches = ((normal(shape, noise), nothing, *features) for _ in range(plan.accumulation))
    state.step = 1
    loss, grad_norm = train_step(settings, TrainingData(no_data, no_data, plan), state, batches)
    if dist.is_main_process:
        print(f"model      {type(state.model).__name__} {state.model.name}\n{cost_table(state.model, settings)}")
        print(memory_table(settings, plan.micro_batch_size, device=dist.device.type, processes=plan.world_size))
        print(
            f"dry run    one step on noise: loss {loss:.4g}, gradient norm {grad_norm:.4g}; nothing was read or written"
        )
    return 0


def wrap(state: TrainState) -> nn.Module:
    """The model in DistributedDataParallel, before `compile_blocks`: in a step the processes exchange gradients alone.

    After its first backward pass DDP lays out its buckets anew, and with them the order in which three or more
    processes add up. So that a step after a resume rounds as in a run without, a backward pass of zeros comes first.
    """
    torch._dynamo.config.optimize_ddp = False  # or its buckets would cut the compiled blocks in pieces
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer releases call broadcast_buffers by another name
        net = nn.parallel.DistributedDataParallel(state.net, broadcast_buffers=False, gradient_as_bucket_view=True)
    model, device, features = state.model, state.ema.device, state.blank_features(2)
    x = torch.zeros(2, *model.latent_shape, device=device)  # (2, C, h, w)
    rows = BatchSlice(seeded_generator("first pass", device=device), 0, len(x))
    routing = model.training_routing(len(x), rows, device)
    nothing = conditions.repeat(model.null_condition, len(x), device)
    (replace(state, net=net).loss(x, nothing, rows, routing, *features) * 0).sum().backward()
    net.zero_grad(set_to_none=True)
    return net


def launch(arguments: list[str]) -> None:
    sys.argv[1:] = cli.literal_paths(arguments, sweep=bool({"-m", "--multirun"} & set(arguments)))
    main()


if __name__ == "__main__":
    cli.command(launch, __doc__)

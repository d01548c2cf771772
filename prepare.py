"""Everything before the first training step: what cannot run is refused here, before anything is written or slow."""

import copy
import fcntl
import json
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from accelerate import PartialState
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from torch import nn

import checkpoint
import cli
import data
from cost import cost_table
from guard import FiniteGuard
from loading import instantiate, load_run
from randomness import Rows
from sample import guidance_from

AT_LEAST = {
    "train.max_steps": 1, "train.global_batch_size": 1, "train.micro_batch_size": 1, "train.lr": 0,
    "train.warmup_steps": 0, "train.decay_steps": 0, "train.log_every": 1, "train.val_every": 0, "train.val_samples": 1,
    "train.save_every": 0, "train.keep_last": 1, "train.max_hours": 0, "train.timeout_s": 1, "train.max_skipped": 0,
    "train.check_replicas_every": 0, "train.keep_every": 1, "preview.every": 0, "eval.every": 0,
    "preview.num_images": 1, "data.num_workers": 0,
}  # fmt: skip


@dataclass(frozen=True)
class BatchPlan:
    """global_batch_size = world_size * micro_batch_size * accumulation; micro-batch m of rank r starts at row
    (m * world + r) * micro."""

    global_batch_size: int
    micro_batch_size: int
    accumulation: int
    rank: int
    world_size: int

    def rows(self, generator: torch.Generator, micro: int) -> Rows:
        return Rows(generator, (micro * self.world_size + self.rank) * self.micro_batch_size, self.global_batch_size)


@dataclass
class State:
    """What training changes. `net` is `model`, wrapped for several processes."""

    net: nn.Module
    model: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    guard: FiniteGuard


def name_run(cfg: DictConfig) -> DictConfig:
    """Hydra's part: run_name and key types. A sweep's jobs go to <run_name or multirun>/<what is swept>."""
    hydra_cfg = HydraConfig.get()
    if hydra_cfg.mode == RunMode.MULTIRUN:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("-m runs its jobs in one process, one after another; start one launch per job instead")
        given = OverridesParser.create().parse_overrides(overrides_of(sys.argv))
        swept = {o.key_or_group for o in given if o.is_sweep_override()}
        job = ",".join(o for o in hydra_cfg.overrides.task if o.partition("=")[0] in swept) or f"job{hydra_cfg.job.num}"
        cfg.run_name = f"{cfg.run_name or 'multirun'}/{job.replace('/', '-')}"
    elif cfg.run_name is None:
        choices = hydra_cfg.runtime.choices
        cfg.run_name = f"{choices.data}-{choices.model}-{choices.objective}"
    cli.check_types(cfg, "config", hydra_cfg.overrides.task)
    return cfg


def overrides_of(argv: list[str]) -> list[str]:
    return [argument for argument in argv[1:] if "=" in argument and not argument.startswith("-")]


def resolve_config(cfg: DictConfig, dist: PartialState) -> DictConfig:
    """Plain values only, precision decided. Raises ValueError for what cannot run."""
    OmegaConf.resolve(cfg)
    train = cfg.train
    for key, least in AT_LEAST.items():
        value = OmegaConf.select(cfg, key)
        if value is not None and not (isinstance(value, (int, float)) and value >= least):
            raise ValueError(f"{key}={value}; needed: at least {least}")
    if cfg.wandb.mode not in ("disabled", "offline", "online"):
        raise ValueError(f"wandb.mode={cfg.wandb.mode}; needed: disabled, offline or online")
    if not 0 <= train.label_dropout < 1 or not 0 <= train.ema_decay < 1 or not train.grad_clip > 0:
        raise ValueError("needed: train.label_dropout and train.ema_decay in [0, 1), train.grad_clip > 0")
    if train.compile not in ("blocks", "off", False):  # YAML reads a bare off as false
        raise ValueError(f"train.compile={train.compile}; needed: blocks or off")
    train.compile = "blocks" if train.compile == "blocks" else "off"
    train.precision = cfg.eval.precision = decide_precision(train.precision, dist.device)
    guidance_from(cfg.preview)
    guidance_from(cfg.eval)
    return cfg


def decide_precision(wanted: str, device: torch.device) -> str:
    """bf16 or fp32. `auto` follows accelerate's launch flag, else is bf16 on hardware with bf16 matrix units."""
    if wanted == "auto":
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launched == "no":
            return "bf16" if has_fast_bf16(device) else "fp32"
        wanted = launched
    if wanted not in ("bf16", "fp32"):
        raise ValueError(
            f"precision {wanted!r}; needed: auto, bf16 or fp32 (fp16 overflows in long runs and is not offered)"
        )
    return wanted


def has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")
    return device.type == "cpu" and cpuinfo.is_file() and "amx_bf16" in cpuinfo.read_text()


def batch_plan(train: DictConfig, dist: PartialState) -> BatchPlan:
    world, total = dist.num_processes, train.global_batch_size
    share = total // world
    micro = train.micro_batch_size or share
    if total < 1 or total % (world * max(micro, 1)):
        raise ValueError(
            f"train.global_batch_size={total} is not "
            f"processes ({world}) x train.micro_batch_size ({micro}) x a whole number"
        )
    return BatchPlan(total, micro, total // (world * micro), dist.process_index, world)


def open_data(cfg: DictConfig, dist: PartialState) -> tuple[data.Latents, data.Latents]:
    """(train, validation) latents, of the shape and classes that the model is for. Raises ValueError where they are
    not."""
    if cfg.data.prepare == "mnist":
        with dist.local_main_process_first():
            data.prepare_mnist(cfg.data.path)
    train = data.open_latents(cfg.data.path, kind=cfg.data.kind, on_error=cfg.data.on_error)
    wanted = (cfg.data.channels, cfg.data.input_size, cfg.data.input_size)
    if tuple(train.shape) != wanted:
        raise ValueError(
            f"{cfg.data.path} holds latents of shape {tuple(train.shape)}, the model is for {wanted}: "
            f"set data.channels and data.input_size, or data.path"
        )
    if train.num_classes > cfg.data.num_classes:
        raise ValueError(
            f"{cfg.data.path} has {train.num_classes} classes, the model has data.num_classes={cfg.data.num_classes}"
        )
    if not data.has_split(cfg.data.path, "val"):
        return train, train
    return train, data.open_latents(cfg.data.path, split="val", kind=cfg.data.kind, on_error=cfg.data.on_error)


def build(cfg: DictConfig, dist: PartialState, new: bool) -> tuple[State, object]:
    """(state, objective) before the first step; `new` ones start from cfg.init_from, if any. Raises ValueError."""
    starts_elsewhere = new and cfg.init_from is not None
    if starts_elsewhere:
        checkpoint.find(cfg.init_from)
    torch.manual_seed(cfg.seed)  # initial weights; the training maths never uses the global generator
    model = instantiate(cfg.model).to(dist.device)
    objective = instantiate(cfg.objective)
    if starts_elsewhere:
        start_from(cfg.init_from, model, objective)
    model.gradient_checkpointing = cfg.train.gradient_checkpointing
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = make_optimizer(model, cfg)
    return State(model, model, ema, optimizer, FiniteGuard(optimizer, dist.device, cfg.train.on_nonfinite)), objective


def start_from(ckpt: str, model: nn.Module, objective) -> None:
    """Loads the EMA weights of `ckpt`. Raises ValueError where they are another model's or another objective's."""
    source = load_run(ckpt, "ema", device="cpu")
    if type(source.objective) is not type(objective):
        found, wanted = type(source.objective).__name__, type(objective).__name__
        raise ValueError(f"init_from={ckpt} was trained as {found}, this run is {wanted}: set objective=")
    checkpoint.load_strictly(model, source.model.state_dict(), source=str(ckpt))


def make_optimizer(model: nn.Module, cfg: DictConfig) -> torch.optim.AdamW:
    settings = cfg.optimizer
    return torch.optim.AdamW(
        model.parameters(), lr=cfg.train.lr, betas=tuple(settings.betas), eps=settings.eps,
        weight_decay=settings.weight_decay, fused=True,
    )  # fmt: skip


def find_resume(cfg: DictConfig, run_folder: Path) -> Path | None:
    """The checkpoint to go on from, whole and unchanged; None for a new run. Raises ValueError."""
    if cfg.resume is None:
        if (run_folder / "config.yaml").exists() or checkpoint.latest(run_folder) is not None:
            raise ValueError(f"{run_folder} exists already; set resume=auto to go on from it, or another run_name")
        return None
    if cfg.resume != "auto":
        found = checkpoint.find(cfg.resume)
        checkpoint.verify(found)
        return found
    return checkpoint.newest_intact(run_folder)


# What may differ between a run and its continuation without changing a number of it.
HARMLESS = (
    "run_name", "results_dir", "resume", "resume_allow", "preview", "eval", "wandb", "hardware", "sampler", "data.path",
    "data.prepare", "data.num_workers", "train.dry_run", "train.micro_batch_size", "train.log_every",
    "train.val_every", "train.val_samples", "train.save_every", "train.keep_last", "train.keep_every",
    "train.max_hours", "train.timeout_s", "train.check_replicas_every", "train.on_nonfinite", "train.max_skipped",
    "train.gradient_checkpointing",
)  # fmt: skip


def resume(path: Path, state: State, cfg: DictConfig, latents: data.Latents) -> int:
    """Restores weights, EMA and optimizer -> the step they are of. Raises ValueError where the run is another one."""
    saved = OmegaConf.load(path / "config.yaml")
    allowed = (*HARMLESS, *cfg.resume_allow) + (() if cfg.train.decay_steps else ("train.max_steps",))
    differing = [
        f"{key} was {OmegaConf.select(saved, key)}, is {OmegaConf.select(cfg, key)}"
        for key in dict.fromkeys([*cli.flat_keys(saved), *cli.flat_keys(cfg)])
        if not any(key == prefix or key.startswith(f"{prefix}.") for prefix in allowed)
        and OmegaConf.select(saved, key) != OmegaConf.select(cfg, key)
    ]
    fingerprint = json.loads((path / "trainer_state.json").read_text())["data"]
    if fingerprint != latents.fingerprint and "data" not in cfg.resume_allow:
        differing.append(f"the data's fingerprint was {fingerprint}, is {latents.fingerprint}")
    if differing:
        raise ValueError(
            f"{path} is of another run: {'; '.join(differing)} (resume_allow=[key,...] goes on all the same)"
        )
    checkpoint.load_weights(path, state.model, "raw")
    checkpoint.load_weights(path, state.ema, "ema")
    checkpoint.load_optimizer(path, state.model, state.optimizer)
    return checkpoint.step_of(path)


def claim_run_folder(run_folder: Path, cfg: DictConfig, start_step: int) -> TextIO:
    """Makes the folder, locks it, writes the resolved config, and drops log lines of steps that will be taken again.

    The lock is the kernel's and ends with the process, however it ends. Raises ValueError where another job has it.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    lock = open(run_folder / ".lock", "a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip() or "another job"
        raise ValueError(f"{run_folder} is in use by {owner}; needed: another run_name") from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    checkpoint.remove_temporaries(run_folder)
    checkpoint.write_text_atomic(run_folder / "config.yaml", OmegaConf.to_yaml(cfg))
    metrics = run_folder / "metrics.jsonl"
    if metrics.exists():
        complete = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
        checkpoint.write_text_atomic(metrics, "".join(line for line in complete if was_logged_before(line, start_step)))
    return lock


def was_logged_before(line: str, start_step: int) -> bool:
    """Whether a log line stays at a resume: all up to the checkpoint, but its evaluations, which are made again."""
    values = json.loads(line)
    return values["step"] < start_step or (values["step"] == start_step and "train/loss" in values)


def describe(
    cfg: DictConfig, model: nn.Module, latents: data.Latents, plan: BatchPlan, resumed: Path | None,
    compiled: str, why_not: str,
) -> str:  # fmt: skip
    """What a run's first lines say."""
    lines = [
        f"run        {Path(cfg.results_dir) / cfg.run_name}" + (f", from {resumed}" if resumed else ""),
        f"model      {cfg.model.size}",
        cost_table(model, cfg),
        f"data       {cfg.data.path}: {len(latents)} samples of {tuple(latents.shape)}, {latents.num_classes} classes",
        f"batch      {plan.global_batch_size} = {plan.world_size} processes x {plan.micro_batch_size} "
        f"x {plan.accumulation} accumulated",
        f"precision  {cfg.train.precision}, compile {compiled}{': ' + why_not if why_not else ''}",
    ]
    return "\n".join(lines)

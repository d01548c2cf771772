"""Everything before the first training step. What cannot run is refused here, before anything slow or written."""

import copy
import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import torch
from accelerate import PartialState
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

import data
from checkpoints import power_ema
from checkpoints.load import load_run
from checkpoints.run_folder import (
    abandon_after,
    average_name,
    find_checkpoint,
    in_todays_names,
    latest_checkpoint,
    load_optimizer,
    load_strictly,
    load_weights,
    newest_intact,
    read_config,
    read_tensors,
    remove_temporaries,
    step_of,
    verify_checkpoint,
)
from cost import cost_table
from data import BatchPlan
from guidance import check_networks, guidance_from
from system import UserError, cli, hub
from system.files import reserve, write_text_atomic
from system.instantiate import instantiate
from system.processes import is_main
from training.guard import FiniteGuard
from training.optimizer import check_optimizer, make_optimizer
from training.stopping import START_AGAIN

WENT_BACK = "went_back.json"  # in checkpoints/: the last explicit resume=, and the step it started from
AT_LEAST = {
    "train.max_steps": 1, "train.global_batch_size": 1, "train.micro_batch_size": 1, "train.lr": 0,
    "train.warmup_steps": 0, "train.decay_steps": 0, "train.log_every": 1, "train.val_every": 0, "train.val_samples": 1,
    "train.save_every": 0, "train.keep_last": 1, "train.max_hours": 0, "train.timeout_s": 1, "train.max_skipped": 0,
    "train.check_replicas_every": 0, "train.keep_every": 1, "preview.every": 0, "eval.every": 0,
    "preview.num_images": 1, "data.num_workers": 0,
}  # fmt: skip


@dataclass
class TrainState:
    """What a training step changes. `net` is `model`, wrapped in DDP for several processes."""

    net: nn.Module
    model: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    guard: FiniteGuard
    power: dict[float, nn.Module] = field(default_factory=dict)  # power averages by width

    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint has of weights, by file."""
        averages = {average_name(width): average for width, average in self.power.items()}
        return {"model": self.model, "ema": self.ema, **averages}


def name_run(cfg: DictConfig) -> DictConfig:
    """Names the run and checks key types. A sweep's jobs go to <run_name or multirun>/<swept overrides>."""
    hydra_cfg = HydraConfig.get()
    cli.check_types(cfg, "config", hydra_cfg.overrides.task)
    choices = hydra_cfg.runtime.choices
    earlier = None  # the folder's name by earlier versions
    if hydra_cfg.mode == RunMode.MULTIRUN:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError("-m runs its jobs one after another in one process; needed: one launch per job")
        given = OverridesParser.create().parse_overrides(overrides_of(sys.argv))
        keys = {o.key_or_group for o in given if o.is_sweep_override()}
        swept = [o for o in hydra_cfg.overrides.task if o.partition("=")[0] in keys]
        parent, job = cfg.run_name or "multirun", f"job{hydra_cfg.job.num}"
        cfg.run_name = f"{parent}/{job_name(swept) or job}"
        earlier = f"{parent}/{(','.join(swept) or job).replace('/', '-')}"
    elif cfg.run_name is None:
        cfg.run_name = default_name(choices, cfg.model.size)
        earlier = f"{choices.data}-{choices.model}-{choices.objective}"
    if earlier and cfg.resume == "auto" and is_this_run(Path(cfg.results_dir) / earlier, cfg):
        if not (Path(cfg.results_dir) / cfg.run_name).exists():
            if os.environ.get("RANK", "0") == "0":
                print(f"this run has a folder, named as in earlier versions: {earlier} (today: {cfg.run_name})")
            cfg.run_name = earlier
    return cfg


def default_name(choices: Mapping, size: str) -> str:
    """[<experiment>-]<data>-<model>-<size>-<objective>: mnist-tread-XS4-edm. One named as its data is said once."""
    experiment = choices.get("experiment")
    first = [experiment] if experiment not in (None, "null", choices["data"]) else []
    size = re.sub(r"[^A-Za-z0-9.]", "", size.removeprefix("DiT-"))
    return "-".join([*first, choices["data"], choices["model"], size, choices["objective"]])


def job_name(swept: Sequence[str]) -> str:
    """Overrides as a folder name that a shell need not quote: model-dit_train.lr-1e-3.

    A value of other characters gets a digest, so that two values never share a name.
    """
    parts = []
    for override in swept:
        key, _, value = override.partition("=")
        plain = re.sub(r"[^A-Za-z0-9.+-]+", "-", value).strip("-")
        if plain != value.replace("/", "-"):
            plain += f"-{hashlib.sha256(value.encode()).hexdigest()[:6]}"
        parts.append(f"{key}-{plain}".replace("@", "-").replace("/", "-"))
    return "_".join(parts)


def is_this_run(folder: Path, cfg: DictConfig) -> bool:
    """Whether a run folder's settings are these, as far as both know them and they are not chosen by the machine."""
    if not (folder / "config.yaml").is_file():
        return False
    saved = in_todays_names(OmegaConf.load(folder / "config.yaml"))
    keys = set(cli.flat_keys(saved)) & set(cli.flat_keys(cfg))
    left_out = (*HARMLESS, "train.precision", "train.compile", *([] if cfg.train.decay_steps else ["train.max_steps"]))
    kept = [key for key in keys if not any(key == k or key.startswith(f"{k}.") for k in left_out)]
    return all(OmegaConf.select(saved, key) == OmegaConf.select(cfg, key) for key in kept)


def overrides_of(argv: list[str]) -> list[str]:
    return [argument for argument in argv[1:] if "=" in argument and not argument.startswith("-")]


def resolve_config(cfg: DictConfig, dist: PartialState) -> DictConfig:
    """The config with interpolations and automatic choices resolved. Raises UserError for what cannot run."""
    OmegaConf.resolve(cfg)
    train = cfg.train
    for key, least in AT_LEAST.items():
        value = OmegaConf.select(cfg, key)
        if value is not None and not (isinstance(value, (int, float)) and value >= least):
            raise UserError(f"{key}={value}; needed: at least {least}")
    if cfg.wandb.mode not in ("disabled", "offline", "online"):
        raise UserError(f"wandb.mode={cfg.wandb.mode}; needed: disabled, offline or online")
    clips = train.grad_clip is None or train.grad_clip > 0
    if not 0 <= train.label_dropout < 1 or not 0 <= train.ema_decay < 1 or not clips:
        raise UserError("needed: train.label_dropout and train.ema_decay in [0, 1), train.grad_clip > 0 or null")
    if cfg.resume is not None and not isinstance(cfg.resume, str):
        raise UserError(f"resume={cfg.resume}; needed: auto, null, a run or one of its checkpoints")
    betas = cfg.optimizer.betas
    if not (OmegaConf.is_list(betas) and len(betas) == 2 and all(is_number(b) and 0 <= b < 1 for b in betas)):
        raise UserError(f"optimizer.betas={betas}; needed: two numbers in [0, 1)")
    if train.save not in ("sync", "async"):
        raise UserError(f"train.save={train.save}; needed: sync or async")
    if train.compile not in ("blocks", "off", False):  # YAML reads a bare off as false
        raise UserError(f"train.compile={train.compile}; needed: blocks or off")
    micro = train.micro_batch_size or train.global_batch_size // dist.num_processes
    if cfg.objective.get("contrastive") and micro % 2:
        raise UserError(f"objective.contrastive pairs the rows of a micro-batch; needed: an even size, got {micro}")
    train.compile = "blocks" if train.compile == "blocks" else "off"
    train.precision = cfg.eval.precision = decide_precision(train.precision, dist.device)
    check_optimizer(cfg.optimizer)
    if not isinstance(cfg.ema.widths, ListConfig | None):
        raise UserError(f"ema.widths={cfg.ema.widths}; needed: a list, as in ema=power")
    for width in cfg.ema.widths or ():
        power_ema.check_width(width)
    guidance_from(cfg.preview)
    guidance_from(cfg.eval)
    return cfg


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def decide_precision(wanted: str, device: torch.device) -> str:
    """bf16 or fp32. "auto" follows accelerate's launch flag, else it is bf16 on hardware with bf16 matrix units."""
    if wanted == "auto":
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launched == "no":
            return "bf16" if has_fast_bf16(device) else "fp32"
        wanted = launched
    if wanted not in ("bf16", "fp32"):
        raise UserError(
            f"precision {wanted!r}; needed: auto, bf16 or fp32 (fp16 overflows in long runs and is not offered)"
        )
    return wanted


def has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")
    return device.type == "cpu" and cpuinfo.is_file() and "amx_bf16" in cpuinfo.read_text()


def batch_plan(train: DictConfig, dist: PartialState) -> BatchPlan:
    """How the global batch splits over processes and accumulation. Raises UserError where it does not."""
    world, total = dist.num_processes, train.global_batch_size
    micro = train.micro_batch_size or total // world
    if total < 1 or total % (world * max(micro, 1)):
        raise UserError(
            f"train.global_batch_size={total} is not "
            f"processes ({world}) x train.micro_batch_size ({micro}) x a whole number"
        )
    return BatchPlan(total, micro, total // (world * micro), dist.process_index, world)


def open_data(cfg: DictConfig, dist: PartialState) -> tuple[data.Latents, data.Latents]:
    """(train, validation) latents. Raises UserError where their shape or classes are not the model's."""
    if cfg.data.prepare == "mnist":
        with dist.local_main_process_first():
            data.prepare_mnist(cfg.data.path)
    with dist.local_main_process_first():
        folder = hub.local(cfg.data.path, "dataset")
    train = data.open_latents(folder, kind=cfg.data.kind, on_error=cfg.data.on_error)
    wanted = (cfg.data.channels, cfg.data.input_size, cfg.data.input_size)
    if tuple(train.shape) != wanted:
        raise UserError(
            f"{cfg.data.path} holds latents of shape {tuple(train.shape)}, the model is for {wanted}: "
            f"set data.channels and data.input_size, or data.path"
        )
    if train.num_classes > cfg.data.num_classes:
        raise UserError(
            f"{cfg.data.path} has {train.num_classes} classes, the model has data.num_classes={cfg.data.num_classes}"
        )
    if not data.has_split(folder, "val"):
        return train, train
    return train, data.open_latents(folder, split="val", kind=cfg.data.kind, on_error=cfg.data.on_error)


def build(cfg: DictConfig, dist: PartialState, new: bool) -> tuple[TrainState, object]:
    """(state, objective) before the first step; a `new` run starts from cfg.init_from, if set. Raises UserError."""
    starts_elsewhere = new and cfg.init_from is not None
    if starts_elsewhere:
        find_checkpoint(cfg.init_from, "init_from")
    torch.manual_seed(cfg.seed)  # for the initial weights; training itself never uses the global generator
    model = instantiate(cfg.model).to(dist.device)
    objective = instantiate(cfg.objective)
    for part in ("preview", "eval"):
        if cfg[part].every and cfg[part].weak_ckpt is None:
            check_networks(guidance_from(cfg[part]), model, model)
    if starts_elsewhere:
        start_from(cfg.init_from, model, objective)
    model.gradient_checkpointing = cfg.train.gradient_checkpointing
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = make_optimizer(model, cfg.optimizer, cfg.train.lr)
    guard = FiniteGuard(optimizer, dist.device, cfg.train.on_nonfinite)
    power = {width: copy.deepcopy(ema) for width in cfg.ema.widths or ()}
    return TrainState(model, model, ema, optimizer, guard, power), objective


def start_from(ckpt: str, model: nn.Module, objective) -> None:
    """Loads the EMA weights of `ckpt`. Raises UserError where its model or objective is another."""
    source = load_run(ckpt, "ema", device="cpu")
    if type(source.objective) is not type(objective):
        found, wanted = type(source.objective).__name__, type(objective).__name__
        raise UserError(f"init_from={ckpt} was trained as {found}, this run is {wanted}: set objective=")
    load_strictly(model, source.model.state_dict(), source=str(ckpt))


def find_resume(cfg: DictConfig, run_folder: Path) -> Path | None:
    """The verified checkpoint to resume from; None for a new run. Raises UserError."""
    if cfg.resume is None:
        if (run_folder / "config.yaml").exists() or latest_checkpoint(run_folder) is not None:
            raise UserError(f"{run_folder} exists already; set resume=auto to continue it, or another run_name")
        return None
    if cfg.resume == "auto":
        return newest_intact(run_folder)
    # The same command goes on where it was stopped; only its first start goes back.
    since = gone_back(cfg, run_folder)
    newest = newest_intact(run_folder) if since is not None else None
    if newest is not None and step_of(newest) > since:
        return newest
    found = find_checkpoint(cfg.resume, "resume")
    verify_checkpoint(found)
    return found


def gone_back(cfg: DictConfig, run_folder: Path) -> int | None:
    """The step to which the run went back when it was last started with this very resume=; None = it was not."""
    note = run_folder / "checkpoints" / WENT_BACK
    try:
        went = json.loads(note.read_text())
        return went["step"] if went["resume"] == str(Path(cfg.resume).absolute()) else None
    except (FileNotFoundError, ValueError, KeyError):
        return None


def go_back(cfg: DictConfig, run_folder: Path, start_step: int) -> None:
    """Sets later checkpoints aside, deleting nothing, and notes where an explicit resume= has started."""
    if abandoned := abandon_after(run_folder, start_step):
        print(f"resume     step {start_step}; later checkpoints are in {abandoned} now")
    if cfg.resume in (None, "auto"):
        return
    note, since = run_folder / "checkpoints" / WENT_BACK, gone_back(cfg, run_folder)
    if since is not None and start_step > since:
        again = f"to go back once more, remove {note}"
        print(f"resume     the run went back to {cfg.resume} before, and goes on at step {start_step}; {again}")
    else:
        note.parent.mkdir(exist_ok=True)
        write_text_atomic(note, json.dumps({"resume": str(Path(cfg.resume).absolute()), "step": start_step}) + "\n")


# Keys that may differ between a run and its continuation: none of them changes a number.
HARMLESS = (
    "run_name", "results_dir", "resume", "resume_allow", "preview", "eval", "wandb", "hardware", "sampler", "data.path",
    "data.prepare", "data.num_workers", "train.dry_run", "train.micro_batch_size", "train.log_every",
    "train.val_every", "train.val_samples", "train.save_every", "train.save", "train.keep_last", "train.keep_every",
    "train.max_hours", "train.timeout_s", "train.check_replicas_every", "train.on_nonfinite", "train.max_skipped",
    "train.gradient_checkpointing", "train.deterministic",
)  # fmt: skip


def resume(path: Path, state: TrainState, cfg: DictConfig, latents: data.Latents) -> int:
    """Restores weights, EMA and optimizer -> the checkpoint's step. Raises UserError where the run is another."""
    saved = read_config(path)
    allowed = (*HARMLESS, *cfg.resume_allow) + (() if cfg.train.decay_steps else ("train.max_steps",))
    known, differing, newer = set(cli.flat_keys(saved)), [], []
    for key in dict.fromkeys([*known, *cli.flat_keys(cfg)]):
        was, now = OmegaConf.select(saved, key), OmegaConf.select(cfg, key)
        if any(key == prefix or key.startswith(f"{prefix}.") for prefix in allowed) or key in known and was == now:
            continue
        if key in known:
            differing.append(f"{key} was {was}, is {now}")
        elif now in (defaults := cli.defaults_of(key)):
            newer.append(f"{key}={now}")
        else:
            differing.append(f"{key} is newer than the checkpoint, which had {defaults}, is {now}")
    fingerprint = json.loads((path / "trainer_state.json").read_text())["data"]
    if fingerprint != latents.fingerprint and "data" not in cfg.resume_allow:
        differing.append(f"the data's fingerprint was {fingerprint}, is {latents.fingerprint}")
    if differing:
        raise UserError(
            f"{path} is of another run: {'; '.join(differing)} (resume_allow=[key,...] continues it nevertheless)"
        )
    if newer and is_main():
        print(f"resume     the checkpoint is older than {', '.join(newer)}: the defaults, as it was trained")
    load_weights(path, state.model, "raw")
    load_weights(path, state.ema, "ema")
    for width, average in state.power.items():
        file = path / f"{average_name(width)}.safetensors"
        if not file.is_file():
            raise UserError(f"{path} has no power average of width {width}; needed: a run with it from its first step")
        load_strictly(average, read_tensors(file), source=str(file))
    load_optimizer(path, state.model, state.optimizer)
    return step_of(path)


def reserve_run_folder(run_folder: Path, cfg: DictConfig, start_step: int) -> TextIO:
    """Creates and locks the folder, sets aside what comes after `start_step`, and writes the resolved config.

    Closing the returned file releases the lock. Raises UserError where another job holds it.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    lock = reserve(run_folder)
    remove_temporaries(run_folder)
    (run_folder / START_AGAIN).unlink(missing_ok=True)
    go_back(cfg, run_folder, start_step)
    write_text_atomic(run_folder / "config.yaml", OmegaConf.to_yaml(cfg))
    metrics = run_folder / "metrics.jsonl"
    if metrics.exists():
        write_text_atomic(metrics, log_until(metrics, start_step))
    return lock


def log_until(metrics: Path, step: int) -> str:
    """The log's lines that stay at a resume: those up to the checkpoint, but not its evaluations, which run again.

    Lines that a full disk or a power cut has broken are left out, with a warning.
    """
    kept, broken = [], []
    lines = metrics.read_bytes().split(b"\n")[:-1]  # what follows the last line's end, a killed job was writing
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line.decode())
            if values["step"] < step or (values["step"] == step and "train/loss" in values):
                kept.append(line.decode() + "\n")
        except (ValueError, KeyError, TypeError):
            broken.append(number)
    if broken:
        numbers = ", ".join(map(str, broken[:10])) + (", ..." if len(broken) > 10 else "")
        print(f"warning: {metrics}: left out what is no log line: {numbers}", file=sys.stderr)
    return "".join(kept)


def describe(
    cfg: DictConfig, model: nn.Module, latents: data.Latents, plan: BatchPlan, resumed: Path | None,
    compiled: str, why_not: str,
) -> str:  # fmt: skip
    """The first lines of a run's output."""
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

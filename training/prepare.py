"""Everything before the first training step. What cannot run is refused here, before anything slow or written."""

import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

import data
from checkpoints import power_ema
from checkpoints.load import load_run
from checkpoints.run_folder import average_name, find_checkpoint, load_strictly, read_config
from cost import cost_table, memory_table, step_products
from data import BatchPlan
from guidance import check_networks, guidance_from
from system import UserError, hub
from system.instantiate import instantiate
from system.precision import decide_precision, launched_precision
from training.guard import FiniteGuard
from training.optimizer import check_optimizer, make_optimizer
from training.trackers import check_log

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


def resolve_config(cfg: DictConfig, dist: PartialState) -> DictConfig:
    """The config with interpolations and automatic choices resolved. Raises UserError for what cannot run."""
    OmegaConf.resolve(cfg)
    train = cfg.train
    for key, least in AT_LEAST.items():
        value = OmegaConf.select(cfg, key)
        if value is not None and not (isinstance(value, (int, float)) and value >= least):
            raise UserError(f"{key}={value}; needed: at least {least}")
    check_log(cfg.log)
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


def settle_precision(cfg: DictConfig, dist: PartialState, micro_batch: int, resumed: Path | None = None) -> None:
    """Puts bf16 or fp32 in the place of auto; all processes must call this. Raises UserError.

    A resumed run keeps its own, whatever this machine would choose; only the launcher's word comes before that.
    """
    wanted = cfg.train.precision
    if wanted == "auto" and resumed is not None and launched_precision() is None:
        wanted = read_config(resumed).train.precision

    products = partial(step_products, cfg, micro_batch)
    cfg.train.precision = cfg.eval.precision = decide_precision(wanted, dist.device, products, backward=True)


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
    made = {"mnist": "the digits are", "fashion": "Fashion-MNIST is", "idx": "data.source's pictures are"}
    if name := cfg.data.prepare:
        if dist.is_main_process and name in made and not Path(cfg.data.path).exists():  # a mistyped one?
            print(f"data       {cfg.data.path} does not exist: {made[name]} made there; data=folder reads your own")
        with dist.local_main_process_first():
            data.prepare(name, cfg.data.path, cfg.data.get("source"), cfg.data.input_size, cfg.data.num_classes)
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


def describe(
    cfg: DictConfig, model: nn.Module, latents: data.Latents, plan: BatchPlan, resumed: Path | None,
    compiled: str, why_not: str,
) -> str:  # fmt: skip
    """The first lines of a run's output. Memory is told where it is a device's own, or was asked for."""
    on = model.pos_embed.device.type
    told = on == "cuda" or cfg.hardware.memory_gb is not None
    lines = [
        f"run        {Path(cfg.results_dir) / cfg.run_name}" + (f", from {resumed}" if resumed else ""),
        f"model      {cfg.model.size}",
        cost_table(model, cfg),
        f"data       {cfg.data.path}: {len(latents)} samples of {tuple(latents.shape)}, {latents.num_classes} classes",
        f"batch      {plan.global_batch_size} = {plan.world_size} processes x {plan.micro_batch_size} "
        f"x {plan.accumulation} accumulated",
        *([memory_table(cfg, plan.micro_batch_size, device=on, processes=plan.world_size)] if told else []),
        f"precision  {cfg.train.precision}, compile {compiled}{': ' + why_not if why_not else ''}",
    ]
    return "\n".join(lines)

"""Everything before the first training step. What cannot run is refused here, before anything slow or written."""

import os
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn

import data
from checkpoints.config import Data, Positive, Settings
from checkpoints.load import Run, align, build_codec, build_network, load_run, with_classes
from checkpoints.run_folder import find_checkpoint, load_strictly, read_config
from contracts import Condition, Loss, Network, Objective
from cost import cost_table, memory_table
from data import BatchPlan
from system import UserError, hub, printable
from system.building import build, class_of
from system.precision import choose_precision, decide_precision, launched_precision
from system.settings import convert, refuse_interpolations
from system.tensors import weights_sha256
from training.ema import make_averages
from training.guard import FiniteGuard
from training.optimizer import make_optimizer
from training.stopping import PreemptionHandler

KEPT = 64  # texts of the validation set that a run keeps, to sample and score with


@dataclass
class TrainedEma(Run):
    """The EMA of a run in training, as sampling and evaluation take it: before each call it may be asked to stop."""

    preemption: PreemptionHandler | None = None

    def predict(self, *arguments) -> torch.Tensor:
        if self.preemption is not None:
            self.preemption.poll()
        return super().predict(*arguments)


@dataclass
class TrainState:
    """What a training step changes. `net` is `model`, in an `Aligned` where its tokens are aligned; for several
    processes, in DDP."""

    net: nn.Module
    model: Network
    averages: dict[str, Network]  # by file: "ema", and power averages
    optimizer: torch.optim.Optimizer
    guard: FiniteGuard
    objective: Objective
    ema: TrainedEma  # averages["ema"], ready to sample
    step: int = 0  # the last that was taken
    middle_weight: float = 0.5
    projector: nn.Module | None = None  # of the alignment: trained, but part of no network
    feature_shape: tuple[int, int] | None = None  # (N, D_t) of the teacher's features that `loss` takes

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The weights that a checkpoint holds, by file."""
        more = {} if self.projector is None else {"projector": self.projector}
        return {"model": self.model, **self.averages, **more}

    @property
    def loss(self) -> Loss:
        return Loss(self.net, self.model, self.objective, self.middle_weight)

    def blank_features(self, batch_size: int) -> list[torch.Tensor]:
        """Zeros in place of the features that `loss` takes, if it takes any."""
        shape = self.feature_shape
        return [] if shape is None else [torch.zeros(batch_size, *shape, device=self.ema.device)]

    @property
    def checkpoint_bytes(self) -> int:
        """Weights, averages, and of each weight two moments, or one where the optimizer is Muon."""
        muon = {p for p, held in self.optimizer.state.items() if "momentum_buffer" in held}
        moments = sum((1 if p in muon else 2) * p.nbytes for p in self.net.parameters())
        return moments + sum(t.nbytes for module in self.modules.values() for t in module.state_dict().values())


@dataclass
class TrainingData:
    """Latents to train on and to validate with, and how a global batch of them is divided."""

    train: data.Latents
    val: data.Latents
    plan: BatchPlan

    @property
    def fingerprints(self) -> dict[str, str]:
        return {"data": self.train.fingerprint, "validation": self.val.fingerprint}

    @property
    def kept(self) -> Condition:
        """The texts that a run keeps; None = the condition is none, or classes, which need no keeping."""
        return self.val.conditions(KEPT) if self.val.condition == "text" else None


def settle_precision(settings: Settings, dist: PartialState, resumed: Path | None = None) -> Settings:
    """auto becomes bf16 or fp32: a resumed run keeps its own; for train.precision, the launcher's word comes first.

    All processes must call this.
    """
    wanted, of_muon = settings.train.precision, settings.optimizer.ns_precision
    kept = None if resumed is None else read_config(resumed)
    if wanted == "auto" and kept is not None and launched_precision() is None:
        wanted = kept.train.precision
    if of_muon == "auto":
        of_muon = choose_precision(dist.device, "Muon") if kept is None else kept.optimizer.ns_precision
    train = replace(settings.train, precision=decide_precision(wanted, dist.device))
    optimizer = replace(settings.optimizer, ns_precision=of_muon)
    evaluation = replace(settings.eval, precision="auto")  # which follows train's
    return replace(settings, train=train, optimizer=optimizer, eval=evaluation)


def batch_plan(settings: Settings, dist: PartialState) -> BatchPlan:
    """How the global batch splits over processes and accumulation. Raises UserError where it does not."""
    train, world, total = settings.train, dist.num_processes, settings.train.global_batch_size
    micro = train.micro_batch_size or total // world
    if total % (world * max(micro, 1)):
        needed = f"processes ({world}) x train.micro_batch_size ({micro}) x a whole number"
        raise UserError(f"train.global_batch_size={total} is not {needed}")
    if settings.objective.get("contrastive") and micro % 2:
        raise UserError(f"objective.contrastive pairs the rows of a micro-batch; needed: an even size, got {micro}")
    return BatchPlan(total, micro, total // (world * micro), dist.process_index, world)


def open_data(settings: Settings, dist: PartialState, plan: BatchPlan) -> TrainingData:
    """Raises UserError where the latents' shape or conditions are not the model's."""
    wanted = settings.data
    made = {"mnist": "the digits are", "fashion": "Fashion-MNIST is", "idx": "data.source's pictures are"}
    made |= {"emoji": "emoji are"}
    if wanted.path is None:
        raise UserError("data.path is missing; needed: a folder of latents (docs/data.md)")
    if wanted.prepare == "pictures":
        with dist.local_main_process_first():
            made_of = (wanted.source, wanted.input_size, wanted.codec, wanted.on_error, dist.device)
            data.prepare_pictures(wanted.path, *made_of)
    elif wanted.prepare is not None:
        if dist.is_main_process and not Path(wanted.path).exists():  # a mistyped one?
            print(f"data       {wanted.path} does not exist: {made[wanted.prepare]} made there; yours: data=folder")
        with dist.local_main_process_first():
            size, text = wanted.latent_shape[1:], (wanted.text_encoder, wanted.text_length)
            data.prepare(wanted.prepare, wanted.path, wanted.source, size, wanted.num_classes, *text)
    with dist.local_main_process_first():
        folder = hub.local(wanted.path, "dataset")
    how = dict(kind=wanted.kind, on_error=wanted.on_error, condition=wanted.condition)
    repa = settings.alignment.on and settings.alignment.name == "repa"
    train = data.open_latents(folder, features=repa, **how)
    if (found := tuple(train.shape)) != wanted.latent_shape:
        cure = "set data.channels and data.input_size, or data.path"
        raise UserError(f"{wanted.path} holds latents of shape {found}, the model is for {wanted.latent_shape}: {cure}")
    if wanted.condition == "class" and (n := train.num_classes) > wanted.num_classes:
        raise UserError(f"{wanted.path} has {n} classes, the model has data.num_classes={wanted.num_classes}")
    if wanted.condition == "text" and train.text_width != wanted.text_width:
        raise UserError(f"{wanted.path} has texts of width {train.text_width}, not data.text_width={wanted.text_width}")
    val = data.open_latents(folder, split="val", **how) if data.has_split(folder, "val") else train
    return TrainingData(train, val, plan)


def check_features(latents: data.Latents, settings: Settings) -> None:
    """Raises UserError where the features that are read are of another teacher, width or grid than configured."""
    if latents.feature_shape is None:
        return
    wanted, (tokens, width), teacher = settings.alignment, latents.feature_shape, latents.meta.get("teacher")
    with torch.device("meta"):
        num_tokens = build_network(settings).num_tokens
    if (teacher, width, tokens) != (wanted.teacher, wanted.teacher_width, num_tokens):
        found = f"{latents.folder} has features of {teacher}, {tokens} tokens of {width} channels"
        needed = f"alignment.teacher={wanted.teacher}, alignment.teacher_width={wanted.teacher_width}"
        raise UserError(f"{found}; needed: {needed}, and the network's {num_tokens} tokens")


def settle_texts(settings: Settings, latents: data.Latents) -> Settings:
    """data.text_encoder, its hash and the length of texts, as the set says. Raises UserError where another is given."""
    given, meta = settings.data, f"{settings.data.path}/meta.json"
    made = {key: latents.meta.get(key) for key in ("text_encoder", "text_sha256")} | {
        "text_length": latents.text_length
    }
    made = made if latents.condition == "text" else dict.fromkeys(made)
    for key, value in made.items():
        if getattr(given, key) not in (None, value):
            found = f"data.{key}={getattr(given, key)}, and {meta} says {value}"
            raise UserError(f"{found}; needed: without data.{key}, or another data.path for new texts")
    told = {"text_length": made["text_length"]} if "text_length" in settings.model else {}
    return replace(settings, data=replace(given, **made), model=settings.model | told)


def settle_data(settings: Settings, latents: data.Latents) -> Settings:
    """data.codec and the names of the classes, completed with what meta.json says of them.

    Raises UserError where they differ, and where previews or scores are due and nobody says which VAE it is.
    """
    vae, meta = "autoencoder.VAECodec", f"{settings.data.path}/meta.json"
    given = {key: value for key, value in settings.data.codec.items() if value is not None}
    given = {} if given == {"_target_": vae} else {"_target_": vae} | given
    recorded = latents.meta.get("codec") or {}
    refuse_interpolations({"codec": recorded, "classes": latents.meta.get("classes")}, meta)
    recorded = recorded and {"_target_": vae} | recorded
    codec = {"_target_": vae} | recorded | given
    if codec["_target_"] == vae:
        applied = {"scale": latents.encoding.scale, "bias": latents.encoding.bias}  # from the VAE's to the model's
        recorded = recorded | {key: value for key, value in applied.items() if value is not None}
        recorded = ({"bias": 0.0} if "scale" in recorded else {}) | recorded
        usual = {} if "path" in recorded else settings.data.usual_codec or {}
        codec = {"_target_": vae, "path": None, "scale": None, "bias": 0.0} | usual | recorded | given
    for key in sorted(given.keys() & recorded.keys()):
        same = os.path.realpath if key == "path" else lambda value: value
        if same(given[key]) != same(recorded[key]) and not (key == "path" and is_of(given[key], latents)):
            found = f"data.codec.{key}={given[key]}, and {meta} says {recorded[key]}"
            raise UserError(f"{found}; needed: without data.codec.{key}, or another meta.json")
    if (settings.preview.every or settings.eval.every) and None in (codec.get("path", ""), codec.get("scale", "")):
        what = f"{settings.data.path} does not say which VAE decodes its latents for previews and scores"
        raise UserError(f"{what}; needed: data.codec.path=, data.codec.scale= and data.codec.bias=, or preview.every=0")
    named, names = settings.data.classes, tuple(latents.meta.get("classes") or ()) or None
    if named and (names or named) != named:
        raise UserError(f"data.classes names other classes than {meta}; needed: without data.classes")
    classes = (named or names) if settings.data.condition == "class" else None
    return replace(settings, data=replace(settings.data, codec=codec, classes=classes, usual_codec=None))


def is_of(path: str, latents: data.Latents) -> bool:
    """Whether the VAE at `path` has the weights that made the latents: it may lie elsewhere on another machine."""
    made, section = latents.meta.get("codec_sha256"), {"_target_": "autoencoder.VAECodec", "path": path}
    return made is not None and made == weights_sha256(build_codec(section, torch.device("cpu")).vae)


def settle_positions(settings: Settings, resumed: Path | None) -> Settings:
    """model.positions_from, where the network that this one starts from, or is resumed as, has another resolution, and
    its class takes it."""
    taken = signature(class_of(settings.model["_target_"], Network, "model._target_")).parameters
    if settings.init_from is None or "positions_from" in settings.model or "positions_from" not in taken:
        return settings
    path = resumed or find_checkpoint(settings.init_from, "init_from")
    before = read_config(path) if path.is_dir() else load_run(settings.init_from, device="cpu").settings
    kind, sides = Positive | tuple[Positive, Positive] | None, before.model.get("positions_from")
    sides = convert(sides, kind, f"{path}: model.positions_from") or before.data.latent_shape[1:]
    sides = [sides] * 2 if isinstance(sides, int) else list(sides)
    if sides == list(settings.data.latent_shape[1:]):
        return settings
    return replace(settings, model=settings.model | {"positions_from": sides})


def build_state(settings: Settings, dist: PartialState, new: bool) -> TrainState:
    """The state before the first step; a `new` run starts from init_from, if set. Raises UserError."""
    init_from = settings.init_from if new else None
    if init_from is not None:
        find_checkpoint(init_from, "init_from")
    objective = build(settings.objective, Objective, "objective")
    torch.manual_seed(settings.seed)  # for the initial weights; training itself never uses the global generator
    model = build_network(settings)
    aligned = align(model, settings)
    net = (aligned or model).to(dist.device)
    if (share := settings.train.dense_last) and not model.routes:
        raise UserError(f"train.dense_last={share}: no step of this network has routes; needed: 0")
    if share and settings.train.routed_steps == (steps := settings.train.max_steps):
        raise UserError(f"train.dense_last={share} of {steps} steps is less than half of one; needed: {1 / steps:.3g}")
    if init_from is not None:
        told = start_from(init_from, model, objective, settings.data)
        if told and dist.is_main_process:
            print(printable(f"init_from  {told}"))
    averages = make_averages(model, settings.ema.widths or ())
    for block in model.all_blocks:
        block.recompute = settings.train.gradient_checkpointing
    projector, shape = (None, None) if aligned is None else (aligned.projector, aligned.feature_shape)
    more = [] if projector is None else projector.parameters()
    optimizer = make_optimizer(model, settings.optimizer, settings.train.lr, more)
    guard = FiniteGuard(optimizer, dist.device, settings.train.on_nonfinite)
    codec = build_codec(settings.data.codec, dist.device)
    ema = TrainedEma(averages["ema"], objective, codec, settings, dist.device, settings.train.precision)
    kept = dict(middle_weight=settings.train.middle_weight, projector=projector, feature_shape=shape)
    return TrainState(net, model, averages, optimizer, guard, objective, ema, **kept)


def start_from(ckpt: str, model: Network, objective: Objective, given: Data) -> str:
    """Loads the EMA weights of `ckpt`, and says what became of its classes and positions; "" = they are the same.

    Raises UserError where its model or objective is another.
    """
    source = load_run(ckpt, "ema", device="cpu")
    found, wanted = ((type(o).__name__, getattr(o, "output", "")) for o in (source.objective, objective))
    if found != wanted:
        found, wanted = (" of ".join(filter(None, said)) for said in (found, wanted))
        raise UserError(f"init_from={ckpt} was trained as {found}, this run is {wanted}: set objective=")
    tensors, told = with_classes(source, given)
    (_, *old), (_, *new) = source.model.latent_shape, model.latent_shape
    if old != new:  # fixed numbers of each position, which the network has made for its own, are in its buffers
        own, alike = {name: buffer for name, buffer in model.named_buffers() if name in tensors}, (1, model.num_tokens)
        other = {name: b for name, b in own.items() if b.shape != tensors[name].shape or b.shape[:2] == alike}
        tensors |= other
        scaled = "latents of {} x {} become {} x {}; the coordinates of tokens are scaled".format(*old, *new)
        told = "; ".join(filter(None, [scaled, told]))
    if len({data.text_sha256 for data in (source.settings.data, given)} - {None}) > 1:
        told = "; ".join(filter(None, [told, "the states of texts are another encoder's"]))
    load_strictly(model, tensors, source=str(ckpt))
    return told


def describe(
    settings: Settings, state: TrainState, loaded: TrainingData, resumed: Path | None, compiled: str, why_not: str
) -> str:
    """The first lines of a run's output. Memory: on GPUs, and where hardware.memory_gb asks for it."""
    model, latents, plan, train = state.model, loaded.train, loaded.plan, settings.train
    on, kept = next(model.parameters()).device.type, f"the last {train.keep_last} are kept"
    kept += f", and every {train.keep_every} steps one" if train.keep_every else ""
    held = {"class": f", {latents.num_classes} classes", "text": ", with texts", "none": ""}[latents.condition]
    if latents.condition == "class" and latents.num_classes < settings.data.num_classes:
        held += f" of data.num_classes={settings.data.num_classes}"
    if loaded.val is latents and settings.train.val_every:
        held += "; no val shards: validation on training data"
    passes = train.max_steps * plan.global_batch_size / len(latents)
    lines = [
        f"run        {Path(settings.results_dir) / settings.run_name}" + (f", from {resumed}" if resumed else ""),
        f"model      {type(model).__name__} {model.name}",
        cost_table(model, settings, hours=False),
        f"data       {settings.data.path}: {len(latents)} samples of {tuple(latents.shape)}{held}",
        f"batch      {plan.global_batch_size} = {plan.world_size} processes x {plan.micro_batch_size} "
        f"x {plan.accumulation} accumulated; {train.max_steps} steps are {passes:.3g} passes over the samples",
        f"precision  {train.precision}, compile {compiled}{': ' + why_not if why_not else ''}",
        f"checkpoint {state.checkpoint_bytes / 1e6:.3g} MB; {kept}",
    ]
    if on == "cuda" or settings.hardware.memory_gb is not None:
        lines.insert(-2, memory_table(settings, plan.micro_batch_size, device=on, processes=plan.world_size))
    if max(train.warmup_steps, 1) > train.max_steps + 1 - train.decay_steps:
        steps = f"train.warmup_steps={train.warmup_steps} and decay_steps={train.decay_steps} of {train.max_steps}"
        lines.append(f"warning    {steps} never let the learning rate reach train.lr={train.lr:g}")
    return "\n".join(lines)

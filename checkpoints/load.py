"""A trained network with everything that sampling needs: objective, codec and settings."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

import conditions
from alignment import Aligned
from autoencoder import Codec
from checkpoints import run_folder as folders
from checkpoints.config import Data, Settings, from_file
from checkpoints.run_folder import CONDITIONS_FILE, WEIGHTS_FILES, load_strictly, read_tensors
from conditions import TextStats
from contracts import Condition, Network, Objective, Routing, check_members
from guidance import internal
from system import UserError, warn
from system.building import build, described
from system.compiling import compile_blocks, decide_compile
from system.files import check_no_links, sha256_once
from system.limits import LARGEST_FLOAT, LEAST_SIZE
from system.precision import decide_precision, tf32
from system.processes import start_processes
from system.settings import nested
from weights import foreign, layouts


@dataclass
class Run:
    """A network ready to sample: what `load_run` returns, and the EMA of a run in training."""

    model: Network
    objective: Objective
    codec: Codec
    settings: Settings
    device: torch.device
    precision: str = "fp32"  # fp32 (TF32 on CUDA) or bf16 (autocast); the sampler's own state is float64
    compile: str = "off"  # off, or blocks, which rounds differently
    pool: Condition = None  # the conditions to choose from: every class, or the texts that the run has kept
    captions: Sequence[str] = ()  # the prompts that have taken the pool's place, if any
    text_stats: TextStats | None = None  # of its data set's texts, if an encoder made them: prompts need it
    step: int = 0
    weights: str = "ema"
    ema_width: float | None = None  # of a power average in the place of the run's EMA
    folder: Path | None = None  # the run folder
    checkpoint: Path | None = None
    called: Callable[[int], object] | None = None  # called with the number of rows of each network call
    dropout_known: bool = True  # the label dropout is known: a file of another project may not say it

    @cached_property
    def sha256(self) -> str:
        """Of the weights file that was loaded, by the manifest that it was verified by; with ema_width, the EMA's."""
        if self.checkpoint.is_file():
            return sha256_once(self.checkpoint)
        return folders.read_manifest(self.checkpoint)["files"][WEIGHTS_FILES[self.weights]]["sha256"]

    def place(self, name: str) -> Path:
        """Where something made of the run goes, in its folder. Raises UserError where links may lead out of that."""
        if self.folder.is_dir():
            check_no_links(self.folder)
        return self.folder / name

    def compile_as(self, wanted: str) -> None:
        """blocks, where this machine can, or off."""
        self.compile, reason = decide_compile(wanted, self.device)
        if reason:
            warn(f"compile off: {reason}")
        compile_blocks(self.model.all_blocks, self.compile, dynamic=True)

    def predict(
        self, x: torch.Tensor, t: torch.Tensor, condition: Condition, routing: Routing | None,
        internal_scale: float = 1.0,
    ) -> torch.Tensor:  # fmt: skip
        """The objective's prediction at (x, t), (B, C, h, w). internal_scale: `guidance.internal`'s; 1 = none."""
        if self.called is not None:
            self.called(len(x))
        net = partial(self.model, routing=routing)
        net = net if internal_scale == 1 else internal(net, internal_scale, x.shape[1])
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")
        with tf32(self.device.type == "cuda" and self.precision == "fp32"), autocast:
            return self.objective.predict(net, x, t, condition)


def load_run(
    ckpt: str | Path, weights: str = "ema", *, tensors: dict[str, torch.Tensor] | None = None, device=None,
    precision: str = "fp32", compile: str = "off",
) -> Run:  # fmt: skip
    """The network of a run folder, checkpoint folder or file (weights/), with its objective, codec and settings.

    weights: "ema" or "raw". tensors: in their place, such as an average of another width. device: None = this process's
    own. precision: fp32, bf16 or, where all processes call this, auto. Raises UserError for no or a damaged checkpoint.
    """
    if weights not in WEIGHTS_FILES:
        raise UserError(f"weights={weights!r}; needed: ema or raw")
    path, known = folders.find_checkpoint(ckpt), True
    if path.is_file():
        values, tensors, step = foreign.read(path, weights, folders.split_family(ckpt)[0])
        settings, beside = from_file(values, str(path)), path.with_name(CONDITIONS_FILE)
        known = "train" in values
    else:
        beside = path / CONDITIONS_FILE
        read = [WEIGHTS_FILES[weights]] if tensors is None else []  # the rest is several times as much
        told = {CONDITIONS_FILE} & {*folders.read_manifest(path)["files"], beside.is_file() and CONDITIONS_FILE}
        folders.verify_checkpoint(path, only=["config.yaml", *read, *told])
        settings, step = folders.read_config(path), folders.step_of(path)
        tensors = read_tensors(path / read[0]) if read else tensors
    device = torch.device(device) if device is not None else start_processes().device
    check_sizes(settings, tensors, str(path))
    with torch.device("meta"):  # before memory is taken
        load_strictly(build_network(settings), tensors, source=str(path))
    model = build_network(settings)
    load_strictly(model, tensors, source=str(path))
    precision = decide_precision(precision, device)
    if precision == "bf16":
        round_linears(model)
    model.to(device).eval().requires_grad_(False)
    beside = read_tensors(beside) if beside.is_file() else {}
    kept = conditions.load(beside)
    objective = build(settings.objective, Objective, "objective")
    codec = build_codec(settings.data.codec, device)
    run = Run(model, objective, codec, settings, device, precision, step=step, weights=weights, checkpoint=path)
    if kept is not None:
        conditions.check(kept, model.null_condition)
    run.pool, run.folder = conditions.pool(model.null_condition, kept), folder_of(ckpt, path)
    run.dropout_known, run.text_stats = known, conditions.load_stats(beside)
    if run.text_stats is not None:
        empty = conditions.empty_caption(run.text_stats)
        conditions.check(empty, model.null_condition)
        model.null_condition = empty
    run.compile_as(compile)
    return run


def with_classes(source: Run, data: Data) -> tuple[dict[str, torch.Tensor], str]:
    """A network's tensors for the classes of `data`, and what became of its own, in words; "" = they stay.

    Classes of the same name keep their rows, and new ones begin as no label. Where the names of either are not known,
    all keep theirs if they are as many, and otherwise none.
    """
    before, tensors = source.settings.data, source.model.state_dict()
    if not before.condition == data.condition == "class":
        return tensors, ""
    known, old, new = bool(before.classes and data.classes), int(source.model.null_condition), data.num_classes
    if old == new and (not known or before.classes == data.classes):
        return tensors, ""
    row = {name: i for i, name in zip(range(old), before.classes)} if known else {}
    rows = [row.get(name, old) for name in data.classes or ()]
    rows += [old] * (new + 1 - len(rows))  # no label last
    kept = [name for name in data.classes or () if name in row]
    why = "" if known else ", for the names of the classes are not recorded in both"
    told = f"{len(kept)} kept by name{why}{': ' if kept else ''}{', '.join(kept)}"
    return layouts.relabel(tensors, rows), f"{old} classes become {new}; {told}; new ones begin as no label"


def check_sizes(settings: Settings, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Raises UserError for a network that is much larger than its tensors, before any time goes into building it."""
    longest = max((side for tensor in tensors.values() for side in tensor.shape), default=0)
    _, given = described(settings.model, Network, "model")
    for key, value in nested(given, "model"):
        most = len(tensors) if "depth" in key else max(longest, LEAST_SIZE)
        most = LARGEST_FLOAT if isinstance(value, float) else most
        if isinstance(value, (int, float)) and abs(value) > most:
            raise UserError(f"{source}: {key}={value:.10g}, and its {len(tensors)} tensors have no such size")


def build_network(settings: Settings) -> Network:
    """The network that the settings describe. Raises UserError, also for one that lacks a member of the contract."""
    try:
        model = build(settings.model, Network, "model")
        check_members(model)
        conditions.check_kind(settings.data.condition, model.null_condition)
        if (shape := tuple(model.latent_shape)) != (wanted := settings.data.latent_shape):
            told = f"the network is for latents {shape}, and data.channels and data.input_size say {wanted}"
            raise UserError(f"{told}; needed: the same in both")
        return model
    except ValueError as error:
        raise UserError(str(error)) from None


def align(net: Network, settings: Settings) -> Aligned | None:
    """The network, on the CPU, with what aligns its tokens; None = nothing. Raises UserError where that cannot be."""
    wanted = settings.alignment
    if not wanted.on:
        return None
    repa = (None, wanted.teacher_width, wanted.projector_width)
    try:
        return Aligned(net, wanted.weight, wanted.block, *(repa if wanted.name == "repa" else (wanted.target,)))
    except ValueError as error:
        raise UserError(str(error)) from None


def build_codec(section: dict, device: torch.device) -> Codec:
    return build(section, Codec, "data.codec").to(device)


def folder_of(ckpt: str | Path, path: Path) -> Path:
    """Where samples and scores of a checkpoint at `path` go: its run folder; for hf:owner/name, a folder in runs/."""
    if hub_name := re.fullmatch(r"(?:\w+:)?hf:(.+)", str(ckpt)):
        return Path("runs") / hub_name.group(1).replace("/", "-")
    return path.with_suffix("") if path.is_file() else path.parent.parent


def round_linears(model: Network) -> None:
    """Gives the blocks' linear layers bf16 weights: autocast would make the same ones anew in every call."""
    for block in model.all_blocks:
        for module in block.modules() if not getattr(block, "keeps_fp32", False) else ():
            if isinstance(module, torch.nn.Linear):
                module.to(torch.bfloat16)

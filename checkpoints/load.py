"""A trained network with everything that sampling needs: objective, codec and config."""

import re
import sys
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from omegaconf import DictConfig

from checkpoints import foreign, power_ema
from checkpoints.run_folder import (
    WEIGHTS_FILES,
    find_checkpoint,
    load_strictly,
    read_config,
    read_manifest,
    read_weights,
    split_family,
    step_of,
    verify_checkpoint,
)
from routing_module import Routing
from system import UserError
from system.compiling import compile_blocks, decide_compile
from system.files import sha256_once
from system.instantiate import check_targets, instantiate
from system.precision import decide_precision, tf32
from system.processes import start_processes

PRECISION_BATCH = 64  # auto is decided for this many images, so that it does not depend on the batch size


@dataclass
class Run:
    """A network ready to sample: what `load_run` returns, and the EMA of a run in training."""

    model: torch.nn.Module
    objective: object
    codec: object
    config: DictConfig  # resolved
    device: torch.device
    precision: str = "fp32"  # fp32 (TF32 on CUDA) or bf16 (autocast); the sampler's own state is float64
    compile: str = "off"  # off, or blocks, which rounds differently
    step: int = 0
    weights: str = "ema"
    ema_width: float | None = None  # of a power average in the place of the run's EMA
    folder: Path | None = None  # the run folder
    checkpoint: Path | None = None
    calls: int = field(default=0, init=False)  # network evaluations per image of the last batch
    macs: int = field(default=0, init=False)  # and their multiply-adds

    @property
    def num_classes(self) -> int:
        return self.model.num_classes

    @cached_property
    def sha256(self) -> str:
        """Of the weights file that was loaded, by the manifest that it was verified by; with ema_width, the EMA's."""
        if self.checkpoint.is_file():
            return sha256_once(self.checkpoint)
        return read_manifest(self.checkpoint)["files"][WEIGHTS_FILES[self.weights]]["sha256"]

    def compile_as(self, wanted: str) -> None:
        """blocks, where this machine can, or off. Raises UserError for anything else."""
        self.compile, reason = decide_compile(wanted, self.device)
        if reason:
            print(f"warning: compile off: {reason}", file=sys.stderr)
        compile_blocks(self.model, self.compile, dynamic=True)

    def predict(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, routing: Routing | None) -> torch.Tensor:
        """The objective's prediction at (x, t), (B, C, h, w); each row counts in `calls` and `macs`."""
        self.calls += len(x)
        self.macs += len(x) * self.model.macs(routing)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")
        with tf32(self.device.type == "cuda" and self.precision == "fp32"), autocast:
            return self.objective.predict(partial(self.model, routing=routing), x, t, y)


def load_run(
    ckpt: str | Path, weights: str = "ema", *, ema_width: float | None = None, device=None, precision: str = "fp32",
    compile: str = "off",
) -> Run:  # fmt: skip
    """The network of a run folder, checkpoint folder or file (foreign.py), with its objective, codec and config.

    weights: "ema" or "raw". ema_width: the power average of this relative width (power_ema.py), of a run trained with
    ema=power; None = its EMA. device: None = this process's own. precision: fp32, bf16 or, where all processes call
    this, auto. Raises UserError where there is no checkpoint or it is damaged.
    """
    path = find_checkpoint(ckpt)
    if ema_width is not None:
        power_ema.check_reconstruction(path, weights, ema_width)
    if path.is_file():
        config, tensors, step = foreign.read(path, weights, split_family(ckpt)[0])
    else:
        if weights not in WEIGHTS_FILES:
            raise UserError(f"weights={weights!r}; needed: ema or raw")
        read = ["config.yaml"] + [WEIGHTS_FILES[weights]] * (ema_width is None)  # the rest is several times as much
        verify_checkpoint(path, only=read)
        config, step = read_config(path), step_of(path)
        tensors = read_weights(path, weights) if ema_width is None else power_ema.reconstruct(path, ema_width)
    check_targets(config)
    device = torch.device(device) if device is not None else start_processes().device
    model = instantiate(config.model)
    load_strictly(model, tensors, source=str(path))
    precision = decide_precision(precision, device, partial(model.products, PRECISION_BATCH), backward=False)
    if precision == "bf16":
        round_linears(model)
    model.to(device).eval().requires_grad_(False)
    run = Run(
        model=model,
        objective=instantiate(config.objective),
        codec=instantiate(config.data.codec).to(device),
        config=config,
        device=device,
        precision=precision,
        step=step,
        weights=weights,
        ema_width=ema_width,
        folder=folder_of(ckpt, path),
        checkpoint=path,
    )
    run.compile_as(compile)
    return run


def folder_of(ckpt: str | Path, path: Path) -> Path:
    """Where samples and scores of a checkpoint at `path` go: its run folder; for hf:owner/name, a folder in runs/."""
    if hub_name := re.fullmatch(r"(?:\w+:)?hf:(.+)", str(ckpt)):
        return Path("runs") / hub_name.group(1).replace("/", "-")
    return path.with_suffix("") if path.is_file() else path.parent.parent


def round_linears(model: torch.nn.Module) -> None:
    """Gives the blocks' linear layers bf16 weights: autocast would make the same ones anew in every call."""
    for i, block in enumerate(model.all_blocks):
        for module in block.modules():
            if isinstance(module, torch.nn.Linear) and i not in model.fp32_blocks:
                module.to(torch.bfloat16)

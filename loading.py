"""A trained network with all that sampling from it takes: its objective, codec and config."""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

import checkpoint
import foreign
from compiling import compile_blocks, decide_compile
from processes import start_processes
from routing_module import Routing

# What a config that came with a checkpoint may build: ours, and nothing else.
ALLOWED_TARGETS = {
    "dit.build", "lightningdit.build", "edm.EDM", "rf.RectifiedFlow", "ddpm.DDPM",
    "autoencoder.PixelCodec", "autoencoder.VAECodec",
}  # fmt: skip


@dataclass
class Run:
    """A network ready to sample: what `load_run` gives, or what training shows of itself."""

    model: torch.nn.Module
    objective: object
    codec: object
    config: DictConfig                              # resolved
    device: torch.device
    precision: str = "fp32"                         # fp32 or bf16 (autocast); the sampler's own state is float64
    compile: str = "off"                            # off, or blocks: which rounds otherwise
    step: int = 0
    weights: str = "ema"
    folder: Path | None = None                      # the run folder
    checkpoint: Path | None = None
    calls: int = field(default=0, init=False)       # network evaluations for one image of the last batch
    macs: int = field(default=0, init=False)        # and their multiply-adds

    @property
    def num_classes(self) -> int:
        return self.model.num_classes

    @property
    def sha256(self) -> str:
        """Of the weights file that was loaded."""
        path = self.checkpoint
        return checkpoint.sha256(path if path.is_file() else path / checkpoint.WEIGHTS_FILES[self.weights])

    def predict(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, routing: Routing | None) -> torch.Tensor:
        """What the objective predicts at (x, t), (B, C, h, w); each row counts in `calls` and `macs`."""
        self.calls += len(x)
        self.macs += len(x) * self.model.macs(routing)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.objective.predict(partial(self.model, routing=routing), x, t, y)


def load_run(
    ckpt: str | Path, weights: str = "ema", *, device=None, precision: str = "fp32", compile: str = "off"
) -> Run:
    """The network of a run folder, checkpoint folder or file (foreign.py), with its objective, codec and config.

    weights: "ema" or "raw". device: None = the process's own. Raises ValueError for no checkpoint or a damaged one.
    """
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision={precision}; needed: fp32 or bf16")
    path = checkpoint.find(ckpt)
    if path.is_file():
        config, tensors, step = foreign.read(path, weights, checkpoint.split_family(ckpt)[0])
    else:
        checkpoint.verify(path)
        config, step = OmegaConf.load(path / "config.yaml"), checkpoint.step_of(path)
        tensors = checkpoint.read_weights(path, weights)
    check_targets(config)
    device = torch.device(device) if device is not None else start_processes().device
    compiled, reason = decide_compile(compile, device)
    if reason:
        print(f"warning: compile off: {reason}", file=sys.stderr)
    model = instantiate(config.model)
    checkpoint.load_strictly(model, tensors, source=str(path))
    if precision == "bf16":
        round_linears(model)
    model.to(device).eval().requires_grad_(False)
    compile_blocks(model, compiled, dynamic=True)
    return Run(
        model=model,
        objective=instantiate(config.objective),
        codec=instantiate(config.data.codec).to(device),
        config=config,
        device=device,
        precision=precision,
        compile=compiled,
        step=step,
        weights=weights,
        folder=path.with_suffix("") if path.is_file() else path.parent.parent,
        checkpoint=path,
    )


def round_linears(model: torch.nn.Module) -> None:
    """Gives the blocks' linear layers bf16 weights: what autocast makes of them, once instead of in every call."""
    for i, block in enumerate(model.blocks):
        for module in block.modules():
            if isinstance(module, torch.nn.Linear) and i not in model.fp32_blocks:
                module.to(torch.bfloat16)


def instantiate(config: DictConfig):
    """The object that a config's `_target_` names. Raises ValueError for a target that is not one of ours."""
    check_targets(config)
    try:
        return hydra.utils.instantiate(config, _convert_="all")
    except hydra.errors.InstantiationException as error:
        raise error.__cause__ if isinstance(error.__cause__, ValueError) else error


def check_targets(config) -> None:
    """Raises ValueError where a config names anything to build outside ALLOWED_TARGETS."""
    values = OmegaConf.to_container(config, resolve=False) if isinstance(config, DictConfig) else config
    if isinstance(values, dict):
        if "_target_" in values and values["_target_"] not in ALLOWED_TARGETS:
            allowed = ", ".join(sorted(ALLOWED_TARGETS))
            raise ValueError(f"the config wants to build {values['_target_']!r}; allowed: {allowed}")
        values = list(values.values())
    for value in values if isinstance(values, list) else ():
        check_targets(value)

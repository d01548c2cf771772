"""What a run will cost: `python cost.py experiment=imagenet256 model.size=DiT-B/2`, or any other config.

Multiply-adds (MACs) are those of one forward pass at batch 1: matrix products and attention, as in DiT's "Gflops". A
training step counts as three forward passes (the backward pass is two), a MAC as two FLOPs.
"""

import sys

import torch
from omegaconf import DictConfig
from torch import nn

from routing_module import Routing
from system import UserError, cli
from system.instantiate import instantiate

BYTES_PER_PARAMETER = 20  # float32 weights, gradients, EMA and Adam's two moments


def cost_table(model: nn.Module, cfg: DictConfig) -> str:
    """Lines on parameters, forward pass, state, and the whole run by cfg.train and cfg.hardware. Raises UserError."""
    parameters = [p.numel() for p in model.parameters()]
    total = sum(parameters)
    dense, routed = model.macs(), model.macs(Routing())
    forward = f"{dense / 1e9:.3f} GMACs dense"
    if model.routes:
        spans = ", ".join(f"{r.start_layer_idx}..{r.end_layer_idx} at {r.selection_ratio:g}" for r in model.routes)
        forward += f", {routed / 1e9:.3f} routed (blocks {spans}): {routed / dense:.4f}, {dense / routed:.3f}x cheaper"
        if model.fp32_blocks:
            blocks = model.block_macs(Routing())
            share = sum(blocks[i] for i in model.fp32_blocks) / routed
            forward += (
                f"\nfp32       {share:.1%} of a routed pass, after routes, without bf16: "
                f"at half the speed a step takes {1 + share:.3f}x"
            )
    hours = f"{gpu_hours(routed, cfg):.3g} GPU-hours"
    if model.routes:
        hours += f" (dense: {gpu_hours(dense, cfg):.3g})"
    averages = len(cfg.ema.widths or ())
    state = "weights, gradients, EMA, Adam's moments" + (f", {averages} power averages" if averages else "")
    if cfg.optimizer.name == "muon":
        state += " (one moment less of Muon's matrices)"
    return "\n".join([
        f"parameters {total / 1e6:.2f} M in {len(parameters)} tensors",
        f"forward    {forward}",
        f"state      {total * (BYTES_PER_PARAMETER + 4 * averages) / 1e9:.3f} GB: {state} in float32",
        f"run        {cfg.train.max_steps} steps x {cfg.train.global_batch_size} images: {hours} "
        f"at {cfg.hardware.mfu:.0%} of {cfg.hardware.peak_tflops:g} TFLOP/s",
    ])  # fmt: skip


def gpu_hours(macs: int, cfg: DictConfig) -> float:
    """GPU-hours of cfg.train's steps at `macs` per forward pass, on GPUs that reach cfg.hardware.mfu of their peak.

    Raises UserError for a peak or share that is not positive.
    """
    if not cfg.hardware.peak_tflops > 0 or not 0 < cfg.hardware.mfu <= 1:
        found = f"{cfg.hardware.peak_tflops} and {cfg.hardware.mfu}"
        raise UserError(f"needed: hardware.peak_tflops > 0 and hardware.mfu in (0, 1]; got {found}")
    flops = 2 * 3 * macs * cfg.train.global_batch_size * cfg.train.max_steps
    return flops / (cfg.hardware.peak_tflops * 1e12 * cfg.hardware.mfu) / 3600


def main(overrides: list[str]) -> None:
    if set(overrides) & {"-h", "--help"}:
        print(__doc__.strip())
        return
    cfg = cli.load_config("config", overrides)
    with torch.device("meta"):  # shapes without memory
        model = instantiate(cfg.model)
    print(f"model      {cfg.model.size}\n{cost_table(model, cfg)}")


if __name__ == "__main__":
    with cli.user_errors():
        main(sys.argv[1:])

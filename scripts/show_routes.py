"""Which tokens bypass which blocks: `python scripts/show_routes.py`, keys in configs/show_routes.yaml.

One row per seed: the image; for each route, the image with the tokens that bypass it darkened; and the whole network,
blocks from bottom to top, tokens from left to right. The masks are those of sampling's strong branch.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample
from guidance import Guidance
from routing_module import draw_keep_ids, num_kept
from system import UserError, cli


def kept_tokens(run: sample.Run, seeds: list[int], gamma: float | None, step: int) -> list[torch.Tensor]:
    """Which tokens each route keeps at call `step`: a list of bool (B, N)."""
    streams, tokens = sample.streams(seeds, "strong"), run.model.num_tokens
    for _ in range(step + 1):  # every call draws for each route in turn
        kept = []
        for route in run.model.routes:
            ratio = route.selection_ratio if gamma is None else gamma
            mask = torch.ones(len(seeds), tokens, dtype=torch.bool)
            if num_kept(tokens, ratio) < tokens:
                ids = draw_keep_ids(len(seeds), tokens, ratio, generators=streams, selection=route.selection)  # (B, K)
                mask = torch.zeros_like(mask).scatter(1, ids, True)
            kept.append(mask)
    return kept


def through_blocks(run: sample.Run, kept: list[torch.Tensor]) -> torch.Tensor:
    """Whether a token passes a block: bool (B, depth, N)."""
    B, N = kept[0].shape
    passes = torch.ones(B, len(run.model.all_blocks), N, dtype=torch.bool)
    for route, mask in zip(run.model.routes, kept):
        passes[:, route.start_layer_idx : route.end_layer_idx + 1] = mask[:, None]
    return passes


def darkened(images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, H, W), bool (B, N) -> the images with the patches of the other tokens darkened: (B, H, W, 3)."""
    side, (height, width) = int(mask.shape[1] ** 0.5), images.shape[2:]
    patches = mask.view(-1, 1, side, side).repeat_interleave(height // side, 2).repeat_interleave(width // side, 3)
    tint = torch.tensor([70, 20, 90]).view(1, 3, 1, 1)
    return torch.where(patches, images.int(), images.int() // 2 + tint).permute(0, 2, 3, 1)


def main(overrides: list[str]) -> None:
    from matplotlib import pyplot as plt

    config = cli.load_config("show_routes", overrides)
    run = sample.load_given(config.ckpt, "mnist-tread-rf")
    if not run.model.routes:
        raise UserError(f"{run.checkpoint} has no routes; needed: a model trained with routes (model=tread)")
    seeds = sample.parse_seeds(config.seeds)
    kept = kept_tokens(run, seeds, config.gamma, config.step)
    labels = sample.labels_for(run.num_classes, seeds, "balanced")
    images = torch.cat(list(sample.generate(run, Guidance(), seeds, labels))).cpu()
    passes = through_blocks(run, kept)

    columns = 2 + len(kept)
    figure, axes = plt.subplots(len(seeds), columns, squeeze=False, figsize=(2 * columns + 1, 2 * len(seeds)))
    for row, seed in enumerate(seeds):
        axes[row, 0].imshow(images[row].permute(1, 2, 0).numpy(), interpolation="nearest")
        axes[row, 0].set_title(f"seed {seed}", fontsize=8)
        for column, (route, mask) in enumerate(zip(run.model.routes, kept), start=1):
            axes[row, column].imshow(darkened(images, mask)[row].numpy(), interpolation="nearest")
            stays = f"{mask[row].sum()} of {mask.shape[1]} tokens"
            axes[row, column].set_title(f"{stays} in blocks {route.start_layer_idx}..{route.end_layer_idx}", fontsize=8)
        axes[row, -1].imshow(passes[row].numpy(), aspect="auto", origin="lower", cmap="gray", vmin=0, vmax=1)
        axes[row, -1].set(xlabel="token", ylabel="block", title="white: passes through")
        axes[row, -1].title.set_fontsize(8)
        for axis in axes[row, :-1]:
            axis.set_axis_off()
    out = Path(config.out) if config.out else run.folder / "routes.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    print(f"{run.checkpoint}: {out}")


if __name__ == "__main__":
    cli.command(main, __doc__)

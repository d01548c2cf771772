"""Which tokens bypass which blocks: `python scripts/show_routes.py`, keys in configs/show_routes.yaml.

One row per seed: the image; for each route, the image with the tokens that bypass it in purple; and the whole network,
a column for each token on its way from the first block, at the bottom, to the last. The masks are those of sampling's
strong branch.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import conditions
import sample
from checkpoints.config import Count, Guidance, Seeds, Share, parse_seeds
from checkpoints.generate import streams
from checkpoints.load import Routing
from system import UserError, cli
from system.files import atomic_file
from system.settings import parse


@dataclass(frozen=True)
class Showing:
    """The keys of configs/show_routes.yaml."""

    ckpt: str | None = None
    seeds: Seeds = "0-3"
    gamma: Share | None = None
    step: Count = 0
    out: str | None = None


def kept_tokens(run: sample.Run, seeds: list[int], gamma: float | None, step: int) -> list[torch.Tensor]:
    """Which tokens each route keeps at call `step`: a list of bool (B, N)."""
    draws, tokens = streams(seeds, "strong"), torch.empty(len(seeds), run.model.num_tokens, 0)
    for _ in range(step + 1):  # every call draws for each route in turn
        routing, kept = Routing(gamma, draws), []
        for route in run.model.routes:
            ids = routing.draw(route, tokens)  # (B, K)
            mask = torch.full(tokens.shape[:2], ids is None)
            kept.append(mask if ids is None else mask.scatter(1, ids, True))
    return kept


def through_blocks(run: sample.Run, kept: list[torch.Tensor]) -> torch.Tensor:
    """Whether a token passes a block: bool (B, depth, N)."""
    B, N = kept[0].shape
    passes = torch.ones(B, len(run.model.all_blocks), N, dtype=torch.bool)
    for route, mask in zip(run.model.routes, kept):
        passes[:, route.sparse_from : route.end_layer_idx + 1] = mask[:, None]
    return passes


PURPLE = (70, 20, 90)


def darkened(images: torch.Tensor, mask: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """uint8 (B, 3, H, W), bool (B, N) -> the images with the patches of the other tokens in purple: (B, H, W, 3)."""
    (height, width), (rows, columns) = images.shape[2:], grid
    patches = mask.view(-1, 1, *grid).repeat_interleave(height // rows, 2).repeat_interleave(width // columns, 3)
    tint = torch.tensor(PURPLE).view(1, 3, 1, 1)
    return torch.where(patches, images.int(), images.int() // 2 + tint).permute(0, 2, 3, 1)


def main(overrides: list[str]) -> None:
    from matplotlib import pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    shown = parse(Showing, cli.load_config("show_routes", overrides))
    seeds, run = parse_seeds(shown.seeds), sample.load_given(shown.ckpt, "mnist-tread-rf")
    if not run.model.routes:
        raise UserError(f"{run.checkpoint} has no routes; needed: a model trained with routes (model=tread)")
    if any(route.grid is None for route in run.model.routes):
        raise UserError(f"the routes of {run.checkpoint} do not say the grid of tokens; needed: Route.grid")
    kept = kept_tokens(run, seeds, shown.gamma, shown.step)
    labels = conditions.choose("balanced", seeds, run.pool)
    images = torch.cat(list(sample.generate(run, Guidance(), seeds, labels))).cpu()
    passes = through_blocks(run, kept)

    columns, purple, light = 2 + len(kept), [value / 255 for value in PURPLE], "#e3e3e3"
    widths = {"width_ratios": [1] * (columns - 1) + [2]}
    size = 2.2 * columns + 2, 2.2 * len(seeds) + 0.4
    figure, axes = plt.subplots(len(seeds), columns, squeeze=False, figsize=size, gridspec_kw=widths)
    for row, seed in enumerate(seeds):
        axes[row, 0].imshow(images[row].permute(1, 2, 0).numpy(), interpolation="nearest")
        axes[row, 0].set_title(f"seed {seed}", fontsize=8)
        for column, (route, mask) in enumerate(zip(run.model.routes, kept), start=1):
            axes[row, column].imshow(darkened(images, mask, route.grid)[row].numpy(), interpolation="nearest")
            stays = f"{mask[row].sum()} of {mask.shape[1]} tokens"
            axes[row, column].set_title(f"{stays} in blocks {route.sparse_from}..{route.end_layer_idx}", fontsize=8)
        network = {"cmap": ListedColormap([purple, light]), "vmin": 0, "vmax": 1}
        axes[row, -1].imshow(passes[row].numpy(), aspect="auto", origin="lower", interpolation="nearest", **network)
        axes[row, -1].set(xlabel="token", ylabel="block, the first is 0")
        for axis in axes[row, :-1]:
            axis.set_axis_off()
    told = {light: "passes the block", tuple(purple): "skips it, and returns unchanged after the route"}
    figure.legend([Patch(color=color) for color in told], told.values(), ncols=2, loc="lower center", frameon=False)
    out = Path(shown.out) if shown.out else run.place("routes.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout(rect=(0, 0.4 / size[1], 1, 1))
    with atomic_file(out) as file:
        figure.savefig(file, dpi=120, format=out.suffix[1:] or None)
    print(f"{run.checkpoint}: {out}")


if __name__ == "__main__":
    cli.command(main, __doc__)

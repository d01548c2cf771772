"""Token routing: a span of blocks sees some of the tokens, and the sequence is whole again after it.

    keep_ids = draw_keep_ids(B, N, ratio)      before block i: which tokens are kept, drawn per sample and step
    kept = gather_tokens(x, keep_ids)          blocks i..j see K = N - int(N * ratio) tokens
    x = scatter_tokens(kept, keep_ids, x)      after block j: the others return unchanged (TREAD, arXiv 2501.04765)

In a delayed route all tokens go on to block k before the others leave; these return as they were before block i.

No parameters, torch alone. B batch, N tokens, K kept tokens, D width. Mistakes raise ValueError.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

# One generator, one for each row, a function (shape, device) -> numbers from [0, 1), or torch's own generator
Source = torch.Generator | Sequence[torch.Generator] | Callable | None
SELECTIONS = ("random", "structured", "rows", "columns", "cells")
CELLS = {1: (1, 1), 2: (1, 2), 4: (2, 2), 8: (2, 4), 16: (4, 4)}  # tokens of a cell: its rows and columns


@dataclass(frozen=True)
class Route:
    """The fraction `selection_ratio`, in [0, 1), of the tokens bypasses blocks `start_layer_idx`..`end_layer_idx`,
    inclusive; negative indices count from the end. selection: one of SELECTIONS (`draw_keep_ids`), or a function
    (tokens (B, N, D), generators) -> scores (B, N), of which the highest are kept.

    leave_layer_idx: the last block that still sees all tokens, in a delayed route; the others return as they were
    before block `start_layer_idx`, so at `end_layer_idx` none leaves, but they are put back. None = they leave at once.
    """

    selection_ratio: float
    start_layer_idx: int
    end_layer_idx: int
    selection: str | Callable = "random"
    leave_layer_idx: int | None = None
    grid: tuple[int, int] | None = field(default=None, compare=False, repr=False)  # rows and columns; None = square

    @property
    def sparse_from(self) -> int:
        """The first block that sees the kept tokens alone; past the end where none leaves."""
        return self.start_layer_idx if self.leave_layer_idx is None else self.leave_layer_idx + 1


@dataclass(frozen=True)
class Routing:
    """Switches a network's routes on for one call, and holds the keep_ids that were `drawn` for each (None = all).

    selection_ratio: None = as in training: each route's own, and SPRINT's path drop; a number in [0, 1) overrides it.
    generators: what both are drawn from. keep_ids: (B, K) int64, as drawn, in place of a draw. drop_path: the span is
    skipped, and its output is the mask token everywhere (SPRINT's path-drop guidance). keep: (B, N) bool, tokens that
    have to stay, K at most. check: a `keep` of more raises a ValueError on a GPU, too, for which the host then waits;
    on a CPU it always does."""

    selection_ratio: float | None = None
    generators: Source = None
    keep_ids: torch.Tensor | None = None
    drop_path: bool = False
    keep: torch.Tensor | None = None
    check: bool = False
    drawn: list[torch.Tensor | None] = field(default_factory=list, init=False, compare=False, repr=False)

    def __post_init__(self):
        num_kept(1, self.selection_ratio or 0)

    def ratio_of(self, route: Route) -> float:
        return route.selection_ratio if self.selection_ratio is None else self.selection_ratio

    def draw(self, route: Route, x: torch.Tensor) -> torch.Tensor | None:
        """keep_ids (B, K) of a route that begins with tokens x (B, N, D); None where its ratio keeps all of them."""
        if self.drop_path:
            raise ValueError("drop_path needs a network with a deep path to drop (model=sprint)")
        (B, N), ratio, keep_ids = x.shape[:2], self.ratio_of(route), self.keep_ids
        if keep_ids is None and num_kept(N, ratio) < N and (callable(route.selection) or self.keep is not None):
            keep_ids = self.best(route, x, num_kept(N, ratio))
        elif keep_ids is None and num_kept(N, ratio) < N:
            how = dict(generators=self.generators, device=x.device, selection=route.selection, grid=route.grid)
            keep_ids = draw_keep_ids(B, N, ratio, **how)
        self.drawn.append(keep_ids)
        return keep_ids

    @torch.no_grad()
    def best(self, route: Route, x: torch.Tensor, kept: int) -> torch.Tensor:
        """keep_ids (B, K) by the scores of the route's own selection, or random ones, after the tokens of `keep`."""
        shape, own = x.shape[:2], callable(route.selection)
        if not own and route.selection != "random":
            raise ValueError(f"keep= with selection={route.selection}; needed: selection=random, or a function")
        scores = route.selection(x, self.generators) if own else draw_scores(shape, self.generators, x.device)
        keep = torch.zeros_like(scores, dtype=torch.bool) if self.keep is None else self.keep
        if not scores.shape == keep.shape == shape or keep.dtype != torch.bool:
            found = f"scores of shape {tuple(scores.shape)}, keep of {keep.dtype} {tuple(keep.shape)}"
            raise ValueError(f"{found}; needed: {tuple(shape)} for both, and torch.bool")
        if self.reads(keep) and (most := int(keep.sum(1).max())) > kept:
            raise ValueError(f"keep: {most} of {shape[1]} tokens have to stay, and the route keeps {kept}")
        scores = scores.masked_fill(keep.to(scores.device, non_blocking=True), math.inf)
        return scores.topk(kept, dim=1, sorted=False).indices.sort(dim=1).values

    def reads(self, given: torch.Tensor) -> bool:
        there = type(given) is torch.Tensor and given.device.type == "cpu"  # a fake tensor has no values
        return not torch.compiler.is_compiling() and (self.check or there)


def run_blocks(
    blocks: Iterable[tuple[int, nn.Module]],  # numbered, as by enumerate
    x: torch.Tensor,  # (B, N, D)
    context: Sequence = (),  # what each block takes after x,
    per_token: Sequence[torch.Tensor] = (),  # and after that: (B or 1, N, ...) each, gathered with the tokens
    routes: Sequence[Route] = (),
    routing: Routing | None = None,  # None = dense
    hidden: Collection[int] = (),
) -> tuple[torch.Tensor, dict[int, tuple[torch.Tensor, torch.Tensor | None]]]:
    """Tokens after all blocks, and {number: (tokens (B, K, D) after the block, keep_ids)} of those in `hidden`.
    A block's attribute `recompute`: the backward pass runs it again; `keeps_fp32`: no autocast where routing is on."""
    starts = {route.start_layer_idx: route for route in routes if routing is not None}
    route = drawn = keep_ids = None
    found = {}
    for i, block in blocks:
        if i in starts:
            route, stash = starts[i], (x, per_token)
            drawn = routing.draw(route, x)
        if drawn is not None and i == route.sparse_from:
            keep_ids = drawn
            x, *per_token = (gather_tokens(part, keep_ids) for part in (x, *per_token))  # (B, K, ...)
        exact = routing is not None and getattr(block, "keeps_fp32", False)
        with torch.autocast(x.device.type, enabled=False) if exact else nullcontext():
            if getattr(block, "recompute", False) and torch.is_grad_enabled():
                # Blocks draw no random numbers, and saving the generator's state would make the host wait.
                x = checkpoint(block, x, *context, *per_token, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, *context, *per_token)
        if i in hidden:
            found[i] = x, keep_ids
        if drawn is not None and i == route.end_layer_idx:
            kept = gather_tokens(x, drawn) if keep_ids is None else x
            x, per_token = scatter_tokens(kept, drawn, stash[0]), stash[1]  # (B, N, ...)
            drawn = keep_ids = None
    return x, found


def draw_keep_ids(
    batch_size: int, num_tokens: int, selection_ratio: float, *, generators: Source = None,
    device: torch.device | str | None = None, selection: str = "random", grid: tuple[int, int] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Which tokens are kept: (B, K) int64, ascending, uniform without replacement, drawn independently per row.

    Ascending, because blocks may depend on the order of tokens (state space, causal). selection: "random";
    "structured" = equally many from each cell of the token grid (`cell_of`); "rows" or "columns" = whole ones; "cells"
    = one of each cell of CELLS, in the order of the cells instead. Raises ValueError where that cannot be.
    """
    kept, side = num_kept(num_tokens, selection_ratio), None
    if selection not in SELECTIONS:
        raise ValueError(f"selection={selection}; needed: {', '.join(SELECTIONS[:-1])} or {SELECTIONS[-1]}")
    if selection in ("rows", "columns", "cells"):
        check_whole(num_tokens, selection_ratio, selection, grid)
    if selection == "structured" and kept < num_tokens:
        side, columns, kept = cell_of(num_tokens, selection_ratio, grid)
    scores = draw_scores((batch_size, num_tokens), generators, device)
    if selection in ("rows", "columns", "cells"):
        return keep_whole(scores, kept, selection, grid or square(num_tokens))
    if side is None:
        return scores.topk(kept, dim=1, sorted=False).indices.sort(dim=1).values
    ids = torch.arange(num_tokens, device=scores.device).view(-1, side, columns // side, side)
    cells = ids.transpose(1, 2).flatten(0, 1).flatten(1)  # (cells, side * side)
    chosen = scores[:, cells].topk(kept, dim=2, sorted=False).indices  # (B, cells, kept)
    return cells.expand(batch_size, -1, -1).gather(2, chosen).flatten(1).sort(dim=1).values


def draw_scores(shape: Sequence[int], generators: Source, device: torch.device | str | None) -> torch.Tensor:
    """Uniform scores (B, N) in [0, 1)."""
    if callable(generators):
        scores = generators(tuple(shape), device)
    elif isinstance(generators, Sequence):
        scores = torch.stack([torch.rand(shape[1], generator=g, device=g.device) for g in generators])
    else:
        scores = torch.rand(*shape, generator=generators, device=getattr(generators, "device", device))
    return scores.to(device or scores.device, non_blocking=True)


def cell_of(num_tokens: int, selection_ratio: float, grid: tuple[int, int] | None = None) -> tuple[int, int, int]:
    """(side of a cell, columns of the grid, tokens kept in each cell), for the smallest cell that keeps a whole number:
    2 x 2 at ratios of 0.25, 0.5 and 0.75, 4 x 4 at other sixteenths. Raises ValueError where there is none."""
    rows, columns = grid or square(num_tokens)
    sides = [side for side in (2, 4) if rows % side == columns % side == 0 and rows * columns == num_tokens]
    if not sides:
        found = f"no cell of 2 x 2 or 4 x 4 divides this grid of {num_tokens} tokens, {columns} in a row"
        raise ValueError(f"selection=structured: {found}; needed: selection=random")
    for side in sides:
        if (kept := side**2 * (1 - selection_ratio)).is_integer():
            return side, columns, int(kept)
    below = min(int(side**2 * selection_ratio), side**2 - 2) / side**2
    near = f"the nearest ratios that do: {below:g} and {below + side**-2:g}"
    raise ValueError(f"selection_ratio {selection_ratio:g} keeps no whole number of a cell's {side**2} tokens; {near}")


def check_whole(num_tokens: int, selection_ratio: float, selection: str, grid: tuple[int, int] | None = None) -> None:
    """Raises ValueError where a ratio keeps no whole rows or columns, or not one token of each cell."""
    (rows, columns), kept = grid or square(num_tokens), num_kept(num_tokens, selection_ratio)
    if rows * columns != num_tokens:
        raise ValueError(f"selection={selection} needs a grid of tokens; found {num_tokens} of {rows} x {columns}")
    lines = rows if selection == "rows" else columns
    scale = 10 ** max(4, len(str(num_tokens)))  # so that rounding up takes no further token
    ratios = [math.ceil(scale * n / lines) / scale for n in range(lines)]  # rounded up, as num_kept rounds down
    if selection == "cells":
        ratios = [1 - 1 / n for n, (high, wide) in CELLS.items() if rows % high == columns % wide == 0]
    if kept not in [num_kept(num_tokens, ratio) for ratio in ratios]:
        near = sorted(sorted(ratios, key=lambda ratio: abs(ratio - selection_ratio))[:2])
        what = "one token of each cell" if selection == "cells" else f"whole {selection}"
        found = f"selection_ratio {selection_ratio:g} keeps {kept} of {rows} x {columns} tokens, not {what}"
        raise ValueError(f"{found}; the nearest ratios that do: {' and '.join(f'{ratio:g}' for ratio in near)}")


def keep_whole(scores: torch.Tensor, kept: int, selection: str, grid: tuple[int, int]) -> torch.Tensor:
    """keep_ids (B, K) of whole rows or columns, ascending, or of one token per cell, by scores (B, N)."""
    ids = torch.arange(math.prod(grid), device=scores.device).view(grid)
    if selection == "cells":
        high, wide = CELLS[ids.numel() // kept]
        cells = ids.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).transpose(1, 2).flatten(0, 1).flatten(1)
        best = scores[:, cells].argmax(dim=2, keepdim=True)  # (B, cells, 1)
        return cells.expand(len(scores), -1, -1).gather(2, best).squeeze(2)
    lines = ids if selection == "rows" else ids.T
    chosen = scores[:, : len(lines)].topk(kept // lines.shape[1], dim=1).indices.sort(dim=1).values
    whole = lines[chosen]  # (B, lines kept, tokens of a line)
    return (whole if selection == "rows" else whole.mT).flatten(1)


def square(num_tokens: int) -> tuple[int, int]:
    return (math.isqrt(num_tokens),) * 2


def gather_tokens(x: torch.Tensor, keep_ids: torch.Tensor) -> torch.Tensor:
    """The kept tokens: x (B or 1, N, ...), keep_ids (B, K) -> (B, K, ...)."""
    ids = keep_ids.reshape(*keep_ids.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return x.expand(len(keep_ids), *x.shape[1:]).gather(1, ids)


def scatter_tokens(kept: torch.Tensor, keep_ids: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """A copy of `full` (B, N, ...) with `kept` (B, K, ...) at keep_ids (B, K)."""
    ids = keep_ids.reshape(*keep_ids.shape, *[1] * (kept.ndim - 2)).expand_as(kept)
    return full.scatter(1, ids, kept.to(full.dtype))


def num_kept(num_tokens: int, selection_ratio: float) -> int:
    """K = N - int(N * ratio). Raises ValueError for a ratio outside [0, 1)."""
    if not isinstance(selection_ratio, int | float) or not 0 <= selection_ratio < 1:
        raise ValueError(f"selection_ratio is the share of tokens routed away, in [0, 1); got {selection_ratio}")
    return num_tokens - int(num_tokens * selection_ratio)

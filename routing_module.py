"""Token routing (TREAD, arXiv 2501.04765): some tokens bypass a span of blocks and are put back after it.

    keep_ids = draw_keep_ids(B, N, ratio)      before block i: which tokens are kept, drawn per sample and step
    kept = gather_tokens(x, keep_ids)          blocks i..j see K = N - int(N * ratio) tokens
    x = scatter_tokens(kept, keep_ids, x)      after block j: the others return to their positions, unchanged

No parameters, any (B, N, D) sequence model. B batch, N tokens, K kept tokens, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch

from randomness import Generators, uniform
from system import UserError


@dataclass(frozen=True)
class Route:
    """The fraction `selection_ratio`, in [0, 1), of the tokens bypasses blocks `start_layer_idx`..`end_layer_idx`,
    inclusive; negative indices count from the end."""

    selection_ratio: float
    start_layer_idx: int
    end_layer_idx: int


@dataclass(frozen=True)
class Routing:
    """Switches a network's routes on for one call.

    selection_ratio: None = each route's own; a number in [0, 1) overrides it. Raises UserError outside.
    generators: the selection's source of randomness (randomness.py).
    """

    selection_ratio: float | None = None
    generators: Generators = None

    def __post_init__(self):
        if self.selection_ratio is not None:
            check_ratio(self.selection_ratio)


def check_ratio(selection_ratio: float) -> None:
    if not 0 <= selection_ratio < 1:
        raise UserError(f"selection_ratio is the share of tokens routed away, in [0, 1); got {selection_ratio}")


def resolve_routes(routes, depth: int) -> tuple[Route, ...]:
    """Routes (or mappings with a Route's three keys) with indices counted from 0, sorted.

    Raises UserError where a route leaves the network of `depth` blocks, is empty, or overlaps another.
    """
    resolved = []
    for route in routes if isinstance(routes, Sequence) else [routes]:
        if isinstance(route, Mapping) and route.keys() == {field.name for field in fields(Route)}:
            route = Route(**route)
        if not isinstance(route, Route):
            raise UserError(f"route {route}; needed: selection_ratio, start_layer_idx and end_layer_idx")
        check_ratio(route.selection_ratio)
        start, end = (i + depth if i < 0 else i for i in (route.start_layer_idx, route.end_layer_idx))
        if not 0 <= start <= end < depth:
            raise UserError(
                f"route {route.start_layer_idx}..{route.end_layer_idx} does not fit a network of {depth} blocks: "
                f"it needs 0 <= start <= end <= {depth - 1}, and is {start}..{end}"
            )
        resolved.append(replace(route, start_layer_idx=start, end_layer_idx=end))
    resolved.sort(key=lambda route: route.start_layer_idx)
    for before, after in zip(resolved, resolved[1:]):
        if after.start_layer_idx <= before.end_layer_idx:
            raise UserError(
                f"routes overlap: {before.start_layer_idx}..{before.end_layer_idx} and "
                f"{after.start_layer_idx}..{after.end_layer_idx}"
            )
    return tuple(resolved)


def num_kept(num_tokens: int, selection_ratio: float) -> int:
    """K = N - int(N * ratio)."""
    return num_tokens - int(num_tokens * selection_ratio)


def draw_keep_ids(
    batch_size: int,
    num_tokens: int,
    selection_ratio: float,
    *,
    generators: Generators = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Which tokens are kept: (B, K) int64, uniform without replacement, each row drawn on its own.

    Ids ascend, so that blocks for which order matters (state space, causal) see the tokens in order.
    Raises UserError for a selection_ratio outside [0, 1).
    """
    check_ratio(selection_ratio)
    scores = uniform((batch_size, num_tokens), generators, device=device)  # (B, N)
    keep_ids = scores.topk(num_kept(num_tokens, selection_ratio), dim=1, sorted=False).indices  # (B, K)
    return keep_ids.sort(dim=1).values


def gather_tokens(x: torch.Tensor, keep_ids: torch.Tensor) -> torch.Tensor:
    """The kept tokens: x (B, N, ...), keep_ids (B, K) -> (B, K, ...)."""
    return x.gather(1, _expand(keep_ids, x))


def scatter_tokens(kept: torch.Tensor, keep_ids: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """A copy of `full` (B, N, ...) with `kept` (B, K, ...) at keep_ids (B, K)."""
    return full.scatter(1, _expand(keep_ids, full), kept.to(full.dtype))


def _expand(keep_ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return keep_ids.reshape(*keep_ids.shape, *[1] * (x.ndim - 2)).expand(*keep_ids.shape, *x.shape[2:])

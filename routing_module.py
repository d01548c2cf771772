"""Token sparsity: a span of blocks sees some of the tokens, and the sequence is whole again after it.

    keep_ids = draw_keep_ids(B, N, ratio)      before block i: which tokens are kept, drawn per sample and step
    kept = gather_tokens(x, keep_ids)          blocks i..j see K = N - int(N * ratio) tokens
    x = scatter_tokens(kept, keep_ids, x)      after block j: the others return to their positions, unchanged

Selection is random, or structured: equally many from each cell of the token grid (SPRINT). What stands in the places of
the others is what they were before the span (TREAD, arXiv 2501.04765), or a mask token (`pad_tokens`: SPRINT,
arXiv 2510.21986, and MaskDiT, arXiv 2306.09305).

No parameters, any (B, N, D) sequence model. B batch, N tokens, K kept tokens, D width. A network whose forward is not
ours keeps it: `RoutedBlocks` replaces its list of blocks, and `with routing(...)` switches the routes on.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from functools import partial
from inspect import signature

import torch
from torch import nn

from randomness import Generators, uniform
from system import UserError


@dataclass(frozen=True)
class Route:
    """The fraction `selection_ratio`, in [0, 1), of the tokens bypasses blocks `start_layer_idx`..`end_layer_idx`,
    inclusive; negative indices count from the end. selection: "random" or "structured" (`draw_keep_ids`)."""

    selection_ratio: float
    start_layer_idx: int
    end_layer_idx: int
    selection: str = "random"


@dataclass(frozen=True)
class Routing:
    """Switches a network's routes on for one call.

    selection_ratio: None = as in training: each route's own, and SPRINT's path drop; a number in [0, 1) overrides it.
        Raises UserError outside.
    generators: the source of randomness of the selection and of path drop (randomness.py).
    keep_ids: (B, K) int64, ascending: the tokens that are kept; nothing is drawn.
    drop_path: the span is skipped, and its output is the mask token everywhere (SPRINT's path-drop guidance).
    """

    selection_ratio: float | None = None
    generators: Generators = None
    keep_ids: torch.Tensor | None = None
    drop_path: bool = False

    def __post_init__(self):
        if self.selection_ratio is not None:
            check_ratio(self.selection_ratio)

    def ratio_of(self, route: Route) -> float:
        """The selection ratio of a route in this call."""
        return route.selection_ratio if self.selection_ratio is None else self.selection_ratio


def check_ratio(selection_ratio: float) -> None:
    if not 0 <= selection_ratio < 1:
        raise UserError(f"selection_ratio is the share of tokens routed away, in [0, 1); got {selection_ratio}")


def resolve_routes(routes, depth: int, num_tokens: int | None = None) -> tuple[Route, ...]:
    """Routes (or mappings with a Route's keys) with indices counted from 0, sorted.

    Raises UserError where a route leaves the network of `depth` blocks, is empty, overlaps another, or selects what the
    grid of `num_tokens` tokens (None = unknown) does not allow.
    """
    required = {field.name for field in fields(Route)} - {"selection"}
    resolved = []
    for route in routes if isinstance(routes, Sequence) else [routes]:
        if isinstance(route, Mapping) and route.keys() - {"selection"} == required:
            route = Route(**route)
        if not isinstance(route, Route):
            raise UserError(f"route {route}; needed: selection_ratio, start_layer_idx and end_layer_idx")
        check_ratio(route.selection_ratio)
        check_selection(route.selection, route.selection_ratio, num_tokens)
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


def check_selection(selection: str, selection_ratio: float, num_tokens: int | None) -> None:
    """Raises UserError for an unknown selection, or a structured one that the grid or the ratio does not allow."""
    if selection not in ("random", "structured"):
        raise UserError(f"selection={selection}; needed: random or structured")
    if selection == "structured" and num_tokens is not None and num_kept(num_tokens, selection_ratio) < num_tokens:
        cell_of(num_tokens, selection_ratio)


def cell_of(num_tokens: int, selection_ratio: float) -> tuple[int, int]:
    """(side of a cell, tokens kept in each) of structured selection: the smallest cell that this ratio keeps whole.

    0.25, 0.5 and 0.75 cut the grid into cells of 2 x 2, the other sixteenths into cells of 4 x 4. Raises UserError
    where neither divides the grid's side, and for any other ratio, with the nearest two that the grid allows.
    """
    side = math.isqrt(num_tokens)
    cells = [cell for cell in (2, 4) if side**2 == num_tokens and side % cell == 0]
    if not cells:
        raise UserError(
            f"selection=structured cuts the token grid into cells of 2 x 2 or 4 x 4, and this one has {num_tokens} "
            f"tokens, a side of {num_tokens**0.5:g}; needed: a side that 2 divides, or selection=random"
        )
    for cell in cells:
        if (kept := cell**2 * (1 - selection_ratio)).is_integer():
            return cell, int(kept)
    parts = cells[-1] ** 2
    below = min(math.floor(parts * selection_ratio), parts - 2)
    raise UserError(
        f"selection=structured with selection_ratio {selection_ratio:g} keeps no whole number of the {parts} tokens in "
        f"a cell; the nearest that do: {below / parts:g} and {(below + 1) / parts:g}"
    )


def draw_keep_ids(
    batch_size: int,
    num_tokens: int,
    selection_ratio: float,
    *,
    generators: Generators = None,
    device: torch.device | str | None = None,
    selection: str = "random",
) -> torch.Tensor:
    """Which tokens are kept: (B, K) int64, ascending, uniform without replacement, drawn independently per row.

    selection: "random" = from the whole sequence; "structured" = equally many from each cell of the token grid
    (`cell_of`). Ascending, because blocks may depend on the order of tokens (state space, causal). Raises UserError for
    a selection_ratio outside [0, 1) or one that no cell gives.
    """
    check_ratio(selection_ratio)
    check_selection(selection, selection_ratio, num_tokens)
    scores = uniform((batch_size, num_tokens), generators, device=device)  # (B, N)
    if selection == "random" or num_kept(num_tokens, selection_ratio) == num_tokens:
        keep_ids = scores.topk(num_kept(num_tokens, selection_ratio), dim=1, sorted=False).indices  # (B, K)
    else:
        cell, kept = cell_of(num_tokens, selection_ratio)
        grid = torch.arange(num_tokens, device=scores.device).view(-1, cell, math.isqrt(num_tokens) // cell, cell)
        cells = grid.transpose(1, 2).flatten(0, 1).flatten(1)  # (cells, cell * cell) token ids
        chosen = scores[:, cells].topk(kept, dim=2, sorted=False).indices  # (B, cells, kept)
        keep_ids = cells.expand(batch_size, -1, -1).gather(2, chosen).flatten(1)
    return keep_ids.sort(dim=1).values


def draw_route(
    route: Route, routing: Routing, batch_size: int, num_tokens: int, device: torch.device
) -> torch.Tensor | None:
    """keep_ids (B, K) for one route, or None where its ratio keeps all tokens. Raises UserError."""
    if routing.drop_path:
        raise UserError("drop_path needs a network with a deep path to drop (model=sprint)")
    ratio = routing.ratio_of(route)
    if routing.keep_ids is not None or num_kept(num_tokens, ratio) == num_tokens:
        return routing.keep_ids
    return draw_keep_ids(
        batch_size, num_tokens, ratio, generators=routing.generators, device=device, selection=route.selection
    )


def draw_only_route(
    routes: Sequence[Route], routing: Routing | None, batch_size: int, num_tokens: int, device: torch.device
) -> torch.Tensor | None:
    """draw_route of a network with at most one route; None = all tokens, also where routing is off."""
    if routing is None or not routes:
        return None
    return draw_route(routes[0], routing, batch_size, num_tokens, device)


def gather_tokens(x: torch.Tensor, keep_ids: torch.Tensor) -> torch.Tensor:
    """The kept tokens: x (B, N, ...), keep_ids (B, K) -> (B, K, ...)."""
    return x.gather(1, _expand(keep_ids, x))


def scatter_tokens(kept: torch.Tensor, keep_ids: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """A copy of `full` (B, N, ...) with `kept` (B, K, ...) at keep_ids (B, K)."""
    return full.scatter(1, _expand(keep_ids, full), kept.to(full.dtype))


def pad_tokens(kept: torch.Tensor, keep_ids: torch.Tensor, mask_token: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """`kept` (B, K, D) at keep_ids (B, K) and `mask_token` (1, 1, D) everywhere else -> (B, N, D)."""
    return scatter_tokens(kept, keep_ids, mask_token.expand(len(kept), num_tokens, -1))


def _expand(keep_ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return keep_ids.reshape(*keep_ids.shape, *[1] * (x.ndim - 2)).expand(*keep_ids.shape, *x.shape[2:])


@dataclass
class Active:
    """What `with routing(...)` switches on. notes: what one list of a network's blocks leaves for the next."""

    routing: Routing
    notes: dict = field(default_factory=dict)


_active: ContextVar[Active | None] = ContextVar("routing", default=None)


@contextmanager
def routing(selection_ratio: float | None = None, generators: Generators = None) -> Iterator[None]:
    """Switches on the routes of every RoutedBlocks that this thread calls inside; the innermost context counts.

    selection_ratio: None = each route's own; a number in [0, 1) overrides it. Raises UserError for another.
    generators: what the selection is drawn from. Under torch.compile of a whole model, drawing from them breaks the
        graph; compiled blocks and the default generator do not.
    """
    token = _active.set(Active(Routing(selection_ratio, generators)))
    try:
        yield
    finally:
        _active.reset(token)


class RoutedBlocks(nn.ModuleList):
    """A network's list of blocks with routes through it, for a forward that is not ours.

        net.blocks = RoutedBlocks(net.blocks, Route(0.5, 2, -3), per_token=["rotary"])
        with routing(generators=generator):
            loss = net(x).square().mean()

    Inside `routing`, iterating over the list yields a call for each block of a route: the first gathers, the last
    scatters, and whatever the network does between them sees the K kept tokens. A forward pass draws once, so gradient
    checkpointing, which runs blocks again, sees the same tokens. Outside, iterating yields the blocks themselves.
    Parameters keep their names; `net.blocks = nn.ModuleList(net.blocks)` undoes it.

    blocks: their first argument is the tokens (B, N, D); everything else that they take and return passes through.
    routes: one or several, counted over `blocks`, as in DiT.
    per_token: names of arguments with one row per token, (B or 1, N, ...) or tuples of such, to be gathered with the
        tokens. A mapping gives each name its own (value, keep_ids, num_tokens, name) -> value instead of gather_rows.
    output: index of the tokens in the tuple that a block returns; None = it returns the tokens alone.
    text: the first so many tokens of the sequence are text and always kept.
    Raises UserError for routes that do not fit, and for arguments that blocks do not take or that have other lengths.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module] = (),
        routes: Sequence[Route | Mapping] | Route | Mapping = (),
        *,
        per_token: Sequence[str] | Mapping[str, Callable] = (),
        output: int | None = None,
        text: int = 0,
    ):
        super().__init__(blocks)
        self.per_token = per_token if isinstance(per_token, Mapping) else dict.fromkeys(per_token, gather_rows)
        self.output, self.text = output, text
        self.arguments = argument_names(self[0]) if len(self) else ()
        unknown = [name for name in self.per_token if len(self) and name not in self.arguments[1:]]
        if unknown:
            found = f"{type(self[0]).__name__} takes {', '.join(self.arguments)}"
            raise UserError(f"per_token names {', '.join(unknown)}, and {found}")
        self.set_routes(resolve_routes(routes, len(self)), first=0)

    def set_routes(self, routes: tuple[Route, ...], first: int) -> None:
        """Resolved routes of a network whose block `first` is this list's block 0."""
        self.routes = routes
        numbers = {i: n for n, r in enumerate(routes) for i in range(r.start_layer_idx, r.end_layer_idx + 1)}
        self.route_of = [numbers.get(first + i) for i in range(len(self))]

    def __iter__(self) -> Iterator[Callable]:
        active = _active.get()
        return super().__iter__() if active is None else self.walk(active.routing, self.notes(active))

    def walk(self, routing: Routing, notes: dict) -> Iterator[Callable]:
        """The blocks for one forward pass. notes: what the pass knows, such as the keep_ids of route `number`."""
        around = [None, *self.route_of, None]
        for block, before, number, after in zip(self._modules.values(), around, self.route_of, around[2:]):
            if number is not None and number != before:
                span = Span(self, number, routing, notes)
            yield block if number is None else partial(span.run, block, number != before, number != after)

    def notes(self, active: Active) -> dict:
        """The notes of a new forward pass."""
        return {}

    def layout(self, x: torch.Tensor, notes: dict) -> tuple[torch.Tensor | int, int]:
        """The numbers of text and image tokens in x (B, S, D) = [text | image | padding]; text may be (B, 1)."""
        return self.text, x.shape[1] - self.text

    def keep_ids(self, number: int, x: torch.Tensor, routing: Routing, notes: dict) -> torch.Tensor | None:
        """Which tokens of x (B, S, D) route `number` keeps: (B, K), or None for all."""
        text, image = self.layout(x, notes)
        if number not in notes:
            notes[number] = draw_route(self.routes[number], routing, len(x), image, x.device)
        ids = notes[number]
        return ids if ids is None or image == x.shape[1] else keep_others(ids, text, image, x.shape[1])


class Span:
    """One route's blocks of one list, in one forward pass."""

    def __init__(self, blocks: RoutedBlocks, number: int, routing: Routing, notes: dict):
        self.blocks, self.number, self.routing, self.notes = blocks, number, routing, notes

    def run(self, block: nn.Module, enters: bool, leaves: bool, *args, **kwargs):
        """One block on the kept tokens. args and kwargs: whatever a third party's forward hands to its block."""
        tokens, output = self.blocks.arguments[0], self.blocks.output
        arguments = dict(zip(self.blocks.arguments, args)) | kwargs
        if enters:
            self.full = arguments[tokens]  # (B, N, D)
            self.ids = self.blocks.keep_ids(self.number, self.full, self.routing, self.notes)  # (B, K)
        if self.ids is None:
            return block(*args, **kwargs)
        if enters:
            arguments[tokens] = gather_tokens(self.full, self.ids)  # (B, K, D)
        for name, gather in self.blocks.per_token.items():
            if arguments.get(name) is not None:
                arguments[name] = gather(arguments[name], self.ids, self.full.shape[1], name)
        out = block(**arguments)
        if isinstance(out, tuple) != (output is not None):
            found = f"{type(block).__name__} returns {f'a tuple of {len(out)}' if output is None else 'no tuple'}"
            raise UserError(f"output={output}, and {found}; needed: the tokens' index in a tuple, or None without one")
        if not leaves:
            return out
        return self.scatter(out) if output is None else (*out[:output], self.scatter(out[output]), *out[output + 1 :])

    def scatter(self, kept: torch.Tensor) -> torch.Tensor:
        """(B, K, D) -> (B, N, D), in the precision of the blocks' output, as without routing."""
        return scatter_tokens(kept, self.ids, self.full.to(kept.dtype))


def argument_names(block: nn.Module) -> tuple[str, ...]:
    """Names of a forward's arguments. Raises UserError for a wrapper, which has none."""
    parameters = signature(block.forward).parameters
    if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        raise UserError(f"{type(block).__name__} does not name its arguments; needed: routes first, wrappers after")
    return tuple(parameters)


def gather_rows(value, keep_ids: torch.Tensor, num_tokens: int, name: str):
    """The kept tokens' rows of a tensor (B or 1, N, ...), or of each in a tuple. Raises UserError for other shapes."""
    if isinstance(value, (tuple, list)):
        return tuple(gather_rows(part, keep_ids, num_tokens, name) for part in value)
    if value.ndim < 2 or value.shape[0] not in (1, len(keep_ids)) or value.shape[1] != num_tokens:
        needed = f"({len(keep_ids)} or 1, {num_tokens}, ...), one row per token"
        raise UserError(f"per-token argument {name} of shape {tuple(value.shape)}; needed: {needed}")
    return gather_tokens(value.expand(len(keep_ids), *value.shape[1:]), keep_ids)


def keep_others(keep_ids: torch.Tensor, text: torch.Tensor | int, image: int, length: int) -> torch.Tensor:
    """keep_ids (B, K) of image tokens -> keep_ids of [text | image | padding] (B, length), with text and padding kept.

    text, image: their numbers of tokens; text may be (B, 1). Ascending, (B, length - image + K).
    """
    K = keep_ids.shape[1]
    place = torch.arange(length - image + K, device=keep_ids.device)
    inside = (place - text).clamp(0, K - 1).expand(len(keep_ids), -1)
    kept = torch.where(place < text + K, text + keep_ids.gather(1, inside), place + image - K)
    return torch.where(place < text, place, kept)

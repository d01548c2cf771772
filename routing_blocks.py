"""Routes through a list of blocks whose forward is somebody else's, on torch alone.

    net.blocks = RoutedBlocks(net.blocks, Route(0.5, 2, -3), per_token=["rotary"])
    with routing(generators=generator):          # training; outside, the network is unchanged, bit for bit
        loss = net(x).square().mean()

Mistakes raise ValueError. B batch, N tokens, K kept tokens, D width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature

import torch
from torch import nn

from routing_module import Route, Routing, Source, draw_keep_ids, gather_tokens, num_kept, scatter_tokens


def resolve_routes(
    routes: Sequence[Route | Mapping] | Route | Mapping, depth: int, grid: tuple[int, int] | None = None
) -> tuple[Route, ...]:
    """Routes (or mappings with a Route's keys) with indices counted from 0, sorted.

    Raises ValueError where a route leaves the network of `depth` blocks, is empty, overlaps another, or selects what
    the grid of tokens (rows, columns; None = unknown) does not allow.
    """
    required, optional = {"selection_ratio", "start_layer_idx", "end_layer_idx"}, {"selection", "leave_layer_idx"}
    resolved = []
    for route in routes if isinstance(routes, Sequence) else [routes]:
        if isinstance(route, Mapping) and route.keys() - optional == required:
            route = Route(**route)
        if not isinstance(route, Route):
            raise ValueError(f"route {route}; needed: selection_ratio, start_layer_idx and end_layer_idx")
        indices = route.start_layer_idx, route.leave_layer_idx, route.end_layer_idx
        if not all(isinstance(i, int) or i is None and n == 1 for n, i in enumerate(indices)):
            raise ValueError(f"{route} names blocks that are no whole numbers")
        check_route(route, route.selection_ratio, grid)
        start, leave, end = (i if i is None or i >= 0 else i + depth for i in indices)
        if not 0 <= start <= end < depth:
            raise ValueError(
                f"route {route.start_layer_idx}..{route.end_layer_idx} does not fit a network of {depth} blocks: "
                f"it needs 0 <= start <= end <= {depth - 1}, and is {start}..{end}"
            )
        if leave is not None and not start <= leave <= end:
            found = f"leave_layer_idx {route.leave_layer_idx} is no block of the route {start}..{end}"
            raise ValueError(f"{found}; needed: from {start} on (tokens leave after it) to {end} (none leaves)")
        resolved.append(replace(route, start_layer_idx=start, leave_layer_idx=leave, end_layer_idx=end, grid=grid))
    resolved.sort(key=lambda route: route.start_layer_idx)
    for before, after in zip(resolved, resolved[1:]):
        if after.start_layer_idx <= before.end_layer_idx:
            spans = [f"{route.start_layer_idx}..{route.end_layer_idx}" for route in (before, after)]
            raise ValueError(f"routes overlap: {' and '.join(spans)}")
    return tuple(resolved)


def check_route(route: Route, selection_ratio: float, grid: tuple[int, int] | None) -> None:
    """Raises ValueError where the route's tokens cannot be selected at this ratio: by drawing them once."""
    rows, columns = grid or (4, 4)
    how = dict(generators=torch.Generator(), device="cpu", selection=route.selection, grid=grid)
    draw_keep_ids(1, rows * columns, selection_ratio if grid or route.selection == "random" else 0.0, **how)


def block_tokens(routes: Sequence[Route], routing: Routing | None, depth: int, num_tokens: int) -> list[int]:
    """The number of tokens that each of `depth` blocks sees in a call with `routing` (None = dense).

    Raises ValueError for drop_path, which needs a network with a deep path to drop.
    """
    if routing is not None and routing.drop_path:
        raise ValueError("drop_path needs a network with a deep path to drop (model=sprint)")
    tokens = [num_tokens] * depth
    for route in routes if routing is not None else ():
        for i in range(route.sparse_from, route.end_layer_idx + 1):
            tokens[i] = num_kept(num_tokens, routing.ratio_of(route))
    return tokens


@dataclass
class Active:
    """What `with routing(...)` switches on. notes: what one list of a network's blocks leaves for the next."""

    routing: Routing
    notes: dict = field(default_factory=dict)


_active: ContextVar[Active | None] = ContextVar("routing", default=None)


@contextmanager
def routing(selection_ratio: float | None = None, generators: Source = None) -> Iterator[None]:
    """Switches on the routes of every RoutedBlocks that this thread calls inside; the innermost context counts.

    selection_ratio: None = each route's own; a number in [0, 1) overrides it. Raises ValueError for another.
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
    Raises ValueError for routes that do not fit, and for arguments that blocks do not take or that have other lengths.
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
        parameters = signature(self[0].forward).parameters if len(self) else {}
        if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
            raise ValueError(
                f"{type(self[0]).__name__} does not name its arguments; needed: routes first, wrappers after"
            )
        self.arguments = tuple(parameters)
        unknown = [name for name in self.per_token if len(self) and name not in self.arguments[1:]]
        if unknown:
            found = f"{type(self[0]).__name__} takes {', '.join(self.arguments)}"
            raise ValueError(f"per_token names {', '.join(unknown)}, and {found}")
        self.set_routes(resolve_routes(routes, len(self)), first=0)

    def set_routes(self, routes: tuple[Route, ...], first: int) -> None:
        """Resolved routes of a network whose block `first` is this list's block 0. Raises ValueError for a delayed
        route across its borders: other lists have other sequences, which hold nothing to put back."""
        for route in routes:
            start, end = route.start_layer_idx - first, route.end_layer_idx - first
            across = start < 0 <= end or start < len(self) <= end
            if route.leave_layer_idx is not None and across:
                found = f"the delayed route {route.start_layer_idx}..{route.end_layer_idx} crosses the border of blocks"
                raise ValueError(f"{found} {first}..{first + len(self) - 1}; needed: a route within one list of blocks")
        self.routes = routes
        numbers = {i: n for n, r in enumerate(routes) for i in range(r.start_layer_idx, r.end_layer_idx + 1)}
        self.route_of = [numbers.get(first + i) for i in range(len(self))]
        self.sparse = [n is not None and first + i >= routes[n].sparse_from for i, n in enumerate(self.route_of)]

    def __iter__(self) -> Iterator[Callable]:
        active = _active.get()
        return super().__iter__() if active is None else self.walk(active.routing, self.notes(active))

    def walk(self, routing: Routing, notes: dict) -> Iterator[Callable]:
        """The blocks for one forward pass. notes: what the pass knows, such as the keep_ids of route `number`."""
        around = [None, *self.route_of, None]
        blocks = zip(self._modules.values(), around, self.route_of, around[2:], self.sparse)
        for block, before, number, after, sparse in blocks:
            if number is not None and number != before:
                span = Span(self, number, routing, notes)
            yield block if number is None else partial(span.run, block, number != before, sparse, number != after)

    def notes(self, active: Active) -> dict:
        """The notes of a new forward pass."""
        return {}

    def layout(self, x: torch.Tensor, notes: dict) -> tuple[torch.Tensor | int, int]:
        """The numbers of text and image tokens in x (B, S, D) = [text | image | padding]; text may be (B, 1)."""
        return self.text, x.shape[1] - self.text

    def keep_ids(self, number: int, x: torch.Tensor, routing: Routing, notes: dict) -> torch.Tensor | None:
        """Which tokens of x (B, S, D) route `number` keeps: (B, K), or None for all."""
        text, image = self.layout(x, notes)
        if number not in notes:  # drawn by a copy, as `routing` may last for many passes and would keep all their ids
            notes[number] = replace(routing).draw(self.routes[number], x[:, :image])
        ids = notes[number]
        return ids if ids is None or image == x.shape[1] else keep_others(ids, text, image, x.shape[1])


class Span:
    """One route's blocks of one list, in one forward pass."""

    def __init__(self, blocks: RoutedBlocks, number: int, routing: Routing, notes: dict):
        self.blocks, self.number, self.routing, self.notes = blocks, number, routing, notes

    def run(self, block: nn.Module, first: bool, sparse: bool, last: bool, *args, **kwargs):
        """One block, on the kept tokens if sparse. args and kwargs: what a third party's forward hands to its block."""
        tokens, output = self.blocks.arguments[0], self.blocks.output
        arguments = dict(zip(self.blocks.arguments, args)) | kwargs
        if first:
            self.full = arguments[tokens]  # (B, N, D)
            self.ids = self.blocks.keep_ids(self.number, self.full, self.routing, self.notes)  # (B, K)
        if self.ids is None:
            return block(*args, **kwargs)
        if sparse and arguments[tokens].shape[1] > self.ids.shape[1]:
            arguments[tokens] = gather_tokens(arguments[tokens], self.ids)  # (B, K, D)
        for name, gather in self.blocks.per_token.items() if sparse else ():
            if arguments.get(name) is not None:
                arguments[name] = gather(arguments[name], self.ids, self.full.shape[1], name)
        out = block(**arguments)
        if isinstance(out, tuple) != (output is not None):
            found = f"{type(block).__name__} returns {f'a tuple of {len(out)}' if output is None else 'no tuple'}"
            raise ValueError(f"output={output}, and {found}; needed: the tokens' index in a tuple, or None without one")
        if not last:
            return out
        kept = out if output is None else out[output]
        kept = kept if sparse else gather_tokens(kept, self.ids)  # (B, K, D)
        whole = scatter_tokens(kept, self.ids, self.full.to(kept.dtype))  # (B, N, D), in the blocks' precision
        return whole if output is None else (*out[:output], whole, *out[output + 1 :])


def gather_rows(value, keep_ids: torch.Tensor, num_tokens: int, name: str):
    """The kept tokens' rows of a tensor (B or 1, N, ...), or of each in a tuple. Raises ValueError for other shapes."""
    if isinstance(value, (tuple, list)):
        return tuple(gather_rows(part, keep_ids, num_tokens, name) for part in value)
    if value.ndim < 2 or value.shape[0] not in (1, len(keep_ids)) or value.shape[1] != num_tokens:
        needed = f"({len(keep_ids)} or 1, {num_tokens}, ...), one row per token"
        raise ValueError(f"per-token argument {name} of shape {tuple(value.shape)}; needed: {needed}")
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

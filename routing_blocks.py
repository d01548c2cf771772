"""Routes through a list of blocks whose forward is somebody else's, on torch alone.

    net.blocks = RoutedBlocks(net.blocks, Route(0.5, 2, -3), per_token=["rotary"])
    with routing(generators=generator):          # training; outside, the network is unchanged, bit for bit
        loss = net(x).square().mean()

Mistakes raise ValueError. B batch, N tokens, K kept tokens, D width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import Parameter, signature
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

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
    (rows, columns), own = grid or (4, 4), callable(route.selection)
    how = dict(generators=torch.Generator(), device="cpu", selection="random" if own else route.selection, grid=grid)
    draw_keep_ids(1, rows * columns, selection_ratio if grid or own or route.selection == "random" else 0.0, **how)


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
    """What `with routing(...)` switches on. notes: what one list of a network's blocks leaves for the next. ran: some
    route has run. span: the one whose block the network was given last, until it asks for the next block."""

    routing: Routing
    notes: dict = field(default_factory=dict)
    ran: bool = False
    span: "Span | None" = None


_active: ContextVar[Active | None] = ContextVar("routing", default=None)


@contextmanager
def routing(
    selection_ratio: float | None = None,
    generators: Source = None,
    *,
    keep_ids: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
    check: bool = False,
) -> Iterator[None]:
    """Switches on the routes of every RoutedBlocks that this thread calls inside; the innermost context counts.

    selection_ratio: None = each route's own; a number in [0, 1) overrides it. Raises ValueError for another.
    generators: what the selection is drawn from. Under torch.compile of a whole model, drawing from them breaks the
        graph; compiled blocks and the default generator do not.
    keep_ids: (B, K) int64, ascending, in place of a draw; keep: (B, N) bool, tokens that have to stay; check: both are
        checked on a GPU, too (`Routing`). N and the ids count image tokens alone.
    Raises RuntimeError on leaving if no route has run.
    """
    active = Active(Routing(selection_ratio, generators, keep_ids, keep=keep, check=check))
    token = _active.set(active)
    try:
        yield
    except (RuntimeError, AttributeError) as error:
        if active.span is None or active.span.due or isinstance(error, torch.OutOfMemoryError):
            raise
        between = f"between blocks of a route, with {active.span.tokens}, the network's forward fails"
        needed = "no residuals of a ControlNet where a route is, or a call outside of routing"
        raise ValueError(f"{between}: {str(error).splitlines()[0]}; needed: {needed}") from error
    finally:
        _active.reset(token)
    if not active.ran:
        needed = "a model with routes (from_pretrained returns one without), called inside, in this thread"
        raise RuntimeError(f"no route has run in this `with routing()`; needed: {needed}")


class Place(NamedTuple):
    """Of a block in the route `number`: the first of the list's, the one before which tokens leave, one on the kept
    tokens, the last of the list's."""

    number: int
    first: bool
    enters: bool
    sparse: bool
    last: bool


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
        self.output, self.text, self.was_routed = output, text, False
        kinds = {name: p.kind for name, p in signature(blocks[0].forward).parameters.items()} if len(self) else {}
        self.arguments = tuple(name for name, kind in kinds.items() if kind < Parameter.VAR_POSITIONAL)
        if kinds and not self.arguments:
            raise ValueError(
                f"{type(blocks[0]).__name__} does not name its arguments; needed: routes first, wrappers after"
            )
        if any(isinstance(module, RoutedBlocks) for block in blocks for module in block.modules()):
            raise ValueError(f"{type(blocks[0]).__name__} has routed blocks inside; needed: one cut, here or there")
        unknown = [name for name in self.per_token if kinds and name not in list(kinds)[1:]]
        if unknown:
            found = f"{type(blocks[0]).__name__} takes {', '.join(kinds)}"
            needed = "names of its arguments, and routes before wrappers and hooks"
            raise ValueError(f"per_token names {', '.join(unknown)}, and {found}; needed: {needed}")
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
        self.places: list[Place | None] = [None] * len(self)
        for number, route in enumerate(routes):
            last = min(route.end_layer_idx - first, len(self) - 1)
            start, sparse_from = (max(i - first, 0) for i in (route.start_layer_idx, route.sparse_from))
            for i in range(start, last + 1):
                self.places[i] = Place(number, i == start, i == sparse_from, i >= sparse_from, i == last)

    def __iter__(self) -> Iterator[Callable]:
        if torch.compiler.is_compiling() and torch.__version__ < (2, 14):  # Dynamo cannot read the context
            raise ValueError("a routed model is compiled as a whole; needed: torch 2.14, or its blocks compiled alone")
        active = _active.get()
        if self.routes and not torch.compiler.is_compiling():
            # A block that is checkpointed runs again without asking for it here: the whole forward does.
            if torch._C._current_graph_task_id() != -1 and (active or self.was_routed):
                raise ValueError("a routed model as a whole is checkpointed; needed: checkpoints of its blocks")
            self.was_routed = active is not None
        return super().__iter__() if active is None else self.walk(active, self.notes(active))

    def __getitem__(self, index):
        taken = super().__getitem__(index)
        return taken if not self.routes or _active.get() is None else Taken(taken)

    def __reversed__(self) -> Iterator[Callable]:
        return map(self.__getitem__, reversed(range(len(self))))

    def _replicate_for_data_parallel(self):
        raise ValueError("DataParallel's threads do not see `with routing()`; needed: DistributedDataParallel")

    def walk(self, active: Active, notes: dict) -> Iterator[Callable]:
        """The blocks for one forward pass. notes: its own, such as the keep_ids of each route, by number."""
        active.span = None
        for block, place in zip(self._modules.values(), self.places):
            if place is None:
                yield block
                continue
            if place.first:
                span = Span(self, active, notes)
            span.due, active.span = True, span
            yield partial(span.run, block, place)
            active.span = None
            if span.due:
                found = f"the forward does not call {type(block).__name__}, a block of a route"
                raise ValueError(f"{found}; needed: no skipped layers (skip_layers), or a call outside of routing")

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
            places = text + torch.arange(image, device=x.device)  # (N,) or (B, N)
            tokens = x if image == x.shape[1] else gather_tokens(x.detach(), places.expand(len(x), -1))  # (B, N, D)
            if (given := routing.keep_ids) is not None:
                check_ids(given, len(x), image, routing.reads(given))
            notes[number] = replace(routing).draw(self.routes[number], tokens)
        ids = notes[number]
        return ids if ids is None or image == x.shape[1] else keep_others(ids, text, image, x.shape[1])


class Taken:
    """What a forward takes out of a routed list by index inside `routing`: its parts are used, but it is not called."""

    def __init__(self, blocks: nn.Module):
        self.blocks = blocks

    def __getattr__(self, name: str):
        return getattr(self.blocks, name)

    def __call__(self, *args, **kwargs):
        needed = "a forward that iterates over all of the list, or no `with routing()`"
        raise ValueError(f"the forward takes blocks out of a routed list by index, past the route; needed: {needed}")

    forward = __iter__ = __call__


class Span:
    """One route's blocks of one list, in one forward pass. due: the network was given a block and has not called it."""

    def __init__(self, blocks: RoutedBlocks, active: Active, notes: dict):
        self.blocks, self.active, self.notes = blocks, active, notes
        self.due, self.without_grad, self.tokens = False, False, "all tokens"

    def run(self, block: nn.Module, place: Place, *args, **kwargs):
        """One block, on the kept tokens if sparse. args and kwargs: what a third party's forward hands to its block."""
        names, output, self.active.ran = self.blocks.arguments, self.blocks.output, True
        if torch.is_grad_enabled() and self.without_grad and not self.due:
            raise ValueError("a routed block is checkpointed with use_reentrant=True; needed: use_reentrant=False")
        self.without_grad = not torch.is_grad_enabled()
        arguments = dict(zip(names, args)) | kwargs
        x = arguments[names[0]]
        if place.first:
            self.full, self.ids = x, self.blocks.keep_ids(place.number, x, self.active.routing, self.notes)  # (B, K)
        if self.ids is None:
            self.due = False
            return block(*args, **kwargs)
        N, K = self.full.shape[1], self.ids.shape[1]
        self.tokens, expected = f"{K} of {N} tokens", K if place.sparse and not place.enters else N
        if x.shape[1] != expected:
            raise ValueError(f"{type(block).__name__} in a route is given {x.shape[1]} tokens; needed: {expected}")
        if place.enters:
            arguments[names[0]] = gather_tokens(x, self.ids)  # (B, K, D)
        for name, gather in self.blocks.per_token.items() if place.sparse else ():
            if arguments.get(name) is not None:
                arguments[name] = gather(arguments[name], self.ids, N, name)
        given = [arguments.pop(name) for name in names[: len(args)]]  # as they were given: some blocks take *args
        out = block(*given, *args[len(given) :], **arguments)
        if isinstance(out, tuple) != (output is not None):
            found = f"{type(block).__name__} returns {f'a tuple of {len(out)}' if output is None else 'no tuple'}"
            raise ValueError(f"output={output}, and {found}; needed: the tokens' index in a tuple, or None without one")
        self.due = False
        if not place.last:
            return out
        kept = out if output is None else out[output]
        kept = kept if place.sparse else gather_tokens(kept, self.ids)  # (B, K, D)
        whole = scatter_tokens(kept, self.ids, self.full.to(kept.dtype))  # (B, N, D), in the blocks' precision
        return whole if output is None else (*out[:output], whole, *out[output + 1 :])


def check_ids(keep_ids: torch.Tensor, batch_size: int, num_tokens: int, values: bool) -> None:
    """Raises ValueError for keep_ids that are not (B, K) int64; values: also where they do not ascend in 0..N-1."""
    if keep_ids.ndim != 2 or len(keep_ids) != batch_size or keep_ids.dtype != torch.int64:
        raise ValueError(f"keep_ids: {keep_ids.dtype} {tuple(keep_ids.shape)}; needed: torch.int64 ({batch_size}, K)")
    between = torch.nn.functional.pad(keep_ids, (1, 0), value=-1)
    if values and not ((between.diff(dim=1) > 0).all() and keep_ids.max() < num_tokens):
        raise ValueError(f"keep_ids of {keep_ids.min()}..{keep_ids.max()}; needed: ascending in 0..{num_tokens - 1}")


def cost_of(model: nn.Module, arguments: Mapping) -> dict[float, int]:
    """FLOPs of a forward pass of a routed model: {0.0: dense, 0.25: n, 0.5: n, 0.75: n}, by the ratio of its routes. A
    training step takes three times as many.

    arguments: of the model's forward. Nothing is computed, so that model and tensors may be on the device "meta".
    Raises ValueError for a model whose forward reads values, such as the lengths of texts.
    """
    costs = {}
    for ratio in (0.0, 0.25, 0.5, 0.75):
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        tensors = {id(tensor): fake.from_tensor(tensor) for tensor in (*model.parameters(), *model.buffers())}
        counted = deepcopy(model, tensors)  # a model may keep what it makes, and this is fake
        given = tree_map_only(torch.Tensor, fake.from_tensor, dict(arguments))
        try:
            attention = sdpa_kernel(SDPBackend.MATH)  # made of products, which are counted on every device
            with torch.no_grad(), fake, routing(ratio), attention, FlopCounterMode(display=False) as counter:
                counted(**given)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(f"the forward of {type(model).__name__} reads values ({error}); needed: shapes") from None
        costs[ratio] = counter.get_total_flops()
    return costs


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

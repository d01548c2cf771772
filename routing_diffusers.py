"""TREAD's routes through the transformers of diffusers, whose code stays as it is.

    model = route(FluxTransformer2DModel.from_pretrained(name, subfolder="transformer"), start=2, end=-3, ratio=0.5)
    with routing(generators=generator):                  # training; outside, the model is unchanged, bit for bit
        velocity = model(...).sample
    unroute(model)                                       # plain lists of blocks again; names of weights never change

FAMILIES lists, for each class, its blocks and those of their arguments that have one row per token. Only image tokens
are routed: text is always kept. B batch, N image tokens, K kept ones, T text tokens, S = T + N (+ padding), H heads.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from routing_blocks import Active, Route, RoutedBlocks, Routing, gather_rows, keep_others, resolve_routes
from routing_blocks import routing as routing  # for those who route a model


class AnglesOfSamples:
    """Rotary angles (B, S, D/H) that differ between samples, for blocks that take (S, D/H).

    Indexed as diffusers' apply_rotary_emb does to broadcast these to (B, S, H, D/H): [None, :, None, :].
    """

    def __init__(self, rows: torch.Tensor):
        self.rows = rows

    def __getitem__(self, index: tuple) -> torch.Tensor:
        return self.rows[:, :, None]  # (B, S, 1, D/H)


def gather_angles(value, keep_ids: torch.Tensor, num_tokens: int, name: str) -> tuple[AnglesOfSamples, ...]:
    """Cosine and sine, (T + N, D/H) each, text first."""
    rows = len(value[0])
    if rows < num_tokens:
        raise ValueError(f"per-token argument {name} of {rows} rows; needed: one per token, {num_tokens} or more")
    ids = keep_others(keep_ids, rows - num_tokens, num_tokens, rows)  # (B, T + K)
    return tuple(AnglesOfSamples(part[ids]) for part in value)


def gather_modulation(value: torch.Tensor, keep_ids: torch.Tensor, num_tokens: int, name: str) -> torch.Tensor:
    """Wan's modulation: per sample (B, 6, D), or per token (B, N, 6, D) since Wan 2.2."""
    return gather_rows(value, keep_ids, num_tokens, name) if value.ndim == 4 else value


def gather_keys(value: torch.Tensor, keep_ids: torch.Tensor, num_tokens: int, name: str) -> torch.Tensor:
    """An attention bias over keys (B, 1, N)."""
    return gather_rows(value.mT, keep_ids, num_tokens, name).mT


def note_streams(arguments: Mapping) -> dict:
    return {"text": arguments["encoder_hidden_states"].shape[1], "image": arguments["hidden_states"].shape[1]}


def note_text(arguments: Mapping) -> dict:
    return {"text": arguments["attention_mask"].sum(1, keepdim=True)}  # (B, 1): captions are padded at the end


def note_image(arguments: Mapping) -> dict:
    return {"image": arguments["hidden_states"].shape[1]}


@dataclass(frozen=True)
class Blocks:
    """A model's list of blocks. per_token, output: as in RoutedBlocks.

    joint: the tokens are one sequence [text | image | padding]. note: what a block's arguments tell later joint lists
    about the numbers of text and image tokens. routed: whether routes count these blocks.
    """

    name: str
    per_token: Mapping[str, Callable] = field(default_factory=dict)
    output: int | None = None
    joint: bool = False
    note: Callable[[Mapping], dict] | None = None
    routed: bool = True


# Lists in the order in which the class's forward runs them; routes count blocks over all of them.
FAMILIES = {
    "DiTTransformer2DModel": [Blocks("transformer_blocks")],
    "PixArtTransformer2DModel": [Blocks("transformer_blocks", {"attention_mask": gather_keys})],
    "SD3Transformer2DModel": [Blocks("transformer_blocks", output=1)],
    "FluxTransformer2DModel": [
        Blocks("transformer_blocks", {"image_rotary_emb": gather_angles}, output=1),
        Blocks("single_transformer_blocks", {"image_rotary_emb": gather_angles}, output=1),
    ],
    "Lumina2Transformer2DModel": [
        Blocks("context_refiner", note=note_text, routed=False),
        Blocks("noise_refiner", note=note_image, routed=False),
        Blocks("layers", {"attention_mask": gather_rows, "image_rotary_emb": gather_rows}, joint=True),
    ],
    "WanTransformer3DModel": [Blocks("blocks", {"rotary_emb": gather_rows, "temb": gather_modulation})],
    "AuraFlowTransformer2DModel": [
        Blocks("joint_transformer_blocks", output=1, note=note_streams),
        Blocks("single_transformer_blocks", joint=True),
    ],
}


class ListedBlocks(RoutedBlocks):
    """RoutedBlocks of a model with several lists: those of one forward pass share its notes, such as the keep_ids."""

    def __init__(self, blocks: Sequence[nn.Module] = (), row: Blocks = Blocks("blocks"), leads: bool = True):
        super().__init__(blocks, per_token=row.per_token, output=row.output)
        self.row, self.leads = row, leads

    def notes(self, active: Active) -> dict:
        if self.leads:
            active.notes = {}  # not cleared: gradient checkpointing may still run the previous pass again
        return active.notes

    def walk(self, routing: Routing, notes: dict) -> Iterator[Callable]:
        for i, block in enumerate(super().walk(routing, notes)):
            yield partial(self.observe, block, notes) if i == 0 and self.row.note is not None else block

    def observe(self, block: Callable, notes: dict, *args, **kwargs):
        """A block, after its row's note of its arguments. They are whatever the model's own forward hands to it."""
        notes.update(self.row.note(dict(zip(self.arguments, args)) | kwargs))
        return block(*args, **kwargs)

    def layout(self, x: torch.Tensor, notes: dict) -> tuple[torch.Tensor | int, int]:
        return (notes["text"], notes["image"]) if self.row.joint else super().layout(x, notes)


def family_of(model: nn.Module) -> list[Blocks]:
    """FAMILIES' row for a model. Raises ValueError for a class that has none."""
    for parent in type(model).__mro__:
        if parent.__name__ in FAMILIES:
            return FAMILIES[parent.__name__]
    raise ValueError(
        f"{type(model).__name__} is none of {', '.join(FAMILIES)}; for another transformer: model.blocks = "
        "routing_blocks.RoutedBlocks(model.blocks, Route(ratio, start, end), per_token=[names of arguments])"
    )


def route(model: nn.Module, start: int, end: int, ratio: float) -> nn.Module:
    """Lets a share `ratio` in [0, 1) of the image tokens bypass blocks start..end (inclusive; negative: from the end).

    Works in place and returns the model; a second call adds a route. Raises ValueError for a span outside the blocks or
    across another route, and for a class that is not in FAMILIES.
    """
    rows = family_of(model)
    lists = [getattr(model, row.name) for row in rows]
    before = next((blocks.routes for blocks in lists if isinstance(blocks, ListedBlocks)), ())
    depth = sum(len(blocks) for blocks, row in zip(lists, rows) if row.routed)
    routes, first = resolve_routes([*before, Route(ratio, start, end)], depth), 0
    for i, (row, blocks) in enumerate(zip(rows, lists)):
        if row.note is not None and not len(blocks):
            raise ValueError(
                f"{type(model).__name__} without {row.name}; needed: a block there, which tells text from image"
            )
        routed = ListedBlocks(blocks, row, leads=i == 0)
        if row.routed:
            routed.set_routes(routes, first)
            first += len(blocks)
        setattr(model, row.name, routed)
    return model


def unroute(model: nn.Module) -> nn.Module:
    """Gives a model its plain lists of blocks back, in place, and returns it. Raises ValueError for unknown classes."""
    for row in family_of(model):
        setattr(model, row.name, nn.ModuleList(getattr(model, row.name)))
    return model

"""TREAD's routes through the transformers of diffusers, whose code stays as it is.

    model = route(FluxTransformer2DModel.from_pretrained(name, subfolder="transformer"), start=2, end=-3, ratio=0.5)
    with routing(generators=generator):                  # training; outside, the model is unchanged, bit for bit
        velocity = model(...).sample
    unroute(model)                                       # plain lists of blocks again; names of weights never change

FAMILIES lists, for each class, its blocks and those of their arguments that have one row per token. Only image tokens
are routed: text is always kept. B batch, N image tokens, K kept ones, T text tokens, S = T + N (+ padding), H heads.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from inspect import signature

import torch
from torch import nn

from routing_blocks import Active, Route, RoutedBlocks, gather_rows, keep_others, resolve_routes
from routing_blocks import routing as routing  # for those who route a model


class AnglesOfSamples:
    """Rotary angles (B, S, D/H) that differ between samples, for blocks that take (S, D/H)."""

    def __init__(self, rows: torch.Tensor):
        self.rows = rows

    def __getitem__(self, index: tuple) -> torch.Tensor:
        """As apply_rotary_emb adds the axes of samples and heads: [None, :, None] -> (B, S, 1, D/H), [None, None]."""
        return self.rows[(slice(None), *index[1:])]

    def unsqueeze(self, dim: int) -> torch.Tensor:
        return self.rows.unsqueeze(dim + 1)  # QwenImage: the axis of heads, (B, S, 1, D/H/2)


def gather_along(
    value, keep_ids: torch.Tensor, num_tokens: int, name: str, dim: int = 1, text_first: bool = True
):  # fmt: skip
    """Kept tokens along axis `dim` of a tensor (B or 1, ...), or of each in a tuple; what it has beyond the tokens is
    the text's, before or after them, and stays. Raises ValueError for other shapes."""
    if isinstance(value, (tuple, list)):
        return tuple(gather_along(part, keep_ids, num_tokens, name, dim, text_first) for part in value)
    rows = value.shape[dim]
    if rows < num_tokens:
        raise ValueError(f"per-token argument {name} of {rows} rows; needed: one per token, {num_tokens} or more")
    ids = keep_others(keep_ids, (rows - num_tokens) * text_first, num_tokens, rows)  # (B, T + K)
    return gather_rows(value.movedim(dim, 1), ids, rows, name).movedim(1, dim)


def gather_angles(value, keep_ids: torch.Tensor, num_tokens: int, name: str) -> tuple[AnglesOfSamples, ...]:
    """Cosine and sine, (T + N, D/H) each, text first."""
    return tuple(AnglesOfSamples(gather_along(part[None], keep_ids, num_tokens, name)) for part in value)


def gather_image_angles(value, keep_ids: torch.Tensor, num_tokens: int, name: str) -> tuple:
    """QwenImage's complex angles: (N, D/H/2) of the image, and those of the text."""
    return AnglesOfSamples(gather_along(value[0][None], keep_ids, num_tokens, name)), value[1]


def gather_modulation(value: torch.Tensor, keep_ids: torch.Tensor, num_tokens: int, name: str) -> torch.Tensor:
    """Per sample, (B, 1, D) or Wan's (B, 6, D), or per token, (B, N, D) or (B, N, 6, D)."""
    return value if value.ndim == 3 and value.shape[1] in (1, 6) else gather_rows(value, keep_ids, num_tokens, name)


def gather_mask(value, keep_ids: torch.Tensor, num_tokens: int, name: str, text_first: bool = True) -> torch.Tensor:
    """A mask over keys, (B, S) or (B, ..., 1, S), or over queries and keys, (S, S) or (B, ..., S, S)."""
    rows = value.shape[-1]
    if value.ndim == 2 and len(value) == rows != len(keep_ids):
        value = value[None, None]
    for dim in (-1, -2)[: 2 if value.ndim > 2 and value.shape[-2] == rows else 1]:
        value = gather_along(value, keep_ids, num_tokens, name, dim, text_first)
    return value


def gather_masks(value: Mapping, keep_ids: torch.Tensor, num_tokens: int, name: str) -> dict:
    """What a model hands through to its attention. Raises ValueError for Flux2's cache of reference tokens."""
    if "kv_cache_mode" in value:
        raise ValueError("kv_cache_mode counts the reference tokens; needed: keep= for them, and no cache")
    masks = {key: mask for key, mask in value.items() if key == "attention_mask" and mask is not None}
    return dict(value) | {key: gather_mask(mask, keep_ids, num_tokens, key) for key, mask in masks.items()}


def refuse(value, keep_ids: torch.Tensor, num_tokens: int, name: str):
    raise ValueError(f"blocks are given {name}, which tells tokens apart by their places; needed: none of it")


def note_streams(arguments: Mapping) -> dict:
    return {"text": arguments["encoder_hidden_states"].shape[1], "image": arguments["hidden_states"].shape[1]}


def note_text(arguments: Mapping) -> dict:
    return {"text": arguments["attention_mask"].sum(1, keepdim=True)}  # (B, 1): captions are padded at the end


def note_padded_text(arguments: Mapping) -> dict:
    return {"text": arguments["hidden_states"].shape[1]}


def note_image(arguments: Mapping) -> dict:
    return {"image": arguments["hidden_states"].shape[1]}


def note_equal_images(arguments: Mapping) -> dict:
    if arguments["attn_mask"] is not None:
        raise ValueError("images of different sizes in a batch, and a route keeps K tokens of each; needed: one size")
    return {"image": arguments["x"].shape[1]}


@dataclass(frozen=True)
class Blocks:
    """A model's list of blocks. per_token, output: as in RoutedBlocks, but for arguments of SOMETIMES.

    joint: the tokens are one sequence [text | image | other]. note: what a block's arguments tell later joint lists
    about the numbers of text and image tokens. routed: whether routes count these blocks.
    """

    name: str
    per_token: Mapping[str, Callable] = field(default_factory=dict)
    output: int | None = None
    joint: bool = False
    note: Callable[[Mapping], dict] | None = None
    routed: bool = True


FLUX = {"image_rotary_emb": gather_angles, "joint_attention_kwargs": gather_masks}
SOMETIMES = ("modulate_index", "noise_mask", "num_tokens")  # arguments of some versions or variants of blocks alone
BEHIND = partial(gather_mask, text_first=False)
# Lists in the order in which the class's forward runs them; routes count blocks over all of them.
FAMILIES = {
    "DiTTransformer2DModel": [Blocks("transformer_blocks")],
    "PixArtTransformer2DModel": [Blocks("transformer_blocks", {"attention_mask": gather_mask})],
    "SD3Transformer2DModel": [Blocks("transformer_blocks", output=1)],
    "FluxTransformer2DModel": [
        Blocks("transformer_blocks", FLUX, output=1),
        Blocks("single_transformer_blocks", FLUX, output=1),
    ],
    "Flux2Transformer2DModel": [
        Blocks("transformer_blocks", FLUX, output=1, note=note_streams),
        Blocks("single_transformer_blocks", FLUX, joint=True),
    ],
    "Flux3Transformer2DModel": [  # in the second list, reference tokens follow the image's
        Blocks("mode_blocks.image", {"image_rotary_emb": gather_angles, "temb_mod": gather_rows}, note=note_image),
        Blocks(
            "single_transformer_blocks", {"image_rotary_emb": gather_angles, "temb_mod": gather_rows}, 1, joint=True
        ),
    ],
    "ChromaTransformer2DModel": [
        Blocks("transformer_blocks", FLUX | {"attention_mask": gather_mask}, output=1, note=note_streams),
        Blocks("single_transformer_blocks", FLUX | {"attention_mask": gather_mask}, joint=True),
    ],
    "QwenImageTransformer2DModel": [
        Blocks("transformer_blocks", {"image_rotary_emb": gather_image_angles, "modulate_index": gather_rows}, output=1)
    ],
    "Krea2Transformer2DModel": [
        Blocks("text_fusion.refiner_blocks", note=note_padded_text, routed=False),
        Blocks("transformer_blocks", {"image_rotary_emb": gather_angles, "attention_mask": gather_mask}, joint=True),
    ],
    "ZImageTransformer2DModel": [  # [image | text | padding]
        Blocks("noise_refiner", note=note_equal_images, routed=False),
        Blocks("layers", {"attn_mask": gather_rows, "freqs_cis": gather_rows, "noise_mask": refuse}, joint=True),
    ],
    "Lumina2Transformer2DModel": [
        Blocks("context_refiner", note=note_text, routed=False),
        Blocks("noise_refiner", note=note_image, routed=False),
        Blocks("layers", {"attention_mask": gather_rows, "image_rotary_emb": gather_rows}, joint=True),
    ],
    "AuraFlowTransformer2DModel": [
        Blocks("joint_transformer_blocks", output=1, note=note_streams),
        Blocks("single_transformer_blocks", joint=True),
    ],
    "CogView4Transformer2DModel": [Blocks("transformer_blocks", {"image_rotary_emb": gather_angles}, output=0)],
    "PRXTransformer2DModel": [Blocks("blocks", {"image_rotary_emb": partial(gather_along, dim=2)})],
    "WanTransformer3DModel": [Blocks("blocks", {"rotary_emb": gather_rows, "temb": gather_modulation})],
    "HunyuanVideoTransformer3DModel": [
        Blocks("transformer_blocks", {"freqs_cis": gather_angles, "attention_mask": BEHIND, "num_tokens": refuse}, 0),
        Blocks(
            "single_transformer_blocks",
            {"image_rotary_emb": gather_angles, "attention_mask": BEHIND, "num_tokens": refuse},
            output=0,
        ),
    ],
    "LTX2VideoTransformer3DModel": [  # its sound keeps all of its tokens
        Blocks(
            "transformer_blocks",
            dict.fromkeys(("video_rotary_emb", "ca_video_rotary_emb"), partial(gather_along, dim=-2))
            | dict.fromkeys(("temb", "temb_ca_scale_shift", "temb_ca_gate", "perturbation_mask"), gather_modulation)
            | {"self_attention_mask": gather_mask},
            output=0,
        )
    ],
}


class ListedBlocks(RoutedBlocks):
    """RoutedBlocks of a model with several lists: those of one forward pass share its notes, such as the keep_ids."""

    def __init__(self, blocks: Sequence[nn.Module] = (), row: Blocks = Blocks("blocks"), leads: bool = True):
        names = signature(blocks[0].forward).parameters if len(blocks) else ()
        per_token = {name: gather for name, gather in row.per_token.items() if name not in SOMETIMES or name in names}
        super().__init__(blocks, per_token=per_token, output=row.output)
        self.row, self.leads = row, leads

    def notes(self, active: Active) -> dict:
        if self.leads:
            active.notes = {}  # not cleared: gradient checkpointing may still run the previous pass again
        return active.notes

    def walk(self, active: Active, notes: dict) -> Iterator[Callable]:
        if self.routes and len(self) and not torch.compiler.is_compiling():
            check_hooks(next(self.children()))
        for i, block in enumerate(super().walk(active, notes)):
            yield partial(self.observe, block, notes) if i == 0 and self.row.note is not None else block

    def observe(self, block: Callable, notes: dict, *args, **kwargs):
        """A block, after its row's note of its arguments. They are whatever the model's own forward hands to it."""
        notes.update(self.row.note(dict(zip(self.arguments, args)) | kwargs))
        return block(*args, **kwargs)

    def layout(self, x: torch.Tensor, notes: dict) -> tuple[torch.Tensor | int, int]:
        text = notes.get("text", 0)
        return (text, notes.get("image", x.shape[1] - text)) if self.row.joint else super().layout(x, notes)


def check_hooks(block: nn.Module) -> None:
    """Raises ValueError where diffusers keeps what a block has made for other calls, which see other tokens."""
    registries = [getattr(module, "_diffusers_hook", None) for module in block.modules()]
    for name in [name for registry in registries if registry is not None for name in registry.hooks]:
        if any(kind in name for kind in ("cache", "fbc", "broadcast")):
            raise ValueError(f"{name} reuses what other calls made of other tokens; needed: model.disable_cache()")


def family_of(model: nn.Module) -> list[Blocks]:
    """FAMILIES' row for a model. Raises ValueError for a class that has none."""
    for parent in type(model).__mro__:
        if parent.__name__ in FAMILIES:
            return FAMILIES[parent.__name__]
    name, modules = type(model).__name__, dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    for inner in modules.values():
        if type(inner).__name__ in FAMILIES:
            raise ValueError(f"{name} wraps a {type(inner).__name__}; needed: the latter is routed, then wrapped")
    lists = [key for key, module in modules.items() if isinstance(module, nn.ModuleList) and len(module) > 1]
    needed = f'FAMILIES["{name}"] = [Blocks("{lists[0] if lists else "blocks"}", {{"argument": gather_rows}})]'
    raise ValueError(
        f"{name} is none of {', '.join(FAMILIES)}; needed: routing_diffusers.{needed}, or model.blocks = "
        "routing_blocks.RoutedBlocks(model.blocks, Route(ratio, start, end), per_token=[names of arguments])"
    )


def routes_of(model: nn.Module) -> list[dict]:
    """A model's routes, as plain values that a config file can hold and `route(model, routes=...)` puts back."""
    blocks = next(model.get_submodule(row.name) for row in family_of(model) if row.routed)
    fields = [asdict(replace(route, grid=None)) for route in getattr(blocks, "routes", ())]
    return [{key: value for key, value in route.items() if value is not None} for route in fields]


def route(
    model: nn.Module,
    start: int | None = None,
    end: int | None = None,
    ratio: float | None = None,
    leave: int | None = None,
    *,
    selection: str | Callable = "random",
    routes: Sequence[Route | Mapping] | Route | Mapping = (),
) -> nn.Module:
    """Lets a share `ratio` in [0, 1) of the image tokens bypass blocks start..end (inclusive; negative: from the end).

    leave: the block after which they leave, in a delayed route (`routing_module.Route`); None = before `start`.
    selection: as in Route. routes: others in place of these numbers, or beside them, such as those of `routes_of`.
    Works in place and returns the model; a second call adds a route. Raises ValueError for a span outside the blocks or
    across another route, for a delayed one across two lists of blocks, for a class that is not in FAMILIES, and for a
    model whose tokens another router cuts.
    """
    rows = family_of(model)
    version = getattr(sys.modules.get("diffusers"), "__version__", "1")
    if [int(part) for part in version.split(".")[:2]] < [0, 35]:
        raise ValueError(f"diffusers {version}; needed: 0.35 or newer")
    new = list(routes) if isinstance(routes, Sequence) else [routes]
    if (start, end, ratio) != (None, None, None):
        new.append(Route(ratio, start, end, selection, leave))
    lists = [model.get_submodule(row.name) for row in rows]
    if getattr(model, "_tread_router", None) or any(type(blocks) is RoutedBlocks for blocks in lists):
        raise ValueError(f"the tokens of this {type(model).__name__} are cut by another router; needed: one of them")
    depth = sum(len(blocks) for blocks, row in zip(lists, rows) if row.routed)
    resolved, first = resolve_routes([*routes_of(model), *new], depth), 0
    for i, (row, blocks) in enumerate(zip(rows, lists)):
        if row.note is not None and not len(blocks):
            raise ValueError(
                f"{type(model).__name__} without {row.name}; needed: a block there, which tells text from image"
            )
        routed = ListedBlocks([*nn.ModuleList.__iter__(blocks)], row, leads=i == 0)
        if row.routed:
            routed.set_routes(resolved, first)
            first += len(blocks)
        model.set_submodule(row.name, routed)
    return model


def unroute(model: nn.Module) -> nn.Module:
    """Gives a model its plain lists of blocks back, in place, and returns it. Raises ValueError for unknown classes."""
    for row in family_of(model):
        model.set_submodule(row.name, nn.ModuleList(nn.ModuleList.__iter__(model.get_submodule(row.name))))
    return model

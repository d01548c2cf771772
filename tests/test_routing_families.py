"""Families of diffusers added since: each routed model against its span run by hand, a sample at a time."""

import copy
import inspect

import diffusers
import pytest
import torch
from torch import nn

from routing_blocks import cost_of, routing
from routing_diffusers import FAMILIES, route
from routing_module import draw_keep_ids
from tests.test_routing_diffusers import CHANNELS, HEADS, TEXT, B, T, arguments_of, image, text, timestep

RAGGED = torch.arange(T) < torch.tensor([3, T])[:, None]  # (B, T): captions of different lengths


def places(count, axes):
    return torch.stack([torch.arange(count.numel()) // 4, *[torch.arange(count.numel()) % 4] * (axes - 1)], 1).float()


def ids(number, axes=4):
    """Places (number, axes) on a grid of 4 columns."""
    return places(torch.empty(number), axes)


def flux2():
    return dict(
        hidden_states=torch.randn(B, 16, CHANNELS), encoder_hidden_states=text(), timestep=timestep() / 1000,
        img_ids=ids(16), txt_ids=torch.zeros(T, 4),
    )  # fmt: skip


def flux3():
    return flux2() | dict(image_cond_hidden_states=torch.randn(B, 5, CHANNELS), image_cond_ids=ids(5) + 1)


def chroma():
    mask = torch.cat([RAGGED, torch.ones(B, 16, dtype=torch.bool)], dim=1).float()
    return flux2() | dict(img_ids=ids(16, 3), txt_ids=torch.zeros(T, 3), attention_mask=mask)


def flux_masked():
    mask = torch.cat([RAGGED, torch.ones(B, 16, dtype=torch.bool)], dim=1)[:, None, None]
    given = dict(pooled_projections=torch.randn(B, TEXT), joint_attention_kwargs=dict(attention_mask=mask))
    return flux2() | dict(img_ids=ids(16, 3), txt_ids=torch.zeros(T, 3)) | given


def qwen(shapes=((1, 4, 4),)):
    older = "txt_seq_lens" in inspect.signature(diffusers.QwenImageTransformer2DModel.forward).parameters
    return (dict(txt_seq_lens=[T] * B) if older else {}) | dict(
        hidden_states=torch.randn(B, sum(t * h * w for t, h, w in shapes), CHANNELS), encoder_hidden_states=text(),
        encoder_hidden_states_mask=RAGGED, timestep=timestep() / 1000, img_shapes=[list(shapes)] * B,
    )  # fmt: skip


def qwen_edit():
    return qwen(((1, 4, 4), (1, 2, 2)))


def cogview4():
    sizes = dict.fromkeys(("original_size", "target_size", "crop_coords"), torch.tensor([[8.0, 8.0]] * B))
    return dict(hidden_states=image(8), encoder_hidden_states=text(), timestep=timestep(), **sizes)


def prx():
    given = dict(attention_mask=RAGGED)
    return dict(hidden_states=image(8), encoder_hidden_states=text(), timestep=timestep() / 1000) | given


def hunyuan():
    return dict(
        hidden_states=image(8)[:, :, None], encoder_hidden_states=text(), timestep=timestep().long(),
        encoder_attention_mask=RAGGED, pooled_projections=torch.randn(B, TEXT),
    )  # fmt: skip


def ltx2():
    return dict(
        hidden_states=torch.randn(B, 16, CHANNELS), audio_hidden_states=torch.randn(B, 5, CHANNELS),
        encoder_hidden_states=text(), audio_encoder_hidden_states=text(), timestep=torch.rand(B, 16) * 1000,
        audio_timestep=timestep(), encoder_attention_mask=RAGGED, num_frames=1, height=4, width=4, audio_num_frames=5,
        video_self_attention_mask=(torch.rand(B, 16, 16) > 0.2).float(),
    )  # fmt: skip


def krea2():
    return dict(
        hidden_states=torch.randn(B, 16, CHANNELS), encoder_hidden_states=torch.randn(B, T, 2, TEXT),
        timestep=timestep() / 1000, position_ids=torch.cat([torch.zeros(T, 3), ids(16, 3)]),
        encoder_attention_mask=RAGGED,
    )  # fmt: skip


def z_image():
    latents, captions = torch.randn(B, CHANNELS, 1, 16, 8), [torch.randn(n, TEXT) for n in (40, 3)]
    return dict(x=list(latents), t=timestep() / 1000, cap_feats=captions)


JOINT = dict(num_layers=3, num_single_layers=3, joint_attention_dim=TEXT, in_channels=CHANNELS)
CONFIGS = {
    "Flux2Transformer2DModel": HEADS | JOINT | dict(
        timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False,
    ),
    "Flux3Transformer2DModel": HEADS | JOINT | dict(
        cond_in_channels=CHANNELS, timestep_channels=16, axes_dims_rope=(2, 2, 2, 2),
    ),
    "FluxTransformer2DModel": HEADS | JOINT | dict(pooled_projection_dim=TEXT, axes_dims_rope=(2, 2, 4)),
    "ChromaTransformer2DModel": HEADS | JOINT | dict(
        axes_dims_rope=(2, 2, 4), approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=1,
    ),
    "QwenImageTransformer2DModel": HEADS | dict(
        in_channels=CHANNELS, out_channels=1, num_layers=5, joint_attention_dim=TEXT, axes_dims_rope=(2, 2, 4),
    ),
    "CogView4Transformer2DModel": HEADS | dict(
        in_channels=CHANNELS, out_channels=CHANNELS, num_layers=5, text_embed_dim=TEXT, time_embed_dim=16,
        condition_dim=8, sample_size=8, rope_axes_dim=(16, 16),
    ),
    "PRXTransformer2DModel": dict(
        in_channels=CHANNELS, context_in_dim=TEXT, hidden_size=16, num_heads=2, depth=5, axes_dim=[4, 4],
    ),
    "HunyuanVideoTransformer3DModel": HEADS | dict(
        in_channels=CHANNELS, out_channels=CHANNELS, num_layers=3, num_single_layers=3, num_refiner_layers=1,
        text_embed_dim=TEXT, pooled_projection_dim=TEXT, rope_axes_dim=(2, 2, 4), guidance_embeds=False,
    ),
    "LTX2VideoTransformer3DModel": HEADS | dict(
        in_channels=CHANNELS, out_channels=CHANNELS, num_layers=5, cross_attention_dim=16, caption_channels=TEXT,
        audio_in_channels=CHANNELS, audio_out_channels=CHANNELS, audio_num_attention_heads=2,
        audio_attention_head_dim=4, audio_cross_attention_dim=8,
    ),
    "Krea2Transformer2DModel": HEADS | dict(
        in_channels=CHANNELS, num_layers=5, num_key_value_heads=1, intermediate_size=32, timestep_embed_dim=16,
        text_hidden_dim=TEXT, num_text_layers=2, text_num_attention_heads=2, text_num_key_value_heads=1,
        text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(2, 2, 4),
    ),
    "ZImageTransformer2DModel": dict(
        in_channels=CHANNELS, dim=16, n_layers=5, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=TEXT,
        axes_dims=[2, 2, 4], axes_lens=[128, 16, 16],
    ),
}  # fmt: skip

# For each list with routed blocks: rows of text before the image's in the tokens, and {argument: (axis, rows before)}
PAIRS = {"image_rotary_emb": (0, T)}
ROWS = {
    "flux, masked text": [(0, PAIRS | {"attention_mask": (-1, T)})] * 2,
    "flux2": [(0, PAIRS), (T, PAIRS)],
    "flux3": [(0, {"image_rotary_emb": (0, 0), "temb_mod": (1, 0)}), (0, PAIRS | {"temb_mod": (1, 0)})],
    "chroma": [(0, PAIRS | {"attention_mask": (1, T)}), (T, PAIRS | {"attention_mask": (1, T)})],
    "qwen": [(0, {"image_rotary_emb": (0, 0)})],
    "qwen, two images": [(0, {"image_rotary_emb": (0, 0), "modulate_index": (1, 0)})],
    "cogview4": [(0, {"image_rotary_emb": (0, 0)})],
    "prx": [(0, {"image_rotary_emb": (2, 0)})],
    "hunyuan": [(0, {name: (0, 0), "attention_mask": (-1, 0)}) for name in ("freqs_cis", "image_rotary_emb")],
    "ltx2": [(0, {
        "video_rotary_emb": (1, 0), "ca_video_rotary_emb": (1, 0), "temb": (1, 0), "temb_ca_scale_shift": (1, 0),
        "temb_ca_gate": (1, 0), "self_attention_mask": (-1, 0),
    })],
    "krea2": [(T, {"image_rotary_emb": (0, T), "attention_mask": (-1, T)})],
    "z-image": [(0, {"attn_mask": (1, 0), "freqs_cis": (1, 0)})],
}  # fmt: skip
ROWS["ltx2, split"] = [(0, ROWS["ltx2"][0][1] | {"video_rotary_emb": (2, 0), "ca_video_rotary_emb": (2, 0)})]
# name: class, what its config has besides, arguments, tokens of the image
CASES = {
    "flux, masked text": ("FluxTransformer2DModel", {}, flux_masked, 16),
    "flux2": ("Flux2Transformer2DModel", {}, flux2, 16),
    "flux3": ("Flux3Transformer2DModel", {}, flux3, 16),
    "chroma": ("ChromaTransformer2DModel", {}, chroma, 16),
    "qwen": ("QwenImageTransformer2DModel", {}, qwen, 16),
    "qwen, two images": (
        "QwenImageTransformer2DModel",
        dict(zero_cond_t=True),
        lambda: qwen(((1, 4, 4), (1, 2, 2))),
        20,
    ),
    "cogview4": ("CogView4Transformer2DModel", {}, cogview4, 16),
    "prx": ("PRXTransformer2DModel", {}, prx, 16),
    "hunyuan": ("HunyuanVideoTransformer3DModel", {}, hunyuan, 16),
    "ltx2": ("LTX2VideoTransformer3DModel", {}, ltx2, 16),
    "ltx2, split": ("LTX2VideoTransformer3DModel", dict(rope_type="split"), ltx2, 16),
    "krea2": ("Krea2Transformer2DModel", {}, krea2, 16),
    "z-image": ("ZImageTransformer2DModel", {}, z_image, 32),
}


def make(case):
    torch.manual_seed(0)
    name, more, _, _ = CASES[case]
    if not hasattr(diffusers, name) or more.keys() - inspect.signature(getattr(diffusers, name)).parameters.keys():
        pytest.skip(f"this diffusers has no {name} with {more}")
    model = getattr(diffusers, name)(**CONFIGS[name] | more)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model.eval()


@pytest.fixture(params=CASES)
def case(request):
    return request.param


def outputs(model, inputs):
    out = model(**inputs, return_dict=False)[0]
    return torch.stack(out) if isinstance(out, list) else out


def lists_of(model):
    return [model.get_submodule(row.name) for row in FAMILIES[type(model).__name__] if row.routed]


def keep_ids_of(tokens):
    return draw_keep_ids(B, tokens, 0.5, generators=torch.Generator().manual_seed(1))


def rows_of(length, before, tokens, kept):
    return [*range(before), *(before + i for i in kept), *range(before + tokens, length)]


def chosen(value, name, b, table, tokens, kept):
    """Sample b's share of an argument, and of it the rows that stay."""
    if isinstance(value, dict):
        return {key: chosen(part, key, b, table, tokens, kept) for key, part in value.items()}
    if isinstance(value, tuple):
        pairs = [chosen(part, name, b, table, tokens, kept) for part in value[:1]]
        other = value[1] if name == "image_rotary_emb" and value[0].is_complex() else None  # QwenImage: of the text
        return (*pairs, other if other is not None else chosen(value[1], name, b, table, tokens, kept))
    if not isinstance(value, torch.Tensor):
        return value
    axis, before = table.get(name, (None, 0))
    if len(value) in (B, 2 * B) and axis != 0:  # 2 B: QwenImage's times, and those of its references
        value = value[b::B]
    if axis is None or value.shape[axis] == 1:
        return value
    rows, length = torch.tensor(rows_of(value.shape[axis], before, tokens, kept)), value.shape[axis]
    square = axis == -1 and value.ndim > 2 and value.shape[-2] == length
    value = value.index_select(axis, rows)
    return value.index_select(-2, rows) if square else value


def run_by_hand(model, case, inputs, spans, keep_ids):
    """The plain model's output where the spans' blocks are run again, a sample at a time, on rows that stay."""
    tokens, number = CASES[case][3], 0
    for blocks, (before, table) in zip(lists_of(model), ROWS[case]):
        for start, end in spans:
            span = [block for i, block in enumerate(blocks, number) if start <= i <= end]
            for block in span:
                remember, leave = tampering(span, before, table, tokens, keep_ids)
                block.register_forward_pre_hook(remember, with_kwargs=True)
            if span:
                span[-1].register_forward_hook(leave)
        number += len(blocks)
    return outputs(model, inputs)


def tampering(span, before, table, tokens, keep_ids):
    """Hooks: what each block is given is kept; the last one's output becomes that of the span by hand."""
    kind = type(span[0]).__name__
    place = 0 if any(word in kind for word in ("CogView4", "Hunyuan", "LTX2")) else 1

    def remember(block, args, kwargs):
        block.given = arguments_of(block, args, kwargs)

    def leave(block, args, output):
        given, whole, others = span[0].given, [], []
        name = "x" if "x" in given else "hidden_states"
        stream = "audio_hidden_states" if "audio_hidden_states" in given else "encoder_hidden_states"
        for b, kept in enumerate(keep_ids.tolist()):
            state = {}
            for one in span:
                own = {k: v for k, v in one.given.items() if k not in ("args", "kwargs")}
                own = {k: chosen(v, k, b, table | {name: (1, before)}, tokens, kept) for k, v in own.items()}
                out = one.forward(**own | state)  # without the hooks
                state = {name: out} if not isinstance(out, tuple) else {name: out[place], stream: out[1 - place]}
            rows = torch.tensor(rows_of(given[name].shape[1], before, tokens, kept))
            whole.append(given[name][b].index_copy(0, rows, state[name][0]))
            others.append(state.get(stream))
        x = torch.stack(whole)
        if not isinstance(output, tuple):
            return x
        return (x, torch.cat(others)) if place == 0 else (torch.cat(others), x)

    return remember, leave


@pytest.mark.parametrize("spans", [[(1, -2)], [(0, 0)], [(0, 1), (-2, -1)]])
def test_output_and_gradients_are_those_of_the_span_by_hand(case, spans):
    model, (_, _, arguments, tokens) = make(case), CASES[case]
    inputs, depth, keep_ids = arguments(), sum(len(blocks) for blocks in lists_of(model)), keep_ids_of(tokens)
    plain = copy.deepcopy(model)
    expected = run_by_hand(plain, case, inputs, [(start % depth, end % depth) for start, end in spans], keep_ids)
    for span in spans:
        route(model, *span, 0.5)
    with routing(keep_ids=keep_ids):
        found = outputs(model, inputs)
    if len(spans) == 1:
        with routing(generators=torch.Generator().manual_seed(1)), torch.no_grad():
            assert torch.equal(outputs(model, inputs), found)
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()
    gradients = [torch.autograd.grad(out.square().mean(), net.parameters(), allow_unused=True)
                 for out, net in ((found, model), (expected, plain))]  # fmt: skip
    largest = max(g.abs().max() for g in gradients[1] if g is not None)
    for (name, _), routed, by_hand in zip(model.named_parameters(), *gradients):
        assert (routed is None) == (by_hand is None), name
        assert routed is None or (routed - by_hand).abs().max() <= 5e-6 * largest, name


def test_off_is_the_model_bit_for_bit(case):
    model, inputs = make(case), CASES[case][2]()
    plain, names = copy.deepcopy(model), list(model.state_dict())
    route(model, 1, -2, 0.5)
    assert list(model.state_dict()) == names
    with torch.no_grad():
        dense = outputs(plain, inputs)
        assert torch.equal(outputs(model, inputs), dense)
        with routing(0.0):
            assert torch.equal(outputs(model, inputs), dense)


@pytest.mark.parametrize("case", ["qwen", "z-image"])
def test_costs_fall_with_the_ratio(case):
    costs = list(cost_of(route(make(case), 1, -2, 0.5), CASES[case][2]()).values())
    assert costs == sorted(costs, reverse=True) and costs[-1] < costs[0]

"""Networks whose image tokens attend to a text, as in PRX: arithmetic, padding, routing, and classes left alone."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import conditions
from conditions import Text
from contracts import muon_matrices
from dit import Attention, DiT
from lightningdit import LightningDiT, RotaryAttention, rotary_angles
from maskdit import MaskDiT
from mixers import Mixer
from routing_module import Routing
from sprint import Sprint
from system import UserError
from system.kernels import as_on_gpus

WIDTH, LENGTH = 5, 7  # of the texts' states
SHAPE = dict(
    input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=6, learn_sigma=False, condition="text",
    text_width=WIDTH, text_length=LENGTH,
)  # fmt: skip
ROUTE = dict(selection_ratio=0.5, start_layer_idx=1, end_layer_idx=-2)


def made(name, **more):
    """A network with random weights where its own are zeros."""
    net = {
        "dit": lambda: DiT(**SHAPE, num_heads=4, routes=[ROUTE], **more),
        "lightningdit": lambda: LightningDiT(**SHAPE, num_heads=4, routes=[ROUTE], **more),
        "sprint": lambda: Sprint(**SHAPE, num_heads=4, **more),
        "maskdit": lambda: MaskDiT(
            **{key: value for key, value in SHAPE.items() if key != "learn_sigma"}, num_heads=4,
            decoder_hidden_size=16, decoder_depth=2, decoder_num_heads=2, **more,
        ),
        "mixer": lambda: Mixer(**SHAPE, routes=[ROUTE], **more),
    }[name]()  # fmt: skip
    g = torch.Generator().manual_seed(3)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=g)
    return net.requires_grad_(False)


ATTENDING = ("dit", "lightningdit", "sprint", "maskdit")


def batch(lengths=(3, 7, 1)):
    """x, t and texts of these lengths; what pads them is not zero."""
    g = torch.Generator().manual_seed(1)
    mask = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    states = torch.randn(len(lengths), LENGTH, WIDTH, generator=g)
    return torch.randn(len(lengths), 4, 8, 8, generator=g), torch.rand(len(lengths), generator=g), Text(states, mask)


def routed():
    return Routing(generators=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("rotary", [False, True])
def test_attention_is_its_definition(rotary, plain):
    g = torch.Generator().manual_seed(0)
    layer = (RotaryAttention(32, 4, False, (24, 7)) if rotary else Attention(32, 4, (24, 7))).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=g)
    x, states = (torch.randn(2, n, d, generator=g).double() for n, d in ((9, 32), (7, 24)))
    angles = rotary_angles(8, 3, 3).double()
    w = dict(layer.named_parameters())

    def norm(name, value):
        return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]

    def turn(value):  # as complex numbers
        pairs = torch.view_as_complex(value.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones(9, 4).double(), angles[:, ::2])).flatten(-2)

    for lengths in ((4, 7), (0, 2)):
        q, k, v = torch.einsum("bnd,ed->bne", x, w["qkv.weight"]).add(w["qkv.bias"]).view(2, 9, 3, 4, 8).unbind(2)
        text_k, text_v = torch.einsum("btd,ed->bte", states, w["text_kv.weight"]).view(2, 7, 2, 4, 8).unbind(2)
        q, k = (norm(name, part).transpose(1, 2) for name, part in (("q_norm", q), ("k_norm", k)))  # (B, H, N, d)
        q, k = (turn(q), turn(k)) if rotary else (q, k)
        expected = []
        for i, n in enumerate(lengths):
            keys = torch.cat([norm("text_norm", text_k[i, :n]).transpose(0, 1), k[i]], dim=1)  # (H, n + N, d)
            values = torch.cat([text_v[i, :n], v[i]]).transpose(0, 1)
            weights = torch.einsum("hnd,hld->hnl", q[i], keys).div(math.sqrt(8)).softmax(-1)
            expected.append(torch.einsum("hnl,hld->nhd", weights, values).flatten(1) @ w["proj.weight"].T)
        text = Text(states, torch.arange(7) < torch.tensor(lengths)[:, None])
        with as_on_gpus(not plain):
            got = layer(x, *((angles.cos()[None], angles.sin()[None]) if rotary else ()), text=text)
        torch.testing.assert_close(got, torch.stack(expected) + w["proj.bias"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("routing", [None, routed])
@pytest.mark.parametrize("name", [*ATTENDING, "mixer"])
def test_padding_is_none_and_texts_of_a_batch_are_alone(name, routing):
    net, (x, t, text) = made(name), batch()
    draws = [routing() if routing else None for _ in range(3)]
    out = net(x, t, text, routing=draws[0])
    other = torch.where(text.mask[..., None], text.states, 99.0)
    torch.testing.assert_close(net(x, t, Text(other, text.mask), routing=draws[1]), out, rtol=1e-6, atol=1e-6)
    longer = Text(F.pad(text.states, (0, 0, 0, 4), value=7.0), F.pad(text.mask, (0, 4)))
    torch.testing.assert_close(net(x, t, longer, routing=draws[2]), out, rtol=1e-5, atol=1e-6)
    for i, n in enumerate((3, 7, 1)):
        one = Text(text.states[i : i + 1, :n], text.mask[i : i + 1, :n])
        ids = draws[0].drawn[0][i : i + 1] if routing else None
        alone = net(x[i : i + 1], t[i : i + 1], one, routing=Routing(keep_ids=ids) if routing else None)
        if name != "sprint" or not routing:  # whose path drop is drawn anew
            torch.testing.assert_close(alone, out[i : i + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*ATTENDING, "mixer"])
def test_a_text_is_read_and_no_text_is_a_text_without_tokens(name):
    net, (x, t, text) = made(name), batch()
    out = net(x, t, text)
    assert (net(x, t, Text(text.states.roll(1, 0), text.mask)) - out).abs().amax((1, 2, 3)).min() > 1e-4
    null = conditions.repeat(net.null_condition, 3, "cpu")
    assert null.states.shape == (3, LENGTH, WIDTH) and not null.mask.any()
    nothing = net(x, t, null)
    assert nothing.isfinite().all() and not torch.allclose(nothing, out, atol=1e-4)
    assert torch.allclose(nothing, net(x, t, Text(text.states, torch.zeros_like(text.mask))), atol=1e-6)


@pytest.mark.parametrize("name", ATTENDING)
def test_blocks_of_a_route_see_the_whole_text(name):
    """Every block gets one and the same text, which no route gathers and no block changes."""
    net, (x, t, text), seen = made(name), batch(), []
    for block in net.all_blocks[:-1]:
        block.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].shape[1], inputs[2])))
    before = net.y_embedder.tokens(text)
    net(x, t, text, routing=routed())
    assert len(seen) == len(net.all_blocks) - 1 and len({n for n, _ in seen}) == 2
    for _, (states, mask) in seen:
        assert torch.equal(states, before.states) and torch.equal(mask, text.mask)


@pytest.mark.parametrize("name", ATTENDING)
def test_ratio_0_is_dense_to_the_bit_and_recomputing_changes_no_gradient(name):
    net, (x, t, text) = made(name).requires_grad_(True), batch()
    assert torch.equal(net(x, t, text, routing=Routing(0.0)), net(x, t, text))
    gradients = []
    for recompute in (False, True):
        for block in net.all_blocks:
            block.recompute = recompute
        net.zero_grad()
        net(x, t, text, routing=routed()).square().mean().backward()
        gradients.append([p.grad for p in net.parameters() if p.grad is not None])
    assert all(map(torch.equal, *gradients))
    assert all(p.grad.any() for name, p in net.named_parameters() if "text_kv" in name or "y_embedder" in name)


@pytest.mark.parametrize("name", ATTENDING)
def test_macs_are_counted_and_muon_leaves_what_the_text_feeds(name):
    net = made(name)
    with FlopCounterMode(display=False) as counter:
        net(torch.randn(1, 4, 8, 8), torch.rand(1), net.null_condition)
    assert counter.get_total_flops() == 2 * net.macs()
    names = {p: key for key, p in net.named_parameters()}
    muon = {names[p] for p in muon_matrices(net)}
    assert any("attn.qkv" in key for key in muon) and not any("text" in key or "y_emb" in key for key in muon)


@pytest.mark.parametrize("name", ATTENDING)
def test_pooled_text_modulates_too(name):
    net, pooled, (x, t, text) = made(name), made(name, pooled_text=True), batch()
    assert net.state_dict().keys() == pooled.state_dict().keys()
    c, more = (each.embed(x, t, text)[1] for each in (net, pooled))
    mean = torch.stack([states[mask].mean(0) for states, mask in zip(*text)])
    torch.testing.assert_close(more - c, net.y_embedder.proj(mean), rtol=1e-4, atol=1e-5)
    assert pooled.macs() - net.macs() == WIDTH * 32
    with pytest.raises(UserError, match="pooled_text=true is for networks that attend to texts"):
        DiT(size="DiT-XS/2", pooled_text=True)


def test_networks_for_classes_have_nothing_of_texts():
    """Nothing is made, drawn or called for a text: their weights, and what is compiled, are as they were."""
    for net in (DiT(size="DiT-XS/4"), LightningDiT(size="DiT-XS/4"), Sprint(size="DiT-XS/2"), MaskDiT(size="DiT-XS/4")):
        assert not [key for key in net.state_dict() if "text" in key]
        assert net.reads_text is False and net.modulated


@pytest.mark.parametrize("name", ["dit", "lightningdit"])
def test_compiled_in_one_graph_for_all_texts(name):
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    net, (x, t, text) = made(name), batch()
    expected = net(x, t, text)
    for block in net.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(net(x, t, text), expected, rtol=1e-5, atol=1e-5)
    for lengths in ((1, 2, 7), (0, 0, 5)):
        net(*batch(lengths))
    assert counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()

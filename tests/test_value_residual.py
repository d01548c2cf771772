"""LightningDiT with values mixed with the first block's, and with a squared ReLU: against few-line computations."""

import copy
from functools import partialmethod

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from lightningdit import LightningBlock, LightningDiT, rotary_angles
from randomness import seeded_generator
from routing_module import Routing, draw_keep_ids
from system import UserError
from system.compiling import compile_blocks
from tests.conftest import assert_same_run

WIDTH, HEADS = 32, 2


def made(route=None, **more):
    torch.manual_seed(0)
    routes = [dict(selection_ratio=0.5, **route)] if route else ()
    how = dict(num_classes=3, routes=routes, value_residual=True) | more
    net = LightningDiT(8, 2, 1, WIDTH, 6, HEADS, **how)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


def batch():
    g = torch.Generator().manual_seed(1)
    return torch.randn(3, 1, 8, 8, generator=g), torch.rand(3, generator=g), torch.tensor([0, 3, 2])


def block_by_hand(block, x, c, angles, first):
    """One sample: x (K, D), c (D,), angles (K, D/H) or None, first: v_1 (K, D), or None in the first block."""
    w = dict(block.named_parameters())
    shift1, scale1, gate1, shift2, scale2, gate2 = F.linear(F.silu(c), *linear(w, "adaLN_modulation.1")).chunk(6)
    norm = lambda x, w: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w  # noqa: E731
    q, k, v = F.linear(norm(x, w["norm1.weight"]) * (1 + scale1) + shift1, *linear(w, "attn.qkv")).chunk(3, -1)
    values, out = v, []
    if first is not None:
        v = w["attn.first_share"] * first + (1 - w["attn.first_share"]) * v
    for part in range(HEADS):
        s = slice(part * WIDTH // HEADS, (part + 1) * WIDTH // HEADS)
        a, b = (q[:, s], k[:, s]) if angles is None else (turn(q[:, s], angles), turn(k[:, s], angles))
        out.append(torch.softmax(a @ b.T / (WIDTH // HEADS) ** 0.5, -1) @ v[:, s])
    x = x + gate1 * F.linear(torch.cat(out, -1), *linear(w, "attn.proj"))
    h = norm(x, w["norm2.weight"]) * (1 + scale2) + shift2
    if "mlp.fc1.weight" in w:
        h = F.linear(F.linear(h, *linear(w, "mlp.fc1")).clamp(min=0) ** 2, *linear(w, "mlp.fc2"))
    else:
        gate, value = F.linear(h, *linear(w, "mlp.w12")).chunk(2, -1)
        h = F.linear(F.silu(gate) * value, *linear(w, "mlp.w3"))
    return x + gate2 * h, values


def linear(w, name):
    return w[f"{name}.weight"], w[f"{name}.bias"]


def turn(x, angles):
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles[:, ::2]), angles[:, ::2])).flatten(-2)


def by_hand(net, keep_ids=None, start=None, leave=None, end=None):
    tokens, c, _ = net.embed(*batch())
    everywhere, whole = rotary_angles(WIDTH // HEADS, 4, 4).to(tokens.dtype), []
    for b in range(3):
        rows, alive, first, stash = tokens[b], list(range(16)), {}, None
        for i, block in enumerate(net.blocks):
            if i == start:
                stash = rows.clone()
            if keep_ids is not None and i == (start if leave is None else leave + 1):
                alive = keep_ids[b].tolist()
                rows = rows[alive]
            angles = everywhere[alive] if net.rotary else None
            mixed = torch.stack([first[n] for n in alive]) if i and net.value_residual else None
            rows, values = block_by_hand(block, rows, c[b], angles, mixed)
            first = first or dict(zip(alive, values))
            if not i and keep_ids is not None and start == 0:  # block 0 has the values of all, whatever it attends to
                first = dict(enumerate(block_by_hand(block, tokens[b], c[b], everywhere, None)[1]))
            if keep_ids is not None and i == end:
                stash[alive] = rows
                rows, alive = stash, list(range(16))
        whole.append(rows)
    return net.output(torch.stack(whole), c, {})


ROUTES = {"dense": None, "routed": dict(start_layer_idx=1, end_layer_idx=3)}
ROUTES |= {"from the first": dict(start_layer_idx=0, end_layer_idx=2)}
ROUTES |= {"delayed": dict(start_layer_idx=1, end_layer_idx=4, leave_layer_idx=2)}


@pytest.mark.parametrize("more", [{}, dict(mlp="relu2"), dict(mlp="relu2", value_residual=False)], ids=str)
@pytest.mark.parametrize("name", ROUTES)
def test_it_is_its_formula(name, more):
    route = ROUTES[name]
    net = made(route, **more)
    ids = draw_keep_ids(3, 16, 0.5, generators=seeded_generator(5)) if route else None
    span = {key.partition("_")[0]: value for key, value in (route or {}).items()}
    with torch.no_grad():
        expected = by_hand(net, ids, **span)
        found = net(*batch(), routing=Routing(keep_ids=ids) if route else None)
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


def test_without_rotary_positions():
    net = made(rotary=False)
    torch.testing.assert_close(net(*batch()), by_hand(net), rtol=1e-6, atol=1e-4)


def test_off_is_the_network_of_before_and_on_starts_from_the_same_weights():
    torch.manual_seed(0)
    before = LightningDiT(8, 2, 1, WIDTH, 6, HEADS, num_classes=3)
    torch.manual_seed(0)
    after = LightningDiT(8, 2, 1, WIDTH, 6, HEADS, num_classes=3, value_residual=True)
    state, other = before.state_dict(), after.state_dict()
    shares = {f"blocks.{i}.attn.first_share" for i in range(1, 6)}
    assert other.keys() - state.keys() == shares and all(torch.equal(state[key], other[key]) for key in state)
    assert all(other[key] == 0.5 for key in shares)
    gelu = LightningDiT(8, 2, 1, WIDTH, 6, HEADS, num_classes=3, mlp="gelu").state_dict()
    squared = LightningDiT(8, 2, 1, WIDTH, 6, HEADS, num_classes=3, mlp="relu2").state_dict()
    assert gelu.keys() == squared.keys()


@pytest.mark.parametrize("route", [None, ROUTES["delayed"]])
def test_the_formula_counts_what_it_multiplies(route):
    net = made(route, mlp="relu2")
    x, t, y = (part[:1] for part in batch())
    for routing in (None, Routing()):
        with FlopCounterMode(display=False) as counter:
            net(x, t, y, routing=routing)
        assert counter.get_total_flops() == 2 * net.macs(routing)


def test_all_learn_whether_recomputed_or_not_in_few_graphs(monkeypatch):
    """The first block, which mixes nothing, has graphs of its own."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    torch.compiler.reset()
    counters.clear()
    net, ids = made(ROUTES["routed"]), draw_keep_ids(3, 16, 0.5)
    nets = [copy.deepcopy(net), copy.deepcopy(net), net]
    compile_blocks(net.all_blocks, "blocks")
    for block in (*nets[1].all_blocks, *net.all_blocks):
        block.recompute = True
    for each in nets:
        each(*batch(), routing=Routing(keep_ids=ids)).square().mean().backward()
    for (name, a), b, c in zip(nets[0].named_parameters(), nets[1].parameters(), net.parameters()):
        assert torch.equal(a.grad, b.grad) and a.grad.any(), name
        torch.testing.assert_close(a.grad, c.grad, rtol=1e-4, atol=1e-6 * a.grad.abs().max().item())
    assert counters["stats"]["unique_graphs"] <= 4 and not counters["graph_break"]
    torch.compiler.reset()


def test_it_trains_and_resumes_with_muon_to_the_bit(run):
    keys = ["model=lightningdit_tread", "model.value_residual=true", "model.mlp=relu2", "optimizer=muon"]
    _, golden = run("golden", *keys, "train.max_steps=4")
    run("cut", *keys, "train.max_steps=4", stop_after=2)
    assert_same_run(golden, run("cut", *keys, "train.max_steps=4")[1])


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="mlp=relu; needed: norm rms or layer, mlp swiglu, gelu or relu2"):
        LightningDiT(8, 2, 1, WIDTH, 6, HEADS, mlp="relu")
    assert LightningBlock(32, 2, 4.0, qk_norm=True, mlp="relu2").mlp.fc1.weight.shape == (128, 32)

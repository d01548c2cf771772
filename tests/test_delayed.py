"""Delayed routes: tokens are stashed before a block, leave after a later one, and return from the stash."""

import copy
from functools import partialmethod
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from cost import cost_table
from dit import DiT
from lightningdit import LightningDiT
from maskdit import MaskDiT
from mixers import Mixer
from randomness import seeded_generator
from routing_blocks import RoutedBlocks, block_tokens, resolve_routes, routing
from routing_diffusers import route
from routing_module import Route, Routing, draw_keep_ids
from sprint import Sprint
from system.compiling import compile_blocks
from tests.made_runs import made_settings
from tests.test_routing_diffusers import CASES, call, drawn, make, seeded
from tests.test_routing_diffusers import by_hand as by_span

SPAN = dict(selection_ratio=0.5, start_layer_idx=1, end_layer_idx=4)
NETWORKS = {"dit": DiT, "lightningdit": LightningDiT, "ssd_zigzag": Mixer, "rwkv": Mixer}
HEADS = {"dit": [2], "lightningdit": [2]}


def made(name, leave, **more):
    torch.manual_seed(0)
    routes, mixer = [SPAN | more | dict(leave_layer_idx=leave)], {} if name in HEADS else {"mixer": name}
    net = NETWORKS[name](8, 2, 1, 32, 6, *HEADS.get(name, []), num_classes=3, routes=routes, **mixer)
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    return net


def batch():
    g = torch.Generator().manual_seed(1)
    return torch.randn(3, 1, 8, 8, generator=g), torch.rand(3, generator=g), torch.tensor([0, 3, 2])


def by_hand(net, keep_ids, leave):
    """A sample at a time, with lists of rows."""
    x, t, y = batch()
    tokens, c, _ = net.embed(x, t, y)
    everywhere, whole = net.positions(), []
    for b, ids in enumerate(keep_ids.tolist()):
        rows, stash, alive = tokens[b : b + 1], None, list(range(16))
        for i, block in enumerate(net.blocks):
            if i == 1:
                stash = rows.clone()
            rows = block(rows, c[b : b + 1], None, *(part[:, alive] for part in everywhere))
            if i == leave and leave < 4:
                rows, alive = rows[:, ids], ids
            if i == 4:
                stash[:, ids] = rows if leave < 4 else rows[:, ids]
                rows, alive = stash, list(range(16))
        whole.append(rows)
    return net.output(torch.cat(whole), c, {})


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("leave", [1, 2, 4])
def test_a_delayed_route_is_the_stash_by_hand(name, leave):
    net, ids = made(name, leave), draw_keep_ids(3, 16, 0.5, generators=seeded_generator(5))
    found, hidden = net(*batch(), routing=Routing(keep_ids=ids), hidden=range(6))
    expected = by_hand(net, ids, leave)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6 * expected.abs().max().item())
    lengths = [16 if i <= leave or i == 5 else 8 for i in range(6)]
    assert [tokens.shape[1] for tokens, _ in hidden.values()] == lengths
    assert [kept is None for _, kept in hidden.values()] == [n == 16 for n in lengths]
    assert block_tokens(net.routes, Routing(), 6, 16) == lengths
    assert net.macs(Routing()) == net.macs() + sum(b.macs(n) - b.macs(16) for b, n in zip(net.blocks, lengths))
    at_once = made(name, None)(*batch(), routing=Routing(keep_ids=ids))
    assert (found - at_once).abs().max() > 1e-3 and (found - net(*batch())).abs().max() > 1e-3


@pytest.mark.parametrize("leave", [None, 1, 4])
def test_the_draws_are_those_of_every_route(leave):
    net, ids = made("dit", leave), draw_keep_ids(3, 16, 0.5, generators=seeded_generator(5))
    routed = Routing(generators=seeded_generator(5))
    assert torch.equal(net(*batch(), routing=routed), net(*batch(), routing=Routing(keep_ids=ids)))
    assert len(routed.drawn) == 1 and torch.equal(routed.drawn[0], ids)
    assert torch.equal(net(*batch(), routing=Routing(0.0)), net(*batch()))


def test_a_route_follows_a_delayed_one():
    routes = [Route(0.5, 0, 2, leave_layer_idx=2), Route(0.75, 3, 5, leave_layer_idx=3)]
    net = DiT(8, 2, 1, 32, 6, 2, num_classes=3, routes=routes)
    _, hidden = net(*batch(), routing=Routing(), hidden=range(6))
    assert [tokens.shape[1] for tokens, _ in hidden.values()] == [16, 16, 16, 16, 4, 4]
    assert block_tokens(net.routes, Routing(), 6, 16) == [16, 16, 16, 16, 4, 4]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_every_parameter_learns_and_checkpointing_changes_nothing(checkpointed):
    net, ids = made("lightningdit", 2, selection="structured"), draw_keep_ids(3, 16, 0.5)
    other = copy.deepcopy(net)
    for block in other.all_blocks:
        block.recompute = checkpointed
    for each in (net, other):
        each(*batch(), routing=Routing(keep_ids=ids)).square().mean().backward()
    assert all(torch.equal(a.grad, b.grad) and a.grad.any() for a, b in zip(net.parameters(), other.parameters()))


@pytest.mark.parametrize("name", ["dit", "lightningdit"])
def test_one_graph_a_token_count(name, monkeypatch):
    """As of other routes; blocks with positions have one more in either, as these differ by sample or not."""
    torch.compiler.reset()
    eager = partialmethod(nn.Module.compile, backend="eager")  # graphs are counted, none is built
    monkeypatch.setattr(nn.Module, "compile", eager)
    counts = []
    for leave in (None, 2):
        torch.compiler.reset()
        counters.clear()
        net = made(name, leave)
        compile_blocks(net.all_blocks, "blocks")
        for step in range(2):
            for block in net.all_blocks:
                block.recompute = bool(step)
            net(*batch(), routing=Routing(generators=seeded_generator(step))).sum().backward()
        assert not counters["graph_break"]
        counts.append(counters["stats"]["unique_graphs"])
    torch.compiler.reset()
    assert counts[1] == counts[0], counts


def test_routes_that_delay_nothing_they_can_are_refused():
    assert resolve_routes([SPAN | dict(leave_layer_idx=-3)], 6) == (Route(0.5, 1, 4, leave_layer_idx=3),)
    for leave in (0, 5, -1, 9):
        with pytest.raises(ValueError, match=rf"leave_layer_idx {leave} is no block of the route 1..4; needed: from 1"):
            resolve_routes([SPAN | dict(leave_layer_idx=leave)], 6)
    for wrong in (dict(leave_layer_idx="2"), dict(start_layer_idx=1.5), dict(end_layer_idx=None)):
        with pytest.raises(ValueError, match="blocks that are no whole numbers"):
            resolve_routes([SPAN | wrong], 6)
    with pytest.raises(ValueError, match="got 0.5x"):
        resolve_routes([SPAN | dict(selection_ratio="0.5x")], 6)


@pytest.mark.parametrize("network", [Sprint, MaskDiT])
def test_networks_with_a_span_of_their_own_take_no_routes(network):
    with pytest.raises(TypeError, match="routes"):
        network(8, 2, 1, 32, 6, 2, routes=[SPAN])


def test_what_it_costs_is_told():
    assert "routed (blocks 1..4 at 0.5, leaving after 2)" in cost_table(made("dit", 2), made_settings([]))


class Scaled(nn.Module):
    def forward(self, x, places, text=None):
        return (x * 2 + x.mean(dim=1, keepdim=True) + places, text)


@pytest.mark.parametrize("leave", [0, 1, 2])
def test_through_other_peoples_blocks(leave):
    x, places = torch.randn(2, 8, 3), torch.randn(2, 8, 3)
    delayed = Route(0.5, 0, 2, leave_layer_idx=leave)
    blocks = RoutedBlocks([Scaled() for _ in range(4)], delayed, per_token=["places"], output=0)
    ids, expected = draw_keep_ids(2, 8, 0.5, generators=seeded_generator(0)), []
    for b, own in enumerate(ids.tolist()):
        rows, alive = x[b : b + 1], list(range(8))
        for i in range(4):
            rows = rows * 2 + rows.mean(dim=1, keepdim=True) + places[b : b + 1, alive]
            if i == min(leave, 2) and leave < 2:
                rows, alive = rows[:, own], own
            if i == 2:
                kept, rows, alive = rows if leave < 2 else rows[:, own], x[b : b + 1].clone(), list(range(8))
                rows[:, own] = kept
        expected.append(rows)
    tokens, text = x, None
    with routing(generators=seeded_generator(0)):
        for block in blocks:
            tokens, text = block(tokens, places, text)
    torch.testing.assert_close(tokens, torch.cat(expected), rtol=1e-6, atol=1e-6)


DEPTH = {"sd3": 5, "flux, single": 6, "lumina2": 5, "lumina2, ragged": 5, "wan, per token": 5, "auraflow, single": 6}


@pytest.mark.parametrize("name", DEPTH)
def test_within_one_list_of_diffusers_blocks(name):
    class_name, arguments, start, end = CASES[name]
    start, end = start % DEPTH[name], end % DEPTH[name]
    plain, inputs = make(class_name), arguments(8)
    case = SimpleNamespace(model=plain, span=range(start + 1, end + 1))
    expected = by_span(case, drawn(), inputs, stash_at=start)
    model = route(copy.deepcopy(plain), start, end, 0.5, leave=start)
    with torch.no_grad(), routing(generators=seeded()):
        found = call(model, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        dense = call(plain, inputs)
        assert torch.equal(call(model, inputs), dense) and (found - dense).abs().max() > 1e-4
        assert (found - by_span(case, drawn(), inputs)).abs().max() > 1e-4  # the stash is not what left
        control = route(copy.deepcopy(plain), start, end, 0.5, leave=end)
        with routing(generators=seeded()):
            assert (call(control, inputs) - dense).abs().max() > 1e-4


def test_across_two_lists_of_blocks_is_refused():
    with pytest.raises(ValueError, match="delayed route 1..4 crosses the border of blocks 0..2; needed"):
        route(make("FluxTransformer2DModel"), 1, -2, 0.5, leave=2)

"""The contract of networks: hidden tokens of four backbones against their blocks run by hand, and what is named."""

import pytest
import torch
from torch import nn

import conditions
from checkpoints.load import build_network
from conditions import Text
from contracts import Network, check_members
from dit import DiT
from lightningdit import LightningDiT
from maskdit import MaskDiT
from randomness import seeded_generator
from routing_module import Routing, draw_keep_ids, gather_tokens, scatter_tokens
from sprint import Sprint
from system import UserError
from tests.made_runs import made_settings

SHAPE = dict(input_size=(8, 12), patch_size=2, in_channels=4, hidden_size=32, depth=6, num_heads=2, num_classes=3)
ROUTES = [dict(selection_ratio=0.5, start_layer_idx=1, end_layer_idx=2)]
DECODER = dict(decoder_hidden_size=16, decoder_depth=2, decoder_num_heads=2)
NETWORKS = {
    "dit": lambda: DiT(**SHAPE, learn_sigma=False, routes=ROUTES),
    "lightningdit": lambda: LightningDiT(**SHAPE, routes=ROUTES),
    "sprint": lambda: Sprint(**SHAPE, selection_ratio=0.5),
    "maskdit": lambda: MaskDiT(**SHAPE, **DECODER, selection_ratio=0.5),
}


def made(name):
    torch.manual_seed(0)
    net = NETWORKS[name]()
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    return net.eval().requires_grad_(False)


def batch():
    g = torch.Generator().manual_seed(1)
    return torch.randn(3, 4, 8, 12, generator=g), torch.rand(3, generator=g), torch.tensor([0, 3, 2])


def by_hand(name, net, x, t, y, keep_ids=None):
    """(tokens, keep_ids) after each block, in loops over the network's own blocks."""
    tokens, c, text = net.embed(x, t, y)
    everywhere, found, kept = net.positions(), [], None
    (route,) = net.routes
    first, last = route.start_layer_idx, route.end_layer_idx
    places = everywhere
    for i, block in enumerate(net.blocks):
        if i == first and keep_ids is not None:
            full, kept = tokens, keep_ids
            tokens, *places = (gather_tokens(part, keep_ids) for part in (tokens, *everywhere))
        elif i == first:
            full = tokens
        tokens = block(tokens, c, text, *places)
        found.append((tokens, kept))
        if i == last and name == "maskdit":
            tokens = net.decoder_layer(tokens, c)
            if kept is not None:
                tokens = scatter_tokens(tokens, kept, net.mask_token.expand(len(x), net.num_tokens, -1))
            tokens, kept = tokens + net.decoder_pos_embed, None
        elif i == last and name == "sprint":
            if kept is not None:
                tokens = scatter_tokens(tokens, kept, net.mask_token.expand_as(full))
            tokens, places, kept = net.fusion(torch.cat([tokens, full], dim=-1)), everywhere, None
        elif i == last and kept is not None:
            tokens, places, kept = scatter_tokens(tokens, kept, full), everywhere, None
    for block in getattr(net, "decoder_blocks", ()):
        tokens = block(tokens, c, text)
        found.append((tokens, None))
    return found


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("routed", [False, True])
def test_hidden_tokens_are_those_of_the_blocks_run_by_hand(name, routed):
    net, (x, t, y) = made(name), batch()
    selection = net.routes[0].selection
    draw = dict(generators=seeded_generator(5), selection=selection, grid=(4, 6))
    ids = draw_keep_ids(3, 24, 0.5, **draw) if routed else None
    expected = by_hand(name, net, x, t, y, ids)
    routing = Routing(0.5, seeded_generator(5)) if routed else None
    plain = net(x, t, y, routing=Routing(0.5, seeded_generator(5)) if routed else None)
    out, found = net(x, t, y, routing=routing, hidden=range(len(expected)))
    assert torch.equal(out, plain) and sorted(found) == list(range(len(expected)))
    for i, (tokens, kept) in enumerate(expected):
        torch.testing.assert_close(found[i][0], tokens, rtol=1e-5, atol=1e-5)
        assert (found[i][1] is None) == (kept is None) and (kept is None or torch.equal(found[i][1], kept)), i
    inside = [i for i, (_, kept) in found.items() if kept is not None]
    assert inside == ([*range(net.routes[0].start_layer_idx, net.routes[0].end_layer_idx + 1)] if routed else [])
    assert all(torch.equal(drawn, ids) for drawn in (routing.drawn if routed else []))
    some = net(x, t, y, routing=routing and Routing(keep_ids=ids), hidden=[2])[1]
    assert list(some) == [2]
    torch.testing.assert_close(some[2][0], expected[2][0], rtol=1e-5, atol=1e-5)


def test_a_dropped_path_has_no_hidden_tokens():
    net, (x, t, y) = made("sprint"), batch()
    _, found = net(x, t, y, routing=Routing(drop_path=True), hidden=range(6))
    assert sorted(found) == [0, 1, 4, 5]


@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_checkpointing_changes_no_hidden_token(name):
    net, (x, t, y) = made(name).requires_grad_(True), batch()
    _, before = net(x, t, y, routing=Routing(0.5, seeded_generator(5)), hidden=[1, 3])
    for block in net.all_blocks:
        block.recompute = True
    _, after = net(x, t, y, routing=Routing(0.5, seeded_generator(5)), hidden=[1, 3])
    assert all(torch.equal(before[i][0], after[i][0]) for i in (1, 3))


class Bare(Network):
    def __init__(self):
        super().__init__()
        self.latent_shape, self.num_tokens, self.name = (1, 4, 4), 4, "B"


class Whole(Bare):
    all_blocks = ()
    null_condition = torch.tensor([3])

    def forward(self, x, t, condition, *, routing=None, hidden=()):
        return x

    def macs(self, routing=None):
        return 1


def test_members_that_a_network_lacks_are_named_in_one_line():
    with pytest.raises(ValueError) as refusal:
        check_members(Bare())
    assert str(refusal.value) == (
        "Bare lacks null_condition, all_blocks, forward, macs; needed: every member of contracts.Network"
    )
    check_members(Whole())
    assert (Whole().routes, Whole().training_routing(2, None, "cpu").keep_ids) == ((), None)
    error = torch.randn(2, 1, 4, 4)
    assert torch.equal(Whole().reduce(error, error, error, None), error.flatten(1).mean(dim=1))


@pytest.mark.parametrize("member", ["name", "num_tokens", "latent_shape", "null_condition", "all_blocks", "macs"])
def test_a_run_of_such_a_network_is_refused(member, monkeypatch):
    settings, built = made_settings(["model=dit"]), {"model": Whole()}
    if member == "macs":
        monkeypatch.delattr(Whole, member)
    elif member in ("all_blocks", "null_condition"):
        monkeypatch.delattr(Whole, member)
    else:
        delattr(built["model"], member)
    monkeypatch.setattr("checkpoints.load.build", lambda section, base, key: built[key])
    with pytest.raises(UserError, match=f"^Whole lacks {member}; needed: every member of contracts.Network$"):
        build_network(settings)


KINDS = {"class": torch.tensor([0, 1]), "none": None}
KINDS["text"] = Text(torch.zeros(2, 1, 4), torch.ones(2, 1, dtype=torch.bool))


@pytest.mark.parametrize("given", KINDS)
@pytest.mark.parametrize("taken", KINDS)
def test_a_condition_of_another_kind_than_the_networks_is_named(given, taken):
    shape = SHAPE | dict(condition=taken, num_classes=3, text_width=4, text_length=3, learn_sigma=False)
    null = DiT(**shape).null_condition
    refused = [lambda: conditions.check(KINDS[given], null), lambda: conditions.check_kind(given, null)]
    for check in refused if given != taken else ():
        with pytest.raises(UserError, match=f"the network takes {conditions.KINDS[taken]}") as refusal:
            check()
        assert "\n" not in str(refusal.value) and "needed: " in str(refusal.value)
    if given == taken:
        assert [check() for check in refused] == [None, None]


def test_a_config_of_another_kind_is_refused_before_anything_slow():
    with pytest.raises(UserError, match="data.condition=class, and the network takes no condition"):
        build_network(made_settings(["model=dit", "model.condition=none"]))
    with pytest.raises(UserError, match="data.condition=text, and the network takes class labels"):
        text = ["data=folder", "data.condition=text", "data.text_width=4", "data.text_length=3"]
        build_network(made_settings(["model=dit", *text, "model.condition=class"]))

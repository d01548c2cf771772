"""Selection as a property of a route: random or structured, and what either does not allow."""

import math

import pytest
import torch

from dit import DiT
from guidance import Guidance, check_networks
from randomness import BatchSlice, seeded_generator
from routing_blocks import block_tokens, resolve_routes
from routing_module import Route, Routing, cell_of, draw_keep_ids, gather_tokens, scatter_tokens
from system import UserError, cli

PUBLISHED = {0.75: (2, 1), 0.5: (2, 2), 0.625: (4, 6), 0.875: (4, 2)}  # ratio: (cell, tokens kept in it)


def in_cells(keep_ids, side, cell):
    """How many kept tokens each cell has: (B, cells)."""
    rows, columns = keep_ids // side // cell, keep_ids % side // cell
    cells = rows * (side // cell) + columns
    return torch.stack([torch.bincount(c, minlength=(side // cell) ** 2) for c in cells])


@pytest.mark.parametrize("ratio", PUBLISHED)
def test_every_cell_keeps_exactly_its_count(ratio):
    cell, count = PUBLISHED[ratio]
    assert cell_of(256, ratio) == (cell, 16, count)
    ids = draw_keep_ids(50, 256, ratio, generators=seeded_generator(0), selection="structured")
    assert (in_cells(ids, 16, cell) == count).all()
    assert ids.dtype == torch.int64 and (ids.diff(dim=1) > 0).all()


@pytest.mark.parametrize("ratio", [0.75, 0.5, 0.625, 0.875, 0.25, 0.0625])
def test_every_position_is_kept_equally_often(ratio):
    """Chi-square over the positions of 8 x 8 tokens. Draws of one cell depend on each other: each has its own sum."""
    draws, side = 20_000, 8
    cell, _, count = cell_of(side**2, ratio)
    ids = draw_keep_ids(draws, side**2, ratio, generators=seeded_generator(1), selection="structured")
    seen = torch.bincount(ids.flatten(), minlength=side**2).double()
    share, n = count / cell**2, cell**2
    # A cell's n counts, each draw keeping a share p of it without replacement: (n - 1) / n / (p (1 - p)) times
    # sum((seen - mean)^2) / draws is chi-square with n - 1 degrees of freedom.
    statistic = ((seen - draws * share) ** 2).sum() / draws * (n - 1) / n / (share * (1 - share))
    freedom = side**2 / n * (n - 1)
    assert abs(statistic - freedom) < 4.5 * math.sqrt(2 * freedom)


def test_a_structured_draw_is_a_function_of_its_generator_alone():
    def draw(rows, generators):
        return draw_keep_ids(rows, 64, 0.75, generators=generators, selection="structured")

    assert torch.equal(draw(5, seeded_generator(3)), draw(5, seeded_generator(3)))
    assert not torch.equal(draw(5, seeded_generator(3)), draw(5, seeded_generator(4)))
    assert torch.equal(draw(1, [seeded_generator(7)])[0], draw(3, [seeded_generator(s) for s in (5, 7, 9)])[1])
    whole = draw(6, BatchSlice(seeded_generator(0), 0, 6))
    parts = [draw(2, BatchSlice(seeded_generator(0), start, 6)) for start in (0, 2, 4)]
    assert torch.equal(whole, torch.cat(parts))


def test_random_draws_are_the_numbers_they_always_were():
    ids = draw_keep_ids(7, 49, 0.6, generators=torch.Generator().manual_seed(5))
    scores = torch.rand(7, 49, generator=torch.Generator().manual_seed(5))
    assert torch.equal(ids, scores.argsort(dim=1, descending=True)[:, :20].sort(dim=1).values)


@pytest.mark.parametrize("selection", ["random", "structured"])
def test_a_grid_need_not_be_square(selection):
    """4 x 6 tokens: the cells are 2 x 2 of that grid; a list of 24 tokens in a square grid has none."""
    ids = draw_keep_ids(50, 24, 0.75, generators=seeded_generator(0), selection=selection, grid=(4, 6))
    assert ids.shape == (50, 6) and (ids.diff(dim=1) > 0).all()
    cells = ids // 6 // 2 * 3 + ids % 6 // 2
    counts = torch.stack([torch.bincount(row, minlength=6) for row in cells])
    assert (counts == 1).all() == (selection == "structured")
    with pytest.raises(ValueError, match="grid of 24 tokens"):
        draw_keep_ids(1, 24, 0.75, selection="structured")


@pytest.mark.parametrize(
    "side, ratio, message",
    [
        (16, 0.6, "the nearest ratios that do: 0.5625 and 0.625"),
        (16, 0.97, "the nearest ratios that do: 0.875 and 0.9375"),
        (14, 0.625, "the nearest ratios that do: 0.5 and 0.75"),  # 4 does not divide 14
        (14, 0.9, "the nearest ratios that do: 0.5 and 0.75"),
        (7, 0.75, "divides this grid of 49 tokens, 7 in a row; needed: selection=random"),
        (9, 0.5, "divides this grid of 81 tokens"),
    ],
)
def test_what_no_cell_gives_is_refused_with_what_is_near(side, ratio, message):
    for refused in (
        lambda: draw_keep_ids(2, side**2, ratio, selection="structured"),
        lambda: resolve_routes([Route(ratio, 1, 2, "structured")], 6, (side, side)),
        lambda: DiT(side, 1, 1, 32, 6, 2, routes=[Route(ratio, 1, 2, "structured")]),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


def test_an_unknown_selection_is_refused():
    with pytest.raises(ValueError, match="selection=grid; needed: random, structured, rows, columns or cells"):
        resolve_routes([Route(0.5, 1, 2, "grid")], 6)
    with pytest.raises(ValueError, match="selection_ratio, start_layer_idx and end_layer_idx"):
        resolve_routes([dict(selection_ratio=0.5, start_layer_idx=1, end_layer_idx=2, select="random")], 6)


def test_a_route_may_say_how_it_selects():
    as_before = dict(selection_ratio=0.5, start_layer_idx=1, end_layer_idx=-2)
    assert resolve_routes([as_before], 6) == (Route(0.5, 1, 4, "random"),)
    assert resolve_routes([as_before | {"selection": "structured"}], 6, (8, 8)) == (Route(0.5, 1, 4, "structured"),)


def test_blocks_inside_a_structured_route_see_tokens_of_every_cell():
    torch.manual_seed(0)
    net, seen = DiT(8, 1, 1, 32, 6, 2, num_classes=3, routes=[Route(0.75, 1, -2, "structured")]), []
    net.blocks[2].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    for block in net.blocks[:1]:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x, t, y = torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([0, 1, 2])
    for block in net.blocks:  # block 1 adds nothing, so that block 2 sees the tokens that were selected
        assert not block.adaLN_modulation[1].weight.any()
    net(x, t, y, routing=Routing(generators=seeded_generator(0)))
    ids = draw_keep_ids(3, 64, 0.75, generators=seeded_generator(0), selection="structured")
    assert torch.equal(seen[1], gather_tokens(seen[0], ids)) and (in_cells(ids, 8, 2) == 1).all()
    assert block_tokens(net.routes, Routing(), 6, 64) == [64, 16, 16, 16, 16, 64]


def test_given_ids_are_taken_as_they_are():
    torch.manual_seed(0)
    net, seen = DiT(8, 2, 1, 32, 6, 2, num_classes=3, routes=[Route(0.5, 1, -2)]), []
    net.blocks[1].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    ids = torch.tensor([[0, 3, 15]])
    net(torch.randn(1, 1, 8, 8), torch.rand(1), torch.tensor([0]), routing=Routing(keep_ids=ids))
    assert seen == [3]


def test_a_mask_token_fills_the_places_of_the_others():
    kept, ids = torch.randn(2, 3, 4), torch.tensor([[0, 2, 5], [1, 2, 3]])
    full = scatter_tokens(kept, ids, torch.full((1, 1, 4), 7.0).expand(2, 6, 4))
    assert torch.equal(gather_tokens(full, ids), kept)
    inside = torch.zeros(2, 6, dtype=torch.bool).scatter(1, ids, True)
    assert (full[~inside] == 7).all() and full.shape == (2, 6, 4)


def test_sparse_guidance_by_a_structured_route_needs_ratios_it_has():
    net = DiT(8, 1, 1, 32, 6, 2, routes=[Route(0.75, 1, -2, "structured")])
    check_networks(Guidance(1.5, None, 0.25, 0.75, "same"), net, net)
    with pytest.raises(UserError, match="nearest"):
        check_networks(Guidance(1.5, None, 0.2, 0.7, "same"), net, net)
    changing = Guidance(1.5, None, 0.25, 0.75, "same", gamma_weak_end=0.5)
    with pytest.raises(UserError, match="gamma_weak changes from 0.75 to 0.5; selection=structured needs one ratio"):
        check_networks(changing, net, net)


@pytest.mark.parametrize("selection, message", [("structured", "this grid of 49 tokens"), ("grid", "selection=grid")])
def test_a_selection_that_does_not_fit_is_one_line_and_exit_code_2(selection, message, capsys):
    import cost

    route = f"{{selection_ratio:0.5,start_layer_idx:2,end_layer_idx:-4,selection:{selection}}}"
    with pytest.raises(SystemExit) as end, cli.user_errors():
        cost.main([f"model.routes=[{route}]"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and error.startswith("error:") and message in error

"""Every wrong use of routes is one line that says the right one, and nothing runs unrouted without a word."""

import json
import threading

import diffusers
import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from routing_blocks import RoutedBlocks, cost_of, routing
from routing_diffusers import FAMILIES, Blocks, route, routes_of, unroute
from routing_module import Route, Routing, draw_keep_ids
from tests.test_routing_diffusers import CASES, CONFIGS, WHOLE, B, N, call, make, seeded
from tests.test_routing_families import CASES as FAMILY_CASES
from tests.test_routing_families import make as make_family


def routed(name, start=1, end=-2):
    class_name, arguments, _, _ = CASES[name]
    return route(make(class_name), start, end, 0.5), arguments(8)


def refused(message, model, inputs, **how):
    with pytest.raises(ValueError, match=message) as error, routing(generators=seeded(), **how):
        call(model, inputs)
    assert "\n" not in str(error.value)


def test_a_second_route_stays_beside_the_first_in_every_family():
    for name in ("lumina2", "flux, both", "auraflow, both", "wan"):
        model, _ = routed(name, 0, 1)
        route(model, -1, -1, 0.75)
        assert [(r["start_layer_idx"], r["selection_ratio"]) for r in routes_of(model)][0] == (0, 0.5)
        assert len(routes_of(model)) == 2
        with pytest.raises(ValueError, match="routes overlap: 0..1 and 1..2"):
            route(model, 1, 2, 0.5)


def test_routes_go_into_a_config_file_and_back():
    model, inputs = routed("flux, both")
    route(model, 0, 0, 0.25)
    stored, copied = json.loads(json.dumps(routes_of(model))), make("FluxTransformer2DModel")
    route(copied, routes=stored)
    assert routes_of(copied) == stored and routes_of(unroute(model)) == []
    with torch.no_grad(), routing(generators=seeded()):
        first = call(copied, inputs)
    route(model, routes=stored[0]), route(model, routes=stored[1:])
    with torch.no_grad(), routing(generators=seeded()):
        assert torch.equal(call(model, inputs), first)
    with pytest.raises(ValueError, match="needed: selection_ratio, start_layer_idx and end_layer_idx"):
        route(model, routes=dict(start=1))
    with pytest.raises(ValueError, match="names blocks that are no whole numbers"):
        route(model, start=1)


def test_leaving_without_a_route_that_ran_says_so():
    model, inputs = routed("wan")
    unroute(model)
    with pytest.raises(RuntimeError, match="no route has run"), routing():
        call(model, inputs)
    route(model, 1, 2, 0.5)
    with pytest.raises(RuntimeError, match="in this thread"), routing():
        worker = threading.Thread(target=call, args=[model, inputs])
        worker.start(), worker.join()
    with pytest.raises(KeyError), routing():
        raise KeyError("what happens inside is not hidden")


class Indexing(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.blocks, self.how = RoutedBlocks([nn.Linear(4, 4) for _ in range(4)], Route(0.5, 1, 2)), how

    def forward(self, x):
        for block in self.how(self.blocks):
            x = block(x)
        return x


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "how", [lambda blocks: [blocks[i] for i in range(4)], lambda blocks: blocks[:], lambda blocks: reversed(blocks)]
)
def test_a_forward_that_does_not_iterate_is_refused(how, compiled):
    net, x = Indexing(how), torch.randn(2, 8, 4)
    torch.compiler.reset()
    run = torch.compile(net, backend="eager") if compiled else net
    dense = run(x)
    for _ in range(2):
        with pytest.raises(ValueError, match="takes blocks out of a routed list by index"), routing():
            run(x)
    assert torch.equal(run(x), dense)


@WHOLE
def test_a_compiled_model_says_each_time_whether_a_route_ran():
    model, inputs = routed("wan")
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        with torch.no_grad(), routing():
            call(compiled, inputs)
        with pytest.raises(RuntimeError, match="no route has run"), routing():
            pass


def test_residuals_between_the_blocks_of_a_route_are_refused():
    model, inputs = routed("flux, both")
    residuals = torch.randn(B, N, 16)
    message = "between blocks of a route, with 8 of 16 tokens, .*no residuals of a ControlNet where a route is"
    refused(message, model, inputs | dict(controlnet_block_samples=[residuals] * 3))
    refused(message, model, inputs | dict(controlnet_single_block_samples=[residuals] * 3))
    model, inputs = routed("sd3")
    refused(
        "between blocks of a route.*context_pre_only", model, inputs | dict(block_controlnet_hidden_states=[residuals])
    )
    with torch.no_grad():
        call(model, inputs | dict(block_controlnet_hidden_states=[residuals]))  # dense, as ever
    with pytest.raises(ValueError, match='^WanVACETransformer3DModel is none of.*FAMILIES."WanVACE'):
        route(
            diffusers.WanVACETransformer3DModel(num_layers=2, vace_layers=[0], ffn_dim=8, num_attention_heads=2),
            0,
            0,
            0.5,
        )


@pytest.mark.parametrize("skipped", [1, 2, 3])
def test_skipped_layers_are_refused(skipped):
    model, inputs = routed("sd3")
    refused(
        "does not call JointTransformerBlock, a block of a route.*skip_layers",
        model,
        inputs | dict(skip_layers=[skipped]),
    )


def test_a_cache_of_other_calls_is_refused():
    model, inputs = routed("flux, both")
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.2))
    refused("fbc_leader_block_hook.*needed: model.disable_cache", model, inputs)


def test_other_cuts_and_wrappers_are_refused():
    model, _ = routed("wan")
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        model.blocks._replicate_for_data_parallel()
    unroute(model).blocks = RoutedBlocks(model.blocks, Route(0.5, 1, 2))
    with pytest.raises(ValueError, match="cut by another router"):
        route(model, 1, 2, 0.5)
    with pytest.raises(ValueError, match="routed blocks inside"):
        RoutedBlocks([Indexing(None)], Route(0.5, 0, 0))
    model = make("WanTransformer3DModel")
    with pytest.raises(ValueError, match="^OptimizedModule wraps a WanTransformer3DModel; needed: .* then wrapped"):
        route(torch.compile(model), 1, 2, 0.5)


@pytest.mark.skipif(torch.__version__ >= (2, 14), reason="older versions' limit")
def test_older_versions_do_not_compile_a_routed_model_as_a_whole():
    model, inputs = routed("wan")
    with pytest.raises(Exception, match="needed: torch 2.14, or its blocks compiled alone"), routing():
        call(torch.compile(model, backend="eager", fullgraph=True), inputs)


def test_a_row_of_ones_own_routes_another_class():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

        def forward(self, x):
            for block in self.stages:
                x = block(x)
            return (x,)

    with pytest.raises(ValueError, match='FAMILIES."Mine". = .Blocks."stages", .*gather_rows'):
        route(Mine(), 0, 1, 0.5)
    FAMILIES["Mine"] = [Blocks("stages")]
    try:
        with routing(keep_ids=torch.tensor([[0, 3]])):
            route(Mine(), 0, 1, 0.5)(torch.randn(1, 8, 4))
    finally:
        del FAMILIES["Mine"]


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_of_the_whole_model_is_refused(use_reentrant, backward_inside):
    model, inputs = routed("wan")
    x = inputs.pop("hidden_states").requires_grad_()
    whole = lambda x: call(model, inputs | dict(hidden_states=x))
    message = "a routed model as a whole is checkpointed; needed: checkpoints of its blocks"
    with pytest.raises(ValueError, match=message), routing(generators=seeded()):
        loss = checkpoint(whole, x, use_reentrant=use_reentrant).square().mean()
        if backward_inside:
            loss.backward()
        else:
            with pytest.raises(ValueError, match=message):
                worker_backward(loss)
            raise ValueError(message)
    dense = checkpoint(whole, x, use_reentrant=use_reentrant).square().mean()  # without routes, as ever
    dense.backward()


def worker_backward(loss):
    """In another thread, as the engine of a GPU does it, which no context reaches."""
    errors = []

    def work():
        try:
            loss.backward()
        except ValueError as error:
            errors.append(error)

    worker = threading.Thread(target=work)
    worker.start(), worker.join()
    raise errors[0]


def test_reentrant_checkpoints_of_blocks_are_refused():
    model, inputs = routed("flux, both")
    model.enable_gradient_checkpointing(lambda block, *args: checkpoint(block, *args, use_reentrant=True))
    with pytest.raises(ValueError, match="use_reentrant=True; needed: use_reentrant=False"), routing():
        call(model, inputs).square().mean().backward()


def test_both_halves_of_a_guided_batch_keep_the_same_tokens():
    model, inputs = routed("wan")
    inputs = {k: torch.cat([v[:1]] * 2) for k, v in inputs.items()}
    with torch.no_grad():
        with routing(generators=seeded()):
            assert not torch.equal(*call(model, inputs))
        with routing(keep_ids=draw_keep_ids(1, N, 0.5, generators=seeded()).repeat(2, 1)):
            assert torch.equal(*call(model, inputs))


@pytest.mark.parametrize("ids, message", [
    (torch.tensor([[0, 2]]), r"keep_ids: torch.int64 \(1, 2\); needed: torch.int64 \(2, K\)"),
    (torch.tensor([[0.0, 2], [1, 2]]), "keep_ids: torch.float32"),
    (torch.tensor([[0, 2], [2, 2]]), r"keep_ids of 0..2; needed: ascending in 0..15"),
    (torch.tensor([[0, 2], [2, 16]]), r"keep_ids of 0..16; needed: ascending in 0..15"),
    (torch.tensor([[-1, 2], [2, 3]]), r"keep_ids of -1..3; needed: ascending in 0..15"),
])  # fmt: skip
def test_ids_that_cannot_be_are_refused(ids, message):
    refused(message, *routed("wan"), keep_ids=ids) if ids is not None else None


def test_tokens_that_have_to_stay_stay_and_the_others_are_drawn():
    keep = torch.zeros(3, 16, dtype=torch.bool)
    keep[0, [1, 5]], keep[1, :8] = True, True
    seen = torch.zeros(3, 16)
    for seed in range(200):
        ids = Routing(0.5, seeded(seed), keep=keep).draw(Route(0.5, 0, 1), torch.randn(3, 16, 4))
        assert ids.shape == (3, 8) and (ids.diff(dim=1) > 0).all() and ids[1].tolist() == [*range(8)]
        seen += torch.zeros(3, 16).scatter(1, ids, 1.0)
    assert (seen[0, [1, 5]] == 200).all()
    others = seen[0][~keep[0]] / 200
    assert (others - 6 / 14).abs().max() < 0.15 and (seen[2] / 200 - 0.5).abs().max() < 0.15
    none = Routing(0.5, seeded(), keep=torch.zeros(3, 16, dtype=torch.bool)).draw(
        Route(0.5, 0, 1), torch.randn(3, 16, 4)
    )
    assert torch.equal(none, draw_keep_ids(3, 16, 0.5, generators=seeded()))


def test_a_mask_that_does_not_fit_is_refused():
    model, inputs = routed("wan")
    full = torch.ones(B, N, dtype=torch.bool)
    refused("keep: 16 of 16 tokens have to stay, and the route keeps 8", model, inputs, keep=full)
    refused(
        r"keep of torch.float32 \(2, 16\); needed: \(2, 16\) for both, and torch.bool", model, inputs, keep=full.float()
    )
    refused(r"keep of torch.bool \(2, 15\); needed", model, inputs, keep=full[:, 1:])
    model = route(make("WanTransformer3DModel"), 1, 2, 0.5, selection="structured")
    refused("keep= with selection=structured; needed: selection=random", model, inputs, keep=full)


def test_a_selection_of_ones_own_keeps_the_highest_scores():
    """The tokens of the largest L1 norm, in one line; of a joint sequence it is given the image's alone."""
    for name in ("wan", "lumina2, ragged"):
        class_name, arguments, start, end = CASES[name]
        seen = []
        largest = lambda tokens, generators: seen.append(tokens) or tokens.abs().sum(2)
        model, inputs = route(make(class_name), start, end, 0.5, selection=largest), arguments(8)
        with torch.no_grad(), routing():
            found = call(model, inputs)
        ids = seen[0].abs().sum(2).topk(N // 2).indices.sort(1).values
        assert seen[0].shape[:2] == (B, N) and not seen[0].requires_grad
        unroute(model)
        with torch.no_grad(), routing(keep_ids=ids):
            assert torch.equal(call(route(model, start, end, 0.5), inputs), found)
    wrong = route(make("WanTransformer3DModel"), 1, 2, 0.5, selection=lambda tokens, generators: tokens[:, :3, 0])
    refused(r"scores of shape \(2, 3\), .*; needed: \(2, 16\)", wrong, CASES["wan"][1](8))


def test_what_families_cannot_route_is_refused_by_name():
    model = route(make_family("z-image"), 1, 2, 0.5)
    inputs = FAMILY_CASES["z-image"][2]()
    inputs["x"][0] = inputs["x"][0][..., :8, :]
    inputs["x"][1] = torch.cat([inputs["x"][1]] * 2, 2)
    refused("images of different sizes in a batch", model, inputs)
    model = route(make_family("flux2"), 1, 2, 0.5)
    refused("kv_cache_mode counts the reference tokens", model,
            FAMILY_CASES["flux2"][2]() | dict(kv_cache_mode="extract", num_ref_tokens=4))  # fmt: skip
    name, config, arguments, _ = FAMILY_CASES["hunyuan"]
    FAMILY_CASES["replacing"] = (name, dict(image_condition_type="token_replace"), arguments, 16)
    model = route(make_family("replacing"), 1, 2, 0.5)
    refused("blocks are given num_tokens, which tells tokens apart by their places", model, arguments())
    del FAMILY_CASES["replacing"]


def test_an_error_of_a_block_is_its_own():
    model, inputs = routed("wan")
    model.blocks[1].attn1.to_q = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="mat1 and mat2"), routing():
        call(model, inputs)


def test_cost_of_counts_what_a_run_counts():
    model, inputs = routed("wan, per token")
    counted = cost_of(model, inputs)
    assert [*counted] == [0.0, 0.25, 0.5, 0.75] and sorted(counted.values(), reverse=True) == [*counted.values()]
    for ratio in counted:
        math = sdpa_kernel(SDPBackend.MATH)
        with math, FlopCounterMode(display=False) as counter, torch.no_grad(), routing(ratio):
            call(model, inputs)
        assert counter.get_total_flops() == counted[ratio]
    with torch.device("meta"):
        empty = route(diffusers.WanTransformer3DModel(**CONFIGS["WanTransformer3DModel"]), 1, -2, 0.5)
        inputs = {k: v.to("meta") for k, v in inputs.items()}
    assert cost_of(empty, inputs) == counted
    with pytest.raises(ValueError, match="Lumina2Transformer2DModel reads values"):
        cost_of(*routed("lumina2"))
    with pytest.raises(RuntimeError, match="no route has run"):
        cost_of(unroute(model), CASES["wan"][1](8))

"""SPRINT: the network against a few independent lines, path drop, its guidance, the official files."""

import math
import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import export
import sample
from checkpoints.generate import branches, generate_latents
from checkpoints.load import Run, build_network, load_run
from checkpoints.naming import settings_name
from dit import DiT
from guidance import Guidance
from randomness import BatchSlice, seeded_generator
from rf import RectifiedFlow
from routing_blocks import block_tokens
from routing_module import Routing, draw_keep_ids
from sprint import Sprint
from system import UserError
from tests import started
from tests.conftest import loss_of
from tests.made_runs import made_settings, make_run, note_calls
from training.prepare import start_from

AS_DIT = dict(norm="layer", mlp="gelu", qk_norm=False, rotary=False, sincos=True)
AS_LIGHTNINGDIT = dict(norm="rms", mlp="swiglu", qk_norm=False, rotary=True, sincos=True)
BACKBONES = {"dit": AS_DIT, "lightningdit": AS_LIGHTNINGDIT, "paper": {}}


def small(backbone="dit", **changes):
    """7 blocks of width 32 on 8 x 8 tokens, random values everywhere."""
    torch.manual_seed(0)
    shape = dict(input_size=16, patch_size=2, in_channels=4, hidden_size=32, depth=7, num_heads=2, num_classes=3)
    net = Sprint(**(shape | BACKBONES[backbone] | changes))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net.eval()


def batch(n=4):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, 16, 16, generator=g), torch.rand(n, generator=g), torch.randint(4, (n,), generator=g)


def expected(net, x, t, y, keep_ids=None):
    """f, g, fusion and h, sample by sample, with the network's own blocks, embedders and final layer."""
    tokens = net.x_embedder(x) + net.pos_embed
    c = net.t_embedder(t) + net.y_embedder(y)
    out = []
    for i in range(len(x)):
        one, condition = tokens[i : i + 1], c[i : i + 1]
        ids = torch.arange(64) if keep_ids is None else keep_ids[i]

        def through(blocks, sequence, places, condition=condition):
            where = (net.cos[:, places], net.sin[:, places]) if net.rotary else ()
            for block in blocks:
                sequence = block(sequence, condition, None, *where)
            return sequence

        shallow = through(net.blocks[:2], one, torch.arange(64))
        deep = net.mask_token.repeat(1, 64, 1)
        deep[:, ids] = through(net.blocks[2:5], shallow[:, ids], ids)
        fused = torch.cat([deep, shallow], dim=2) @ net.fusion.weight.T + net.fusion.bias
        out.append(net.final_layer(through(net.blocks[5:], fused, torch.arange(64)), condition))
    grid = torch.cat(out).view(len(x), 8, 8, 2, 2, 4)
    return torch.einsum("bijpqc->bcipjq", grid).reshape(x.shape)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_dense_and_sparse_passes_are_what_the_paper_says(backbone):
    net, inputs = small(backbone), batch()
    with torch.no_grad():
        torch.testing.assert_close(net(*inputs), expected(net, *inputs), rtol=1e-5, atol=1e-5)
        assert torch.equal(net(*inputs), net(*inputs, routing=Routing(0.0)))
        ids = draw_keep_ids(4, 64, 0.75, generators=seeded_generator(5), selection="structured")
        for routing in (Routing(keep_ids=ids), Routing(0.75, seeded_generator(5))):
            torch.testing.assert_close(net(*inputs, routing=routing), expected(net, *inputs, ids), rtol=1e-5, atol=1e-5)


def test_without_its_extras_it_has_dits_blocks():
    net, plain = small(), DiT(16, 2, 4, 32, 7, 2, num_classes=3, learn_sigma=False)
    added = {"fusion.weight", "fusion.bias", "mask_token"}
    assert net.state_dict().keys() - plain.state_dict().keys() == added
    plain.load_state_dict({key: value for key, value in net.state_dict().items() if key not in added})
    with torch.no_grad():  # a fusion that hands on the deep stream leaves DiT
        net.fusion.weight.copy_(torch.cat([torch.eye(32), torch.zeros(32, 32)], dim=1))
        net.fusion.bias.zero_()
        torch.testing.assert_close(net(*batch()), plain(*batch()), rtol=1e-5, atol=1e-5)


def test_the_mask_token_is_not_trained_and_saved():
    net = small()
    assert "mask_token" in net.state_dict() and "mask_token" not in dict(net.named_parameters())
    assert 0.01 < small(hidden_size=512, num_heads=4).mask_token.std() < 0.03
    loss_of(net, RectifiedFlow(), *batch()[::2], seeded_generator(0)).sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_path_drop_takes_the_whole_deep_stream_of_a_share_of_the_samples():
    net, (x, t, y) = small(path_drop=0.3), batch(200)
    with torch.no_grad():
        without = net(x, t, y, routing=Routing(drop_path=True))
        out = net(x, t, y, routing=Routing(generators=seeded_generator(2)))
    dropped = (out - without).flatten(1).abs().amax(dim=1) < 1e-5
    assert abs(dropped.float().mean() - 0.3) < 4.5 * math.sqrt(0.3 * 0.7 / 200)
    generator = seeded_generator(2)
    ids = draw_keep_ids(200, 64, 0.75, generators=generator, selection="structured")
    assert torch.equal(dropped, torch.rand(200, generator=generator) < 0.3)  # drawn after the selection
    kept = [i for i in range(200) if not dropped[i]][:5]
    torch.testing.assert_close(
        out[kept], expected(net, x[kept], t[kept], y[kept], ids[kept]).detach(), rtol=1e-5, atol=1e-5
    )


def test_path_drop_of_a_row_does_not_depend_on_how_the_batch_is_split():
    net, (x, t, y) = small(path_drop=0.5), batch(8)
    with torch.no_grad():
        whole = net(x, t, y, routing=Routing(generators=BatchSlice(seeded_generator(0), 0, 8)))
        for start in (0, 4):
            rows = slice(start, start + 4)
            part = net(x[rows], t[rows], y[rows], routing=Routing(generators=BatchSlice(seeded_generator(0), start, 8)))
            torch.testing.assert_close(part, whole[rows], rtol=1e-5, atol=1e-5)


def test_path_drop_is_for_training_alone_and_stays_in_stage_two():
    net, (x, t, y) = small(path_drop=0.5), batch(40)
    with torch.no_grad():
        for routing in (None, Routing(0.0, seeded_generator(0)), Routing(0.75, seeded_generator(0))):
            out, without = net(x, t, y, routing=routing), net(x, t, y, routing=Routing(drop_path=True))
            assert ((out - without).flatten(1).abs().amax(dim=1) > 1e-3).all()
        second = small(path_drop=0.5, selection_ratio=0.0)
        dropped = second(x, t, y, routing=Routing(generators=seeded_generator(0))) - without
        assert torch.equal(
            dropped.flatten(1).abs().amax(dim=1) < 1e-5, torch.rand(40, generator=seeded_generator(0)) < 0.5
        )


def test_a_dropped_path_is_never_run():
    net, seen = small(), []
    for i, block in enumerate(net.blocks):
        block.register_forward_hook(lambda module, inputs, output, i=i: seen.append(i))
    net(*batch(), routing=Routing(drop_path=True))
    assert seen == [0, 1, 5, 6]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_counted_cost_is_what_runs(backbone):
    with FakeTensorMode():
        net = small(backbone, hidden_size=64, depth=9)
        x, t, y = torch.randn(2, 4, 16, 16), torch.rand(2), torch.zeros(2, dtype=torch.int64)
        for routing in (None, Routing(0.75), Routing(0.5), Routing(drop_path=True)):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                net(x, t, y, routing=routing)
            assert counter.get_total_flops() / 4 == pytest.approx(net.macs(routing), rel=0.02)


def test_published_cost_of_xl():
    with torch.device("meta"):
        plain, net = DiT(size="DiT-XL/2"), Sprint(size="DiT-XL/2")
    assert net.macs(Routing()) / plain.macs() == pytest.approx(0.3585, rel=1e-3)  # 2.79 times fewer
    guided = (net.macs() + net.macs(Routing(drop_path=True))) / (2 * net.macs())
    assert guided == pytest.approx(0.574, rel=1e-3)
    extra = sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in net.blocks.parameters())
    assert net.fusion.weight.numel() == 2 * 1152**2 and extra > net.fusion.weight.numel()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_structured_selection_needs_a_grid_that_cells_divide(backbone):
    with pytest.raises(ValueError, match="needed: selection=random"):
        small(backbone, input_size=14)
    small(backbone, input_size=14, selection="random")
    with pytest.raises(ValueError, match="leave none of 4"):
        small(backbone, depth=4)
    with pytest.raises(ValueError, match="path_drop 1"):
        small(backbone, path_drop=1.0)


def guided_run(net):
    return Run(net.requires_grad_(False), RectifiedFlow(), None, None, torch.device("cpu"), pool=torch.arange(3))


def test_path_drop_guidance_is_the_one_rule_with_a_weak_branch_without_g():
    net, y = small(), torch.tensor([0, 1, 2])
    run = guided_run(net)
    macs = note_calls(run)
    strong, weak = branches(run, run, Guidance(3.0, weak_path="drop"), range(3), y)
    x, t = batch(3)[0], torch.tensor(0.4)
    null = torch.full_like(y, 3)
    assert torch.equal(strong(x, t), net(x, t.expand(3), y))
    assert torch.equal(weak(x, t), net(x, t.expand(3), null, routing=Routing(drop_path=True)))
    steps = dict(takes="velocity", num_steps=4, solver="euler")
    at = partial(generate_latents, run, seeds=range(3), condition=y, sampler=steps)
    one, by_cfg = at(guidance=Guidance(1.0, weak_path="drop")), at(guidance=Guidance(3.0))
    macs.clear()
    dropped = at(guidance=Guidance(3.0, weak_path="drop"))
    assert sorted(macs) == [net.macs(Routing(drop_path=True))] * 12 + [net.macs()] * 12  # four steps of three images
    assert torch.equal(one, at(guidance=Guidance())) and (dropped - by_cfg).abs().max() > 1e-3
    # With interval and schedule: the weak branch is called only where they ask for it.
    macs.clear()
    at(guidance=Guidance(3.0, interval=(0.2, 0.6), weak_path="drop"))
    assert len(macs) == 3 * (4 + 2)  # of t = 1, 0.75, 0.5 and 0.25, the last two are in the interval
    macs.clear()
    scheduled = at(guidance=Guidance(1.0, scale_end=3.0, weak_path="drop"))
    assert len(macs) == 3 * (4 + 3) and (scheduled - dropped).abs().max() > 1e-3


@pytest.mark.parametrize("settings", [dict(gamma_weak=0.5), dict(weak_path="skip")])
def test_guidance_that_says_two_things_is_refused(settings):
    with pytest.raises(UserError, match="weak_path"):
        Guidance(**(dict(scale=2.0, weak_path="drop") | settings))


SMALL_RUN = ["objective=rf", "model.depth=6", "model.hidden_size=32", "model.num_heads=2", "sampler.num_steps=2"]


def test_path_drop_guidance_on_other_models_is_one_line_and_exit_code_2(tmp_path):
    make_run(tmp_path / "dit", ["model=dit", *SMALL_RUN])
    command = [sys.executable, "sample.py", f"ckpt={tmp_path / 'dit'}", "guidance=path_drop", "seeds=0"]
    done = started.run(command)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "weak_path: drop_path needs a network with a deep path to drop (model=sprint)" in done.stderr and not list(
        tmp_path.rglob("*.png")
    )
    with pytest.raises(ValueError, match="drop_path needs"):
        DiT(8, 2, 1, 32, 6, 2, routes=[dict(selection_ratio=0.5, start_layer_idx=1, end_layer_idx=2)])(
            torch.randn(1, 1, 8, 8), torch.rand(1), torch.tensor([0]), routing=Routing(drop_path=True)
        )


@pytest.mark.parametrize("model", ["sprint", "lightningdit_sprint"])
def test_a_run_is_sampled_with_path_drop_guidance(model, tmp_path):
    make_run(tmp_path / "run", [f"model={model}", *SMALL_RUN])
    out = tmp_path / "out"
    sample.main([f"ckpt={tmp_path / 'run'}", "guidance=path_drop", "seeds=0-1", f"out={out}", "interval=[0.1,1]"])
    assert len(list(out.rglob("*.png"))) == 3
    names = [settings_name(Guidance(3.0, interval=(low, 1), weak_path="drop")) for low in (0.1, 0.2)]
    assert all(name.startswith("scale-3.0_interval-") and name.endswith("_weak_path-drop") for name in names)
    assert len(set(names)) == 2


# The official layout, by hand: shapes and names as its files have them, and what they compute.

WIDTH, HEADS, SIDE, PATCH = 128, 4, 8, 2


def official_state(mlp, depth=3, channels=4, classes=5, encoder=2, decoder=2, inner=4 * WIDTH):
    """Random values under the official names: `mlp` is gelu or swiglu."""
    linear = {
        "x_embedder.proj": (channels * PATCH**2, WIDTH),
        "t_embedder.mlp.0": (256, WIDTH),
        "t_embedder.mlp.2": (WIDTH, WIDTH),
    }
    linear |= {"renoise_linear": (2 * WIDTH, WIDTH), "final_layer.linear": (WIDTH, channels * PATCH**2)}
    linear |= {"final_layer.adaLN_modulation.1": (WIDTH, 2 * WIDTH)}
    state = {
        "y_embedder.embedding_table.weight": torch.randn(classes + 1, WIDTH) * 0.1,
        "mask_token": torch.randn(1, 1, WIDTH) * 0.02,
    }
    for stage, number in (("encoder_blocks", encoder), ("middle_blocks", depth), ("decoder_blocks", decoder)):
        for i in range(number):
            block = f"{stage}.{i}"
            linear |= {f"{block}.attn.qkv": (WIDTH, 3 * WIDTH), f"{block}.attn.proj": (WIDTH, WIDTH)}
            linear |= {f"{block}.adaLN_modulation.1": (WIDTH, 6 * WIDTH)}
            names = ("fc1",) if mlp == "gelu" else ("fc1_g", "fc1_x")
            linear |= {f"{block}.mlp.{name}": (WIDTH, inner) for name in names} | {f"{block}.mlp.fc2": (inner, WIDTH)}
            state |= {
                f"{block}.attn.{name}.weight": 1 + torch.randn(WIDTH // HEADS) * 0.1 for name in ("q_norm", "k_norm")
            }
    for name, (inputs, outputs) in linear.items():
        state |= {
            f"{name}.weight": torch.randn(outputs, inputs) * inputs**-0.5,
            f"{name}.bias": torch.randn(outputs) * 0.1,
        }
    return state


def official_output(state, x, t, y, keep_ids=None):
    """One sample: x (C, h, w), t (), y () -> velocity (C, h, w). All loops, on the official tensors."""

    def linear(name, value):
        return value @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(value):
        return (value - value.mean(-1, keepdim=True)) / (value.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def turn(value, places):  # (K, heads, width): pairs (2j, 2j + 1), rows first, then columns
        turned = value.clone()
        half = WIDTH // HEADS // 2
        for axis, coordinate in enumerate((places // SIDE, places % SIDE)):
            for j in range(half // 2):
                angle = (coordinate * 10000.0 ** (-2 * j / half))[:, None]
                a, b = value[..., axis * half + 2 * j], value[..., axis * half + 2 * j + 1]
                turned[..., axis * half + 2 * j] = a * angle.cos() - b * angle.sin()
                turned[..., axis * half + 2 * j + 1] = b * angle.cos() + a * angle.sin()
        return turned

    def block(name, value, places):
        shifts = linear(f"{name}.adaLN_modulation.1", F.silu(c)).split(WIDTH)
        inner = norm(value) * (1 + shifts[1]) + shifts[0]
        q, k, v = linear(f"{name}.attn.qkv", inner).view(len(value), 3, HEADS, -1).unbind(1)
        rms = [part * (part.square().mean(-1, keepdim=True) + 1e-6).rsqrt() for part in (q, k)]
        q, k = (turn(part * state[f"{name}.attn.{n}_norm.weight"], places) for part, n in zip(rms, "qk"))
        weights = torch.einsum("ihd,jhd->hij", q, k).div((WIDTH // HEADS) ** 0.5).softmax(-1)
        value = value + shifts[2] * linear(f"{name}.attn.proj", torch.einsum("hij,jhd->ihd", weights, v).flatten(1))
        inner = norm(value) * (1 + shifts[4]) + shifts[3]
        if f"{name}.mlp.fc1.weight" in state:
            inner = F.gelu(linear(f"{name}.mlp.fc1", inner), approximate="tanh")
        else:
            inner = F.silu(linear(f"{name}.mlp.fc1_g", inner)) * linear(f"{name}.mlp.fc1_x", inner)
        return value + shifts[5] * linear(f"{name}.mlp.fc2", inner)

    channels, everywhere = len(x), torch.arange(SIDE**2)
    patches = x.view(channels, SIDE, PATCH, SIDE, PATCH).permute(1, 3, 0, 2, 4).reshape(SIDE**2, -1)
    shallow = linear("x_embedder.proj", patches)
    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    c = torch.cat([(t * frequencies).cos(), (t * frequencies).sin()])
    c = (
        linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", c)))
        + state["y_embedder.embedding_table.weight"][y]
    )
    stages = {
        stage: sorted({".".join(k.split(".")[:2]) for k in state if k.startswith(stage)})
        for stage in ("encoder", "middle", "decoder")
    }
    for name in stages["encoder"]:
        shallow = block(name, shallow, everywhere)
    ids = everywhere if keep_ids is None else keep_ids
    kept = shallow[ids]
    for name in stages["middle"]:
        kept = block(name, kept, ids)
    deep = state["mask_token"][0].repeat(SIDE**2, 1)
    deep[ids] = kept
    tokens = linear("renoise_linear", torch.cat([deep, shallow], dim=1))
    for name in stages["decoder"]:
        tokens = block(name, tokens, everywhere)
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(c)).split(WIDTH)
    patches = linear("final_layer.linear", norm(tokens) * (1 + scale) + shift)
    return patches.view(SIDE, SIDE, channels, PATCH, PATCH).permute(2, 0, 3, 1, 4).reshape(x.shape)


@pytest.fixture(params=[("gelu", 4 * WIDTH), ("swiglu", 4 * WIDTH), ("swiglu", 4 * WIDTH * 2 // 3)])
def official(request, tmp_path):
    torch.manual_seed(0)
    state = official_state(request.param[0], inner=request.param[1])
    save_file(state, tmp_path / "model_1.safetensors")
    return state, tmp_path / "model_1.safetensors"


def test_an_official_file_computes_what_it_did(official):
    state, path = official
    run = load_run(f"sprint16:{path}", device="cpu")
    assert type(run.objective) is RectifiedFlow and run.objective.timesteps == "logit_normal"
    net, (x, t, y) = run.model, batch(2)
    assert net.num_classes == 5 and net.routes[0].selection_ratio == 0.75 and net.path_drop == 0.1
    ids = draw_keep_ids(2, 64, 0.75, generators=seeded_generator(0), selection="structured")
    for routing, kept in ((None, [None, None]), (Routing(keep_ids=ids), ids)):
        found = run.objective.predict(partial(net, routing=routing), x, t, y)
        wanted = torch.stack([official_output(state, *one, k) for *one, k in zip(x, t, y, kept)])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("encoder, depth, decoder", [(3, 3, 2), (1, 6, 1), (2, 3, 3), (1, 1, 1)])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_stages_are_read_from_the_keys(encoder, depth, decoder, mlp, tmp_path):
    torch.manual_seed(0)
    state = official_state(mlp, depth, encoder=encoder, decoder=decoder)
    save_file(state, tmp_path / "a.safetensors")
    run = load_run(f"sprint16:{tmp_path / 'a.safetensors'}", device="cpu")
    x, t, y = batch(2)
    ids = draw_keep_ids(2, 64, 0.75, generators=seeded_generator(0), selection="structured")
    for routing, kept in ((None, [None, None]), (Routing(keep_ids=ids), ids)):
        found = run.objective.predict(partial(run.model, routing=routing), x, t, y)
        wanted = torch.stack([official_output(state, *one, k) for *one, k in zip(x, t, y, kept)])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)
    tokens = [64] * encoder + [16] * depth + [64] * decoder
    assert block_tokens(run.model.routes, Routing(), sum((encoder, depth, decoder)), 64) == tokens
    save_file(run.model.state_dict(), tmp_path / "flat.safetensors")  # our names count all blocks through
    for prefix in ("", "repa:", "sprint16:"):
        with pytest.raises(UserError, match=r"keys do not tell its stages.*ckpt=sprint-2-2:FILE|an even side"):
            load_run(f"{prefix}{tmp_path / 'flat.safetensors'}", device="cpu")
    back = load_run(f"sprint-{encoder}-{decoder}:{tmp_path / 'flat.safetensors'}", device="cpu")
    assert torch.equal(back.model(x, t, y), run.model(x, t, y)) and back.settings.model == run.settings.model
    drop = Routing(drop_path=True)
    assert torch.equal(back.model(x, t, y, routing=drop), run.model(x, t, y, routing=drop))
    assert len(run.model.block_macs(drop)) == encoder + decoder


@pytest.mark.parametrize("told, message", [
    ({}, None), ({"rel_pos_embed": None}, "says rel_pos_embed none in"), ({"q_norm": "layernorm"}, "q_norm layernorm"),
])  # fmt: skip
def test_settings_in_sections_of_sections_decide(told, message, tmp_path):
    network = {"num_classes": 6, "class_dropout_prob": 0.0, "use_swiglu": True, "q_norm": "RMSNorm"} | told
    config = {"model": {"network_config": network}, "loss": {"path_type": "linear", "prediction": "v", "cfg_prob": 0.1}}
    torch.save({"ema": official_state("swiglu", 1), "config": config}, tmp_path / "a.pt")  # of six rows of labels
    with pytest.raises(UserError, match=message) if message else nullcontext():
        run = load_run(f"sprint16:{tmp_path / 'a.pt'}", device="cpu")
        assert run.model.num_classes == 6 and run.dropout_known and run.settings.train.label_dropout == 0


def test_the_dense_blocks_must_leave_some():
    assert [len(small(encoder_depth=3, decoder_depth=1).blocks), small().sparse] == [7, slice(2, -2)]
    for depths in ((0, 2), (2, 0), (4, 3)):
        with pytest.raises(ValueError, match="leave none of 7|1 of each"):
            small(encoder_depth=depths[0], decoder_depth=depths[1])


def test_the_papers_mlp_and_the_codes_have_the_sizes_that_are_said():
    sizes = {}
    for mlp in ("gelu", "swiglu"):
        with torch.device("meta"):
            sizes[mlp] = sum(
                p.numel() for p in build_network(made_settings(["experiment=sprint", f"model.mlp={mlp}"])).parameters()
            )
    assert sizes == {"gelu": 677_475_664, "swiglu": 677_518_672}


def test_an_official_file_may_be_wrapped_and_says_what_is_wrong_with_it(official, tmp_path):
    state, path = official
    torch.save({"ema": {f"module._orig_mod.{key}": value for key, value in state.items()}}, tmp_path / "wrapped.pt")
    wrapped, plain = (load_run(f"sprint16:{p}", device="cpu").model for p in (tmp_path / "wrapped.pt", path))
    assert all(torch.equal(a, b) for a, b in zip(wrapped.state_dict().values(), plain.state_dict().values()))
    assert load_run(path, device="cpu").model.latent_shape == (4, 32, 32) and load_run(
        f"sprint64:{path}", device="cpu"
    ).model.latent_shape == (4, 64, 64)
    save_file(
        {key: value for key, value in state.items() if key != "renoise_linear.bias"}, tmp_path / "less.safetensors"
    )
    for ckpt, message in (
        (tmp_path / "less.safetensors", "1 missing: fusion.bias"),
        (f"sprint15:{path}", "an even side"),
        (f"sit:{path}", "an even side"),
    ):
        with pytest.raises(UserError, match=message):
            load_run(ckpt, device="cpu")
    torch.save(DiT(8, 2, 4, 128, 2, 4).state_dict(), tmp_path / "DiT.pt")
    with pytest.raises(UserError, match="is not a SPRINT"):
        load_run(f"sprint:{tmp_path / 'DiT.pt'}", device="cpu")


def test_an_official_file_is_sampled_exported_and_trained_on(official, tmp_path):
    state, path = official
    run = load_run(f"sprint16:{path}", device="cpu")
    sampler = dict(takes="velocity", num_steps=2, solver="euler")
    guided = generate_latents(run, Guidance(3.0, weak_path="drop"), range(2), torch.tensor([0, 4]), sampler)
    assert guided.shape == (2, 4, 16, 16) and guided.isfinite().all()
    export.main([f"ckpt=sprint16:{path}", f"out={tmp_path / 'out'}"])
    back = load_run(tmp_path / "out", device="cpu").model
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), run.model.state_dict().values()))
    with pytest.raises(UserError, match="needed: safetensors"):
        export.main([f"ckpt=sprint16:{path}", f"out={tmp_path / 'out.pt'}", "format=sit"])
    given = {key: "null" if value is None else value for key, value in run.settings.model.items() if key != "_target_"}
    keys = [f"++model.{key}={value}" for key, value in given.items()]
    keys += ["data.channels=4", "data.input_size=16", "model.selection_ratio=0"]
    second = build_network(made_settings(["model=sprint", "objective=rf", *keys]))
    start_from(f"sprint16:{path}", second, run.objective, run.settings.data)
    assert all(torch.equal(a, b) for a, b in zip(second.state_dict().values(), run.model.state_dict().values()))
    assert block_tokens(second.routes, Routing(), 7, 64) == [64] * 7


def test_a_config_builds_it():
    for model in ("sprint", "lightningdit_sprint"):
        net = build_network(made_settings([f"model={model}"]))
        assert type(net) is Sprint and net.num_tokens == 196
        assert block_tokens(net.routes, Routing(), 12, 196) == [196] * 2 + [49] * 8 + [196] * 2

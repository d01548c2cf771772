"""MaskDiT: network and loss against a few independent lines, the official files, what training them means."""

import argparse
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import export
from checkpoints.generate import generate_latents
from checkpoints.load import build_network, load_run
from contracts import pixel_mean
from ddpm import DDPM
from edm import EDM
from guidance import Guidance
from maskdit import MaskDiT
from randomness import seeded_generator
from rf import RectifiedFlow
from routing_blocks import block_tokens
from routing_module import Routing, draw_keep_ids
from system import UserError, cli
from tests.conftest import loss_of
from tests.made_runs import made_settings
from training.prepare import start_from

SMALL = dict(input_size=16, patch_size=2, in_channels=4, hidden_size=32, depth=3, num_heads=2, num_classes=3)
DECODER = dict(decoder_hidden_size=16, decoder_depth=2, decoder_num_heads=4)


def small(**changes):
    torch.manual_seed(0)
    net = MaskDiT(**(SMALL | DECODER | changes))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net.eval()


def batch(n=4):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, 16, 16, generator=g), torch.rand(n, generator=g), torch.randint(4, (n,), generator=g)


def sincos(width, side):
    """Positions (side^2, width): sines and cosines of the column, then of the row."""
    rates = 10000.0 ** (-torch.arange(width // 4).double() * 4 / width)
    rows = [
        [part for p in (column, row) for part in (torch.sin(p * rates), torch.cos(p * rates))]
        for row in range(side)
        for column in range(side)
    ]
    return torch.stack([torch.cat(parts) for parts in rows]).float()


def reference(state, x, t, y, heads, decoder_heads, keep_ids=None):
    """One sample, on the official tensors: x (C, h, w), t () the network's time, y () -> (C, h, w)."""

    def linear(name, value):
        return value @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(value):
        return F.layer_norm(value, value.shape[-1:], eps=1e-6)

    def block(name, value, heads):
        width = value.shape[1]
        s = linear(f"{name}.adaLN_modulation.1", F.silu(c)).split(width)
        q, k, v = linear(f"{name}.attn.qkv", norm(value) * (1 + s[1]) + s[0]).view(len(value), 3, heads, -1).unbind(1)
        weights = torch.einsum("ihd,jhd->hij", q, k).div((width // heads) ** 0.5).softmax(-1)
        value = value + s[2] * linear(f"{name}.attn.proj", torch.einsum("hij,jhd->ihd", weights, v).flatten(1))
        inner = F.gelu(linear(f"{name}.mlp.fc1", norm(value) * (1 + s[4]) + s[3]), approximate="tanh")
        return value + s[5] * linear(f"{name}.mlp.fc2", inner)

    def number(prefix):
        return len({key.split(".")[1] for key in state if key.startswith(prefix)})

    kernel = state["x_embedder.proj.weight"]
    width, patch, side = len(kernel), kernel.shape[-1], x.shape[-1] // kernel.shape[-1]
    frequencies = torch.exp(-torch.arange(128) / 128 * torch.log(torch.tensor(10000.0)))
    c = torch.cat([(t * frequencies).cos(), (t * frequencies).sin()])
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", c)))
    label = state["y_embedder.embedding_table.weight"]
    c = c + label @ F.one_hot(y, label.shape[1] + 1)[:-1].float()  # no label: no one
    tokens = torch.stack([
        (kernel * x[:, i * patch : i * patch + patch, j * patch : j * patch + patch]).sum((1, 2, 3))
        for i in range(side) for j in range(side)
    ]) + state["x_embedder.proj.bias"] + sincos(width, side)  # fmt: skip
    ids = torch.arange(side**2) if keep_ids is None else keep_ids
    kept = tokens[ids]
    for i in range(number("blocks.")):
        kept = block(f"blocks.{i}", kept, heads)
    shift, scale = linear("decoder_layer.adaLN_modulation.1", F.silu(c)).split(width)
    kept = linear("decoder_layer.linear", norm(kept) * (1 + scale) + shift)
    full = state["mask_token"][0].repeat(side**2, 1)
    full[ids] = kept
    full = full + sincos(full.shape[1], side)
    for i in range(number("decoder_blocks.")):
        full = block(f"decoder_blocks.{i}", full, decoder_heads)
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(c)).split(full.shape[1])
    patches = linear("final_layer.linear", norm(full) * (1 + scale) + shift)
    return patches.view(side, side, patch, patch, -1).permute(4, 0, 2, 1, 3).reshape(x.shape)


@pytest.mark.parametrize("masked", [False, True])
def test_the_network_is_what_the_paper_says(masked):
    net, (x, t, y) = small(), batch()
    ids = draw_keep_ids(4, 64, 0.5, generators=seeded_generator(3))
    with torch.no_grad():
        out = net(x, t, y, routing=Routing(keep_ids=ids) if masked else None)
        wanted = torch.stack([
            reference(net.state_dict(), *one, 2, 4, k) for *one, k in zip(x, t, y, ids if masked else [None] * 4)
        ])  # fmt: skip
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
        drawn = net(x, t, y, routing=Routing(generators=seeded_generator(3)))
        assert torch.equal(out, drawn) == masked
        assert torch.equal(net(x, t, y), net(x, t, y, routing=Routing(0.0)))


def per_patch(value):
    """(C, 16, 16) -> (64, C * 4), patch by patch."""
    return torch.stack([value[:, i : i + 2, j : j + 2].flatten() for i in range(0, 16, 2) for j in range(0, 16, 2)])


@pytest.mark.parametrize("objective", [EDM(), RectifiedFlow(), DDPM()], ids=["edm", "rf", "ddpm"])
def test_the_loss_is_that_of_visible_patches_and_a_tenth_of_the_reconstruction(objective):
    net, (x, _, y) = small(), batch()
    found = loss_of(net, objective, x, y, seeded_generator(6))
    generator = seeded_generator(6)
    ids = draw_keep_ids(4, 64, 0.5, generators=generator)  # before all that the objective draws

    def watched(*inputs):
        return net(*inputs, routing=Routing(keep_ids=ids))

    seen = dict(zip(("error", "x_t", "denoised"), objective.errors(watched, x, y, generator)))
    for i in range(4):
        visible = torch.zeros(64, dtype=torch.bool).scatter(0, ids[i], True)
        target = per_patch(seen["x_t"][i])
        target = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True) + 1e-6) ** 0.5
        rebuilt = ((per_patch(seen["denoised"][i]) - target) ** 2).mean(1)[~visible].mean()
        expected = per_patch(seen["error"][i]).mean(1)[visible].mean() + 0.1 * rebuilt
        torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", [EDM(), RectifiedFlow(), DDPM()], ids=["edm", "rf", "ddpm"])
def test_what_an_objective_hands_to_a_reduction_is_its_own_loss(objective):
    """Where all patches count alike the two are one number; noisy input and denoised estimate are what they are."""
    x, y = torch.randn(3, 4, 16, 16), torch.zeros(3, dtype=torch.int64)
    seen = {}

    def net(x_in, t, y):
        seen["in"] = x_in
        return 0.3 * x_in

    error, x_t, denoised = objective.errors(net, x, y, seeded_generator(0))
    torch.testing.assert_close(error.flatten(1).mean(dim=1), pixel_mean(error), rtol=1e-5, atol=0)
    scale = (x_t / seen["in"]).flatten(1)
    assert ((scale - scale[:, :1]).abs() < 1e-2).all()  # the input is x_t, scaled by a number for each sample

    def perfect(x_in, t, y):
        """Predicts what makes the denoised estimate x itself."""
        if isinstance(objective, RectifiedFlow):
            return (x_in - x) / t.view(-1, 1, 1, 1)
        if isinstance(objective, DDPM):
            sigma = objective.log_sigma[t.round().long()].exp().view(-1, 1, 1, 1)
            return (x_in * (1 + sigma**2).sqrt() - x) / sigma
        sigma = (4 * t).exp().view(-1, 1, 1, 1)
        variance = sigma**2 + 0.25
        return (x - 0.25 / variance * x_in * variance.sqrt()) / (sigma * 0.5 / variance.sqrt())

    error, _, denoised = objective.errors(perfect, x, y, seeded_generator(0))
    torch.testing.assert_close(denoised, x, rtol=0, atol=2e-3)
    assert pixel_mean(error).max() < 1e-3


def test_the_loss_takes_the_mask_that_the_call_drew():
    """Other draws, other loss; the ids that `Routing` records are those that `reduce` reads."""
    net, (x, _, y) = small(), batch()
    routing = net.training_routing(4, seeded_generator(1), x.device)
    assert routing.drawn == [] and routing.keep_ids.shape == (4, 32)
    errors = EDM().errors(partial(net, routing=routing), x, y, seeded_generator(2))
    (drawn,) = routing.drawn
    assert torch.equal(drawn, routing.keep_ids)
    assert torch.equal(drawn, draw_keep_ids(4, 64, 0.5, generators=seeded_generator(1)))
    own = net.reduce(*errors, routing)
    routing.drawn[0] = draw_keep_ids(4, 64, 0.5, generators=seeded_generator(3))
    assert (net.reduce(*errors, routing) != own).all()
    assert torch.equal(net.reduce(*errors, None), pixel_mean(errors[0]))
    on_all = Routing(0.0)
    net(x, torch.rand(4), y, routing=on_all)
    assert on_all.drawn == [None] and torch.equal(net.reduce(*errors, on_all), pixel_mean(errors[0]))


def test_masked_training_reaches_every_parameter_and_unmasked_all_but_the_mask_token():
    x, _, y = batch()
    for ratio, untouched in ((0.5, []), (0.0, ["mask_token"])):
        net = small(selection_ratio=ratio)
        assert [n for n, p in net.named_parameters() if not p.requires_grad] == untouched
        loss_of(net, EDM(), x, y, seeded_generator(0)).sum().backward()
        assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == untouched


def test_nothing_masked_is_the_plain_loss():
    net, (x, _, y) = small(selection_ratio=0.0), batch()
    torch.testing.assert_close(
        loss_of(net, EDM(), x, y, seeded_generator(2)),
        pixel_mean(EDM().errors(net, x, y, seeded_generator(2))[0]),
        rtol=0,
        atol=0,
    )


def test_it_starts_as_the_official_one():
    torch.manual_seed(0)
    net = MaskDiT(**SMALL, **DECODER)
    assert not net(*batch()).any()
    zero = {n for n, p in net.named_parameters() if not p.any() and not n.endswith("bias")}
    layers = ("decoder_layer", "final_layer")
    blocks = ("blocks.0", "blocks.1", "blocks.2", "decoder_blocks.0", "decoder_blocks.1")
    assert zero == {
        *(f"{part}.adaLN_modulation.1.weight" for part in (*blocks, *layers)),
        *(f"{layer}.linear.weight" for layer in layers),
    }  # fmt: skip
    assert 0.01 < net.y_embedder.embedding_table.weight.std() < 0.03
    torch.testing.assert_close(net.decoder_pos_embed[0], sincos(16, 8), rtol=0, atol=1e-6)


def test_no_label_is_a_zero_embedding():
    embedder = small().y_embedder
    y = torch.tensor([0, 3, 2])
    out = embedder(y)
    assert out.shape == (3, 32) and not out[1].any()
    assert torch.equal(out[2], embedder.embedding_table.weight[:, 2])


def test_counted_cost_is_what_runs_and_what_was_published():
    with FakeTensorMode():
        net = small(hidden_size=64, depth=6, **DECODER)
        x, t, y = torch.randn(2, 4, 16, 16), torch.rand(2), torch.zeros(2, dtype=torch.int64)
        for routing in (None, Routing(), Routing(0.75)):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                net(x, t, y, routing=routing)
            assert counter.get_total_flops() / 4 == pytest.approx(net.macs(routing), rel=0.02)
    with torch.device("meta"):
        assert MaskDiT().macs(Routing()) / 1e9 == pytest.approx(65.45, rel=1e-3)  # published: 65.5


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(decoder_num_heads=3), "must be divisible by decoder_num_heads"),
        (dict(selection="structured", input_size=14), "this grid of 49 tokens"),
        (dict(selection_ratio=1.0), "in \\[0, 1\\)"),
        (dict(patch_size=1, in_channels=1, input_size=8), "needed: mae_weight=0"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


@pytest.mark.parametrize(
    "override", ["model.routes=[]", "+model.routes=[{selection_ratio:0.5,start_layer_idx:2,end_layer_idx:-2}]"]
)
def test_routes_are_refused_in_one_line(override, capsys):
    import cost

    with pytest.raises(SystemExit) as end, cli.user_errors():
        cost.main(["model=maskdit", override])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and "model.routes" in error


# Official files: {model, ema, args}, the network under `model.`, as its train.py writes them.


@pytest.fixture
def official(tmp_path):
    torch.manual_seed(0)
    net = small(
        input_size=8,
        hidden_size=384,
        num_heads=6,
        depth=2,
        decoder_hidden_size=512,
        decoder_depth=8,
        decoder_num_heads=16,
    )
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    state = {f"model.{key}": value for key, value in net.state_dict().items()}
    args = argparse.Namespace(config="configs/train/imagenet256-latent.yaml", ckpt_path=None, num_steps=40)
    other = {key: value + 1 for key, value in state.items()}
    path = tmp_path / "0100000.pt"
    torch.save({"model": other, "ema": state, "opt": {"state": {}, "param_groups": []}, "args": args}, path)
    return net, path


def test_its_keys_are_the_official_ones():
    keys = {key for key in small(depth=1, decoder_depth=1).state_dict()}
    block = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]
    layers = [f"{stage}.0.{part}" for stage in ("blocks", "decoder_blocks") for part in block]
    layers += ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    layers += [
        f"{layer}.{part}" for layer in ("decoder_layer", "final_layer") for part in ("linear", "adaLN_modulation.1")
    ]
    single = {"pos_embed", "decoder_pos_embed", "mask_token", "y_embedder.embedding_table.weight"}
    assert keys == single | {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}


def test_an_official_file_computes_what_it_did(official):
    net, path = official
    run = load_run(path, device="cpu")
    assert type(run.model) is MaskDiT and type(run.objective) is EDM and run.objective.P_mean == -1.2
    assert run.model.num_classes == 3 and run.model.routes[0].selection_ratio == 0.5 and run.model.mae_weight == 0.1
    assert all(torch.equal(a, b) for a, b in zip(run.model.state_dict().values(), net.state_dict().values()))
    x, y, sigma = torch.randn(2, 4, 8, 8), torch.tensor([2, 3]), 1.7
    with torch.no_grad():
        found = run.objective.predict(run.model, x, torch.tensor(sigma), y)
        inside = [
            reference(net.state_dict(), x_i / (0.25 + sigma**2) ** 0.5, torch.tensor(sigma).log() / 4, y_i, 6, 16)
            for x_i, y_i in zip(x, y)
        ]
    wanted = 0.25 / (0.25 + sigma**2) * x + sigma * 0.5 / (0.25 + sigma**2) ** 0.5 * torch.stack(inside)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)
    raw = load_run(path, "raw", device="cpu").model
    assert torch.equal(raw.mask_token, net.mask_token + 1)


def test_an_official_file_is_sampled_exported_and_trained_on(official, tmp_path):
    net, path = official
    run = load_run(path, device="cpu")
    sampler = dict(takes="denoised", num_steps=2)
    for guidance in (Guidance(2.0), Guidance(1.5, None, 0.2, 0.7, "same")):
        latents = generate_latents(run, guidance, range(2), torch.tensor([0, 2]), sampler)
        assert latents.shape == (2, 4, 8, 8) and latents.isfinite().all()
    export.main([f"ckpt={path}", f"out={tmp_path / 'out'}"])
    back = load_run(tmp_path / "out", device="cpu").model
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), net.state_dict().values()))
    with pytest.raises(UserError, match="needed: safetensors"):
        export.main([f"ckpt={path}", f"out={tmp_path / 'out.pt'}", "format=dit"])
    shape = ["data.input_size=8", "data.channels=4", "data.num_classes=3", "model.size=DiT-S/2", "model.depth=2"]
    tuned = build_network(made_settings(["model=maskdit", "model.selection_ratio=0", *shape]))
    start_from(str(path), tuned, run.objective, run.settings.data)
    assert all(torch.equal(a, b) for a, b in zip(tuned.state_dict().values(), net.state_dict().values()))


def test_other_official_variants_are_refused_with_their_keys(official, tmp_path):
    _, path = official
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(path, weights_only=True)["ema"]
    for change, message in (
        (lambda s: s.pop("model.mask_token"), "1 missing: mask_token"),
        (lambda s: s.update({"model.cls_token": torch.zeros(1, 1, 384)}), "1 unknown: cls_token"),
    ):
        changed = dict(state)
        change(changed)
        torch.save({"ema": changed}, tmp_path / "changed.pt")
        with pytest.raises(UserError, match=message):
            load_run(tmp_path / "changed.pt", device="cpu")


def test_a_config_builds_it():
    net = build_network(made_settings(["model=maskdit"]))
    assert type(net) is MaskDiT and len(net.decoder_blocks) == 4
    assert block_tokens(net.routes, Routing(), 12, net.num_tokens) == [25] * 12
    published = build_network(made_settings(["model=maskdit", "model.size=DiT-S/2"]))
    assert len(published.decoder_blocks) == 8 and published.mask_token.shape[-1] == 512
    assert published.decoder_blocks[0].attn.num_heads == 16

"""Terms of the loss (LayerSync, REPA), the middle head and internal guidance: each against a few lines of its own."""

import json
import sys
from contextlib import nullcontext
from functools import partial, partialmethod
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import alignment
from checkpoints.generate import count_calls, generate_latents
from checkpoints.load import Run
from checkpoints.run_folder import latest_checkpoint, read_tensors
from contracts import MIDDLE, Loss
from data import BatchPlan, make_loader, open_latents
from data.encoding import LatentEncoding
from data.index import load_index
from data.shards import finalize, read_manifest, shard_name, write_manifest, write_shard
from ddpm import DDPM
from dit import DiT
from edm import EDM
from evaluation import features
from guidance import Guidance, check_networks
from lightningdit import LightningDiT
from maskdit import MaskDiT
from randomness import BatchSlice, seeded_generator
from rf import RectifiedFlow
from routing_module import Routing, draw_keep_ids
from scripts.add_features import TEACHERS, load_teacher
from sprint import Sprint
from system import UserError
from system.compiling import compile_blocks
from tests import started
from tests.conftest import assert_same_run, numbers
from tests.made_runs import made_settings

SHAPE = dict(input_size=(8, 12), patch_size=2, in_channels=4, hidden_size=32, depth=6, num_heads=2, num_classes=3)
N, WIDTH = 24, 5  # tokens, and channels of the teacher's features
ROUTE = [dict(selection_ratio=0.5, start_layer_idx=1, end_layer_idx=3)]
NETWORKS = {
    "dit": partial(DiT, **SHAPE, learn_sigma=False, routes=ROUTE),
    "lightningdit": partial(LightningDiT, **SHAPE, routes=ROUTE),
    "sprint": partial(Sprint, **SHAPE, selection_ratio=0.5, path_drop=0.0),
}
OBJECTIVES = {"edm": EDM, "rf": RectifiedFlow, "ddpm": DDPM}


def made(name="dit", **more):
    torch.manual_seed(0)
    net = NETWORKS[name](**more)
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    return net


def batch():
    g = torch.Generator().manual_seed(1)
    x, features = torch.randn(3, 4, 8, 12, generator=g), torch.randn(3, N, WIDTH, generator=g).half()
    return x, torch.tensor([0, 3, 2]), features


def routings():
    """Dense, and with given ids."""
    return None, Routing(keep_ids=draw_keep_ids(3, N, 0.5, generators=seeded_generator(5)))


def rows(key=0):
    return BatchSlice(seeded_generator("rows", key), 0, 3)


def gathered(tokens, ids):
    return tokens if ids is None else torch.stack([row[kept] for row, kept in zip(tokens, ids)])


def test_the_terms_are_negative_mean_cosines_and_the_target_is_constant():
    h, target = (torch.randn(3, 7, 8, generator=seeded_generator(i)).requires_grad_() for i in (0, 1))
    term = alignment.layersync(h, target)
    torch.testing.assert_close(term, -F.cosine_similarity(h, target, dim=-1).mean(1), atol=1e-6, rtol=0)
    term.sum().backward()
    assert h.grad.abs().sum() > 0 and target.grad is None
    assert alignment.layersync(h, 3 * h).tolist() == pytest.approx([-1] * 3)
    projector = nn.Linear(8, WIDTH)
    given = torch.randn(3, 7, WIDTH, generator=seeded_generator(2))
    expected = -F.cosine_similarity(projector(h), given, dim=-1).mean(1)
    torch.testing.assert_close(alignment.repa(h, given, projector), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("block, target", [(2, 3), (0, 2), (2, 5), (0, 5)])
def test_layersync_is_on_the_tokens_that_both_blocks_have(name, block, target):
    net, (x, y, _) = made(name), batch()
    loss = Loss(alignment.Aligned(net, 0.2, block, target), net, EDM())
    for routing in routings():
        plain = Loss(net, net, EDM())(x, y, rows(), routing)
        seen = {}
        spied = lambda *given, **how: seen.update(zip(("x", "t", "y"), given)) or net(*given, **how)
        Loss(spied, net, EDM())(x, y, rows(), routing)
        _, states = net(*seen.values(), routing=routing, hidden=[block, target])
        (h, kept), (deeper, others) = states[block], states[target]
        h, deeper = gathered(h, others if kept is None else None), gathered(deeper, kept if others is None else None)
        assert h.shape == deeper.shape and (
            routing is None or (h.shape[1] < N) == (kept is not None or others is not None)
        )
        expected = plain - 0.2 * F.cosine_similarity(h, deeper, dim=-1).mean(1)
        torch.testing.assert_close(loss(x, y, rows(), routing), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("block", [0, 2])
def test_repa_is_on_the_features_of_the_kept_tokens(name, block):
    net, (x, y, given) = made(name), batch()
    aligned = alignment.Aligned(net, 0.5, block, None, WIDTH, 16)
    assert [tuple(p.shape) for p in aligned.projector.parameters()] == [(16, 32), (16,), (16, 16), (16,), (5, 16), (5,)]
    for routing in routings():
        seen = {}
        spied = lambda *given, **how: seen.update(zip(("x", "t", "y"), given)) or net(*given, **how)
        plain = Loss(spied, net, EDM())(x, y, rows(), routing)
        h, kept = net(*seen.values(), routing=routing, hidden=[block])[1][block]
        first, second, last = (layer for layer in aligned.projector if isinstance(layer, nn.Linear))
        projected = last(F.silu(second(F.silu(first(h)))))
        term = F.cosine_similarity(projected, gathered(given, kept).float(), dim=-1).mean(1)
        assert (kept is not None) == (routing is not None and block == 2)
        found = Loss(aligned, net, EDM())(x, y, rows(), routing, given)
        torch.testing.assert_close(found, plain - 0.5 * term, atol=1e-6, rtol=1e-6)
        found.sum().backward()
        assert all(p.grad is not None for p in aligned.projector.parameters())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_middle_heads_error_is_of_the_same_noise_on_the_tokens_it_has_seen(name, objective):
    objective, (x, y, _) = OBJECTIVES[objective](), batch()
    net = made(name, middle_head=2)
    for routing in routings():
        plain = Loss(net, net, objective, 0)(x, y, rows(), routing)

        def middle(x_t, t, y):
            _, c, *_ = net.embed(x_t, t, y)
            tokens, kept = net(x_t, t, y, routing=routing, hidden=[2])[1][2]
            patches = net.middle_layer(tokens, c)
            everywhere = torch.zeros(3, N, 16)
            for row in range(3):
                everywhere[row, slice(None) if kept is None else kept[row]] = patches[row]
            grid = everywhere.view(3, 4, 6, 2, 2, 4)
            return grid.permute(0, 5, 1, 3, 2, 4).reshape(3, 4, 8, 12)

        error = objective.errors(middle, x, y, rows())[0]  # (B, C, h, w)
        patches = error.view(3, 4, 4, 2, 6, 2).permute(0, 2, 4, 1, 3, 5).reshape(3, N, 16)
        expected = plain + 0.5 * gathered(patches, None if routing is None else routing.keep_ids).flatten(1).mean(1)
        found = Loss(net, net, objective, 0.5)(x, y, rows(), routing)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        found.sum().backward()
        assert all(p.grad is not None for p in net.middle_layer.parameters())


@pytest.mark.parametrize("predict", ["velocity", "x"])
def test_the_velocitys_angle_is_a_term_of_the_output_alone(predict):
    net, (x, y, _) = made(middle_head=2), batch()
    turned, plain = (RectifiedFlow(cosine=weight, predict=predict) for weight in (1.0, 0.0))
    for routing in routings():
        term, expected = (
            Loss(net, net, turned, weight)(x, y, rows(), routing) - Loss(net, net, plain, weight)(x, y, rows(), routing)
            for weight in (0.5, 0)
        )
        torch.testing.assert_close(term, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)
        assert expected.min() > 0.1
    assert turned.cosine == 1


@pytest.mark.parametrize("leave", [None, 1, 2, 3])
def test_a_middle_head_guides_routed_sampling_where_it_sees_all_tokens(leave):
    for middle in range(6):
        net = made(routes=[ROUTE[0] | dict(leave_layer_idx=leave)], middle_head=middle)
        x, y, _ = batch()
        seen = net(x, torch.ones(3), y, routing=routings()[1], hidden=[MIDDLE])[1][MIDDLE][1]
        for ratios in ({}, dict(gamma_strong=0.5, gamma_weak=0.75)):
            guidance = Guidance(1.5, weak_label="none", internal_scale=1.4, **ratios)
            refused = pytest.raises(UserError, match="lies inside a route; needed: gamma_strong=0")
            with refused if ratios and seen is not None else nullcontext():
                check_networks(guidance, net, net)


def test_weight_zero_is_the_plain_loss_bit_for_bit():
    net, (x, y, _) = made(middle_head=2), batch()
    for routing in routings():
        plain = net.reduce(*EDM().errors(partial(net, routing=routing), x, y, rows()), routing)
        assert torch.equal(Loss(net, net, EDM(), 0)(x, y, rows(), routing), plain)
        assert torch.equal(Loss(alignment.Aligned(net, 0.0, 2, 3), net, EDM(), 0)(x, y, rows(), routing), plain)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_middle_head_begins_at_zero_and_leaves_the_other_weights_as_they_are(name):
    nets = []
    for middle in (None, 2):
        torch.manual_seed(0)
        nets.append(NETWORKS[name](middle_head=middle))
    without, net = nets
    own = net.state_dict()
    head = {key: own.pop(key) for key in list(own) if key.startswith("middle_layer.")}
    assert own.keys() == without.state_dict().keys()
    assert all(torch.equal(value, without.state_dict()[key]) for key, value in own.items())
    kinds = [type(module) for module in net.final_layer.modules()]
    assert kinds == [type(module) for module in net.middle_layer.modules()]
    assert all((value == 0).all() for key, value in head.items() if "norm" not in key)
    x, y, _ = batch()
    asked = net(x, torch.ones(3), y, hidden=[MIDDLE])[1][MIDDLE]
    assert asked[0].shape == net(x, torch.ones(3), y).shape and asked[1] is None
    linear = 32 * 16
    assert net.macs() - without.macs() == N * linear + 2 * 32**2
    assert net.macs(Routing()) - without.macs(Routing()) == N // 2 * linear + 2 * 32**2


def test_compiled_and_recomputed_blocks_keep_one_graph(monkeypatch):
    torch.compiler.reset()
    eager = partialmethod(nn.Module.compile, backend="eager")  # graphs are counted, none is built
    monkeypatch.setattr(nn.Module, "compile", eager)
    losses = {}
    for checkpointed in (False, True):
        torch.compiler.reset()
        net, (x, y, given) = made(middle_head=2), batch()
        loss = Loss(alignment.Aligned(net, 0.5, 2, None, WIDTH, 16), net, EDM())
        losses[checkpointed, "eager"] = loss(x, y, rows(), routings()[1], given)
        for block in net.all_blocks:
            block.recompute = checkpointed
        compile_blocks(net.all_blocks, "blocks")
        counters.clear()
        for _ in range(2):
            losses[checkpointed, "compiled"] = loss(x, y, rows(), routings()[1], given)
            losses[checkpointed, "compiled"].sum().backward()
        # Blocks on all and on the kept tokens; the head on all, and the middle head on the kept.
        assert counters["stats"]["unique_graphs"] == 4 and not counters["graph_break"]
    first = losses.pop((False, "eager"))
    assert all(torch.allclose(first, other, atol=1e-5) for other in losses.values())
    torch.compiler.reset()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_internal_guidance_is_the_rule_on_each_branch_without_another_call(objective):
    objective, cpu = OBJECTIVES[objective](), torch.device("cpu")
    net = made(middle_head=2).eval().requires_grad_(False)
    settings = SimpleNamespace(sampler={"num_steps": 3}, train=SimpleNamespace(label_dropout=0.1))
    run, x, t, y = Run(net, objective, None, settings, cpu), batch()[0], torch.tensor(0.5), torch.tensor([0, 1, 2])
    strong, weak = (
        objective.predict(lambda *given: net(*given, hidden=[MIDDLE])[1][MIDDLE][0], x, t, label)
        + 1.4
        * (net_prediction - objective.predict(lambda *given: net(*given, hidden=[MIDDLE])[1][MIDDLE][0], x, t, label))
        for label in (y, torch.full((3,), 3))
        for net_prediction in [objective.predict(net, x, t, label)]
    )
    torch.testing.assert_close(run.predict(x, t, y, None, 1.4), strong, atol=1e-5, rtol=1e-5)
    seen = []
    run.objective = SimpleNamespace(predicts=objective.predicts, predict=objective.predict, sample=None)

    def one_step(predict, noise, **_):
        seen.append(predict(x, t))
        return noise

    run.objective.sample = one_step
    for scale, expected in ((1.0, strong), (1.5, weak + 1.5 * (strong - weak))):
        generate_latents(run, Guidance(scale, internal_scale=1.4), range(3), y, {})
        torch.testing.assert_close(seen.pop(), expected, atol=1e-5, rtol=1e-5)
    run.objective = objective
    for plain, internal in (
        (Guidance(), Guidance(internal_scale=1.4)),
        (Guidance(2.0), Guidance(2.0, internal_scale=1.4)),
    ):
        assert count_calls(run, plain) == count_calls(run, internal)


def test_what_has_no_term_is_named_in_one_line():
    net, two = made(), [dict(selection_ratio=0.5, start_layer_idx=i, end_layer_idx=i + 1) for i in (1, 3)]
    refused = [
        ("alignment of block 6, which the network does not have", partial(alignment.Aligned, net, 0.2, 2, 6)),
        ("alignment of blocks in two routes", partial(alignment.Aligned, made(routes=two), 0.2, 2, 3)),
        ("middle_head=6; needed: the number of a block, from 0 to 5", partial(made, middle_head=6)),
    ]
    decoder = dict(decoder_hidden_size=16, decoder_depth=2, decoder_num_heads=2)
    masked = MaskDiT(**SHAPE, **decoder, selection_ratio=0.5)
    refused.append(("widths differ: 32, 16", partial(alignment.Aligned, masked, 0.2, 2, 7)))
    for words, call in refused:
        with pytest.raises(ValueError, match=words) as refusal:
            call()
        assert "\n" not in str(refusal.value)
    alignment.Aligned(masked, 0.5, 2, None, WIDTH, 16)  # in the encoder, the kept tokens' features are gathered


@pytest.mark.parametrize(
    "keys, words",
    [
        (["alignment=layersync", "alignment.target=3"], "block=3, target=3; needed: a target after the block"),
        (["alignment=repa", "alignment.teacher=null"], "teacher=null; needed: text"),
        (["alignment.name=layersync"], "without a weight; needed: alignment=layersync"),
        (["alignment.name=repa"], "without a weight; needed: alignment=repa"),
        (["train.middle_weight=0"], "train.middle_weight=0; needed: a number of above 0|above 0"),
    ],
)
def test_settings_that_fit_nothing_are_refused(keys, words):
    with pytest.raises(UserError, match=words):
        made_settings(keys)


# Features beside the latents


@pytest.fixture(scope="module")
def aligned_set(tmp_path_factory):
    """50 latents (1, 8, 8) of 3 classes with features (16, 5), whose first number says which sample it is."""
    folder, rng = tmp_path_factory.mktemp("aligned") / "set", np.random.default_rng(0)
    folder.mkdir()
    for shard, count in enumerate((30, 20)):
        numbers = range(30 * shard, 30 * shard + count)
        rows = rng.normal(0, 1, (count, 16, 5)).astype(np.float16)
        rows[:, 0, 0] = numbers
        arrays = rng.normal(0, 0.5, (count, 1, 8, 8)).astype(np.float32)
        arrays[:, 0, 0, 0] = rows[:, 0, 0] / 100
        samples = zip((f"{i:04d}" for i in numbers), arrays, (i % 3 for i in numbers), rows)
        write_shard(folder / shard_name("train", shard), samples)
    write_manifest(folder, finalize(folder, LatentEncoding("sample_scaled"), num_classes=3) | {"teacher": "made"})
    return folder


def test_features_come_with_their_latents_where_they_are_asked_for(aligned_set):
    assert read_manifest(aligned_set)["feature_shape"] == [16, 5]
    plain, latents = open_latents(aligned_set), open_latents(aligned_set, features=True)
    assert plain.feature_shape is None and latents.feature_shape == (16, 5)
    assert plain.fingerprint != latents.fingerprint and len(plain.read([3, 41])) == 2
    for workers in (0, 1):
        batches = make_loader(latents, BatchPlan(10, 5, 2, 0, 1), num_steps=3, num_workers=workers)
        for raw, labels, rows in batches:
            assert rows.shape == (5, 16, 5) and rows.dtype == torch.float16
            assert torch.equal(rows[:, 0, 0].long(), (100 * raw[:, 0, 0, 0]).round().long())
            assert torch.equal(rows[:, 0, 0].long() % 3, labels)
    assert all(len(made) == 2 for made in make_loader(plain, BatchPlan(10, 10, 1, 0, 1), num_steps=2))


def test_damaged_and_missing_features_are_named(aligned_set, few_latents, tmp_path):
    latents = open_latents(aligned_set, features=True)
    entry = latents._index.entries[2]
    for path in aligned_set.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / shard_name("train", 0)
    contents = bytearray(shard.read_bytes())
    contents[entry["feature_offset"] + entry["feature_header"] + 7] ^= 1
    moved = open_latents(tmp_path, features=True)
    shard.write_bytes(contents)
    with pytest.raises(UserError, match="sample '0002'.*has changed since"):
        moved.read([2])
    with pytest.raises(UserError, match="holds no features of a teacher"):
        open_latents(few_latents, features=True)
    write_shard(tmp_path / "other.tar", [("a", np.zeros((1, 8, 8), np.float32), 0)])
    index = load_index(tmp_path, "x", ["other.tar"], read_manifest(aligned_set) | {"shards": []})
    assert "has no .features.npy" in index.faults[0]


@pytest.fixture
def repa(aligned_set):
    """Overrides of a run with REPA on that set."""
    keys = ["block=2", "teacher=made", "teacher_width=5", "projector_width=8"]
    return [f"data.path={aligned_set}", "alignment=repa", *(f"alignment.{key}" for key in keys)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_with_a_projector_resumes_to_the_bit_and_keeps_it_out_of_the_ema(run, repa, optimizer):
    keys = [*repa, f"optimizer={optimizer}", "model.middle_head=1", "train.max_steps=6"]
    whole, parts = run("whole", *keys)[1], run("parts", *keys, stop_after=3)[1]
    run("parts", *keys)
    assert_same_run(whole, parts)
    first, second = (latest_checkpoint(folder) for folder in (whole, parts))
    assert (first / "projector.safetensors").read_bytes() == (second / "projector.safetensors").read_bytes()
    model, ema, state = (read_tensors(first / f"{name}.safetensors") for name in ("model", "ema", "optimizer"))
    assert model.keys() == ema.keys() and any(key.startswith("middle_layer.") for key in ema)
    projector = {key.rpartition("/")[2] for key in state if key.startswith("projector.")}
    assert projector == {"exp_avg", "exp_avg_sq", "step"} and not any("projector" in key for key in ema)


def test_alignment_of_weight_zero_trains_todays_numbers(run, repa):
    data = repa[:1]
    folders = [run(name, *keys)[1] for name, keys in (("plain", data), ("repa", [*repa, "alignment.weight=0"]))]
    assert_same_run(*folders)


def test_a_run_without_a_projector_is_not_resumed_with_one(run, repa):
    run("late", *repa[:1], stop_after=1)
    with pytest.raises(UserError, match="has no projector.safetensors; needed: a run that has had it from its first"):
        run("late", *repa, "resume_allow=[alignment,data,validation]")


def test_two_processes_align_as_one(tiny_overrides, repa, tmp_path):
    keys = [*tiny_overrides, *repa, "model.middle_head=2", f"results_dir={tmp_path}", "train.check_replicas_every=1"]
    for processes in (1, 2):
        job = started.run([sys.executable, "train.py", *keys, f"run_name=of{processes}"], processes=processes)
        assert job.returncode == 0, job.stderr
    one, two = (tmp_path / name for name in ("of1", "of2"))
    for a, b in zip(numbers(two), numbers(one), strict=True):
        assert a == pytest.approx(b, rel=1e-3), a["step"]
    assert numbers(two)[0] == pytest.approx(numbers(one)[0], rel=1e-6)
    found, wanted = (read_tensors(latest_checkpoint(folder) / "projector.safetensors") for folder in (two, one))
    assert all(torch.allclose(found[name], wanted[name], atol=1e-4) for name in wanted)


@pytest.mark.parametrize("key, words", [
    ("alignment.teacher=mnist", "has features of made"), ("alignment.teacher_width=64", "16 tokens of 5 channels"),
    ("model.size=DiT-XS/4", "the network's 4 tokens"), ("alignment.block=9", "alignment of block 9"),
])  # fmt: skip
def test_features_of_another_teacher_or_grid_are_refused_before_anything_is_written(run, repa, tmp_path, key, words):
    with pytest.raises(UserError, match=words) as refusal:
        run("refused", *repa, key)
    assert "\n" not in str(refusal.value) and not (tmp_path / "refused").exists()


@pytest.mark.parametrize("program, key", [
    (["train.py", "model=maskdit"], "model.middle_head=2"), (["sample.py"], "guidance=internal"),
])  # fmt: skip
def test_a_network_without_a_middle_head_ends_a_command_in_one_line(program, key):
    job = started.run([sys.executable, *program, key])
    (line,) = [line for line in job.stderr.splitlines() if line.startswith("error: ")]
    assert job.returncode == 2 and "middle_head" in line


# Teachers


def test_the_digits_teacher_is_a_second_network_and_its_tokens_are_a_map(digits):
    assert not TEACHERS["mnist"].samefile(features.CLASSIFIERS["mnist"])
    images = features.real_images("mnist", "val", digits)[0][:6]
    tokens = load_teacher("mnist")(images)
    assert tokens.shape == (6, 196, 64) and (tokens >= 0).all() and not tokens.requires_grad
    other = features.load_extractor("mnist").net.tokens(images)
    assert F.cosine_similarity(tokens.mean((0, 1)), other.mean((0, 1)), dim=0) < 0.99
    with pytest.raises(UserError, match="needed: python scripts/train_classifier.py data=fashion teacher=true"):
        load_teacher("fashion")


class Vit(nn.Module):
    """As timm's: a class token, then patch tokens, here the mean colours of patches of 14."""

    pretrained_cfg, num_prefix_tokens = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1)}, 1
    patch_embed = SimpleNamespace(patch_size=(14, 14))

    def forward_features(self, x):
        patches = F.avg_pool2d(x, 14).flatten(2).transpose(1, 2)
        return torch.cat([torch.full_like(patches[:, :1], 9), patches], dim=1)


def test_a_vits_tokens_are_of_sixteen_pixels_each_without_its_class_token(monkeypatch):
    def create_model(name, **how):
        if name != "vit":
            raise RuntimeError(f"Unknown model ({name})")
        return Vit()

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    images = torch.zeros(2, 3, 64, 32, dtype=torch.uint8)
    images[:, :, 16:32, 16:] = 255
    tokens = load_teacher("vit")(images)
    assert tokens.shape == (2, 8, 3)
    mean, std = torch.tensor(Vit.pretrained_cfg["mean"]), torch.tensor(Vit.pretrained_cfg["std"])
    torch.testing.assert_close(tokens[0, 0], -mean / std, atol=0.2, rtol=0)
    torch.testing.assert_close(tokens[0, 3], (1 - mean) / std, atol=0.7, rtol=0)
    with pytest.raises(UserError, match="features=resnet: Unknown model .*; needed: a ViT of timm"):
        load_teacher("resnet")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="needs the package timm"):
        load_teacher("vit")


def test_features_are_added_to_latents_that_are_there(digits, tmp_path):
    few, out = tmp_path / "few", tmp_path / "features"
    few.mkdir()
    images, labels = open_latents(digits, split="val").read(range(60))
    for split, chosen in (("train", range(55)), ("val", range(55, 60))):
        write_shard(few / shard_name(split, 0), ((f"{i:02d}", images[i].numpy(), int(labels[i])) for i in chosen))
    finalize(few, LatentEncoding("sample_scaled"), codec={"_target_": "autoencoder.PixelCodec"}, num_classes=10)
    command = [sys.executable, "scripts/add_features.py", f"data.path={few}", "data.prepare=null", f"out={out}"]
    job = started.run(command)
    assert job.returncode == 0, job.stderr
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["teacher"], meta["feature_shape"], meta["counts"]) == ("mnist", [196, 64], {"train": 55, "val": 5})
    raw, given, rows = open_latents(out, features=True).read(range(55))
    assert torch.equal(raw, images[:55]) and torch.equal(given, labels[:55])
    teacher, pictures = load_teacher("mnist"), features.real_images("mnist", "val", digits)[0]
    torch.testing.assert_close(rows.float(), teacher(pictures[:55]), atol=1e-2, rtol=1e-2)
    refused = started.run([*command[:-1], f"out={few}"])
    assert refused.returncode == 2 and "holds other shards" in refused.stderr

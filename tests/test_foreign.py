"""Files of other projects come up as what they are; our own go out and back; what is not right is refused unread."""

import argparse
import inspect
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import export
import fid
import rf
import sample
from autoencoder import PixelCodec
from checkpoints.config import FORMAT, from_file, to_yaml
from checkpoints.generate import check_request, generate
from checkpoints.load import Run, build_network, load_run
from checkpoints.run_folder import checkpoint_tensors, latest_checkpoint, load_strictly, read_config, write_checkpoint
from conditions import Text
from contracts import pixel_mean
from ddpm import DDPM
from dit import DiT
from guidance import Guidance
from lightningdit import LightningDiT
from solvers import edm_sampler, flow_sampler
from system import UserError, cli
from tests import started
from tests.made_runs import made_settings, make_run
from training.prepare import start_from
from weights import foreign

WIDTH, DEPTH = 128, 6  # the smallest width whose number of heads is known
SMALL = dict(in_channels=1, num_classes=3, hidden_size=32, num_heads=2, learn_sigma=False)


def network(**changes):
    """A DiT of official names with random values everywhere."""
    torch.manual_seed(0)
    shape = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=WIDTH, depth=DEPTH, num_heads=4, num_classes=10)
    net = DiT(**(shape | dict(learn_sigma=True) | changes))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def net():
    return network()


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(3, 4, 8, 8), torch.tensor([0, 3, 10])


def namespace(**values):
    return argparse.Namespace(**{"image_size": 256, "config": "settings.yaml"} | values)


SIT_ARGS = namespace(model="SiT-XL/2", path_type="Linear", prediction="velocity")
REPA_ARGS = namespace(model="SiT-XL/2", path_type="linear", prediction="v", enc_type="dinov2-vit-b")


def layouts(state):
    """(file name, content, family) as each project writes it."""
    wrapped = {f"module.{key}": value for key, value in state.items()}
    compiled = {key.replace("blocks.1.", "blocks.1._orig_mod."): value for key, value in state.items()}
    inner = {f"model.{key}": value for key, value in state.items()}
    both = dict(model=wrapped, ema=state, opt={"state": {}, "param_groups": []})
    heads = {"projectors.0.0.weight": torch.zeros(2, 2), "projectors.0.0.bias": torch.zeros(2)}
    return {
        "official DiT": ("DiT-XL-2-256x256.pt", state, "dit"),
        "DiT in training": ("0400000.pt", both | dict(args=namespace(model="DiT-XL/2")), "dit"),
        "fast-DiT": ("0050000.pt", both | dict(args=namespace(model="DiT-XL/2", feature_path="features")), "dit"),
        "official SiT": ("SiT-XL-2-256x256.pt", state, "sit"),
        "SiT in training": ("0400000.pt", both | dict(args=SIT_ARGS), "sit"),
        "REPA without heads": ("0400000.pt", both | dict(args=REPA_ARGS), "repa"),
        "REPA": ("0400000.pt", dict(ema=state | heads, args=REPA_ARGS, steps=400000), "repa"),
        "TREAD": ("0400000.pt", dict(model_state_dict=inner, ema_state_dict=inner, step=400000), "tread"),
        "compiled": ("SiT-B-2.pt", {f"_orig_mod.{key}": value for key, value in compiled.items()}, "sit"),
        "safetensors": ("DiT-B-2.safetensors", state, "dit"),
        "named by hand": ("weights.pth", state, "dit"),
    }  # fmt: skip


@pytest.mark.parametrize("layout", layouts({}))
def test_each_layout_loads_strictly_as_what_it_is(net, layout, tmp_path):
    name, content, family = layouts(net.state_dict())[layout]
    (save_file if name.endswith(".safetensors") else torch.save)(content, tmp_path / name)
    prefix = "dit:" if layout == "named by hand" else ""
    run = load_run(f"{prefix}{tmp_path / name}", device="cpu")
    objective = {"dit": "DDPM", "sit": "RectifiedFlow", "repa": "RectifiedFlow", "tread": "EDM"}[family]
    assert type(run.objective).__name__ == objective and run.model.num_classes == 10
    assert bool(run.model.routes) == (family == "tread")
    turned = ("t_embedder.mlp.0", "final_layer.linear") if family == "sit" else ()
    for key, value in run.model.state_dict().items():
        assert key.startswith(turned) or torch.equal(value, net.state_dict()[key]), key
    assert run.step == (400000 if layout in ("TREAD", "REPA") else 0)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_lightningdit_files_are_flows_turned(qk_norm, tmp_path, x):
    x, y = x
    torch.manual_seed(0)
    net = LightningDiT(8, 1, 4, WIDTH, DEPTH, 4, num_classes=10, qk_norm=qk_norm).eval().requires_grad_(False)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    state = {f"module.{key}": value for key, value in net.state_dict().items()}
    angles = {"module.feat_rope.freqs_cos": torch.zeros(64, 32), "module.feat_rope.freqs_sin": torch.zeros(64, 32)}
    torch.save(dict(model=state, ema=state | angles), tmp_path / "lightningdit-xl-imagenet256-64ep.pt")
    run = load_run(tmp_path / "lightningdit-xl-imagenet256-64ep.pt", device="cpu")
    expected = -net(x, torch.full((3,), 0.7), y)
    torch.testing.assert_close(run.objective.predict(run.model, x, torch.tensor(0.3), y), expected, rtol=0, atol=1e-6)


def test_a_file_of_va_vaes_latents_does_not_come_up_with_sds_autoencoder(tmp_path, capsys):
    net = LightningDiT(4, 1, 32, WIDTH, DEPTH, 4, num_classes=10)
    torch.save(net.state_dict(), tmp_path / "lightningdit.pt")
    run = load_run(tmp_path / "lightningdit.pt", device="cpu")
    assert "lightningdit.pt has no feat_rope and does not say use_rope; taken as true\n" in capsys.readouterr().err
    assert run.settings.data.codec["path"] is None
    with pytest.raises(ValueError, match="nothing says which VAE these latents are of; needed: codec.path="):
        generate(run, Guidance(), [0])  # before the first step


def with_labels(state, rows):
    return state | {foreign.LABELS: torch.randn(rows, WIDTH)}


def lightning(**changes):
    """A file as LightningDiT's training saves it: its settings are in sections of `config`."""
    state = LightningDiT(8, 1, 4, WIDTH, DEPTH, 4, num_classes=10).state_dict()
    transport = {"path_type": "Linear", "prediction": "velocity", "loss_weight": None, "use_cosine_loss": True}
    model = {"model_type": "LightningDiT-XL/1", "use_swiglu": True, "use_rope": True, "use_rmsnorm": True}
    config = {"transport": transport, "model": model, "data": {"num_classes": 10}}
    for key, value in changes.items():
        section = "transport" if key in transport else "model"
        config[section] = config[section] | {key: value}
    return {"model": state, "ema": state, "opt": {}, "config": config}


def refused_arguments(state):
    cosine, other = (
        namespace(**vars(REPA_ARGS) | changes) for changes in ({"path_type": "cosine"}, {"prediction": "x"})
    )
    no_rope = lightning()
    del no_rope["config"]["model"]["use_rope"]
    return {
        "REPA's cosine path": (dict(ema=state, args=cosine), "path_type cosine"),
        "another spelling": (dict(ema=state, args={"path-type": "cosine", "prediction": "v"}), "path_type cosine"),
        "arguments that are none": (dict(ema=state, args=["--path-type", "cosine"]), "its args are a list; needed"),
        "LightningDiT's, beside others": (lightning(path_type="GVP") | {"args": namespace()}, "path_type gvp"),
        "infinitely many labels": (dict(ema=state, args=namespace(model="DiT-S/2", num_classes=1e999)), "classes inf"),
        "REPA's other prediction": (dict(ema=state, args=other), "prediction x"),
        "SiT without a prediction": (dict(ema=state, args=namespace(path_type="Linear")), "prediction none"),
        "SiT of scores": (dict(ema=state, args=namespace(path_type="Linear", prediction="score")), "prediction score"),
        "LightningDiT's GVP": (lightning(path_type="GVP"), "path_type gvp"),
        "LightningDiT of noise": (lightning(prediction="noise"), "prediction noise"),
        "LightningDiT of both": (lightning(path_type="VP", prediction="noise"), "path_type vp, prediction noise"),
        "LightningDiT without rotary positions": (lightning(use_rope=False), "use_rope false"),
        "LightningDiT's default, without rotary positions": (no_rope, "use_rope false"),
        "a DiT with rotary positions": (state | {"feat_rope.freqs_cos": torch.zeros(4)}, "unknown: feat_rope.freqs"),
        "rows of labels": (
            dict(ema=with_labels(state, 11), args=namespace(model="DiT-S/2", num_classes=11, class_dropout_prob=0.1)),
            "11 rows of labels, and says class_dropout_prob 0.1, num_classes 11",
        ),
        "no label at all": (
            dict(ema=with_labels(state, 1), args=namespace(model="DiT-S/2", cfg_prob=0.1)),
            "1 rows of labels, and says class_dropout_prob 0.1",
        ),
        "a share that is none": (
            dict(ema=state, args=namespace(model="DiT-S/2", class_dropout_prob="some")), "class_dropout_prob some",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("case", refused_arguments(network().state_dict()))
@pytest.mark.parametrize("prefix", ["", "repa:", "sit:"])
def test_arguments_decide_whatever_the_prefix(net, case, prefix, tmp_path):
    content, message = refused_arguments(net.state_dict())[case]
    torch.save(content, tmp_path / "DiT-S-2.pt")
    with pytest.raises(UserError, match=message) as refusal:
        load_run(f"{prefix}{tmp_path / 'DiT-S-2.pt'}", device="cpu")
    assert "DiT-S-2.pt" in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_velocity_is_not_opened_as_something_else(net, tmp_path):
    torch.save(dict(ema=net.state_dict(), args=SIT_ARGS), tmp_path / "a.pt")
    with pytest.raises(UserError, match="says path_type Linear .* of a velocity; needed: .*, not dit:"):
        load_run(f"dit:{tmp_path / 'a.pt'}", device="cpu")


def test_lightningdits_own_config_opens(tmp_path):
    torch.save(lightning(), tmp_path / "a.pt")
    run = load_run(tmp_path / "a.pt", device="cpu")
    assert type(run.model) is LightningDiT and type(run.objective) is rf.RectifiedFlow and not run.dropout_known


@pytest.mark.parametrize("rows, args, classes, dropout", [
    (10, dict(class_dropout_prob=0), 10, 0.0),
    (10, dict(num_classes=10), 10, 0.0),
    (10, dict(num_classes=10, cfg_prob=0.0), 10, 0.0),
    (1, {}, 1, 0.0),
    (11, dict(num_classes=10), 10, None),
    (11, dict(cfg_prob=0.1), 10, 0.1),
    (11, dict(num_classes=10, class_dropout_prob=0.2), 10, 0.2),
    (11, {}, 10, None),
    (2, {}, 1, None),
])  # fmt: skip
def test_a_table_of_labels_is_read_by_the_arguments(net, rows, args, classes, dropout, tmp_path, capsys):
    state = with_labels(net.state_dict(), rows)
    torch.save(dict(ema=state, args=namespace(model="DiT-S/2", **args)), tmp_path / "a.pt")
    run = load_run(tmp_path / "a.pt", device="cpu")
    assert run.model.num_classes == classes == len(run.pool)
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, classes - 1])
    theirs = network(num_classes=rows)  # with a row that is never asked for
    theirs.load_state_dict(state | {foreign.LABELS: torch.cat([state[foreign.LABELS], torch.ones(1, WIDTH)])})
    torch.testing.assert_close(run.model(x, t, y), theirs(x, t, y), rtol=0, atol=1e-6)
    export.main([f"ckpt={tmp_path / 'a.pt'}", f"out={tmp_path / 'out'}"])
    for opened in (run, load_run(tmp_path / "out", device="cpu")):
        assert opened.dropout_known == (dropout is not None)
        assert not opened.dropout_known or opened.settings.train.label_dropout == dropout
        capsys.readouterr()
        for _ in range(2):  # the second says nothing
            if dropout == 0:
                with pytest.raises(UserError, match="was never trained with a null label"):
                    check_request(opened, Guidance(2.0), y)
                check_request(opened, Guidance(2.0, weak_label="random"), y)
            else:
                check_request(opened, Guidance(2.0), y)
        told = capsys.readouterr().err
        assert told.count("does not say its label dropout") == told.count("\n") == (dropout is None)
        check_request(opened, Guidance(), y)
        assert not capsys.readouterr().err


def test_a_run_without_label_dropout_is_not_guided_by_the_null_label(tmp_path):
    small = ["model=dit", "model.size=DiT-XS/4", "model.depth=6", "model.hidden_size=32", "model.num_heads=2"]
    run = make_run(tmp_path / "run", [*small, "objective=rf", "train.label_dropout=0", "train.precision=fp32"])
    export.main([f"ckpt={run}", f"out={tmp_path / 'out'}"])
    for ckpt in (run, tmp_path / "out"):
        command = [sys.executable, "sample.py", f"ckpt={ckpt}", "guidance=cfg", "seeds=0", f"out={tmp_path / 'images'}"]
        done = started.run(command)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "label_dropout 0" in done.stderr
        sample.main([f"ckpt={ckpt}", "guidance=icg", "seeds=0", "steps=1", f"out={tmp_path / ckpt.name / 'icg'}"])
    trained = make_run(tmp_path / "trained", [*small, "objective=rf"])
    check_request(load_run(trained, device="cpu"), Guidance(2.0), torch.tensor([0]))
    weak = Guidance(2.0, weak_ckpt=str(run))  # the weak branch is what has no label
    with pytest.raises(UserError, match="was never trained with a null label"):
        check_request(load_run(trained, device="cpu"), weak, torch.tensor([0]))


def test_raw_and_ema_weights_are_told_apart(net, tmp_path):
    other = {key: value + 1 for key, value in net.state_dict().items()}
    torch.save(dict(model=other, ema=net.state_dict(), args=namespace(model="DiT-S/2")), tmp_path / "both.pt")
    key = "final_layer.linear.bias"
    for weights, shift in (("ema", 0), ("raw", 1)):
        run = load_run(tmp_path / "both.pt", weights, device="cpu")
        assert torch.equal(run.model.state_dict()[key], net.state_dict()[key] + shift)
    torch.save(dict(model=other), tmp_path / "dit-raw.pt")
    with pytest.raises(ValueError, match="has model, not ema"):
        load_run(tmp_path / "dit-raw.pt", device="cpu")


def test_sits_field_is_ours_with_sign_and_time_turned(net, tmp_path, x):
    """SiT: x_s = s data + (1 - s) noise, v = data - noise; so v(x, t) = -v_SiT(x, 1 - t)."""
    x, y = x
    torch.save(net.state_dict(), tmp_path / "SiT-B-2.pt")
    run = load_run(tmp_path / "SiT-B-2.pt", device="cpu")
    for t in (0.0, 0.013, 0.3, 0.5, 0.77, 1.0):
        expected = -net(x, torch.full((3,), 1 - t), y)[:, :4]
        torch.testing.assert_close(run.objective.predict(run.model, x, torch.tensor(t), y), expected, rtol=0, atol=1e-6)


def test_repas_field_is_ours(net, tmp_path, x):
    x, y = x
    torch.save(net.state_dict(), tmp_path / "repa.pt")
    run = load_run(f"repa:{tmp_path / 'repa.pt'}", device="cpu")
    t = torch.tensor([0.1, 0.5, 0.9])
    assert torch.equal(run.objective.predict(run.model, x, t, y), net(x, t, y)[:, :4])


def test_ddpm_denoises_an_exact_gaussian_at_every_noise_level():
    """Data N(mu, s^2): the best eps is known, and so is the best denoiser."""
    mu, s = 0.3, 0.7
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)

    def eps(x_k, step, y):
        a = kept[step.round().long()].view(-1, 1, 1, 1)
        return ((1 - a).sqrt() * (x_k - a.sqrt() * mu) / (a * s**2 + 1 - a)).float()

    sigma = ((1 - kept) / kept).sqrt()
    torch.manual_seed(0)
    x_t = mu + torch.randn(1000, 2, 2, 2) * (s**2 + sigma**2).sqrt().float().view(-1, 1, 1, 1)
    got = DDPM().predict(eps, x_t, sigma, torch.zeros(1000))
    s2 = sigma.view(-1, 1, 1, 1) ** 2
    expected = (s**2 * x_t.double() + s2 * mu) / (s**2 + s2)
    assert (got - expected).abs().max() < 1e-3
    assert torch.equal(DDPM().step_at(sigma.float()).round(), torch.arange(1000.0))
    between = DDPM().step_at(torch.tensor([1e-3, float((sigma[400] * sigma[401]).sqrt()), 1e3]))
    torch.testing.assert_close(between, torch.tensor([0.0, 400.5, 999.0]), rtol=0, atol=1e-2)


def test_ddpm_loss_is_the_error_of_the_noise():
    objective, x, y = DDPM(), torch.randn(4000, 1, 2, 2), torch.zeros(4000, dtype=torch.int64)
    error, _, _ = objective.errors(lambda x, t, y: torch.zeros_like(x), x, y, torch.Generator().manual_seed(0))
    loss = pixel_mean(error)
    assert loss.shape == (4000,) and loss.mean().item() == pytest.approx(1, abs=0.05)
    seen = []
    objective.errors(lambda x, t, y: seen.append((x, t)) or torch.zeros_like(x), x, y, torch.Generator().manual_seed(0))
    x_k, step = seen[0]
    assert step.min() < 2 and step.max() > 997 and (step - step.round()).abs().max() < 1e-2
    assert x_k.std().item() == pytest.approx(1, abs=0.02)  # variance is preserved: data and noise have 1


@pytest.fixture(scope="module", params=["edm", "rf"])
def trained(request, tmp_path_factory, few_latents):
    """A run folder as training leaves it, without the training."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    settings = made_settings([
        f"objective={request.param}", f"data.path={few_latents}", "data.input_size=8", "data.num_classes=3",
        "model.size=DiT-XS/2", "model.depth=6", "model.hidden_size=32", "model.num_heads=2",
    ])  # fmt: skip
    model, ema = network(**SMALL), network(**SMALL)
    for p in ema.parameters():
        p.mul_(0.9)
    tensors = checkpoint_tensors({"model": model, "ema": ema}, torch.optim.AdamW(model.parameters()))
    write_checkpoint(folder, 7, tensors, {"data": "none"}, to_yaml(settings))
    (folder / "metrics.jsonl").write_text(
        '{"step": 6, "train/loss": 0.5}\n{"step": 7, "val/loss_dense": 0.25}\n{"step": 7, "val'
    )
    (folder / "eval" / "x").mkdir(parents=True)
    scores = {"checkpoint_sha256": load_run(folder, device="cpu").sha256, "n": 100, "fd_mnist": 12.5, "seconds": 3}
    (folder / "eval" / "x" / "metrics.json").write_text(json.dumps(scores))
    return request.param, folder


@pytest.mark.parametrize("layout", ["safetensors", "dit", "sit"])
def test_exports_come_back_bit_for_bit(trained, layout, tmp_path):
    objective, folder = trained
    out = tmp_path / ("out" if layout == "safetensors" else "out.pt")
    arguments = [f"ckpt={folder}", f"out={out}", f"format={layout}"]
    if (objective, layout) == ("edm", "sit"):
        with pytest.raises(ValueError, match="needs a flow"):
            export.main(arguments)
        return
    export.main(arguments)
    ours, back = load_run(folder, device="cpu"), load_run(out, device="cpu")
    assert type(back.objective) is type(ours.objective) and back.step == 7
    assert back.model.routes == ours.model.routes
    for key, value in ours.model.state_dict().items():
        assert torch.equal(back.model.state_dict()[key], value), key
    with pytest.raises(ValueError, match="exists already"):
        export.main(arguments)


@pytest.mark.parametrize("trained", ["rf"], indirect=True)
def test_sit_export_is_sits_flow(trained, tmp_path):
    _, folder = trained
    export.main([f"ckpt={folder}", f"out={tmp_path / 'sit.pt'}", "format=sit"])
    theirs = network(**SMALL)
    theirs.load_state_dict(torch.load(tmp_path / "sit.pt", weights_only=True)["ema"])  # as SiT's sample.py does
    ours = load_run(folder, device="cpu").model
    x, y = torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 3])
    theirs, ours = theirs(x, torch.full((3,), 0.8), y), ours(x, torch.full((3,), 0.2), y)
    torch.testing.assert_close(theirs, -ours, rtol=0, atol=1e-6)


def test_export_has_its_config_and_a_card_with_the_runs_figures(trained, few_latents, tmp_path):
    _, folder = trained
    export.main([f"ckpt={folder}", f"out={tmp_path / 'out'}"])
    card, config = (tmp_path / "out" / "README.md").read_text(), (tmp_path / "out" / "config.json").read_text()
    assert "| train/loss | 0.5 (step 6) |" in card and "0.25 (step 7)" in card and "fd_mnist 12.5" in card
    assert json.loads(config)["model"]["depth"] == 6
    metadata_and_tensors = (tmp_path / "out" / "model.safetensors").read_bytes()
    for text in (card, config, metadata_and_tensors.decode("latin1")):
        assert str(few_latents) not in text and str(folder.parent) not in text  # nobody's machine
    ema = load_file(latest_checkpoint(folder) / "ema.safetensors")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(exported[key], ema[key]) for key in ema)


def test_a_card_has_front_matter_and_the_preview_of_its_weights(trained, tmp_path):
    folder = shutil.copytree(trained[1], tmp_path / "digits")
    preview = folder / "samples" / "step_0000007.png"
    preview.parent.mkdir(exist_ok=True)
    preview.write_bytes(b"a picture")
    export.main([f"ckpt={folder}", f"out={tmp_path / 'ema'}", "license=cc-by-4.0"])
    export.main([f"ckpt={folder}", f"out={tmp_path / 'raw'}", "weights=raw"])
    cards = [(tmp_path / name / "README.md").read_text().split("---\n") for name in ("ema", "raw")]
    heads = [yaml.safe_load(head) for _, head, *_ in cards]
    assert [head["license"] for head in heads] == ["cc-by-4.0", "unknown"]
    assert heads[0]["pipeline_tag"] == "unconditional-image-generation"
    assert "![Samples](samples.png)" in cards[0][2] and 'load_run("model.safetensors")' in cards[0][2]
    assert (tmp_path / "ema" / "samples.png").read_bytes() == b"a picture"
    assert "samples.png" not in cards[1][2] and not (tmp_path / "raw" / "samples.png").exists()
    for wrong in (["license=A licence"], ["license=mit", "format=dit"]):
        with pytest.raises(UserError, match="license="):
            export.main([f"ckpt={folder}", f"out={tmp_path / 'not'}", *wrong])


def test_a_run_starts_from_weights_of_its_own_kind(trained):
    _, folder = trained
    model = network(**SMALL)
    same = load_run(folder, device="cpu")
    start_from(str(folder), model, same.objective, same.settings.data)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.model.parameters(), strict=True))
    with pytest.raises(ValueError, match="was trained as"):
        start_from(str(folder), model, DDPM(), same.settings.data)
    with pytest.raises(ValueError, match="is of another model"):
        start_from(str(folder), network(**SMALL | dict(num_classes=4)), same.objective, same.settings.data)


class Planted:
    """Runs a command when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def planted(folder):
    mark, path = folder / "it ran", folder / "DiT-XL-2.pt"
    torch.save({"ema": network().state_dict(), "args": Planted(mark)}, path)
    torch.save(network().state_dict(), folder / "DiT-good.pt")
    return path, mark


COMMANDS = {
    "sample": lambda path: sample.main([f"ckpt={path}", "seeds=0"]),
    "rf": lambda path: rf.main(["sample_tread", f"ckpt={path}", "seeds=0"]),
    "fid": lambda path: fid.main(["calc", f"ckpt={path}", "seeds=0-3"]),
    "weak": lambda path: sample.main([f"ckpt={path.with_name('DiT-good.pt')}", "guidance=auto", f"weak_ckpt={path}"]),
    "export": lambda path: export.main([f"ckpt={path}", f"out={path.parent / 'out'}"]),
    "init_from": lambda path: start_from(str(path), network(), rf.RectifiedFlow(), None),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_pickle_runs(command, tmp_path, capsys):
    path, mark = planted(tmp_path)
    with cli.user_errors(), pytest.raises((ValueError, SystemExit)) as refusal:
        COMMANDS[command](path)
    told = str(refusal.value) + capsys.readouterr().err
    assert "needs code to load" in told and "mkdir" in told
    assert not mark.exists() and b"mkdir" in path.read_bytes()  # the plant is there


def test_the_command_line_says_it_in_one_line(tmp_path):
    path, mark = planted(tmp_path)
    command = [sys.executable, "export.py", f"ckpt={path}", f"out={tmp_path / 'out'}"]
    env = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}  # which asks for tracebacks
    done = started.run(command, env=env)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not mark.exists() and not (tmp_path / "out").exists()


def broken_files(state):
    """(file name, bytes or content, what the refusal says)."""
    extra = {f"{key}_2": torch.zeros(1) for key in state if key.startswith("blocks.0.")}
    fewer = {key: value for key, value in state.items() if not key.startswith("blocks.3.")}
    wide = state | {"blocks.0.mlp.fc1.weight": torch.zeros(2 * WIDTH, WIDTH)}
    vit = {key: torch.zeros(4, 4) for key in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "head.weight")}
    mask = dict(ema={f"model.{key}": value for key, value in (state | {"mask_token": torch.zeros(1)}).items()})
    patches, times = "x_embedder.proj.weight", "t_embedder.mlp.0.weight"
    narrow = network(hidden_size=64).state_dict()
    score = namespace(model="SiT-XL/2", path_type="GVP", prediction="score")
    return {
        "empty": ("DiT-a.pt", b"", "damaged"),
        "text": ("DiT-a.pt", b"hello", "damaged"),
        "truncated": ("DiT-a.pt", None, "damaged"),
        "empty safetensors": ("DiT-a.safetensors", b"", "damaged"),
        "list": ("DiT-a.pt", [torch.zeros(1)], "holds a list"),
        "no weights": ("DiT-a.pt", {"state": {"a": torch.zeros(1)}}, "no weights under a name"),
        "unknown family": ("weights.pt", state, "ckpt=dit:FILE"),
        "unknown keys": ("DiT-a.pt", state | extra, "10 unknown: blocks.0.adaLN_modulation.1.bias_2"),
        "missing keys": ("DiT-a.pt", fewer, "missing: blocks.3.*unknown: blocks.5"),
        "another network": ("DiT-a.pt", vit, "another architecture.*missing.*unknown: head.weight, patch_embed"),
        "part of a MaskDiT": ("a.pt", mask, "unknown: mask_token"),
        "wrong width of the MLP": ("DiT-a.pt", wide, r"fc1.weight is \(256, 128\) in the file and \(512, 128\)"),
        "wrong patch": ("SiT-a.pt", state | {patches: torch.zeros(WIDTH, 4, 4, 4)}, "2 outputs .* patch 4"),
        "no convolution": ("SiT-a.pt", state | {patches: torch.zeros(WIDTH, 16)}, "proj.weight has the shape"),
        "wrong time embedding": ("SiT-a.pt", state | {times: torch.zeros(WIDTH, 8)}, "mlp.0.weight has the shape"),
        "wrong grid": ("SiT-a.pt", state | {"pos_embed": torch.zeros(1, 15, WIDTH)}, "pos_embed is"),
        "unknown number of heads": ("DiT-a.pt", narrow, "width 64"),
        "SiT of another path": ("a.pt", dict(ema=state, args=score), "path_type gvp"),
    }  # fmt: skip


@pytest.mark.parametrize("case", broken_files(network().state_dict()))
def test_what_is_not_right_is_refused_in_one_line(net, case, tmp_path):
    name, content, message = broken_files(net.state_dict())[case]
    path = tmp_path / name
    if content is None:
        torch.save(net.state_dict(), path)
        path.write_bytes(path.read_bytes()[:-5000])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message) as refusal:
        load_run(path, device="cpu")
    assert path.name in str(refusal.value) and "\n" not in cli.one_line(refusal.value)


def test_foreign_weights_are_sampled_and_guided(tmp_path):
    path, out = tmp_path / "DiT-S-2.pt", tmp_path / "out"
    torch.save(network(in_channels=1, learn_sigma=False).state_dict(), path)
    sample.main([f"ckpt={path}", "seeds=0-1", "steps=2", "guidance=cfg", "scale=2", f"out={out}"])
    assert len(list(out.rglob("*.png"))) == 3
    with pytest.raises(ValueError, match="routes"):  # an official DiT was not trained with any
        sample.main([f"ckpt={path}", "seeds=0", "guidance=sparse", f"out={tmp_path / 'sparse'}"])


OTHER = """
import torch
from contracts import Network

class Other(Network):
    def __init__(self, width: int):
        super().__init__()
        self.latent_shape, self.num_tokens, self.name = (1, 2, 3), 6, "other"
        self.null_condition, self.all_blocks, self.width = None, (), width
        self.model, self.encoder_blocks = torch.nn.Linear(width, 1), torch.nn.ModuleList([torch.nn.Linear(1, width)])
        self.module = torch.nn.Linear(width, width)

    def forward(self, x, t, condition, *, routing=None, hidden=()):
        return x

    def macs(self, routing=None):
        return 1
"""


@pytest.fixture
def other(tmp_path, monkeypatch):
    """(settings, network) of a class that nothing here knows, whose tensors have names as other projects' files."""
    (tmp_path / "other_network.py").write_text(OTHER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("system.building.ROOT", tmp_path)
    data = {"name": "made", "channels": 1, "input_size": [2, 3], "condition": "none"}
    data |= {"codec": {"_target_": "autoencoder.PixelCodec"}}
    values = {"model": {"_target_": "other_network.Other", "width": 4}, "objective": {"_target_": "rf.RectifiedFlow"}}
    values |= {"format": FORMAT, "data": data, "sampler": {"takes": "velocity"}, "train": {"max_steps": 7}}
    settings = from_file(values, "made")
    return settings, build_network(settings)


def test_an_export_of_any_class_comes_back(other, tmp_path):
    settings, net = other
    source = tmp_path / "source.safetensors"
    save_file(net.state_dict(), source)
    run = Run(net, rf.RectifiedFlow(), PixelCodec(), settings, torch.device("cpu"), folder=tmp_path, checkpoint=source)
    export.export_folder(run, net.state_dict(), tmp_path / "out", export.Export("", ""))
    values, tensors, _ = foreign.read(tmp_path / "out" / "model.safetensors", family="dit")
    assert from_file(values, "out") == settings
    load_strictly(build_network(from_file(values, "out")), tensors, "out")
    assert tensors.keys() == net.state_dict().keys()
    assert not (tmp_path / "out" / "conditions.safetensors").exists()
    assert "Other other for made: 1 x 2 x 3, no condition" in (tmp_path / "out" / "README.md").read_text()
    for layout, message in (("dit", "cannot open it"), ("sit", "cannot open it"), ("diffusers", "needs a DiT")):
        with pytest.raises(UserError, match=message):
            export.check_layout(run, layout)


def test_the_texts_of_a_run_go_with_its_export(tmp_path):
    keys = ["data.condition=text", "data.num_classes=null", "data.text_width=5", "model.condition=text"]
    keys += ["model.text_width=5", "model.num_classes=null", "data.input_size=8", "data.path=nowhere"]
    small = ["model.size=DiT-XS/2", "model.depth=6", "model.hidden_size=32", "model.num_heads=2"]
    kept = Text(torch.randn(3, 4, 5), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool())
    run = make_run(tmp_path / "run", [*keys, *small, "objective=rf"], kept=kept)
    export.main([f"ckpt={run}", f"out={tmp_path / 'out'}"])
    back = load_run(tmp_path / "out", device="cpu")
    assert all(map(torch.equal, back.pool, kept))
    with pytest.raises(UserError, match="needs labels .* and square latents; .* for texts and latents of 8 x 8"):
        export.main([f"ckpt={run}", f"out={tmp_path / 'sit.pt'}", "format=sit"])


def test_only_square_latents_go_to_other_projects(tmp_path):
    small = ["model.size=DiT-XS/2", "model.depth=6", "model.hidden_size=32", "model.num_heads=2"]
    run = make_run(tmp_path / "run", [*small, "objective=ddpm", "model=dit", "data.input_size=[4,8]"])
    for layout in ("dit", "diffusers"):
        with pytest.raises(UserError, match="latents of 4 x 8"):
            export.main([f"ckpt={run}", f"out={tmp_path / 'out'}", f"format={layout}"])
    assert not (tmp_path / "out").exists()
    export.main([f"ckpt={run}", f"out={tmp_path / 'out'}"])
    assert load_run(tmp_path / "out", device="cpu").model.latent_shape == (1, 4, 8)


@pytest.mark.parametrize("found, message", [
    ({}, "format None; needed: format 1"), ({"format": 2}, "format 2; needed: format 1"),
])  # fmt: skip
def test_another_format_is_refused_in_one_line(found, message, net, tmp_path):
    values = foreign.read(saved(net, tmp_path / "DiT-S-2.pt"))[0]
    text = yaml.safe_dump({key: value for key, value in values.items() if key != "format"} | found)
    save_file(net.state_dict(), tmp_path / "model.safetensors", {foreign.CONFIG_KEY: text, "step": "many"})
    (tmp_path / "config.yaml").write_text(text)
    for open_it in (lambda: load_run(tmp_path / "model.safetensors", device="cpu"), lambda: read_config(tmp_path)):
        with pytest.raises(UserError, match=message) as refusal:
            open_it()
        assert str(tmp_path) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", ["- 1", "7", "", "{model: [}", "format: 1", "format: 1\nmodel: 3", b"\xff\xfe\xff"])
def test_a_damaged_config_is_refused(text, net, tmp_path):
    if isinstance(text, str):
        save_file(net.state_dict(), tmp_path / "model.safetensors", {foreign.CONFIG_KEY: text})
        with pytest.raises(UserError, match="model.safetensors"):
            load_run(tmp_path / "model.safetensors", device="cpu")
    (tmp_path / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match="config.yaml"):
        read_config(tmp_path)


def test_a_file_is_sampled_as_a_run_of_its_objective():
    """The sampler that such a file comes with is the one of configs/sampler/, whose values are the functions' own."""
    for name, function in (("edm", edm_sampler), ("rf", flow_sampler)):
        config = yaml.safe_load((Path(export.__file__).parent / "configs" / "sampler" / f"{name}.yaml").read_text())
        own = {key: p.default for key, p in inspect.signature(function).parameters.items()}
        told = {key: value for key, value in config.items() if value is not None and key != "takes"}
        assert told == {key: own[key] for key in told}


def saved(net, path):
    torch.save(net.state_dict(), path)
    return path


def test_another_projects_file_says_nothing_of_its_training(net, tmp_path):
    export.main([f"ckpt={saved(net, tmp_path / 'DiT-S-2.pt')}", f"out={tmp_path / 'out'}"])
    facts = json.loads((tmp_path / "out" / "config.json").read_text())
    assert facts.keys() == {"step", "weights", "format", "model", "objective", "sampler", "data"}
    assert "global_batch_size" not in (tmp_path / "out" / "README.md").read_text()
    assert type(load_run(tmp_path / "out", device="cpu").objective) is DDPM


def test_an_average_of_another_width_is_exported_in_the_place_of_the_ema(tmp_path):
    settings = made_settings(["model.size=DiT-XS/2", "model.depth=6", "model.hidden_size=32", "model.num_heads=2"])
    modules = {name: build_network(settings) for name in ("model", "ema", "power_0.05", "power_0.1")}
    tensors = checkpoint_tensors(modules, torch.optim.AdamW(modules["model"].parameters()))
    write_checkpoint(tmp_path / "run", 7, tensors, {}, to_yaml(settings))
    export.main([f"ckpt={tmp_path / 'run'}", f"out={tmp_path / 'out'}", "ema_width=0.05"])
    exported = load_run(tmp_path / "out", device="cpu").model.state_dict()
    assert all(torch.equal(value, exported[key]) for key, value in modules["power_0.05"].state_dict().items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["ema_width"] == 0.05
    assert "| ema_width | 0.05 |" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(UserError, match="needed: weights=ema"):
        export.main([f"ckpt={tmp_path / 'run'}", f"out={tmp_path / 'raw'}", "ema_width=0.05", "weights=raw"])


def test_a_network_of_changed_parts_is_not_another_projects(tmp_path):
    small = ["model.size=DiT-XS/2", "model.depth=6", "model.hidden_size=32", "model.num_heads=2"]
    run = make_run(tmp_path / "run", [*small, "model=lightningdit", "objective=rf", "+model.norm=layer"])
    with pytest.raises(UserError, match="another architecture than DiT; 13 missing"):
        export.main([f"ckpt={run}", f"out={tmp_path / 'out.pt'}", "format=sit"])

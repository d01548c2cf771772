"""Muon: which weights it takes, its step against independent computations, what it leaves alone on a bad step."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import train as training
from checkpoints.run_folder import latest_checkpoint, read_config, read_tensors
from data import BatchPlan
from dit import DiT
from lightningdit import LightningDiT
from rf import RectifiedFlow
from scripts.bench import OpCounter
from system import precision
from tests.conftest import assert_same_run, numbers, poison
from tests.made_runs import made_settings
from tests.test_step import TREAD, latents_of, settings, state_of
from training.optimizer import make_optimizer
from training.stopping import EXIT_START_AGAIN

A, B, C = 3.4445, -4.7750, 2.0315  # the quintic of Jordan's post


def muon_settings(*overrides):
    return made_settings(["optimizer=muon", *overrides]).optimizer


def muon_state(device="cpu", mode="stop", network=DiT):
    torch.manual_seed(0)
    sizes = dict(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=6, num_heads=2, num_classes=3)
    with torch.device(device):
        model = network(learn_sigma=False, routes=TREAD, **sizes)
    optimizer = make_optimizer(model, muon_settings(), 1e-3)
    return state_of(model, {}, optimizer, device, RectifiedFlow(), mode)


def block_of(**parts):
    block = nn.Module()
    for name, part in parts.items():
        setattr(block, name, part)
    return block


def listed(name, blocks):
    """A module with a list of blocks under this name, which is all that Muon asks of a network."""
    model = nn.Module()
    setattr(model, name, nn.ModuleList(blocks))
    model.all_blocks = tuple(blocks)
    return model


def of_muon(model, optimizer):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for p in optimizer.param_groups[0]["params"]}


@pytest.mark.parametrize("network, of_mlp", [(DiT, ("fc1", "fc2")), (LightningDiT, ("w12", "w3"))])
def test_muon_takes_the_matrices_of_attention_and_mlp(network, of_mlp):
    state = muon_state(network=network)
    parts = ("attn.qkv", "attn.proj", *(f"mlp.{name}" for name in of_mlp))
    assert of_muon(state.model, state.optimizer) == {f"blocks.{i}.{part}.weight" for i in range(6) for part in parts}
    every = [p for group in state.optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, every)) == sorted(map(id, state.model.parameters()))


def test_muon_takes_those_of_any_stack_of_blocks():
    """Of those that the network lists, and not what a block leaves to AdamW, at any depth."""
    model = listed("decoder_blocks", [block_of(mixer=nn.Linear(4, 4), table=nn.Linear(4, 8)) for _ in range(2)])
    model.mlp, model.fusion = nn.Linear(4, 4), nn.Linear(8, 4)
    for block in model.decoder_blocks:
        block.table = nn.Sequential(nn.SiLU(), block.table)
        block.left_to_adamw = ("table",)
    optimizer = make_optimizer(model, muon_settings(), 1e-3)
    assert of_muon(model, optimizer) == {"decoder_blocks.0.mixer.weight", "decoder_blocks.1.mixer.weight"}


def newton_schulz(m):
    """What the five iterations do to singular values, U p(p(p(p(p(S))))) V^T, in float64."""
    u, s, v = torch.linalg.svd(m.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = A * s + B * s**3 + C * s**5
    return (u * s @ v).float()


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 0.1)])  # bf16 alone costs 5 %
@pytest.mark.parametrize("shape", [(96, 32), (32, 128), (32, 32)])
def test_two_steps_of_a_matrix_are_an_independent_newton_schulz(shape, precision, tolerance):
    torch.manual_seed(0)
    model = listed("blocks", [block_of(mlp=nn.Linear(shape[1], shape[0]))])
    weight, lr, clip, decay = model.blocks[0].mlp.weight, 1e-2, 2.0, 0.1
    optimizer = make_optimizer(
        model, muon_settings(f"optimizer.weight_decay={decay}", f"optimizer.ns_precision={precision}"), lr
    )
    optimizer.grad_scale = torch.tensor(clip)
    momentum = torch.zeros(shape)
    for _ in range(2):
        before, gradient = weight.detach().clone(), torch.randn(shape)
        weight.grad = gradient.clone()
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * gradient / clip
        torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], momentum)
        expected = newton_schulz(0.95 * momentum + 0.05 * gradient / clip)
        update = ((1 - lr * decay) * before - weight.detach()) / (lr * 0.2 * max(shape) ** 0.5)
        assert (update - expected).norm() < tolerance * expected.norm()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9")
@pytest.mark.parametrize("nesterov", [True, False])
def test_bf16_is_torchs_muon_in_the_mean(nesterov):
    """Of 24 matrices in three steps: equal but for rounding, which points nowhere."""
    torch.manual_seed(0)
    model = listed("blocks", [block_of(up=nn.Linear(64, 256), down=nn.Linear(256, 64)) for _ in range(12)])
    weights = [p for p in model.parameters() if p.ndim == 2]
    theirs, before = [p.detach().clone() for p in weights], [p.detach().clone() for p in weights]
    how = dict(lr=1e-2, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn="match_rms_adamw")
    keys = ["optimizer.ns_precision=bf16", "optimizer.weight_decay=0.1", f"optimizer.nesterov={nesterov}"]
    steps = make_optimizer(model, muon_settings(*keys), 1e-2), torch.optim.Muon(theirs, **how)
    for _ in range(3):
        for ours, other in zip(weights, theirs):
            ours.grad = torch.randn_like(ours)
            other.grad = ours.grad.clone()
        for optimizer in steps:
            optimizer.step()
    ours, theirs = (torch.cat([(p - b).flatten() for p, b in zip(found, before)]) for found in (weights, theirs))
    assert abs((ours - theirs) @ theirs) < 1e-3 * (theirs @ theirs)
    assert (ours - theirs).mean().abs() < 1e-3 * theirs.abs().mean() and (ours - theirs).norm() < 0.1 * theirs.norm()


@pytest.mark.parametrize("mode, value", [("stop", float("nan")), ("skip", float("inf"))])
def test_a_bad_step_changes_no_bit(mode, value):
    config, data = settings(global_batch_size=4, precision="fp32"), latents_of(BatchPlan(4, 4, 1, 0, 1))
    state = muon_state(mode=mode)
    for parameter in state.model.parameters():  # adaLN-Zero would pass no gradient to the blocks
        nn.init.normal_(parameter, std=0.1)
    batch = torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)

    def everything():
        fields = [value for held in state.optimizer.state.values() for value in held.values()]
        return [tensor.detach().clone() for tensor in (*state.model.parameters(), *fields)]

    def take(step, latent):
        state.step = step
        training.train_step(config, data, state, iter([(latent, batch[1])]))

    take(1, batch[0])
    first = everything()
    take(2, batch[0])
    good = everything()
    assert not any(map(torch.equal, first, good))
    take(3, batch[0].clone().fill_(value))
    assert all(torch.equal(a, b) for a, b in zip(good, everything(), strict=True))
    take(4, batch[0])  # in mode stop nothing is updated any more
    assert all(map(torch.equal, good, everything())) == (mode == "stop")
    assert all(tensor.isfinite().all() for tensor in everything())


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_step_on_a_gpu_waits_for_nothing():
    with FakeTensorMode():
        state = muon_state("cuda")
        for p in state.model.parameters():
            p.grad = torch.empty_like(p)
        state.optimizer.grad_scale = torch.ones((), device="cuda")
        with OpCounter() as counter:
            state.optimizer.step()
    assert counter.calls["_fused_adamw_"] == 1 and counter.calls["baddbmm"] == 2 * 5 * 3  # qkv; proj; fc1 with fc2
    assert counter.to_cpu == 0 and counter.waits == 0


def test_resume_under_muon_is_exact(run):
    code, golden = run("golden", "optimizer=muon")
    assert code == 0
    for cut in (1, 4):
        assert run(f"cut{cut}", "optimizer=muon", stop_after=cut)[0] == EXIT_START_AGAIN
        assert run(f"cut{cut}", "optimizer=muon")[0] == 0
        assert_same_run(golden, golden.with_name(f"cut{cut}"))


def test_a_bad_step_is_left_out_of_a_run(run, monkeypatch):
    poison(monkeypatch, 4)
    code, folder = run("skip", "optimizer=muon", "train.on_nonfinite=skip")
    assert code == 0 and [line["train/skipped"] for line in numbers(folder)] == [0, 0, 0, 1, 1, 1, 1]
    saved = read_tensors(latest_checkpoint(folder) / "optimizer.safetensors")
    assert saved["x_embedder.proj.weight/step"] == 6 and all(tensor.isfinite().all() for tensor in saved.values())
    assert "blocks.0.attn.qkv.weight/momentum_buffer" in saved and "blocks.0.attn.qkv.bias/exp_avg" in saved


@pytest.mark.parametrize("before, after", [("adamw", "muon"), ("muon", "adamw")])
def test_the_state_of_another_optimizer_is_refused(run, before, after):
    _, folder = run(before, f"optimizer={before}", stop_after=2)
    kept = {path: path.read_bytes() for path in folder.glob("checkpoints/*/*")}
    with pytest.raises(ValueError, match=f"another run: .*optimizer.name was {before}, is {after}"):
        run(before, f"optimizer={after}")
    with pytest.raises(ValueError, match="of another optimizer.*needed: ") as error:
        run(before, f"optimizer={after}", "resume_allow=[optimizer]")
    assert "\n" not in str(error.value) and kept == {path: path.read_bytes() for path in folder.glob("checkpoints/*/*")}


@pytest.mark.parametrize("then", ["fp32", "bf16"])
def test_a_run_keeps_the_precision_of_its_products(run, monkeypatch, then):
    other = {"fp32": "bf16", "bf16": "fp32"}[then]
    monkeypatch.setattr(precision, "choose", lambda device, of: then)
    _, folder = run("kept", "optimizer=muon", "train.precision=fp32", stop_after=1)
    monkeypatch.setattr(precision, "choose", lambda device, of: other)
    assert run("kept", "optimizer=muon", "train.precision=fp32", stop_after=2)[0] == EXIT_START_AGAIN
    assert read_config(latest_checkpoint(folder)).optimizer.ns_precision == then
    with pytest.raises(ValueError, match=f"optimizer.ns_precision was {then}, is {other}"):
        run("kept", "optimizer=muon", "train.precision=fp32", f"optimizer.ns_precision={other}")

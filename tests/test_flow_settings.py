"""objective.shift and objective.predict=x of the rectified flow: training, sampling, guidance, and what is refused."""

import json
import math

import pytest
import torch
import yaml

import export
from checkpoints import run_folder
from checkpoints.generate import generate_latents
from checkpoints.load import load_run
from checkpoints.run_folder import latest_checkpoint
from contracts import pixel_mean
from guidance import Guidance
from randomness import normal, seeded_generator, uniform
from rf import RectifiedFlow
from solvers import flow_sampler, solve
from system import UserError
from tests.conftest import assert_same_run, numbers
from tests.made_runs import made_settings, make_run

X, Y = torch.randn(64, 2, 4, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(64, dtype=torch.int64)


def net(x, t, y):
    return (x * (1 + t.view(-1, 1, 1, 1))).sin()


def drawn(timesteps="uniform", shift=1.0):
    """t, noise and x_t as `RectifiedFlow.errors` draws them with seed 1, in float64."""
    g = seeded_generator(1)
    t = (uniform((64,), g) if timesteps == "uniform" else normal((64,), g).sigmoid()).double()
    t = (shift * t / (1 + (shift - 1) * t)).view(-1, 1, 1, 1)
    noise = normal(X.shape, g).double()
    return t, noise, (1 - t) * X + t * noise


@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal"])
@pytest.mark.parametrize("shift", [1.0, 3.0, 0.3])
def test_training_times_are_shifted(timesteps, shift):
    error, x_t, denoised = RectifiedFlow(timesteps, shift=shift).errors(net, X, Y, seeded_generator(1))
    t, noise, expected = drawn(timesteps, shift)
    torch.testing.assert_close(x_t.double(), expected, rtol=1e-6, atol=1e-6)
    velocity = net(x_t, t.float().flatten(), Y).double()
    torch.testing.assert_close(error.double(), (velocity - (noise - X)).square(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(denoised.double(), x_t - t * velocity, rtol=1e-5, atol=1e-5)
    if shift == 1:
        before = RectifiedFlow(timesteps).errors(net, X, Y, seeded_generator(1))
        assert all(torch.equal(a, b) for a, b in zip(before, (error, x_t, denoised)))


@pytest.mark.parametrize("contrastive, cosine", [(0.0, 0.0), (0.05, 1.0)])
def test_the_loss_of_x_is_on_the_velocity(contrastive, cosine):
    """arXiv 2511.13720: v = (x_t - x) / max(t, 0.05), of the prediction and of the target alike."""
    objective = RectifiedFlow("uniform", contrastive, cosine, predict="x")
    error, x_t, denoised = objective.errors(net, X, Y, seeded_generator(1))
    t, _, exact = drawn()
    assert 0 < (t < 0.05).sum() < 20
    out = net(x_t, t.float().flatten(), Y).double()
    target = (exact - X) / t.clamp(min=0.05)
    expected = ((exact - out) / t.clamp(min=0.05) - target).square()
    if contrastive:
        velocity = (exact - out) / t.clamp(min=0.05)
        angle = torch.nn.functional.cosine_similarity(velocity, target, dim=1)[:, None]
        wrong = target.unflatten(0, (32, 2)).flip(1).flatten(0, 1)
        expected = expected - contrastive * (velocity - wrong).square() + cosine * (1 - angle)
    assert (pixel_mean(error) - pixel_mean(expected)).abs().max() < 1e-6 * pixel_mean(expected).abs().max()
    torch.testing.assert_close(denoised.double(), out, rtol=1e-5, atol=1e-5)


def test_the_velocity_of_x_is_clamped_in_sampling_too():
    objective = RectifiedFlow(predict="x")
    for t in (0.9, 0.05, 0.02):
        found = objective.predict(net, X, torch.tensor(t), Y)
        out = net(X, torch.full((64,), t), Y)
        torch.testing.assert_close(found, (X - out) / max(t, 0.05), rtol=1e-6, atol=1e-6)
    # A network that knows the one image there is gives it, in as many steps as one likes.
    point = lambda x, t, y: torch.full_like(x, 0.7)  # noqa: E731
    predict = lambda x, t: objective.predict(point, x, t, Y)  # noqa: E731
    for settings in ({"num_steps": 1}, {"num_steps": 20, "solver": "heun"}):
        out = solve(objective, predict, X, settings, None)
        torch.testing.assert_close(out, torch.full_like(X, 0.7), rtol=0, atol=1e-5)
    # Steps below t = 0.05 leave some of the noise: of the last two of 40, half.
    out = solve(objective, predict, X, {"num_steps": 40}, None)
    torch.testing.assert_close(out, 0.7 + 0.025 * 0.5 * (X - 0.7), rtol=0, atol=1e-5)


def test_sampling_takes_the_shift_of_training_unless_it_is_told_another():
    field = lambda x, t: x * t - 1  # noqa: E731
    for shift, told, effective in ((3.0, None, 3.0), (3.0, 1.0, 1.0), (3.0, 2.0, 2.0), (1.0, None, 1.0)):
        settings = {"takes": "velocity", "num_steps": 5, "shift": told}
        found = solve(RectifiedFlow(shift=shift), field, X, settings, None)
        assert torch.equal(found, flow_sampler(field, X, num_steps=5, shift=effective))


SMALL = ["objective=rf", "data.channels=1", "data.input_size=8", "data.num_classes=3", "model.size=DiT-XS/2"]
SMALL += ["model.depth=6", "model.hidden_size=32", "model.num_heads=2", "sampler.num_steps=3"]


def test_a_runs_own_shift_holds_for_commands_that_name_a_sampler(tmp_path):
    assert made_settings(SMALL).sampler["shift"] is None
    folders = {shift: make_run(tmp_path / f"shift{shift}", [*SMALL, f"objective.shift={shift}"]) for shift in (1, 3)}

    def latents(trained, **told):
        run = load_run(folders[trained], device="cpu")
        sampler = run.settings.sampler | told
        return generate_latents(run, Guidance(), [0, 1], torch.tensor([0, 2]), sampler)

    assert torch.equal(latents(3), latents(1, shift=3)) and torch.equal(latents(3, shift=1), latents(1))
    assert not torch.equal(latents(3), latents(1))


def test_guidance_is_on_the_velocities_of_both_networks(tmp_path):
    """Strong: x-prediction, weak: another checkpoint of it without a label; by hand at one Euler step."""
    folder = make_run(tmp_path / "x", [*SMALL, "objective.predict=x", "sampler.num_steps=1"], steps=(1, 2))
    run = load_run(folder, device="cpu")
    weak = load_run(folder / "checkpoints" / "step_0000001", device="cpu")
    noise = normal((2, 1, 8, 8), [seeded_generator("image", seed, "noise") for seed in (0, 1)])
    t, labels = torch.ones(2), torch.tensor([0, 2])
    clean, other = run.model(noise, t, labels)[:, :1], weak.model(noise, t, torch.tensor([3, 3]))[:, :1]
    guidance = Guidance(1.5, weak_ckpt="earliest", weak_label="none")
    found = generate_latents(run, guidance, [0, 1], labels, run.settings.sampler, weak)
    torch.testing.assert_close(found, other + 1.5 * (clean - other), rtol=1e-5, atol=1e-5)


def test_it_trains_resumes_and_is_no_start_for_another_prediction(run, tmp_path):
    keys = ["objective=rf", "objective.predict=x", "objective.shift=2", "train.val_every=4", "train.max_steps=4"]
    _, golden = run("golden", *keys)
    run("cut", *keys, stop_after=2)
    assert_same_run(golden, run("cut", *keys)[1])
    assert sum(name.startswith("val/loss_routed/") for name in numbers(golden)[-1]) == 5
    with pytest.raises(UserError, match="was trained as RectifiedFlow of x, this run is RectifiedFlow of velocity"):
        run("other", "objective=rf", f"init_from={golden}")
    with pytest.raises(UserError, match="objective.shift was 2, is 1"):
        run("cut", *keys, "objective.shift=1", "resume=auto")
    with pytest.raises(UserError, match="format=sit needs a flow .*; .* predicts x"):
        export.check_layout(load_run(golden, device="cpu"), "sit")


def test_a_run_of_before_these_keys_goes_on(run):
    _, folder = run("older", "objective=rf", "model=lightningdit_tread", stop_after=2)
    path = latest_checkpoint(folder) / "config.yaml"
    config = yaml.safe_load(path.read_text())
    for section, key in (("objective", "shift"), ("objective", "predict"), ("model", "value_residual")):
        del config[section][key]
    path.write_text(yaml.safe_dump(config))
    manifest = latest_checkpoint(folder) / "manifest.json"
    entries = json.loads(manifest.read_text())
    entries["files"]["config.yaml"] = {"bytes": path.stat().st_size, "sha256": run_folder.sha256_of(path)}
    manifest.write_text(json.dumps(entries))
    with pytest.raises(UserError, match="another run: objective.shift was 1.0, is 2;"):
        run("older", "objective=rf", "model=lightningdit_tread", "objective.shift=2")
    assert run("older", "objective=rf", "model=lightningdit_tread")[0] == 0


@pytest.mark.parametrize("bad", [dict(shift=0.0), dict(shift=math.inf), dict(predict="noise")])
def test_what_cannot_be_is_refused(bad):
    with pytest.raises(UserError, match=f"objective.{next(iter(bad))}=.*; needed: "):
        RectifiedFlow(**bad)

"""Samplers against known solutions: for data that is N(0.3, 0.5^2) the exact denoiser and velocity are closed forms."""

import math

import pytest
import torch

from edm import EDM
from guidance import guide
from randomness import seeded_generator
from rf import RectifiedFlow
from solvers import (
    SIGMA_RANGES,
    as_denoised,
    as_velocity,
    edm_sampler,
    flow_sampler,
    flow_times,
    iddpm_levels,
    noise_levels,
    schedule_named,
    solve,
)  # fmt: skip

MEAN, STD = 0.3, 0.5
NOISE = torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(0))


def denoise(x, sigma):
    return (STD**2 * x + sigma**2 * MEAN) / (STD**2 + sigma**2)


def velocity(x, t):
    variance = ((1 - t) * STD) ** 2 + t**2
    apart = x - (1 - t) * MEAN
    return t / variance * apart - (MEAN + (1 - t) * STD**2 / variance * apart)  # E[z | x_t] - E[x | x_t]


def solution(sigma_max):
    """Where the flow of `denoise` carries sigma_max * NOISE."""
    return MEAN + (NOISE.double() * sigma_max - MEAN) * STD / math.hypot(STD, sigma_max)


def errors(sampler, exact, steps=(32, 64, 128), **settings):
    return [(sampler(NOISE, num_steps=n, **settings) - exact).abs().max().item() for n in steps]


def ratios(values):
    return [a / b for a, b in zip(values, values[1:])]


def counted(predict):
    def call(x, t):
        call.times.append(float(t))
        return predict(x, t)

    call.times = []
    return call


def test_heun_is_of_order_two_and_euler_of_order_one():
    run = lambda noise, **settings: edm_sampler(denoise, noise, **settings)  # noqa: E731
    heun, euler = (errors(run, solution(80), solver=solver, sigma_min=1e-3) for solver in ("heun", "euler"))
    assert min(ratios(heun)) > 3.5 and 1.7 < min(ratios(euler)) <= max(ratios(euler)) < 2.5
    run = lambda noise, **settings: flow_sampler(velocity, noise, **settings)  # noqa: E731
    exact = MEAN + STD * NOISE.double()
    heun, euler = (errors(run, exact, solver=solver) for solver in ("heun", "euler"))
    assert min(ratios(heun)) > 3.5 and 1.7 < min(ratios(euler)) <= max(ratios(euler)) < 2.5


@pytest.mark.parametrize("schedule", ["linear", "vp", "ve"])
@pytest.mark.parametrize("scaling", ["none", "vp"])
def test_every_time_and_scale_of_table_1_solves_the_same_equation(schedule, scaling):
    run = lambda noise, **settings: edm_sampler(denoise, noise, **settings)  # noqa: E731
    found = errors(run, solution(80), steps=(64, 128), schedule=schedule, scaling=scaling, sigma_min=1e-3)
    assert found[1] < 0.05 and ratios(found)[0] > 3


@pytest.mark.parametrize("discretization", SIGMA_RANGES)
def test_every_choice_of_noise_levels_reaches_the_data(discretization):
    low, high = SIGMA_RANGES[discretization]
    levels = noise_levels(64, discretization, low, high)
    assert levels.shape == (64,) and levels.dtype == torch.float64 and (levels.diff() < 0).all()
    assert levels[0].item() == pytest.approx(high, rel=0.02) and levels[-1].item() >= low * 0.999
    out = edm_sampler(denoise, NOISE, num_steps=64, discretization=discretization)
    assert (out - solution(levels[0].item())).abs().max() < 0.02


def test_noise_levels_are_the_papers():
    karras = noise_levels(18, "edm", 0.002, 80)
    assert karras[0] == pytest.approx(80) and karras[-1] == pytest.approx(0.002)
    assert karras[1] == pytest.approx((80 ** (1 / 7) + (0.002 ** (1 / 7) - 80 ** (1 / 7)) / 17) ** 7)
    vp = lambda t: math.sqrt(math.exp(19.9 * t**2 / 2 + 0.1 * t) - 1)  # noqa: E731  Table 1, beta_d 19.9 and beta_min 0.1
    low, high = SIGMA_RANGES["vp"]
    assert low == pytest.approx(vp(1e-3), rel=1e-12) and high == pytest.approx(vp(1), rel=1e-12)
    assert noise_levels(3, "vp", vp(1e-3), vp(1))[1] == pytest.approx(vp((1 + 1e-3) / 2))
    assert noise_levels(3, "ve", 0.01, 100)[1] == pytest.approx(1)
    cosine = iddpm_levels()  # away from the cap of C_1 they are what the cosine schedule's alpha_bar says
    alpha_bar = math.sin(math.pi / 2 * 500 / (1000 * 1.008)) ** 2 / math.sin(math.pi / 2 / 1.008) ** 2
    assert len(cosine) == 1000 and cosine[500] == pytest.approx(math.sqrt(1 / alpha_bar - 1))


@pytest.mark.parametrize("schedule", ["linear", "vp", "ve"])
def test_curves_invert_and_differentiate_themselves(schedule):
    noise_schedule = schedule_named(schedule, 0.002, 80)
    sigma = torch.tensor([0.002, 0.1, 1.0, 30.0, 80.0], dtype=torch.float64)
    t = noise_schedule.time(sigma)
    torch.testing.assert_close(noise_schedule.sigma(t), sigma)
    step = t * 1e-6
    slope = (noise_schedule.sigma(t + step) - noise_schedule.sigma(t - step)) / (2 * step)
    torch.testing.assert_close(noise_schedule.rate(t), slope, rtol=1e-4, atol=0)


@pytest.mark.parametrize("steps", [1, 5])
def test_calls_are_what_the_docstrings_say(steps):
    for sampler, predict in ((edm_sampler, denoise), (flow_sampler, velocity)):
        for solver, calls in (("euler", steps), ("heun", 2 * steps - 1)):
            probe = counted(predict)
            sampler(probe, NOISE, num_steps=steps, solver=solver)
            assert len(probe.times) == calls and min(probe.times) > 0
    probe = counted(velocity)
    flow_sampler(probe, NOISE, num_steps=steps, solver="sde", generators=torch.Generator().manual_seed(0))
    assert len(probe.times) == steps


def test_heun_on_the_exact_denoiser_reaches_its_statistics():
    noise = torch.randn(5000, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    noise = torch.cat([noise, -noise]) / noise.square().mean().sqrt()  # mean 0 and std 1, as drawn from a larger sample
    out = edm_sampler(denoise, noise, num_steps=60)
    assert out.dtype == torch.float32
    assert out.mean().item() == pytest.approx(MEAN, rel=0.01) and out.std().item() == pytest.approx(STD, rel=0.01)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sde_keeps_the_variance(shift):
    noise = torch.randn(50_000, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    out = flow_sampler(velocity, noise, num_steps=250, solver="sde", shift=shift, generators=generator)
    assert out.mean().item() == pytest.approx(MEAN, abs=0.01) and out.std().item() == pytest.approx(STD, rel=0.015)


def test_last_step_of_the_sde_adds_no_noise():
    used, expected = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    flow_sampler(velocity, NOISE, num_steps=5, solver="sde", generators=used)
    for _ in range(4):
        torch.randn(NOISE.shape, generator=expected)
    assert torch.equal(used.get_state(), expected.get_state())
    t = flow_times(5, shift=2.0, last_step=0.04)
    assert t[-2].item() == pytest.approx(0.04) and t[-1] == 0


def test_churn_keeps_the_statistics_and_draws_from_each_images_own_stream():
    noise = torch.randn(20_000, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    for scaling in ("none", "vp"):
        out = edm_sampler(
            denoise, noise, num_steps=100, S_churn=40, scaling=scaling, generators=torch.Generator().manual_seed(1)
        )
        assert out.std().item() == pytest.approx(STD, rel=0.03)
    for sampler, settings in ((edm_sampler, {"S_churn": 40}), (flow_sampler, {"solver": "sde"})):
        field = denoise if sampler is edm_sampler else velocity
        alone, among = (
            sampler(field, NOISE[rows], num_steps=8, **settings, generators=[seeded_generator(row) for row in rows])
            for rows in ([1], [0, 1, 2])
        )
        assert torch.equal(among[1:2], alone) and not torch.equal(alone, sampler(field, NOISE[[1]], num_steps=8))


def test_euler_is_exact_on_a_constant_field():
    field = torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    for steps in (1, 7, 50):
        for shift in (1.0, 3.0):
            out = flow_sampler(lambda x, t: field, NOISE, num_steps=steps, shift=shift)
            torch.testing.assert_close(out, NOISE - field, rtol=0, atol=1e-6)


def test_shift_moves_steps_to_the_noisy_side():
    torch.testing.assert_close(flow_times(4), torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=torch.float64))
    torch.testing.assert_close(flow_times(4, shift=3.0), torch.tensor([1, 0.9, 0.75, 0.5, 0], dtype=torch.float64))


def test_a_denoiser_is_a_flow_and_back():
    x, t = NOISE.double(), torch.tensor(0.3, dtype=torch.float64)
    torch.testing.assert_close(as_velocity(denoise)(x, t), velocity(x, t))
    sigma = torch.tensor(2.0, dtype=torch.float64)
    torch.testing.assert_close(as_denoised(velocity)(x, sigma), denoise(x, sigma))


def test_every_sampler_runs_on_every_objective():
    exact = MEAN + STD * NOISE.double()
    for objective, predict in ((EDM(), denoise), (RectifiedFlow(), velocity)):
        for settings in ({"takes": "denoised"}, {"takes": "velocity", "solver": "heun", "t_start": None}, {}):
            probe = counted(predict)
            out = solve(objective, probe, NOISE, settings | {"num_steps": 100}, None)
            assert (out - exact).abs().max() < 0.03
            assert max(probe.times) == pytest.approx(80 if objective.predicts == "denoised" else 1, rel=0.02)


def test_guidance_means_the_same_on_a_denoiser_and_on_its_flow():
    other = lambda x, sigma: denoise(x, sigma) * 0.9  # noqa: E731
    x, t = NOISE.double(), torch.tensor(0.4, dtype=torch.float64)
    of_denoisers = as_velocity(guide(denoise, other, 1.7))(x, t)
    torch.testing.assert_close(of_denoisers, guide(as_velocity(denoise), as_velocity(other), 1.7)(x, t))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_steps": 0}, {"num_steps": 2.5}, {"sigma_min": 80, "sigma_max": 1}, {"sigma_min": 0}, {"sigma_min": "low"},
        {"rho": 0}, {"solver": "rk4"}, {"discretization": "cosine"}, {"schedule": "cosine"}, {"scaling": "ve"},
        {"takes": "score"}, {"takes": "velocity", "solver": "euler2"}, {"takes": "velocity", "shift": 0},
        {"takes": "velocity", "solver": "sde", "last_step": 0}, {"takes": "velocity", "t_start": 1.0},
        {"takes": "velocity", "t_start": 1.5}, {"discretization": "iddpm", "sigma_min": 1e-9, "sigma_max": 1e-8},
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(ValueError):
        solve(EDM(), denoise, NOISE, settings, None)

"""Samplers: from noise to latents, as functions of a predicting callable.

    edm_sampler   predict(x, sigma) -> denoised   EDM (arXiv 2206.00364): Heun or Euler over noise levels, with churn
    flow_sampler  predict(x, t) -> velocity       rectified flow: Euler, Heun, and SiT's SDE (arXiv 2401.08740)
    ddpm_sampler  predict(x, sigma) -> denoised   DDPM's ancestral steps (arXiv 2006.11239) and DDIM (arXiv 2010.02502)

Each runs on each kind of network: `solve` converts predictions by `as_velocity` and `as_denoised` where needed. A
denoiser's x is data + sigma noise, a flow's x_t is (1 - t) data + t noise: the same up to scale, with
t = sigma / (1 + sigma). Times are () float64 tensors on the CPU, so no step waits for the device.
"""

import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from randomness import Generators, normal
from system import UserError
from system.limits import STEPS
from system.settings import convert

VP_TIME_MIN = 1e-3  # epsilon_s, where the VP schedule reaches its lowest noise level; it reaches the highest at 1
VP_BETA_D, VP_BETA_MIN = 19.9, 0.1  # of the published VP schedule (EDM, Table 1)
# Lowest and highest noise level of each discretization (EDM, Table 1).
SIGMA_RANGES = {
    "edm": (0.002, 80.0),
    "vp": tuple(math.sqrt(math.expm1(VP_BETA_D * t**2 / 2 + VP_BETA_MIN * t)) for t in (VP_TIME_MIN, 1.0)),
    "ve": (0.02, 100.0),
    "iddpm": (0.002, 81.0),
}


def solve(objective, predict: Callable, noise: torch.Tensor, settings: dict, generators: Generators) -> torch.Tensor:
    """Latents (B, C, h, w) by the sampler of `settings` (configs/sampler/*.yaml; null = the sampler's default).

    settings["takes"] is the prediction that the sampler needs, "denoised" or "velocity" ("noise" for ddpm_sampler), and
    objective.predicts the one that the network makes. Without it the sampler is the objective's own. Raises UserError
    for unknown settings.
    """
    settings = {key: value for key, value in settings.items() if value is not None}
    takes = settings.pop("takes", objective.predicts)
    choose("sampler.takes", takes, ("denoised", "velocity", "noise"))
    samplers = {"denoised": edm_sampler, "velocity": flow_sampler, "noise": ddpm_sampler}
    own = takes == objective.predicts
    sampler = objective.sample if own else samplers[takes]
    settings = fitting(settings, sampler) | {"generators": generators}

    def plain(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:  # without the variance that a network has learned
        return predict(x, t)[:, : x.shape[1]]

    if takes == "noise":
        denoise = predict if objective.predicts == "denoised" else as_denoised(plain)
        return sampler(denoise, noise, **settings, alpha_bar=getattr(objective, "alpha_bar", None))
    if own:
        return sampler(plain, noise, **settings)
    if takes == "denoised":
        return sampler(as_denoised(plain), noise, **settings)
    settings = {"t_start": flow_time(80, "denoised")} | settings  # denoisers are trained for finite noise levels
    return sampler(as_velocity(plain), noise, **settings)


def fitting(settings: dict, sampler: Callable) -> dict:
    """The settings, as the sampler annotates them. Raises UserError for those that it does not have."""
    given = {"generators", "alpha_bar"}  # by `solve`
    parameters = [p for p in inspect.signature(sampler).parameters.values() if p.kind == p.KEYWORD_ONLY]
    known = {p.name: p.annotation for p in parameters if p.name not in given}
    if unknown := sorted(settings.keys() - known):
        raise UserError(f"unknown key sampler.{unknown[0]}; needed: {', '.join(known)}")
    infinite = {key: math.inf for key, value in settings.items() if value in ("inf", math.inf)}
    return {key: convert(settings[key], known[key], f"sampler.{key}") for key in settings.keys() - infinite} | infinite


def as_velocity(denoise: Callable) -> Callable:
    """A denoiser as a flow: v = (x_t - D(x_t / (1 - t); t / (1 - t))) / t, for t in (0, 1), else UserError."""

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if not 0 < t < 1:
            raise UserError(f"a denoiser has no velocity at t={float(t):g}; needed: sampler.t_start < 1, say 0.987")
        return (x - denoise(x / (1 - t), t / (1 - t))) / t

    return velocity


def as_denoised(velocity: Callable) -> Callable:
    """A flow as a denoiser: at t = sigma / (1 + sigma), x_t = x / (1 + sigma) and D = x_t - t v(x_t, t)."""

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        t = flow_time(sigma, "denoised")
        x_t = x / (1 + sigma)
        return x_t - t * velocity(x_t, t)

    return denoise


def flow_time(t, predicts: str):
    """A network's time as a flow's, 1 (noise) to 0 (data): a flow's own t, or a denoiser's sigma / (1 + sigma)."""
    return t / (1 + t) if predicts == "denoised" else t


def edm_sampler(
    predict: Callable,  # predict(x, sigma) -> denoised
    noise: torch.Tensor,  # (B, C, h, w), N(0, 1)
    *,
    num_steps: int = 40,
    solver: str = "heun",  # or euler
    discretization: str = "edm",  # of the noise levels: edm, vp, ve, iddpm
    schedule: str = "linear",  # sigma(t): linear, vp, ve
    scaling: str = "none",  # s(t): none, or vp = 1 / sqrt(1 + sigma^2)
    sigma_min: float | None = None,  # None = by discretization
    sigma_max: float | None = None,
    rho: float = 7.0,  # of discretization edm
    S_churn: float = 0.0,  # > 0 = stochastic; drawn from `generators`
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    generators: Generators = None,
) -> torch.Tensor:
    """Steps from sigma_max to 0 (Algorithms 1 and 2, with Table 1's choices) -> latents (B, C, h, w) float32.

    Calls of `predict`: 2 * num_steps - 1 for heun (second order), num_steps for euler (first order). The state is
    float64 where the device supports it. Raises UserError for unknown settings.
    """
    choose("solver", solver, ("heun", "euler"))
    choose("scaling", scaling, ("none", "vp"))
    choose("discretization", discretization, SIGMA_RANGES)
    S_max, ends = number("S_max", S_max), SIGMA_RANGES[discretization]
    low = number("sigma_min", ends[0] if sigma_min is None else sigma_min)
    high = number("sigma_max", ends[1] if sigma_max is None else sigma_max)
    if not 0 < low < high < math.inf:
        raise UserError(f"sigma_min {low:g}, sigma_max {high:g}; needed: 0 < sigma_min < sigma_max")
    sigmas = noise_levels(num_steps, discretization, low, high, rho)
    noise_schedule = schedule_named(schedule, low, high)
    t_steps = torch.cat([noise_schedule.time(sigmas), sigmas.new_zeros(1)])  # (num_steps + 1,)

    def size(sigma: torch.Tensor) -> torch.Tensor:
        return (1 + sigma**2).rsqrt() if scaling == "vp" else torch.ones_like(sigma)

    def slope(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:  # dx/dt (Eq. 4)
        sigma, rate = noise_schedule.sigma(t), noise_schedule.rate(t)
        shrink = sigma * rate / (1 + sigma**2) if scaling == "vp" else 0.0  # - s'(t) / s(t)
        return (rate / sigma - shrink) * x - rate * size(sigma) / sigma * predict(x / size(sigma), sigma)

    x = state(noise) * sigmas[0] * size(sigmas[0])
    for t, t_next in zip(t_steps, t_steps[1:]):
        sigma = noise_schedule.sigma(t)
        if S_churn > 0 and S_min <= sigma <= S_max:
            raised = sigma * (1 + min(S_churn / num_steps, math.sqrt(2) - 1))
            added = normal(x.shape, generators, device=x.device) * S_noise
            x = size(raised) * (x / size(sigma) + (raised**2 - sigma**2).sqrt() * added)
            t = noise_schedule.time(raised)
        step, first = t_next - t, slope(x, t)
        x_next = x + step * first
        if solver == "heun" and t_next > 0:
            x_next = x + step * (first + slope(x_next, t_next)) / 2
        x = x_next
    return x.float()


def noise_levels(num_steps: int, discretization: str, low: float, high: float, rho: float = 7.0) -> torch.Tensor:
    """Noise levels from high to low (Table 1, "Time steps"): (num_steps,) float64. Raises UserError."""
    check_steps(num_steps)
    if not rho > 0:
        raise UserError(f"rho {rho:g}; needed: above 0")
    ramp = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    if discretization == "edm":
        return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    if discretization == "ve":
        return high * (low / high) ** ramp
    if discretization == "vp":
        return schedule_named("vp", low, high).sigma(1 + ramp * (VP_TIME_MIN - 1))
    levels = iddpm_levels()
    if not len(levels := levels[(levels >= low) & (levels <= high)]):
        raise UserError(f"iddpm has no noise level between sigma_min {low:g} and sigma_max {high:g}")
    return levels[((len(levels) - 1) * ramp).round().long()]


def iddpm_levels(M: int = 1000, C_1: float = 0.001, C_2: float = 0.008) -> torch.Tensor:
    """The M noise levels of improved DDPM's cosine schedule, descending (Table 1): u_M = 0, u_(j-1) from u_j."""
    alpha_bar = [math.sin(math.pi / 2 * j / (M * (C_2 + 1))) ** 2 for j in range(M + 1)]
    levels = [0.0]
    for j in range(M, 0, -1):
        levels.append(math.sqrt((levels[-1] ** 2 + 1) / max(alpha_bar[j - 1] / alpha_bar[j], C_1) - 1))
    return torch.tensor(levels[:0:-1], dtype=torch.float64)


class NoiseSchedule(NamedTuple):
    """sigma(t), its derivative and its inverse t(sigma) (Table 1, "Schedule")."""

    sigma: Callable
    rate: Callable
    time: Callable


def schedule_named(name: str, low: float, high: float) -> NoiseSchedule:
    """linear, vp or ve; vp's betas are those that reach the noise levels `low` and `high`. Raises UserError."""
    choose("schedule", name, ("linear", "vp", "ve"))
    if name == "linear":
        return NoiseSchedule(lambda t: t, torch.ones_like, lambda sigma: sigma)
    if name == "ve":
        return NoiseSchedule(lambda t: t.sqrt(), lambda t: 0.5 / t.sqrt(), lambda sigma: sigma**2)
    log_min, log_max = math.log1p(low**2), math.log1p(high**2)
    beta_d = 2 * (log_min / VP_TIME_MIN - log_max) / (VP_TIME_MIN - 1)
    beta_min = log_max - beta_d / 2

    def sigma_of(t: torch.Tensor) -> torch.Tensor:
        return torch.expm1(beta_d * t**2 / 2 + beta_min * t).sqrt()

    return NoiseSchedule(
        sigma_of,
        lambda t: (beta_min + beta_d * t) * (sigma_of(t) + 1 / sigma_of(t)) / 2,
        lambda sigma: ((beta_min**2 + 2 * beta_d * torch.log1p(sigma**2)).sqrt() - beta_min) / beta_d,
    )


def flow_sampler(
    predict: Callable,  # predict(x, t) -> velocity
    noise: torch.Tensor,  # (B, C, h, w), N(0, 1)
    *,
    num_steps: int = 50,
    solver: str = "euler",  # or heun; or sde = SiT's Euler-Maruyama, drawn from `generators`
    shift: float = 1.0,  # t -> shift t / (1 + (shift - 1) t); > 1 = more steps near noise
    t_start: float = 1.0,  # the first time; the state starts as t_start * noise
    last_step: float = 0.04,  # of sde: length of the final step, which adds no noise
    generators: Generators = None,
) -> torch.Tensor:
    """Steps from t = t_start to 0 -> latents (B, C, h, w) float32.

    Calls of `predict`: num_steps, or 2 * num_steps - 1 for heun. The SDE's diffusion coefficient is w(t) = t; a drift
    along the score compensates it, so the marginals are the flow's. The state is float64 where the device supports it.
    Raises UserError for unknown settings.
    """
    choose("solver", solver, ("euler", "heun", "sde"))
    if not 0 < number("t_start", t_start) <= 1:
        raise UserError(f"t_start {t_start}; needed: in (0, 1]")
    t_steps = t_start * flow_times(num_steps, shift, last_step if solver == "sde" else None)
    x = state(noise) * t_start
    for t, t_next in zip(t_steps, t_steps[1:]):
        step, velocity = t_next - t, predict(x, t)
        if solver == "sde":
            expected_noise = x + (1 - t) * velocity  # E[z | x_t] = -t score
            x = x + step * (velocity + expected_noise)
            if t_next > 0:
                x = x + (-2 * t * step).sqrt() * normal(x.shape, generators, device=x.device)
        elif solver == "heun" and t_next > 0:
            x = x + step * (velocity + predict(x + step * velocity, t_next)) / 2
        else:
            x = x + step * velocity
    return x.float()


def flow_times(num_steps: int, shift: float = 1.0, last_step: float | None = None) -> torch.Tensor:
    """Times 1..0, equally spaced before the shift, the last step `last_step` if given: (num_steps + 1,) float64."""
    check_steps(num_steps)
    if not 0 < shift < math.inf:
        raise UserError(f"shift {shift:g}; needed: above 0")
    t = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    if last_step is not None and num_steps > 1:
        if not 0 < last_step < 1:
            raise UserError(f"last_step {last_step}; needed: in (0, 1)")
        t[:-1] = torch.linspace(1, last_step / (shift - (shift - 1) * last_step), num_steps, dtype=torch.float64)
    return shifted(t, shift)


def shifted(t: torch.Tensor, shift: float) -> torch.Tensor:
    """Times in [0, 1], towards noise (1) for shift > 1 (arXiv 2403.03206, Eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def linear_alpha_bar(num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> torch.Tensor:
    """prod(1 - beta) over a linear schedule (arXiv 2006.11239, Section 4): (num_steps,) float64, falling."""
    check_steps(num_steps)
    return torch.cumprod(1 - torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64), dim=0)


def ddpm_sampler(
    predict: Callable,  # predict(x, sigma) -> denoised (B, C, h, w), or with a learned variance after it (B, 2 C, h, w)
    noise: torch.Tensor,  # (B, C, h, w), N(0, 1)
    *,
    num_steps: int = 250,
    solver: str = "ancestral",  # drawn from `generators`; or ddim, deterministic
    variance: str | None = None,  # of ancestral: small (beta tilde), large (beta), learned; None = learned, if there
    spacing: str = "even",  # of the steps taken among those trained: even, as official DiT; leading, as diffusers
    alpha_bar: torch.Tensor | None = None,  # of the steps trained, (K,); None = linear_alpha_bar()
    generators: Generators = None,
) -> torch.Tensor:
    """Steps over some of the noise levels of DDPM's training -> latents (B, C, h, w) float32.

    Calls of `predict`: num_steps. A step goes from a to a' > a (alpha_bar), x = sqrt(a) data + sqrt(1 - a) eps, to

        x' = sqrt(a') D + sqrt(1 - a' - v) eps + noise,    v = (1 - a') / (1 - a) beta,    beta = 1 - a / a'

    which has the posterior's mean (arXiv 2006.11239, Eq. 7); ddim has v = 0. The noise has variance v (small), beta
    (large), or one between their logarithms that the network has learned (arXiv 2102.09672, Eq. 15). The last step adds
    none. The state is float64 where the device supports it. Raises UserError for unknown settings.
    """
    choose("solver", solver, ("ancestral", "ddim"))
    choose("variance", variance or "small", ("learned", "small", "large"))
    alpha_bar = linear_alpha_bar() if alpha_bar is None else alpha_bar
    levels = torch.cat([alpha_bar[step_indices(num_steps, len(alpha_bar), spacing)], alpha_bar.new_ones(1)])
    x, channels = state(noise), noise.shape[1]
    for a, a_next in zip(levels, levels[1:]):
        sigma = ((1 - a) / a).sqrt()
        prediction = predict(x / a.sqrt(), sigma)
        denoised, learned = prediction[:, :channels].to(x.dtype), prediction[:, channels:].to(x.dtype)
        eps = (x - a.sqrt() * denoised) / (1 - a).sqrt()
        beta = 1 - a / a_next
        small = beta * (1 - a_next) / (1 - a) if solver == "ancestral" else torch.zeros_like(a)
        x = a_next.sqrt() * denoised + (1 - a_next - small).sqrt() * eps
        if solver == "ancestral" and a_next < 1:
            if variance == "learned" and not learned.shape[1]:
                raise UserError("variance=learned: the network has no learned variance; needed: small, large or null")
            if variance in ("small", "large") or not learned.shape[1]:
                log_variance = (beta if variance == "large" else small).log()
            else:
                fraction = (learned + 1) / 2
                log_variance = fraction * beta.log() + (1 - fraction) * small.log()
            x = x + (log_variance / 2).exp() * normal(x.shape, generators, device=x.device)
    return x.float()


def step_indices(num_steps: int, trained: int, spacing: str) -> torch.Tensor:
    """Those of the trained steps 0..trained - 1 that are taken, from the last: (num_steps,). Raises UserError."""
    check_steps(num_steps)
    choose("spacing", spacing, ("even", "leading"))
    if num_steps > trained:
        raise UserError(f"num_steps {num_steps}; needed: at most the {trained} steps of training")
    if spacing == "leading":
        return torch.arange(num_steps).flip(0) * (trained // num_steps)
    order = torch.arange(num_steps, dtype=torch.float64).flip(0)
    return (order * ((trained - 1) / max(num_steps - 1, 1))).round().long()


def broadcast_t(t: torch.Tensor | float, x: torch.Tensor) -> torch.Tensor:
    """t as (B,) float32 on x's device. A number or a CPU scalar needs no copy that the host would wait for."""
    if not isinstance(t, torch.Tensor) or t.ndim == 0 and t.device.type == "cpu":
        return torch.full((len(x),), float(t), dtype=torch.float32, device=x.device)
    return t.float().expand(len(x))


def state(noise: torch.Tensor) -> torch.Tensor:
    """A sampler's state: float64, except on Apple's GPUs, which lack it."""
    return noise.to(torch.float32 if noise.device.type == "mps" else torch.float64)


def check_steps(num_steps: int) -> None:
    if not isinstance(num_steps, int) or not 1 <= num_steps <= STEPS:
        raise UserError(f"num_steps {num_steps}; needed: a whole number in 1..{STEPS}")


def number(name: str, value: float | str) -> float:
    """A setting that may come as a word, such as inf. Raises UserError where it is not a number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"{name} {value!r}; needed: a number") from None


def choose(name: str, value: str, choices) -> None:
    if value not in choices:
        raise UserError(f"{name} {value!r}; needed: {', '.join(choices)}")

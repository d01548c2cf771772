"""EDM (arXiv 2206.00364): training of a denoiser D(x; sigma) and its sampler. Equations and tables are that paper's.

x is clean data, sigma the noise level, x_t = x + sigma * noise. The network sees c_noise = ln(sigma) / 4 as its time.
"""

import math
from collections.abc import Callable

import torch

from randomness import Generators, normal


class EDM:
    """Denoising with preconditioning. P_mean, P_std: ln(sigma) ~ N(P_mean, P_std^2) in training; sigma_data: std of x."""

    def __init__(self, P_mean: float = -1.2, P_std: float = 1.2, sigma_data: float = 0.5):
        self.P_mean, self.P_std, self.sigma_data = P_mean, P_std, sigma_data

    def loss(self, net: Callable, x: torch.Tensor, y: torch.Tensor, generator: Generators = None) -> torch.Tensor:
        """Weighted squared error of the denoiser, a number for each sample (Eq. 5-7): x (B, C, h, w), y (B,) -> (B,)."""
        sigma = (self.P_mean + self.P_std * normal((len(x),), generator, device=x.device)).exp()  # (B,)
        noise = normal(x.shape, generator, device=x.device)
        denoised = self.predict(net, x + noise * _column(sigma), sigma, y)
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        return weight * (denoised - x).square().flatten(1).mean(dim=1)

    def predict(self, net: Callable, x_t: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """D(x_t; sigma) (Table 1): x_t (B, C, h, w), t = sigma, () or (B,), y (B,) -> denoised (B, C, h, w) float32.

        `net(x, t, y)`: a network with its routing bound, if any; channels past C (learned sigma) are not used.
        """
        x_t = x_t.float()
        sigma = times(t, x_t)  # (B,)
        variance = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = sigma * self.sigma_data / variance.sqrt()
        c_in = 1 / variance.sqrt()
        out = net(_column(c_in) * x_t, sigma.log() / 4, y)[:, : x_t.shape[1]].float()
        return _column(c_skip) * x_t + _column(c_out) * out

    def sample(
        self,
        predict: Callable,                          # predict(x, sigma) -> denoised; sigma is a () float64 tensor on the CPU
        noise: torch.Tensor,                        # (B, C, h, w), N(0, 1)
        *,
        num_steps: int = 40,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        S_churn: float = 0.0,                       # > 0 = stochastic; drawn from `generators`
        S_min: float = 0.0,
        S_max: float = math.inf,
        S_noise: float = 1.0,
        generators: Generators = None,
    ) -> torch.Tensor:
        """Heun's second-order steps from sigma_max to 0 (Algorithms 1 and 2) -> latents (B, C, h, w) float32.

        2 * num_steps - 1 calls of `predict`. The state is float64 where the device has it.
        """
        sigmas = karras_sigmas(num_steps, sigma_min, sigma_max, rho)
        x = noise.to(state_dtype(noise.device)) * sigmas[0]
        for sigma, sigma_next in zip(sigmas, sigmas[1:]):
            if S_churn > 0 and S_min <= sigma <= S_max:
                gamma = min(S_churn / num_steps, math.sqrt(2) - 1)
                sigma_hat = sigma * (1 + gamma)
                added = normal(x.shape, generators, device=x.device) * S_noise
                x = x + (sigma_hat**2 - sigma**2).sqrt() * added
                sigma = sigma_hat
            slope = (x - predict(x, sigma)) / sigma
            x_next = x + (sigma_next - sigma) * slope
            if sigma_next > 0:
                slope_next = (x_next - predict(x_next, sigma_next)) / sigma_next
                x_next = x + (sigma_next - sigma) * (slope + slope_next) / 2
            x = x_next
        return x.float()


def karras_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> torch.Tensor:
    """Noise levels sigma_max..sigma_min and a final 0 (Eq. 5): (num_steps + 1,) float64."""
    if num_steps < 1 or not 0 < sigma_min < sigma_max:
        raise ValueError(
            f"needed: num_steps >= 1 and 0 < sigma_min < sigma_max; got {num_steps}, {sigma_min}, {sigma_max}"
        )
    ramp = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def times(t: torch.Tensor | float, x: torch.Tensor) -> torch.Tensor:
    """t as (B,) float32 beside x. A number or a CPU scalar is filled in on the device, without a wait for it."""
    if not isinstance(t, torch.Tensor) or t.ndim == 0 and t.device.type == "cpu":
        return torch.full((len(x),), float(t), dtype=torch.float32, device=x.device)
    return t.float().expand(len(x))


def state_dtype(device: torch.device) -> torch.dtype:
    """What a sampler keeps its state in: float64, which Apple's GPUs lack."""
    return torch.float32 if device.type == "mps" else torch.float64


def _column(per_sample: torch.Tensor) -> torch.Tensor:
    return per_sample.view(-1, 1, 1, 1)

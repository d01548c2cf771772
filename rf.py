"""Rectified flow (arXiv 2209.03003, 2401.08740): training of a velocity field and its sampler; demos on the command line.

x_t = (1 - t) x + t z with noise z ~ N(0, 1): t = 0 is data, t = 1 is noise, and the velocity to learn is z - x.

    python rf.py sample ckpt=runs/mnist-tread-rf                          plain, or classifier-free with scale=1.5
    python rf.py sample_tread ckpt=runs/mnist-tread-rf scale=1.5 gamma_strong=0.2 gamma_weak=0.7
"""

import sys
from collections.abc import Callable

import torch

from edm import state_dtype, times
from randomness import Generators, normal, uniform


class RectifiedFlow:
    """timesteps: how t is drawn in training, "uniform" (SiT) or "logit_normal" (arXiv 2403.03206: sigmoid of N(0, 1))."""

    def __init__(self, timesteps: str = "logit_normal"):
        if timesteps not in ("uniform", "logit_normal"):
            raise ValueError(f"timesteps {timesteps!r}; needed: uniform or logit_normal")
        self.timesteps = timesteps

    def loss(self, net: Callable, x: torch.Tensor, y: torch.Tensor, generator: Generators = None) -> torch.Tensor:
        """Squared error of the velocity, a number for each sample: x (B, C, h, w), y (B,) -> (B,)."""
        if self.timesteps == "uniform":
            t = uniform((len(x),), generator, device=x.device)  # (B,)
        else:
            t = normal((len(x),), generator, device=x.device).sigmoid()  # (B,)
        noise = normal(x.shape, generator, device=x.device)
        x_t = x + t.view(-1, 1, 1, 1) * (noise - x)
        velocity = self.predict(net, x_t, t, y)
        return (velocity - (noise - x)).square().flatten(1).mean(dim=1)

    def predict(self, net: Callable, x_t: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """v(x_t, t): x_t (B, C, h, w), t in [0, 1], () or (B,), y (B,) -> velocity (B, C, h, w) float32.

        `net(x, t, y)`: a network with its routing bound, if any; channels past C (learned sigma) are not used.
        """
        return net(x_t.float(), times(t, x_t), y)[:, : x_t.shape[1]].float()

    def sample(
        self,
        predict: Callable,                          # predict(x, t) -> velocity; t is a () float64 tensor on the CPU
        noise: torch.Tensor,                        # (B, C, h, w), N(0, 1)
        *,
        num_steps: int = 50,
    ) -> torch.Tensor:
        """Euler from t = 1 to t = 0 in equal steps -> latents (B, C, h, w) float32. num_steps calls of `predict`."""
        if num_steps < 1:
            raise ValueError(f"num_steps {num_steps}; needed: at least 1")
        x = noise.to(state_dtype(noise.device))
        t_steps = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        for t, t_next in zip(t_steps, t_steps[1:]):
            x = x + (t_next - t) * predict(x, t)
        return x.float()


def main(argv: list[str]) -> None:
    """`sample` and `sample_tread`: sample.py for runs trained with objective=rf, the second with sparse guidance."""
    import cli
    import sample

    with cli.user_errors():
        verb, overrides = cli.verb(argv, __doc__, ("sample", "sample_tread"))
        sample.main(overrides, preset="sparse" if verb == "sample_tread" else "none", objective="rf.RectifiedFlow")


if __name__ == "__main__":
    main(sys.argv[1:])

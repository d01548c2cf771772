"""What a network and an objective bring, so that everything else of this repository works with them."""

from collections.abc import Callable, Collection
from copy import copy
from dataclasses import dataclass

import torch
from torch import nn

from conditions import Condition
from routing_module import Route, Routing, Source

MIDDLE = "middle"  # in `hidden`: what the middle head predicts


class Network(nn.Module):
    """A denoiser of latents: ten members. `net.training` decides nothing.

    routes: spans of blocks that some tokens bypass; () = none. num_tokens: N. latent_shape: (C, h, w) of x.
    name: a short word for run folders, such as XS4. null_condition: what stands for "no condition": a batch of one. Of
        texts, the empty caption is put there if the data has its states.
    all_blocks: the modules that are compiled, each on its own. Those that `routing_module.run_blocks` calls are
        recomputed in the backward pass where their attribute `recompute` is set. Muon takes their 2-D weights, but not
        those of submodules that their attribute `left_to_adamw` names: what the condition alone feeds, and the output.
        Where their attribute `keeps_fp32` is set, sampling in bf16 leaves their weights as they are.
    A network may have a second head: `middle_head` is the number of the block that it comes after.
    """

    routes: tuple[Route, ...] = ()
    num_tokens: int
    latent_shape: tuple[int, int, int]
    name: str
    null_condition: Condition
    all_blocks: tuple[nn.Module, ...]
    middle_head = None

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, condition: Condition, *, routing: Routing | None = None,
        hidden: Collection[int | str] = (),
    ) -> torch.Tensor | tuple[torch.Tensor, dict]:  # fmt: skip
        """x (B, C, h, w), t (B,) in the objective's units -> (B, C_out, h, w): the prediction is the first C channels.

        routing: None = dense. hidden: numbers of blocks, whose tokens come second: {number: (tokens (B, K, D), keep_ids
        (B, K), or None where all were kept)}. MIDDLE among them: the middle head's prediction (B, C_out, h, w), and the
        pixels that it has seen, (B, 1, h, w) of 0 and 1, or None for all.
        """
        raise NotImplementedError

    def macs(self, routing: Routing | None = None) -> int:
        """Multiply-adds of one call at batch 1. Raises ValueError for a routing that the network does not have."""
        raise NotImplementedError

    def training_routing(self, batch_size: int, generators: Source, device: torch.device) -> Routing:
        """How one training step is routed. What is drawn here is drawn before the noise."""
        return Routing(generators=generators)

    def reduce(
        self, error: torch.Tensor, x_t: torch.Tensor, denoised: torch.Tensor, routing: Routing | None
    ) -> torch.Tensor:
        """Of what `Objective.errors` returns, (B, C, h, w) each, the loss per sample (B,): the mean over all pixels."""
        return pixel_mean(error)


class Objective:
    """What a network learns. predicts: "denoised" (t is sigma) or "velocity" (t is a flow's time). sigma_data: the
    standard deviation that it expects of the latents. sample: a function of solvers.py. cosine: weight of a term of
    `errors` that a middle head's are without."""

    predicts: str
    sigma_data: float
    sample: Callable
    cosine: float = 0.0

    def errors(
        self, net: Callable, x: torch.Tensor, condition: Condition, generators: Source = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of clean latents x (B, C, h, w): (weighted squared error, noisy input, estimate of x), (B, C, h, w) each.

        net(x, t, condition): the network, with its routing bound.
        """
        raise NotImplementedError

    def predict(self, net: Callable, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        """The prediction at x_t (B, C, h, w) and t, () or (B,) -> (B, C, h, w) float32."""
        raise NotImplementedError

    def noise_share(self, t: torch.Tensor) -> torch.Tensor | None:
        """The network's own time t (B,) on a scale from 0 = data to 1 = noise, (B,), on which validation has five bins;
        None = it has none."""
        return None


@dataclass(frozen=True)
class Loss:
    """The loss of each sample in a step: the objective's error, reduced by the network, and what is added to it.

    net: the network, in DDP for several processes, or an `alignment.Aligned` of it, whose "loss" is added.
    middle_weight: of the middle head's error (arXiv 2512.24176), a mean over the pixels that it has seen.
    """

    net: Callable
    network: Network
    objective: Objective
    middle_weight: float = 0.5

    def __call__(
        self, x: torch.Tensor, condition: Condition, generators: Source, routing: Routing | None,
        *features: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """x (B, C, h, w) and its condition -> (B,). features: a teacher's (B, N, D_t), where `net` takes them."""
        found, hidden = {}, [MIDDLE] if self.network.middle_head is not None and self.middle_weight > 0 else []

        def net(x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
            out = self.net(x_t, t, condition, *features, routing=routing, hidden=hidden)
            out, states = out if isinstance(out, tuple) else (out, {})
            found.update(states)
            return out

        generator = getattr(generators, "generator", generators)
        before = generator.get_state() if hidden else None
        loss = self.network.reduce(*self.objective.errors(net, x, condition, generators), routing)  # (B,)
        if hidden:
            generator.set_state(before)  # for the same noise
            prediction, seen = found[MIDDLE]
            objective = copy(self.objective)
            objective.cosine = 0.0  # as published (arXiv 2512.24176), the squared error alone
            error, *_ = objective.errors(lambda *_: prediction, x, condition, generators)
            mean = pixel_mean(error) if seen is None else pixel_mean(error * seen) / pixel_mean(seen)
            loss = loss + self.middle_weight * mean
        return loss + found["loss"] if "loss" in found else loss


def weighted(squared: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """squared (B, C, h, w) times weight (B,). Its `pixel_mean` weighs the mean: one rounding a sample, not a pixel."""
    error = squared * weight.view(-1, 1, 1, 1)
    error.factors = squared, weight
    return error


def pixel_mean(error: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B,)."""
    squared, weight = getattr(error, "factors", (error, None))
    mean = squared.flatten(1).mean(dim=1)
    return mean if weight is None else weight * mean


def muon_matrices(net: Network) -> list[nn.Parameter]:
    """What Muon takes, in the network's order: the 2-D weights of `all_blocks`, but not those `left_to_adamw`."""
    taken = set()
    for block in net.all_blocks:
        left = tuple(f"{name}." for name in getattr(block, "left_to_adamw", ()))
        taken |= {p for name, p in block.named_parameters() if p.ndim == 2 and not name.startswith(left)}
    return [p for p in net.parameters() if p in taken]


def check_members(net: Network) -> None:
    """Raises ValueError with the members of the contract that a network lacks."""
    lacking = [name for name in Network.__annotations__ if not hasattr(net, name)]
    lacking += [name for name in ("forward", "macs") if getattr(type(net), name) is getattr(Network, name)]
    if lacking:
        raise ValueError(f"{type(net).__name__} lacks {', '.join(lacking)}; needed: every member of contracts.Network")

"""Non-finite steps: where a gradient on any process is NaN or infinite, no process updates its weights.

The optimizer's `found_inf` decides on the device, alike on all processes; the host learns of it with the log line.
"""

import torch


class FiniteGuard:
    """mode "stop": nothing is updated from the first bad step on, until the host sees it and ends the run.
    mode "skip": only the bad step is left out, and counted."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, mode: str):
        self.mode = mode
        self.count = torch.zeros((), device=device)  # bad steps so far
        self.first = torch.zeros((), device=device)  # the first of them; 0 = none
        self.found = torch.zeros((), device=device)
        optimizer.found_inf = self.found  # the optimizer changes nothing where this is 1

    def check(self, grad_norm: torch.Tensor, step: int) -> torch.Tensor:
        """Before the optimizer's step -> whether this step is finite, () bool on the device."""
        good = grad_norm.isfinite()
        self.first += step * (~good & (self.count == 0))
        self.count += ~good
        self.found.copy_(self.count > 0 if self.mode == "stop" else ~good)
        return good

"""Steps that change nothing: where the gradient is not finite, on any process, no process updates its weights.

The decision is made on the device, by the fused optimizer's `found_inf`, so it costs no wait; the host learns of it
when it next reads the log values. The gradients that are looked at are the mean over all processes, so all decide
alike.
"""

import torch


class FiniteGuard:
    """mode "stop": nothing is updated from the first bad step on, until the host sees it and ends the run.
    mode "skip": the bad step alone is left out, and counted."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, mode: str):
        if mode not in ("stop", "skip"):
            raise ValueError(f"train.on_nonfinite={mode}; needed: stop or skip")
        self.mode = mode
        self.count = torch.zeros((), device=device)  # bad steps so far
        self.first = torch.zeros((), device=device)  # the first of them; 0 = none
        self.found = torch.zeros((), device=device)
        optimizer.found_inf = self.found  # fused AdamW leaves everything as it is where this is 1

    def check(self, grad_norm: torch.Tensor, step: int) -> torch.Tensor:
        """Before the optimizer's step -> whether this step is good, () bool on the device."""
        good = grad_norm.isfinite()
        self.first += step * (~good & (self.count == 0))
        self.count += ~good
        self.found.copy_(self.count > 0 if self.mode == "stop" else ~good)
        return good

"""Temporary: replaced by the data branch."""
from typing import NamedTuple

import torch


class Text(NamedTuple):
    states: torch.Tensor
    mask: torch.Tensor


Condition = torch.Tensor | Text | None

"""Stands in for Inception's weights, which tests cannot fetch: random numbers in torch-fidelity's layout."""

import functools
import io
import math

import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from evaluation import inception
from system.files import sha256_of


class Unloaded(FeatureExtractorInceptionV3):
    def load_state_dict(self, state_dict):
        """Leaves PyTorch's initial numbers."""


@functools.cache
def made_state() -> dict[str, torch.Tensor]:
    """Of a size that keeps activations near one through all layers."""
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    state = Unloaded("inception-v3-compat", ["2048"], feature_extractor_weights_path=empty).state_dict()
    generator = torch.Generator().manual_seed(0)
    for key, tensor in state.items():
        if key.endswith("conv.weight"):
            tensor.normal_(0, math.sqrt(2 / tensor[0].numel()), generator=generator)
        elif key.endswith("bn.bias"):
            tensor.normal_(0, 0.1, generator=generator)
        elif key == "fc.weight":
            tensor.normal_(0, 0.15, generator=generator)  # classes differ from picture to picture
    return dict(state)


def write_made_weights(folder) -> tuple:
    """(path, sha256) of a file with `made_state`."""
    path = folder / inception.URL.rpartition("/")[2]
    torch.save(made_state(), path)
    return path, sha256_of(path)


def noise(n: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    """uint8 (n, 3, size, size)."""
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)

"""Weights of the 2015 Inception network, in whose features FID is defined, under the names of torch-fidelity's port.

Two files hold them: torch-fidelity's state dict and NVIDIA's TorchScript archive, which ADM's PyTorch ports use. Both
are known by their sha256. Neither runs code: the first is read with weights_only, of the second only tensors are used.
"""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch

from system import UserError

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
STATE_DICT = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
TORCHSCRIPT = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
TRUE_WEIGHTS = {STATE_DICT: "torch-fidelity", TORCHSCRIPT: "NVIDIA"}  # distances in their features are FIDs

# NVIDIA's names of the convolutions, in the order of torch-fidelity's.
A = "conv tower.conv tower.conv_1 tower_1.conv tower_1.conv_1 tower_1.conv_2 tower_2.conv"
B = "conv tower.conv tower.conv_1 tower.conv_2"
C = (
    "conv tower.conv tower.conv_1 tower.conv_2 "
    "tower_1.conv tower_1.conv_1 tower_1.conv_2 tower_1.conv_3 tower_1.conv_4 tower_2.conv"
)
D = "tower.conv tower.conv_1 tower_1.conv tower_1.conv_1 tower_1.conv_2 tower_1.conv_3"
E = (
    "conv tower_conv tower_mixed_conv tower_mixed_conv_1 "
    "tower_1_conv tower_1_conv_1 tower_1_mixed_conv tower_1_mixed_conv_1 tower_2_conv"
)
BLOCKS = zip(("mixed", *(f"mixed_{i}" for i in range(1, 11))), (A, A, A, B, C, C, C, C, D, E, E))
CONVOLUTIONS = ["layers.conv", *(f"layers.conv_{i}" for i in range(1, 5))]
CONVOLUTIONS += [f"layers.{block}.{name}" for block, names in BLOCKS for name in names.split()]
LEAVES = {"weight": "conv.weight", "beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}


def published_weights() -> Path:
    """torch-fidelity's, downloaded once into torch's cache. Raises UserError, naming the file and its place."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / URL.rpartition("/")[2]
    if not cached.is_file():
        cached.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL, str(cached), hash_prefix=STATE_DICT)
        except (OSError, RuntimeError):
            raise UserError(
                f"no Inception weights, and no download: put {URL} at {cached}, or give extractor_weights=FILE"
            ) from None
    return cached


def load(path: Path, layers: list[str]) -> torch.nn.Module:
    """torch-fidelity's network with the weights of either published file, which returns a tuple of `layers`.

    Raises UserError for any other file.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):  # the constructor unpickles a file: an empty one of our own
        def load_state_dict(self, state: dict) -> None: ...

    torch.save({}, empty := io.BytesIO())
    empty.seek(0)
    net = Unloaded("inception-v3-compat", layers, feature_extractor_weights_path=empty)
    try:
        if zipfile.is_zipfile(path) and any("/code/" in name for name in zipfile.ZipFile(path).namelist()):
            nvidias = torch.jit.load(path, map_location="cpu").state_dict()
            state = dict(_translate(nvidias, convolutions(net.state_dict())))
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, KeyError, EOFError, UnpicklingError) as error:
        reason = f"cannot be read without running code ({type(error).__name__})"
        raise UserError(f"{path} holds no Inception weights, or {reason}") from None
    try:
        torch.nn.Module.load_state_dict(net, state)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: these are not Inception's weights: {' '.join(str(error).split())[:200]}") from None
    return net


def convolutions(state: dict[str, torch.Tensor]) -> dict[str, str]:
    """{NVIDIA's name: torch-fidelity's name} of each convolution, from torch-fidelity's state dict."""
    own = [key.removesuffix(".conv.weight") for key in state if key.endswith(".conv.weight")]
    return dict(zip(CONVOLUTIONS, own, strict=True))


def _translate(theirs: dict[str, torch.Tensor], names: dict[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """NVIDIA's tensors under torch-fidelity's names. Their batch norms have no scale: it is one."""
    for name, own in names.items():
        for leaf, key in LEAVES.items():
            yield f"{own}.{key}", theirs[f"{name}.{leaf}"]
        yield f"{own}.bn.weight", torch.ones_like(theirs[f"{name}.beta"])
        yield f"{own}.bn.num_batches_tracked", torch.tensor(0)
    yield from ((f"fc.{leaf}", theirs[f"output.{leaf}"]) for leaf in ("weight", "bias"))

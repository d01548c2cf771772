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

# Names of the convolutions, NVIDIA's: torch-fidelity's.
STEM = {
    "conv": "Conv2d_1a_3x3", "conv_1": "Conv2d_2a_3x3", "conv_2": "Conv2d_2b_3x3",
    "conv_3": "Conv2d_3b_1x1", "conv_4": "Conv2d_4a_3x3",
}  # fmt: skip
A = {
    "conv": "branch1x1", "tower.conv": "branch5x5_1", "tower.conv_1": "branch5x5_2", "tower_1.conv": "branch3x3dbl_1",
    "tower_1.conv_1": "branch3x3dbl_2", "tower_1.conv_2": "branch3x3dbl_3", "tower_2.conv": "branch_pool",
}  # fmt: skip
B = {
    "conv": "branch3x3",
    "tower.conv": "branch3x3dbl_1", "tower.conv_1": "branch3x3dbl_2", "tower.conv_2": "branch3x3dbl_3",
}  # fmt: skip
C = {
    "conv": "branch1x1", "tower.conv": "branch7x7_1", "tower.conv_1": "branch7x7_2", "tower.conv_2": "branch7x7_3",
    "tower_1.conv": "branch7x7dbl_1", "tower_1.conv_1": "branch7x7dbl_2", "tower_1.conv_2": "branch7x7dbl_3",
    "tower_1.conv_3": "branch7x7dbl_4", "tower_1.conv_4": "branch7x7dbl_5", "tower_2.conv": "branch_pool",
}  # fmt: skip
D = {
    "tower.conv": "branch3x3_1", "tower.conv_1": "branch3x3_2", "tower_1.conv": "branch7x7x3_1",
    "tower_1.conv_1": "branch7x7x3_2", "tower_1.conv_2": "branch7x7x3_3", "tower_1.conv_3": "branch7x7x3_4",
}  # fmt: skip
E = {
    "conv": "branch1x1", "tower_conv": "branch3x3_1", "tower_mixed_conv": "branch3x3_2a",
    "tower_mixed_conv_1": "branch3x3_2b", "tower_1_conv": "branch3x3dbl_1", "tower_1_conv_1": "branch3x3dbl_2",
    "tower_1_mixed_conv": "branch3x3dbl_3a", "tower_1_mixed_conv_1": "branch3x3dbl_3b", "tower_2_conv": "branch_pool",
}  # fmt: skip
LEAVES = {"weight": "conv.weight", "beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}
BLOCKS = {
    "mixed": ("Mixed_5b", A), "mixed_1": ("Mixed_5c", A), "mixed_2": ("Mixed_5d", A), "mixed_3": ("Mixed_6a", B),
    "mixed_4": ("Mixed_6b", C), "mixed_5": ("Mixed_6c", C), "mixed_6": ("Mixed_6d", C), "mixed_7": ("Mixed_6e", C),
    "mixed_8": ("Mixed_7a", D), "mixed_9": ("Mixed_7b", E), "mixed_10": ("Mixed_7c", E),
}  # fmt: skip


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

    try:
        if zipfile.is_zipfile(path) and any("/code/" in name for name in zipfile.ZipFile(path).namelist()):
            state = dict(_translate(torch.jit.load(path, map_location="cpu").state_dict()))
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, KeyError, EOFError, UnpicklingError) as error:
        reason = f"cannot be read without running code ({type(error).__name__})"
        raise UserError(f"{path} holds no Inception weights, or {reason}") from None
    own_bytes = io.BytesIO()  # the constructor unpickles its file, so it gets one that we have just written
    torch.save(state, own_bytes)
    own_bytes.seek(0)
    try:
        return FeatureExtractorInceptionV3("inception-v3-compat", layers, feature_extractor_weights_path=own_bytes)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: these are not Inception's weights: {' '.join(str(error).split())[:200]}") from None


def _translate(theirs: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """NVIDIA's tensors under torch-fidelity's names. Their batch norms have no scale: it is one."""
    names = {f"layers.{name}": own for name, own in STEM.items()}
    for block, (own_block, convolutions) in BLOCKS.items():
        names |= {f"layers.{block}.{name}": f"{own_block}.{own}" for name, own in convolutions.items()}
    for name, own in names.items():
        for leaf, key in LEAVES.items():
            yield f"{own}.{key}", theirs[f"{name}.{leaf}"]
        yield f"{own}.bn.weight", torch.ones_like(theirs[f"{name}.beta"])
        yield f"{own}.bn.num_batches_tracked", torch.tensor(0)
    yield from ((f"fc.{leaf}", theirs[f"output.{leaf}"]) for leaf in ("weight", "bias"))

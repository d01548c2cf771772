"""Weights of the 2015 Inception network, in whose features FID is defined, under the names of torch-fidelity's port.

Two files hold them: torch-fidelity's state dict and NVIDIA's TorchScript archive, which ADM's PyTorch ports use. Both
are identified by their sha256, and neither runs code: the first is read with weights_only, and of the second only the
tensors are used.
"""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch

from system import UserError
from system.files import sha256_once

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
STATE_DICT = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
TORCHSCRIPT = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
TRUE_WEIGHTS = {STATE_DICT, TORCHSCRIPT}  # distances in their features are FIDs

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
BLOCKS = {
    "mixed": ("Mixed_5b", A), "mixed_1": ("Mixed_5c", A), "mixed_2": ("Mixed_5d", A), "mixed_3": ("Mixed_6a", B),
    "mixed_4": ("Mixed_6b", C), "mixed_5": ("Mixed_6c", C), "mixed_6": ("Mixed_6d", C), "mixed_7": ("Mixed_6e", C),
    "mixed_8": ("Mixed_7a", D), "mixed_9": ("Mixed_7b", E), "mixed_10": ("Mixed_7c", E),
}  # fmt: skip


def find_weights(path: str | Path | None) -> Path:
    """The file given, or torch-fidelity's, downloaded once into torch's cache.

    Raises UserError, naming the file and its place, where there is none.
    """
    if path is not None:
        if not Path(path).is_file():
            raise UserError(f"extractor_weights={path}: no such file")
        return Path(path)
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


def read_weights(path: Path, sha256: str | None = None) -> tuple[dict[str, torch.Tensor], str]:
    """(state dict in torch-fidelity's names, sha256 of the file).

    sha256: required of the file; None = that of either published file. Raises UserError for any other file.
    """
    found = sha256_once(path)
    if found not in ({sha256} if sha256 else TRUE_WEIGHTS):
        needed = sha256 or f"{STATE_DICT} (torch-fidelity) or {TORCHSCRIPT} (NVIDIA)"
        raise UserError(f"{path} has sha256 {found}; needed: {needed}")
    try:
        if zipfile.is_zipfile(path) and any("/code/" in name for name in zipfile.ZipFile(path).namelist()):
            return dict(_translate(torch.jit.load(path, map_location="cpu").state_dict())), found
        return torch.load(path, map_location="cpu", weights_only=True), found
    except (RuntimeError, KeyError, EOFError, UnpicklingError) as error:
        reason = f"cannot be read without running code ({type(error).__name__})"
        raise UserError(f"{path} holds no Inception weights, or {reason}") from None


def build(state: dict[str, torch.Tensor], layers: list[str]) -> torch.nn.Module:
    """torch-fidelity's network with these weights, which returns a tuple of `layers`. Raises UserError."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    own_bytes = io.BytesIO()  # the constructor unpickles its file, so it gets one that we have just written
    torch.save(state, own_bytes)
    own_bytes.seek(0)
    try:
        return FeatureExtractorInceptionV3("inception-v3-compat", layers, feature_extractor_weights_path=own_bytes)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise UserError(f"these are not Inception's weights: {' '.join(str(error).split())[:200]}") from None


def _translate(theirs: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """NVIDIA's tensors under torch-fidelity's names. Their batch norms have no scale: it is one."""
    names = {f"layers.{name}": own for name, own in STEM.items()}
    for block, (own_block, convolutions) in BLOCKS.items():
        names |= {f"layers.{block}.{name}": f"{own_block}.{own}" for name, own in convolutions.items()}
    for name, own in names.items():
        yield f"{own}.conv.weight", theirs[f"{name}.weight"]
        yield f"{own}.bn.weight", torch.ones_like(theirs[f"{name}.beta"])
        yield f"{own}.bn.bias", theirs[f"{name}.beta"]
        yield f"{own}.bn.running_mean", theirs[f"{name}.mean"]
        yield f"{own}.bn.running_var", theirs[f"{name}.var"]
        yield f"{own}.bn.num_batches_tracked", torch.tensor(0)
    yield "fc.weight", theirs["output.weight"]
    yield "fc.bias", theirs["output.bias"]

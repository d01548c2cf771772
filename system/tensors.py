"""Files of tensors: .safetensors and .pt, which are read without running code and refused in one line, and ours."""

import argparse
import hashlib
import math
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from system import UserError
from system.files import open_regular

Tensors = dict[str, torch.Tensor]


def open_safetensors(path: Path) -> Any:
    """The handle that safetensors gives, of which tensors are read one by one. UserError where it is damaged."""
    open_regular(path).close()
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or not a safetensors file ({' '.join(str(error).split())})") from None


def read_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """(tensors, what the file says about itself), on the CPU. Raises UserError where it is damaged."""
    file = open_safetensors(path)
    try:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or not a safetensors file ({error})") from None


def write_safetensors(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """Writes a file with a new file's permissions; by itself, safetensors lets its owner alone read it."""
    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, path, metadata)
    path.chmod(mode)


def read_pt(path: Path) -> dict:
    """What torch.save has written of a dict. Raises UserError for a file that is damaged, or needs code to load."""
    open_regular(path).close()
    if zipfile.is_zipfile(path):
        try:
            members = zipfile.ZipFile(path).infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise UserError(f"{path} is damaged or not a file of weights ({error})") from None
        if packed := next((i for i in members if i.compress_type != zipfile.ZIP_STORED), None):
            raise UserError(f"{path}: {packed.filename!r:.100} is compressed, which torch.save never does")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # what official files have in `args`
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises a dozen kinds for files that are not its own
        asked = re.search(r"unsupported global:? (?:GLOBAL )?(\S+)", str(error), re.IGNORECASE)
        if asked:
            raise UserError(f"{path} needs code to load ({asked.group(1)}), which is never run") from None
        raise UserError(f"{path} is damaged or not a file of weights") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}; needed: a state dict or a checkpoint with one")
    return loaded


def check_numbers(tensors: Tensors, source: object, held: float = math.inf) -> None:
    """Raises UserError for anything but plain tensors of finite numbers. held: the bytes of the file that has them."""
    for key, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{source}: {key} is a {type(value).__name__}; needed: a tensor")
        if value.layout != torch.strided or value.is_meta or value.is_complex():
            raise UserError(f"{source}: {key} is {value.dtype}, {value.layout}; needed: plain real numbers")
        if (held := held - value.nbytes) < 0:
            raise UserError(f"{source}: its tensors have more bytes than the file, as {key}: numbers stand for several")
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"{source}: {key} has numbers that are not finite")


def weights_sha256(module: torch.nn.Module) -> str:
    """Of a module's names and numbers, whatever files they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()

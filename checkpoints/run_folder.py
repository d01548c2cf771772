"""Run folders: the one writer and the one strict reader.

    <results_dir>/<run_name>/checkpoints/step_0050000/   model.safetensors, ema.safetensors, optimizer.safetensors,
                                                         config.yaml, trainer_state.json, manifest.json (sha256 of each)
                                                         and with ema=power the averages, power_<width>.safetensors
    <results_dir>/<run_name>/checkpoints/latest          the name of the newest
    <results_dir>/<run_name>/snapshots/step_0050000/     what pruning leaves of a checkpoint with power averages: these,
                                                         in float16, and a manifest

A checkpoint is written to a temporary folder, flushed to disk and renamed: it exists whole or not at all. Tensors are
safetensors and settings are text, so reading a checkpoint runs no code.
"""

import errno
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from checkpoints.config import Settings, from_file
from system import UserError, hub
from system.files import sha256_of, sha256_once, sync, usual_mode, write_text_atomic
from system.processes import is_main
from system.settings import read_yaml

MANIFEST = "manifest.json"
CONDITIONS_FILE = "conditions.safetensors"  # texts of the validation set, to draw images for
START_AGAIN = "start_again"  # in the run folder: the run was stopped and saved; the same command continues it
TRACKER_ID = "tracker_id"  # in the run folder: which curve at wandb and trackio is this run's
WEIGHTS_FILES = {"ema": "ema.safetensors", "raw": "model.safetensors"}
TEMPORARY = ".tmp_"
STEP_NAME = re.compile(r"step_(\d{7,})")
NamedTensors = dict[str, dict[str, torch.Tensor]]


def checkpoint_tensors(modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer) -> NamedTensors:
    """{file: {name: tensor}} of a checkpoint: the tensors themselves, not copies. The largest file comes first."""
    names = {p: name for name, p in modules["model"].named_parameters()}
    state = {
        f"{names[p]}/{field}": torch.as_tensor(value)
        for p, fields in optimizer.state.items()
        for field, value in fields.items()
    }
    return {"optimizer.safetensors": state} | {f"{name}.safetensors": m.state_dict() for name, m in modules.items()}


def write_checkpoint(run_folder: Path, step: int, tensors: NamedTensors, state: dict, config: str) -> Path:
    """Writes the checkpoint of `step`, of `checkpoint_tensors`, and points `latest` at it.

    state: plain numbers and strings, for trainer_state.json. config: the settings, as YAML. Raises OSError where the
    disk cannot be written or has less than 102 % of the bytes free; earlier checkpoints are untouched.
    """
    texts = {"config.yaml": config, "trainer_state.json": json.dumps({"step": step, **state}, indent=2) + "\n"}
    target = run_folder / "checkpoints" / f"step_{step:07d}"
    needed = sum(t.nbytes for named in tensors.values() for t in named.values())
    free = shutil.disk_usage(next(p for p in (run_folder, *run_folder.absolute().parents) if p.exists())).free
    if free < needed * 1.02:
        reason = f"{free / 1e9:.2f} GB free, and a checkpoint needs {needed / 1e9:.2f} GB"
        raise OSError(errno.ENOSPC, reason, str(run_folder))
    write_folder(target, tensors, texts)
    write_text_atomic(target.parent / "latest", target.name + "\n")
    remove_temporaries(run_folder)
    return target


def write_folder(target: Path, tensors: NamedTensors, texts: dict[str, str]) -> None:
    """Writes the folder of a step with these files and their manifest: whole or not at all."""
    temporary = target.with_name(f"{TEMPORARY}{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, text in texts.items():
            (temporary / name).write_text(text)
        with ThreadPoolExecutor() as pool:  # a file is hashed while the next is written
            entries = {name: pool.submit(seal, temporary / name) for name in texts}
            for name, named in tensors.items():
                with usual_mode(temporary / name):
                    save_file({key: tensor.detach().contiguous() for key, tensor in named.items()}, temporary / name)
                entries[name] = pool.submit(seal, temporary / name)
        files = {name: entries[name].result() for name in sorted(entries)}
        manifest = {"step": step_of(target), "files": files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        sync(temporary / MANIFEST)
        sync(temporary)
        if target.exists():
            # A damaged checkpoint of this step, skipped at the resume: moved aside until its replacement is there.
            shutil.rmtree(aside := target.with_name(f"{TEMPORARY}old_{target.name}"), ignore_errors=True)
            os.rename(target, aside)
        os.rename(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, SafetensorError):  # how safetensors reports what the operating system refused
            raise OSError(errno.EIO, str(error), str(target)) from None
        raise
    sync(target.parent)


def seal(path: Path) -> dict:
    """Flushes a file to disk -> its entry in the manifest."""
    entry = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}  # while the system writes it out
    sync(path)
    return entry


def remove_temporaries(run_folder: Path) -> None:
    """Removes what a killed writer left."""
    folder, snapshots = run_folder / "checkpoints", run_folder / "snapshots"
    for path in (*folder.glob(f"{TEMPORARY}*"), *snapshots.glob(f"{TEMPORARY}*"), *folder.glob(".latest.*.tmp")):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def prune_checkpoints(run_folder: Path, keep_last: int, keep_every: int | None) -> None:
    """Deletes all but the newest `keep_last` checkpoints and those whose step is a multiple of `keep_every`.

    Power averages stay, as snapshots in float16. A checkpoint whose snapshot cannot be written stays whole.
    """
    for path in complete_checkpoints(run_folder)[:-keep_last]:
        if keep_every and step_of(path) % keep_every == 0:
            continue
        try:  # 4 bytes a parameter of the checkpoint's 24
            if averages := average_files(path):
                halves = {p.name: {name: t.half() for name, t in read_tensors(p).items()} for p in averages.values()}
                write_folder(run_folder / "snapshots" / path.name, halves, {})
        except (OSError, UserError) as error:
            print(f"warning: {path} is not deleted, for its averages cannot be kept: {error}", file=sys.stderr)
            continue
        (path / MANIFEST).unlink()  # from here on it is no checkpoint
        shutil.rmtree(path)


def abandon_after(run_folder: Path, step: int) -> Path | None:
    """Moves checkpoints and snapshots after `step`, and a copy of the log, to checkpoints/abandoned_<date>/ -> it.

    For a run that goes back, whose own checkpoints are then the newest. None where nothing comes after `step`.
    """
    folder = run_folder / "checkpoints"
    places = (*folder.glob("step_*"), *(run_folder / "snapshots").glob("step_*"))
    later = [p for p in places if STEP_NAME.fullmatch(p.name) and step_of(p) > step]
    if not later:
        return None
    abandoned = folder / time.strftime("abandoned_%Y-%m-%d_%H%M%S")
    abandoned.mkdir(exist_ok=True)
    if (log := run_folder / "metrics.jsonl").is_file():
        shutil.copy2(log, abandoned)
    for path in sorted(later, key=step_of, reverse=True):
        os.rename(path, abandoned / (path.name if path.parent == folder else f"snapshot_{path.name}"))
    sync(folder)
    if remaining := latest_checkpoint(run_folder):
        write_text_atomic(folder / "latest", remaining.name + "\n")
    else:
        (folder / "latest").unlink(missing_ok=True)
    return abandoned


def average_name(width: float) -> str:
    return f"power_{width}"


def average_files(folder: Path) -> dict[float, Path]:
    """{width: file} of the power averages in a checkpoint or snapshot."""
    return {float(p.stem.removeprefix("power_")): p for p in sorted(folder.glob("power_*.safetensors"))}


def snapshots_until(checkpoint: Path) -> list[Path]:
    """The run's folders with power averages, oldest first, one for each step up to the checkpoint's: the checkpoint in
    float32 where there still is one."""
    run_folder = checkpoint.absolute().parent.parent
    every = (*complete_checkpoints(run_folder, "snapshots"), *complete_checkpoints(run_folder), checkpoint)
    folders = {step_of(p): p for p in every if average_files(p)}
    return [folders[step] for step in sorted(folders) if step <= step_of(checkpoint)]


def complete_checkpoints(run_folder: Path, kind: str = "checkpoints") -> list[Path]:
    """The run's checkpoint folders (or "snapshots") that have a manifest, oldest first."""
    found = (p for p in (run_folder / kind).glob("step_*") if STEP_NAME.fullmatch(p.name) and (p / MANIFEST).is_file())
    return sorted(found, key=step_of)


def is_complete(run_folder: Path, step: int) -> bool:
    """Whether there is a checkpoint of this step."""
    return (run_folder / "checkpoints" / f"step_{step:07d}" / MANIFEST).is_file()


def latest_checkpoint(run_folder: Path) -> Path | None:
    """The newest complete checkpoint; None = none."""
    return next(reversed(complete_checkpoints(run_folder)), None)


def newest_intact(run_folder: Path) -> Path | None:
    """The newest checkpoint that matches its manifest, or None; damaged ones are skipped with a warning."""
    for path in reversed(complete_checkpoints(run_folder)):
        try:
            verify_checkpoint(path)
            return path
        except UserError as error:
            if is_main():
                print(f"warning: {error}; going back to the one before", file=sys.stderr)
    return None


def step_of(checkpoint: Path) -> int:
    """From the folder's name, or from the manifest of one that was renamed."""
    named = STEP_NAME.fullmatch(checkpoint.name)
    return int(named.group(1)) if named else read_manifest(checkpoint)["step"]


def split_family(ckpt: str | Path) -> tuple[str | None, Path]:
    """ "sit:weights.pt" -> ("sit", weights.pt): what a file of another project does not say of itself.

    hf:owner/name[/file] becomes its local copy.
    """
    named = re.fullmatch(r"(dit|sit|repa|tread|maskdit|sprint(?:\d*|-\d+-\d+)):(.+)", str(ckpt))
    return (named.group(1), hub.local(named.group(2))) if named else (None, hub.local(ckpt))


def find_checkpoint(ckpt: str | Path, key: str = "ckpt") -> Path:
    """The checkpoint folder of a run folder or checkpoint folder, or a file for weights/foreign.py.

    key: the setting that names it. Raises UserError where there is neither.
    """
    family, path = split_family(ckpt)
    if not path.exists():
        raise UserError(f"{key}={ckpt}: no such file or folder; needed: a run, a checkpoint or a file of weights")
    if path.is_file() or (path / MANIFEST).is_file() and family is None:
        return path
    if (path / "config.json").is_file():  # an export
        return path / "model.safetensors"
    if (newest := latest_checkpoint(path)) is None:
        needed = f"a run folder (with checkpoints/step_*/{MANIFEST}) or one of its checkpoints"
        raise UserError(f"{key}={ckpt} is not a checkpoint; needed: {needed}")
    return newest


def read_manifest(checkpoint: Path) -> dict:
    """{step, files: {file name: {bytes, sha256}}}. Raises UserError where it is damaged."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        return {"step": int(manifest["step"]), "files": dict(manifest["files"])}
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{checkpoint / MANIFEST} is damaged ({error})") from None


def verify_checkpoint(checkpoint: Path, only: Sequence[str] | None = None) -> None:
    """Raises UserError where a file is missing or differs from the manifest in any byte. only: these files; None = all.

    What the manifest does not name must not be read either.
    """
    files = read_manifest(checkpoint)["files"]
    for name in files if only is None else only:
        path = checkpoint / name
        if name not in files or not path.is_file():
            by = "not named by the manifest" if path.is_file() else "missing, but the manifest names it"
            raise UserError(f"{path} is {by}: the checkpoint is damaged")
        # On resuming, the processes of a job may see different checkpoints, so that none waits for another's answer.
        found = (sha256_of if only is None else sha256_once)(path)
        if path.stat().st_size != files[name]["bytes"] or found != files[name]["sha256"]:
            raise UserError(f"{path} does not match its sha256 in the manifest: the checkpoint is damaged")


def read_config(checkpoint: Path) -> Settings:
    """The settings that a checkpoint was trained with. Raises UserError where they are damaged or of another format."""
    path = checkpoint / "config.yaml"
    return from_file(read_yaml(path.read_bytes(), str(path)), str(path))


def load_strictly(module: torch.nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Loads tensors whose names and shapes are exactly the module's. Raises UserError with the first that differ."""
    own, theirs = ({key: tuple(t.shape) for key, t in named.items()} for named in (module.state_dict(), tensors))
    missing, extra = sorted(own.keys() - theirs.keys()), sorted(theirs.keys() - own.keys())
    shapes = sorted(key for key in own.keys() & theirs.keys() if own[key] != theirs[key])
    if missing or extra or shapes:
        parts = [f"missing {missing[:3]}"] * bool(missing) + [f"unknown {extra[:3]}"] * bool(extra)
        parts += [f"{key} is {theirs[key]} in the file and {own[key]} in the model" for key in shapes[:3]]
        raise UserError(f"{source} is of another model: {'; '.join(parts)}")
    module.load_state_dict(tensors)


def load_optimizer(checkpoint: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restores the optimizer's state, which is saved by parameter name.

    Raises UserError for names that the model lacks and for the state of another optimizer.
    """
    path = checkpoint / "optimizer.safetensors"
    names = {p: name for name, p in model.named_parameters()}
    state = {name: {} for name in names.values()}
    for key, value in read_tensors(path).items():
        name, _, field = key.rpartition("/")
        if name not in state:
            raise UserError(f"{path} has state of {name!r}, which the model lacks")
        state[name][field] = value
    order = [(names[p], "betas" in group) for group in optimizer.param_groups for p in group["params"]]
    for name, adam in order:
        needed = "exp_avg" if adam else "momentum_buffer"
        if state[name] and needed not in state[name]:
            raise UserError(
                f"{path} is of another optimizer: it has {', '.join(state[name])} of {name}, needed: {needed}; "
                f"continue with the run's own optimizer=, or start a new run with init_from="
            )
    state = {i: state[name] for i, (name, _) in enumerate(order) if state[name]}  # as PyTorch numbers parameters
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A safetensors file, on the CPU. Raises UserError where it is damaged or something else."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or not a safetensors file ({error})") from None

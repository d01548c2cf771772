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

import contextlib
import errno
import json
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from checkpoints.config import Settings, from_file, to_yaml
from system import UserError, cli, hub, warn
from system.files import check_name, read_json, read_small, sha256_of, sha256_once, sync, write_text_atomic
from system.processes import is_main
from system.settings import Count, parse_known, read_yaml
from system.tensors import check_numbers, read_safetensors, write_safetensors

MANIFEST = "manifest.json"
CONDITIONS_FILE = "conditions.safetensors"  # texts of the validation set, to draw images for
START_AGAIN = "start_again"  # in the run folder: the run was stopped and saved; the same command continues it
TRACKER_ID = "tracker_id"  # in the run folder: which curve at wandb and trackio is this run's
WEIGHTS_FILES = {"ema": "ema.safetensors", "raw": "model.safetensors"}
# What resuming reads
CONTINUED = ("config.yaml", "trainer_state.json", "optimizer.safetensors", *WEIGHTS_FILES.values())
TEMPORARY = ".tmp_"
STEP_NAME = re.compile(r"step_(\d{7,})")
PAUSES_S = (1, 10)  # before a failed save is tried again: a full disk or a network file system may recover
NamedTensors = dict[str, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Sealed:
    """A file's entry in the manifest."""

    bytes: Count
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """manifest.json"""

    step: Count
    files: dict[str, Sealed]


@dataclass(frozen=True)
class TrainerState:
    """trainer_state.json; data and validation: the fingerprints of what the run is trained and validated on."""

    step: Count
    data: str
    validation: str | None = None


def save(
    run_folder: Path, step: int, settings: Settings, modules: dict[str, torch.nn.Module],
    optimizer: torch.optim.Optimizer, fingerprints: dict[str, str], kept: dict[str, torch.Tensor] | None = None,
) -> None:  # fmt: skip
    """Writes the checkpoint of a step and deletes what is not to be kept. Raises OSError after three attempts.

    modules: by file, "model", "ema" and averages, and an alignment's "projector". fingerprints: of the data, as in
    `TrainerState`. kept: what `conditions.save` gave of texts, to sample without the data.
    """
    texts = {CONDITIONS_FILE: kept} if kept else {}
    tensors = checkpoint_tensors(modules, optimizer) | texts
    for pause in (*PAUSES_S, None):
        try:
            write_checkpoint(run_folder, step, tensors, fingerprints, to_yaml(settings))
            break
        except OSError as error:
            if pause is None:
                raise
            again = f"{cli.one_line(error)}; trying again in {pause} s"
            warn(f"checkpoint of step {step}: {again}")
            time.sleep(pause)
    prune_checkpoints(run_folder, settings.train.keep_last, settings.train.keep_every)


def checkpoint_tensors(modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer) -> NamedTensors:
    """{file: {name: tensor}} of a checkpoint: the tensors themselves, not copies. The largest file comes first."""
    named = trained_parameters(modules["model"], modules.get("projector"))
    states = ((name, field, value) for name, p in named for field, value in optimizer.state.get(p, {}).items())
    state = {f"{name}/{field}": torch.as_tensor(value) for name, field, value in states}
    return {"optimizer.safetensors": state} | {f"{name}.safetensors": m.state_dict() for name, m in modules.items()}


def trained_parameters(
    model: torch.nn.Module, projector: torch.nn.Module | None
) -> list[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of what an optimizer has: the network's, and those of an alignment's projector."""
    more = () if projector is None else projector.named_parameters(prefix="projector")
    return [*model.named_parameters(), *more]


def write_checkpoint(run_folder: Path, step: int, tensors: NamedTensors, state: dict, config: str) -> Path:
    """Writes a checkpoint, with `state` in trainer_state.json and `config` in config.yaml, and points `latest` at it.

    Raises OSError where the disk cannot be written or is too full; earlier checkpoints are untouched.
    """
    texts = {"config.yaml": config, "trainer_state.json": json.dumps({"step": step, **state}, indent=2) + "\n"}
    target = run_folder / "checkpoints" / f"step_{step:07d}"
    check_space(run_folder, sum(t.nbytes for named in tensors.values() for t in named.values()))
    write_folder(target, tensors, texts)
    write_text_atomic(target.parent / "latest", target.name + "\n")
    remove_temporaries(run_folder)
    return target


def check_space(run_folder: Path, needed: int) -> None:
    """Raises OSError where a checkpoint of so many bytes of tensors does not fit on the run folder's disk."""
    free = shutil.disk_usage(next(p for p in (run_folder, *run_folder.absolute().parents) if p.exists())).free
    if free < 1.02 * needed:
        reason = f"{free / 1e9:.2f} GB free, and a checkpoint needs {1.02 * needed / 1e9:.2f} GB"
        raise OSError(errno.ENOSPC, reason, str(run_folder))


def write_folder(target: Path, tensors: NamedTensors, texts: dict[str, str]) -> None:
    """Writes the folder of a step with these files and their manifest: whole or not at all."""
    temporary = target.with_name(f"{TEMPORARY}{target.name}")
    remove(temporary)
    temporary.mkdir(parents=True)
    try:
        for name, text in texts.items():
            (temporary / name).write_text(text)
        with ThreadPoolExecutor() as pool:  # a file is hashed while the next is written
            entries = {name: pool.submit(seal, temporary / name) for name in texts}
            for name, named in tensors.items():
                write_safetensors(temporary / name, named)
                entries[name] = pool.submit(seal, temporary / name)
        manifest = {"step": step_of(target), "files": {name: entries[name].result() for name in sorted(entries)}}
        write_text_atomic(temporary / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        if target.exists():  # a damaged checkpoint, skipped at the resume: moved aside until its replacement is there
            remove(aside := target.with_name(f"{TEMPORARY}old_{target.name}"))
            os.rename(target, aside)
        os.rename(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, SafetensorError):  # how safetensors reports what the operating system refused
            raise OSError(errno.EIO, str(error), str(target)) from None
        raise
    sync(target.parent)


def seal(path: Path) -> dict:
    """Flushes a file to disk, hashing it while the system writes it out -> its entry in the manifest."""
    entry = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    sync(path)
    return entry


def remove(path: Path) -> None:
    """Removes a folder, or a file or link, as far as that is possible."""
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def remove_temporaries(run_folder: Path) -> None:
    """Removes what a killed writer left."""
    for path in (*run_folder.glob(f"*/{TEMPORARY}*"), *run_folder.glob("checkpoints/.latest.*.tmp")):
        remove(path)


def prune_checkpoints(run_folder: Path, keep_last: int, keep_every: int | None) -> None:
    """Deletes all but the newest `keep_last` checkpoints and those whose step is a multiple of `keep_every`.

    Power averages stay, as snapshots in float16. A checkpoint whose snapshot cannot be written stays whole.
    """
    complete = complete_checkpoints(run_folder)
    oldest = step_of(complete[-keep_last:][0]) if complete else 0
    for path in {*(run_folder / "checkpoints").glob("step_*")} - {*complete}:  # what a killed deletion left
        older = STEP_NAME.fullmatch(path.name) and step_of(path) < oldest
        if older and not (keep_every and step_of(path) % keep_every == 0):
            remove(path)
    for path in complete[:-keep_last]:
        if keep_every and step_of(path) % keep_every == 0:
            continue
        try:  # 4 bytes a parameter of the checkpoint's 24
            files = average_files(path).values()
            halves = {file.name: {name: t.half() for name, t in read_tensors(file).items()} for file in files}
            if halves:
                write_folder(run_folder / "snapshots" / path.name, halves, {})
        except (OSError, UserError) as error:
            warn(f"{path} is not deleted, for its averages cannot be kept: {error}")
        else:
            (path / MANIFEST).unlink()  # from here on it is no checkpoint
            shutil.rmtree(path)


def abandon_after(run_folder: Path, step: int) -> Path | None:
    """Moves checkpoints and snapshots after `step`, and a copy of the log, to checkpoints/abandoned_<date>/ -> it.

    None where nothing comes after `step`.
    """
    folder = run_folder / "checkpoints"
    places = (p for kind in (folder, run_folder / "snapshots") for p in kind.glob("step_*"))
    later = [p for p in places if STEP_NAME.fullmatch(p.name) and step_of(p) > step]
    if not later:
        return None
    abandoned = folder / time.strftime("abandoned_%Y-%m-%d_%H%M%S")
    abandoned.mkdir(exist_ok=True)
    if (log := run_folder / "metrics.jsonl").is_file():
        shutil.copy2(log, abandoned)
    (folder / "latest").unlink(missing_ok=True)  # until the next save
    for path in sorted(later, key=step_of, reverse=True):
        os.rename(path, abandoned / (path.name if path.parent == folder else f"snapshot_{path.name}"))
    sync(folder)
    return abandoned


def average_files(folder: Path) -> dict[float, Path]:
    """{width: file} of the power averages in a checkpoint or snapshot."""
    return {float(p.stem.removeprefix("power_")): p for p in sorted(folder.glob("power_*.safetensors"))}


def snapshots_until(checkpoint: Path) -> list[Path]:
    """Folders with power averages of the steps up to the checkpoint's, oldest first: in float32 where there are."""
    run_folder, last = checkpoint.absolute().parent.parent, step_of(checkpoint)
    every = (*complete_checkpoints(run_folder, "snapshots"), *complete_checkpoints(run_folder), checkpoint)
    folders = {step_of(p): p for p in every if average_files(p) and step_of(p) <= last}
    return [folders[step] for step in sorted(folders)]


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
    """The newest checkpoint that matches its manifest; damaged ones are skipped with a warning. None = there are none.

    Raises UserError where all are damaged: to begin anew is the user's choice.
    """
    for path in (found := complete_checkpoints(run_folder)[::-1]):
        try:
            verify_checkpoint(path)
            return path
        except UserError as error:
            if is_main():
                warn(f"{error}; going back to the one before")
    if found:
        raise UserError(f"{run_folder}: all {len(found)} checkpoints are damaged; needed: a copy, or another run_name")


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
    if family is None and path.is_file() and (path.parent / MANIFEST).is_file():  # a file of a checkpoint
        if path.name == WEIGHTS_FILES["ema"]:
            return path.parent
        needed = f"{key}={path.parent}, and weights=raw or ema_width="
        raise UserError(f"{key}={ckpt} is one file of a checkpoint; needed: {needed}")
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
    path = checkpoint / MANIFEST
    manifest = parse_known(Manifest, read_json(path), path)
    return {"step": manifest.step, "files": {check_name(name, path): asdict(s) for name, s in manifest.files.items()}}


def verify_checkpoint(checkpoint: Path, only: Sequence[str] | None = None) -> None:
    """Raises UserError where a file is missing, or not the manifest's to the byte. only: these files; None = all."""
    files, hashing = read_manifest(checkpoint)["files"], sha256_once
    if only is None:  # on resuming, the processes of a job may see different checkpoints: none waits for another's hash
        hashing, lying = sha256_of, (path.name for path in checkpoint.glob("*.safetensors"))
        only = sorted({*files, *lying, *(CONTINUED if checkpoint.parent.name != "snapshots" else ())})
    for name in only:
        path = checkpoint / name
        if name not in files or not path.is_file():
            raise UserError(f"{path} is missing, there or in the manifest: the checkpoint is damaged")
        if hashing(path) != files[name]["sha256"]:
            raise UserError(f"{path} does not match its sha256 in the manifest: the checkpoint is damaged")


def read_config(checkpoint: Path) -> Settings:
    """The settings of a run or checkpoint folder. Raises UserError where they are damaged or of another format."""
    path = checkpoint / "config.yaml"
    return from_file(read_yaml(read_small(path), str(path)), str(path))


def load_strictly(module: torch.nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Loads finite tensors whose names and shapes are exactly the module's. Raises UserError with those that differ.

    A module on the device "meta" is compared only.
    """
    check_numbers(tensors, source)
    own, theirs = ({key: tuple(t.shape) for key, t in named.items()} for named in (module.state_dict(), tensors))
    differing = sorted({key for key, _ in own.items() ^ theirs.items()})[:3]
    if differing:
        both = [(key, theirs.get(key, "missing"), own.get(key, "missing")) for key in differing]
        told = "; ".join(f"{key} is {found} in the file and {needed} in the model" for key, found, needed in both)
        raise UserError(f"{source} is of another model: {told}")
    for key, like in module.state_dict().items():
        if tensors[key].dtype != like.dtype and not (like.is_floating_point() and tensors[key].is_floating_point()):
            raise UserError(f"{source}: {key} is {tensors[key].dtype} in the file and {like.dtype} in the model")
    if not any(like.is_meta for like in module.state_dict().values()):
        module.load_state_dict(tensors)


def load_optimizer(
    checkpoint: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, projector: torch.nn.Module | None = None
) -> None:
    """Restores the optimizer's state, saved by parameter name. Raises UserError for the state of another optimizer."""
    path, saved = checkpoint / "optimizer.safetensors", defaultdict(dict)
    tensors = read_tensors(path)
    check_numbers(tensors, str(path))
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        saved[name][field] = value
    names, state = {p: name for name, p in trained_parameters(model, projector)}, {}  # state: as PyTorch numbers them
    for group in optimizer.param_groups:
        needed = ["exp_avg", "exp_avg_sq", "step"] if "betas" in group else ["momentum_buffer"]
        for i, p in enumerate(group["params"], len(state)):
            state[i] = held = saved.pop(names[p], {})
            if held and sorted(held) != needed:
                found = f"it has {', '.join(held)} of {names[p]}, needed: {', '.join(needed)}"
                cure = "continue with the run's own optimizer=, or start a new run with init_from="
                raise UserError(f"{path} is of another optimizer: {found}; {cure}")
            for field, value in held.items():  # a fused kernel takes for granted what is checked here
                shape, least = ((), 0) if field == "step" else (p.shape, 0 if field == "exp_avg_sq" else None)
                fits = value.shape == shape and value.dtype == p.dtype and (least is None or (value >= least).all())
                if not fits:
                    told = f"{names[p]}/{field} is {value.dtype} {tuple(value.shape)}"
                    raise UserError(f"{path}: {told}; needed: {p.dtype} {tuple(shape)}, and not below 0 but for means")
    if saved:
        raise UserError(f"{path} is of another model: it has the state of {next(iter(saved))}")
    optimizer.load_state_dict(optimizer.state_dict() | {"state": {i: held for i, held in state.items() if held}})


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A safetensors file, on the CPU. Raises UserError where it is damaged or something else."""
    return read_safetensors(path)[0]

"""The run's name: given, or made of what tells runs apart."""

import hashlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from checkpoints.run_folder import in_todays_names
from system import UserError, cli
from training.resuming import HARMLESS


def name_run(cfg: DictConfig) -> DictConfig:
    """Names the run and checks key types. A sweep's jobs go to <run_name or multirun>/<swept overrides>."""
    hydra_cfg = HydraConfig.get()
    cli.check_types(cfg, "config", hydra_cfg.overrides.task)
    choices = hydra_cfg.runtime.choices
    earlier = None  # the folder's name by earlier versions
    if hydra_cfg.mode == RunMode.MULTIRUN:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError("-m runs its jobs one after another in one process; needed: one launch per job")
        given = OverridesParser.create().parse_overrides(overrides_of(sys.argv))
        keys = {o.key_or_group for o in given if o.is_sweep_override()}
        swept = [o for o in hydra_cfg.overrides.task if o.partition("=")[0] in keys]
        parent, job = cfg.run_name or "multirun", f"job{hydra_cfg.job.num}"
        cfg.run_name = f"{parent}/{job_name(swept) or job}"
        earlier = f"{parent}/{(','.join(swept) or job).replace('/', '-')}"
    elif cfg.run_name is None:
        cfg.run_name = default_name(choices, cfg.model.size)
        earlier = f"{choices.data}-{choices.model}-{choices.objective}"
    if earlier and cfg.resume == "auto" and is_this_run(Path(cfg.results_dir) / earlier, cfg):
        if not (Path(cfg.results_dir) / cfg.run_name).exists():
            if os.environ.get("RANK", "0") == "0":
                print(f"this run has a folder, named as in earlier versions: {earlier} (today: {cfg.run_name})")
            cfg.run_name = earlier
    return cfg


def default_name(choices: Mapping, size: str) -> str:
    """[<experiment>-]<data>-<model>-<size>-<objective>: mnist-tread-XS4-edm. One named as its data is said once."""
    experiment = choices.get("experiment")
    first = [experiment] if experiment not in (None, "null", choices["data"]) else []
    size = re.sub(r"[^A-Za-z0-9.]", "", size.removeprefix("DiT-"))
    return "-".join([*first, choices["data"], choices["model"], size, choices["objective"]])


def job_name(swept: Sequence[str]) -> str:
    """Overrides as a folder name that a shell need not quote: model-dit_train.lr-1e-3.

    A value of other characters gets a digest, so that two values never share a name.
    """
    parts = []
    for override in swept:
        key, _, value = override.partition("=")
        plain = re.sub(r"[^A-Za-z0-9.+-]+", "-", value).strip("-")
        if plain != value.replace("/", "-"):
            plain += f"-{hashlib.sha256(value.encode()).hexdigest()[:6]}"
        parts.append(f"{key}-{plain}".replace("@", "-").replace("/", "-"))
    return "_".join(parts)


def is_this_run(folder: Path, cfg: DictConfig) -> bool:
    """Whether a run folder's settings are these, as far as both know them and they are not chosen by the machine."""
    if not (folder / "config.yaml").is_file():
        return False
    saved = in_todays_names(OmegaConf.load(folder / "config.yaml"))
    keys = set(cli.flat_keys(saved)) & set(cli.flat_keys(cfg))
    left_out = (*HARMLESS, *cfg.resume_allow, "train.precision", "train.compile")
    left_out += () if cfg.train.decay_steps else ("train.max_steps",)
    kept = [key for key in keys if not any(key == k or key.startswith(f"{k}.") for k in left_out)]
    return all(OmegaConf.select(saved, key) == OmegaConf.select(cfg, key) for key in kept)


def overrides_of(argv: list[str]) -> list[str]:
    return [argument for argument in argv[1:] if "=" in argument and not argument.startswith("-")]

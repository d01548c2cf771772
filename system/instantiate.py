"""Builds what a config's `_target_` names: our own classes, and nothing else."""

import hydra
from omegaconf import DictConfig, OmegaConf

from system import UserError

# A config may come with somebody's checkpoint, and `_target_` can name any code on this machine.
ALLOWED_TARGETS = {
    "dit.DiT", "lightningdit.LightningDiT", "sprint.Sprint", "maskdit.MaskDiT", "edm.EDM", "rf.RectifiedFlow",
    "ddpm.DDPM", "autoencoder.PixelCodec", "autoencoder.VAECodec",
}  # fmt: skip


def instantiate(config: DictConfig):
    """The object that a config describes. Raises UserError for a target outside ALLOWED_TARGETS or unknown keys."""
    check_targets(config)
    try:
        return hydra.utils.instantiate(config, _convert_="all")
    except hydra.errors.InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, TypeError) and "unexpected keyword" in str(cause):
            raise UserError(f"{config.get('_target_')}: {cause}") from None
        raise cause from None


def check_targets(config) -> None:
    """Raises UserError where a config, at any depth, names something outside ALLOWED_TARGETS."""
    values = OmegaConf.to_container(config, resolve=False) if isinstance(config, DictConfig) else config
    if isinstance(values, dict):
        if "_target_" in values and values["_target_"] not in ALLOWED_TARGETS:
            allowed = ", ".join(sorted(ALLOWED_TARGETS))
            raise UserError(f"the config names {values['_target_']!r} as its class; allowed: {allowed}")
        values = list(values.values())
    for value in values if isinstance(values, list) else ():
        check_targets(value)

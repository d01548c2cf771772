"""A run's weights for others to use: `python export.py ckpt=RUN out=FOLDER`, keys in configs/export.yaml.

    format=safetensors   a folder: model.safetensors, config.json and README.md, a model card with the run's figures
    format=dit           a .pt in official DiT's layout, {"ema": ..., "args": ...}; the prediction stays the run's own
    format=sit           a .pt that official SiT samples from unchanged: our flow with time and sign reversed

All three are valid ckpt=: each carries the config with the weights, which come back bit for bit. dtype=float16 halves
the file and rounds them.
"""

import json
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file

from checkpoints.foreign import CONFIG_KEY, reverse_time
from checkpoints.load import Run, load_run
from cost import cost_table
from evaluation.table import SCORES, finite
from system import UserError, cli

KEPT = ["model", "objective", "sampler", "data", "train", "optimizer", "seed"]  # of the config: no paths
DTYPES = {"float32": torch.float32, "float16": torch.float16}


def main(overrides: list[str]) -> None:
    if set(overrides) & {"-h", "--help"}:
        print(__doc__.strip())
        return
    settings = cli.load_config("export", overrides)
    if settings.format not in ("safetensors", "dit", "sit"):
        raise UserError(f"format={settings.format}; needed: safetensors, dit or sit")
    if settings.dtype not in DTYPES:
        raise UserError(f"dtype={settings.dtype}; needed: {', '.join(DTYPES)}")
    out = Path(settings.out)
    if out.exists():
        raise UserError(f"out={out} exists already")
    run = load_run(settings.ckpt, settings.weights, device="cpu")
    tensors = {key: value.to(DTYPES[settings.dtype]).contiguous() for key, value in run.model.state_dict().items()}
    config = portable_config(run.config)
    out.parent.mkdir(parents=True, exist_ok=True)
    if settings.format == "safetensors":
        export_folder(run, tensors, config, out)
    else:
        export_pt(run, tensors, config, out, settings.format)
    print(f"{settings.weights} weights of {run.checkpoint}, step {run.step}: {out}")


def portable_config(config: DictConfig) -> DictConfig:
    """The part that rebuilds and describes the network, without this machine's paths."""
    kept = OmegaConf.masked_copy(config, [key for key in KEPT if key in config])
    for key in ("path", "prepare"):
        kept.data.pop(key, None)
    return kept


def export_folder(run: Run, tensors: dict[str, torch.Tensor], config: DictConfig, out: Path) -> None:
    out.mkdir()
    metadata = {CONFIG_KEY: OmegaConf.to_yaml(config), "layout": "dit", "step": str(run.step), "format": "pt"}
    save_file(tensors, out / "model.safetensors", metadata)
    facts = finite({"step": run.step, "weights": run.weights, **OmegaConf.to_container(config)})
    (out / "config.json").write_text(json.dumps(facts, indent=2) + "\n")
    (out / "README.md").write_text(model_card(run, config))


def export_pt(run: Run, tensors: dict[str, torch.Tensor], config: DictConfig, out: Path, layout: str) -> None:
    """layout: dit or sit. Raises UserError where SiT's is asked for a network that is not a flow."""
    args = {"layout": layout, CONFIG_KEY: OmegaConf.to_yaml(config), "model": config.model.size}
    if layout == "sit":
        if run.objective.predicts != "velocity":
            found = f"{run.checkpoint} predicts {run.objective.predicts}"
            raise UserError(f"format=sit needs a flow (objective=rf); {found}")
        tensors = reverse_time(tensors)
        args |= {"model": config.model.size.replace("DiT", "SiT"), "path_type": "Linear", "prediction": "velocity"}
    torch.save({"ema": tensors, "args": args, "step": run.step}, out)


def model_card(run: Run, config: DictConfig) -> str:
    """Markdown: the network, its training, and every score in the run folder."""
    model = run.model
    lines = [
        f"# {run.folder.name}, step {run.step}", "",
        f"{config.model.size} for {config.data.name}: {model.in_channels} x {model.input_size} x {model.input_size}, "
        f"{run.num_classes} classes; {run.weights} weights.", "",
        "    python sample.py ckpt=model.safetensors", "",
        "| | |", "|---|---|",
    ]  # fmt: skip
    facts = {"objective": config.objective._target_, "codec": config.data.codec._target_, "sha256": run.sha256}
    if "train" in config:
        names = ("global_batch_size", "lr", "label_dropout", "ema_decay", "precision")
        facts |= {name: config.train[name] for name in names if name in config.train}
    facts |= last_figures(run.folder / "metrics.jsonl", run.step) | scores(run)
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    if "hardware" in run.config:
        lines += ["", *(f"    {line}" for line in cost_table(model, run.config).splitlines())]
    return "\n".join(lines) + "\n"


def last_figures(log: Path, step: int) -> dict[str, str]:
    """The last training and validation losses up to `step`, by name."""
    figures = {}
    for line in log.read_text().splitlines() if log.is_file() else ():
        values = json.loads(line)
        at = values.pop("step")
        for name, value in values.items():
            if at <= step and value is not None and name.startswith(("train/loss", "val/")):
                figures[name] = f"{value:.4g} (step {at})"
    return figures


def scores(run: Run) -> dict[str, str]:
    """fid.py's scores of this checkpoint, from eval/*/metrics.json."""
    found = {}
    for path in sorted(run.folder.glob("eval/**/metrics.json")):
        values = json.loads(path.read_text())
        if values.get("checkpoint_sha256") == run.sha256:
            figures = [f"{name} {value:.4g}" for name, value in values.items() if name.startswith(SCORES)]
            found[f"{path.parent.name}, {values['n']} images"] = ", ".join(figures)
    return found


if __name__ == "__main__":
    with cli.user_errors():
        main(sys.argv[1:])

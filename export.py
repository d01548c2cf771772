"""A run's weights for others to use: `python export.py ckpt=RUN out=FOLDER`, keys in configs/export.yaml.

    format=safetensors   a folder: model.safetensors, config.json and README.md, a model card with picture and figures
    format=dit           a .pt in official DiT's layout, {"ema": ..., "args": ...}; the prediction stays the run's own
    format=sit           a .pt that official SiT samples from unchanged: our flow with time and sign reversed
    format=diffusers     a folder for DiTPipeline.from_pretrained: a DiT with objective=ddpm, its schedule and its VAE

The first takes any network, and the texts that a run has kept go with it; the others take DiTs for class labels and
square latents. ckpt= opens the first three: each carries the config with the weights, which come back bit for bit.
dtype=float16 halves the file and rounds them. ema_width=0.07: of a run with ema=power, the average of that width.
push=owner/name uploads a folder with its card to the Hugging Face hub, as the user that `hf auth login` has logged in.
"""

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import yaml

import conditions
from checkpoints.config import Settings, Train, Weights, Width, to_yaml
from checkpoints.curves import log_lines
from checkpoints.load import Run, load_run
from checkpoints.run_folder import CONDITIONS_FILE, find_checkpoint
from cost import cost_table
from evaluation.table import SCORES, finite
from system import UserError, cli, hub, printable
from system.files import atomic_file, fresh_folder, read_json
from system.settings import Check, parse
from system.tensors import write_safetensors
from training.ema import check_reconstruction, reconstruct
from weights import pipeline
from weights.foreign import CONFIG_KEY, check_keys
from weights.layouts import Tensors, reverse_time

PICTURE = "samples.png"  # of a card
LOSSES = ("train/loss", "val/loss_dense", "val/loss_routed")  # of a log, in a card


@dataclass(frozen=True)
class Export:
    """configs/export.yaml"""

    ckpt: str
    out: str
    format: Literal["safetensors", "dit", "sit", "diffusers"] = "safetensors"
    weights: Weights = "ema"
    ema_width: Width | None = None
    dtype: Literal["float32", "float16"] = "float32"
    license: Annotated[str, Check("such as mit or cc-by-4.0", re.compile(r"[a-z0-9.-]+").fullmatch)] = "unknown"
    push: Annotated[str, Check("such as owner/name", re.compile(r"[\w.-]+/[\w.-]+").fullmatch)] | None = None

    def __post_init__(self):
        if self.push is not None and self.format not in ("safetensors", "diffusers"):
            raise UserError(f"push={self.push} uploads a folder; needed: format=safetensors or diffusers")
        if self.license != "unknown" and self.format not in ("safetensors", "diffusers"):
            raise UserError(f"license={self.license} goes into a model card; needed: format=safetensors or diffusers")


def main(overrides: list[str]) -> None:
    settings = parse(Export, cli.load_config("export", overrides))
    out, width, average = Path(settings.out), settings.ema_width, None
    if out.exists():
        raise UserError(f"out={out} exists already")
    if settings.push is not None:
        from huggingface_hub import create_repo, upload_folder

        with hub.refusals(f"push={settings.push}"):
            create_repo(settings.push, exist_ok=True)
    if width is not None:
        checkpoint = find_checkpoint(settings.ckpt)
        check_reconstruction(checkpoint, settings.weights, width)
        average = reconstruct(checkpoint, width)
    run = load_run(settings.ckpt, settings.weights, tensors=average, device="cpu")
    run.ema_width = width
    check_layout(run, settings.format)
    dtype = getattr(torch, settings.dtype)
    tensors = {k: (t.to(dtype) if t.is_floating_point() else t).contiguous() for k, t in run.model.state_dict().items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    if settings.format == "safetensors":
        export_folder(run, tensors, out, settings)
    elif settings.format == "diffusers":
        export_pipeline(run, tensors, out, settings)
    else:
        export_pt(run, tensors, out, settings.format)
    of_width = "" if width is None else f" of width {width:g}"
    print(f"{settings.weights} weights{of_width} of {run.checkpoint}, step {run.step}: {out}")
    if settings.format != "diffusers":
        print(f"next       python sample.py ckpt={shlex.quote(str(out))}")
    if settings.push is not None:
        with hub.refusals(f"push={settings.push}"):
            upload_folder(repo_id=settings.push, folder_path=out, commit_message=f"step {run.step}")
        print(f"uploaded: {settings.push}")


def check_layout(run: Run, layout: str) -> None:
    """Raises UserError where the layout of another project cannot hold the run's network."""
    if layout == "safetensors":
        return
    (_, h, w), objective = run.model.latent_shape, run.settings.objective["_target_"]
    model, kind = run.settings.model["_target_"], conditions.kind_of(run.model.null_condition)
    found = f"{run.checkpoint} is of the class {model}"
    if layout == "diffusers" and (model, objective) != ("dit.DiT", "ddpm.DDPM"):
        raise UserError(f"format=diffusers needs a DiT with objective=ddpm; {found}, with {objective}")
    own = [f"{key}={value}" for key, value in run.settings.model.items() if key == "positions_from" or value == "relu2"]
    found += f" with {', '.join(own)}" * bool(own)
    if own or model not in ("dit.DiT", "lightningdit.LightningDiT"):
        raise UserError(f"format={layout} is another project's, which cannot open it: {found}; needed: safetensors")
    if kind != "class" or h != w or layout == "diffusers" and len(run.pool) > pipeline.NULL_LABEL:
        found = f"{run.checkpoint} is for {conditions.KINDS[kind]} and latents of {h} x {w}"
        raise UserError(f"format={layout} needs labels (for diffusers 1000 at most) and square latents; {found}")
    if layout == "sit" and (predicts := getattr(run.objective, "output", run.objective.predicts)) != "velocity":
        raise UserError(f"format=sit needs a flow (objective=rf); {run.checkpoint} predicts {predicts}")
    check_keys(run.model.state_dict(), run.checkpoint)


def portable_config(run: Run) -> dict:
    """What rebuilds and describes the network, as plain values without this machine's paths."""
    values = yaml.safe_load(to_yaml(run.settings))
    for key in ("path", "prepare", "source"):
        del values["data"][key]
    if (encoder := run.settings.data.text_encoder) and Path(encoder).is_dir():
        values["data"]["text_encoder"] = Path(encoder).name  # its hash is there
    if not is_trained(run.settings):  # but its label dropout may be known
        values["train"] = {"label_dropout": run.settings.train.label_dropout}
    told = ["train", "optimizer", "seed"] if is_trained(run.settings) else ["train"] * run.dropout_known
    return {key: values[key] for key in ("format", "model", "objective", "sampler", "data", *told)}


def is_trained(settings: Settings) -> bool:
    """Whether the settings of training are known: another project's file tells its label dropout at most."""
    return settings.train != Train(label_dropout=settings.train.label_dropout)


def export_folder(run: Run, tensors: Tensors, out: Path, settings: Export) -> None:
    config = portable_config(run)
    metadata = {CONFIG_KEY: yaml.safe_dump(config, sort_keys=False), "step": str(run.step), "format": "pt"}
    width = {} if run.ema_width is None else {"ema_width": run.ema_width}
    facts = finite({"step": run.step, "weights": run.weights, **width, **config})
    where = "model.safetensors" if settings.push is None else f"hf:{settings.push}"
    use = f"    python sample.py ckpt={where}\n\nor, from Python, in a checkout of the code:\n\n"
    use += f'    from checkpoints.load import load_run\n    run = load_run("{where}")'
    card = model_card(run, use, settings)
    with fresh_folder(out) as folder:
        write_safetensors(folder / "model.safetensors", tensors, metadata)
        if conditions.kind_of(run.pool) == "text":
            write_safetensors(folder / CONDITIONS_FILE, conditions.save(run.pool, run.text_stats))
        (folder / "config.json").write_text(json.dumps(facts, indent=2) + "\n")
        add_card(run, folder, card)


def export_pt(run: Run, tensors: Tensors, out: Path, layout: str) -> None:
    """layout: dit or sit."""
    config = yaml.safe_dump(portable_config(run), sort_keys=False)
    size = f"{run.model.name.rstrip('0123456789')}/{run.model.patch_size}"  # XL/2
    args = {"layout": layout, CONFIG_KEY: config, "model": f"DiT-{size}"}
    if layout == "sit":
        tensors = reverse_time(tensors)
        args |= {"model": f"SiT-{size}", "path_type": "Linear", "prediction": "velocity"}
    with atomic_file(out) as file:
        torch.save({"ema": tensors, "args": args, "step": run.step}, file)


def export_pipeline(run: Run, tensors: Tensors, out: Path, settings: Export) -> None:
    """The folder of a DiTPipeline with a DDIMScheduler. Raises UserError for latents that no such VAE scales."""
    from diffusers import DDIMScheduler, DiTPipeline

    names = {"num_steps": "num_train_timesteps", "beta_start": "beta_start", "beta_end": "beta_end"}
    schedule = {names[key]: value for key, value in run.settings.objective.items() if key in names}
    if run.settings.data.codec["_target_"] == "autoencoder.PixelCodec":
        vae = pipeline.pixel_vae(run.model.latent_shape[0])
    elif run.codec.scale.ndim or run.codec.bias.any():
        raise UserError("format=diffusers needs latents of one scale and no bias; these have one per channel")
    else:
        vae = run.codec.vae
        vae.register_to_config(scaling_factor=round(run.codec.scale.item(), 8))  # as written: float32 has 7 digits
    labels = {i: str(i) for i in range(len(run.pool))}
    scheduler = DDIMScheduler(**schedule, clip_sample=False)  # its defaults are those of ddpm.DDPM
    made = DiTPipeline(pipeline.transformer_of(run.model, tensors), vae, scheduler, id2label=labels)
    made.register_to_config(id2label=labels)
    card = model_card(run, pipeline.PIPELINE_USE, settings)
    with fresh_folder(out) as folder:
        made.save_pretrained(folder)
        add_card(run, folder, card)


def picture_of(run: Run) -> Path | None:
    """The preview that training has drawn with these weights; None = it has not."""
    path = run.place("samples") / f"step_{run.step:07d}.png"
    return path if run.weights == "ema" and run.ema_width is None and path.is_file() else None


def add_card(run: Run, folder: Path, card: str) -> None:
    (folder / "README.md").write_text(card)
    if (picture := picture_of(run)) is not None:
        shutil.copyfile(picture, folder / PICTURE)


def model_card(run: Run, use: str, export: Export) -> str:
    """Markdown with the hub's front matter: the network, its picture, how to `use` it, its training and its scores."""
    model, settings, shape = run.model, run.settings, " x ".join(map(str, run.model.latent_shape))
    kind = conditions.kind_of(model.null_condition)
    told = f"{len(run.pool)} classes" if kind == "class" else conditions.KINDS[kind]
    what = f"{type(model).__name__} {model.name} for {markdown(settings.data.name)}: {shape}, {told}; "
    what += f"{run.weights} weights."
    library = ["library_name: diffusers"] if export.format == "diffusers" else []
    task = "text-to-image" if kind == "text" else "unconditional-image-generation"
    lines = ["---", f"license: {export.license}", *library, f"pipeline_tag: {task}", "tags: [diffusion, tread]", "---"]
    lines += ["", f"# {markdown(run.folder.name)}, step {run.step}", "", what, ""]
    lines += [] if picture_of(run) is None else [f"![Samples]({PICTURE})", ""]
    lines += [use, "", "| | |", "|---|---|"]
    facts = {key: part["_target_"] for key, part in (("objective", settings.objective), ("codec", settings.data.codec))}
    facts["sha256"] = run.sha256
    if is_trained(settings):
        names = ("global_batch_size", "lr", "label_dropout", "ema_decay", "precision")
        facts |= {name: getattr(settings.train, name) for name in names}
    if run.ema_width is not None:
        facts |= {"ema_width": run.ema_width}
        facts.pop("ema_decay", None)
    facts |= last_figures(run) | scores(run)
    lines += [f"| {markdown(name)} | {markdown(value)} |" for name, value in facts.items()]
    if run.checkpoint.is_dir():
        lines += ["", *(f"    {line}" for line in cost_table(model, settings).splitlines())]
    return "\n".join(lines) + "\n"


def markdown(value: object) -> str:
    """A value from a config or a log, which may be a stranger's, as text of a card: one line, without markup."""
    text = printable(" ".join(str(value).split()))[:100]
    return re.sub(r"([\\`*\[\]<>|#!&~])", r"\\\1", text).replace("\\<", "&lt;").replace("\\>", "&gt;")


def last_figures(run: Run) -> dict[str, str]:
    """The last training and validation losses up to the run's step, by name."""
    figures, log = {}, run.folder / "metrics.jsonl"
    for _, _, values in log_lines(log):
        for name, value in (values or {}).items():
            if values["step"] <= run.step and is_number(value) and name in LOSSES:
                figures[name] = f"{value:.4g} (step {values['step']})"
    return figures


def scores(run: Run) -> dict[str, str]:
    """fid.py's scores of this checkpoint, from eval/*/metrics.json."""
    found = {}
    for path in sorted(run.folder.glob("eval/**/metrics.json")):
        values = read_json(path)
        if values.get("checkpoint_sha256") == run.sha256 and values.get("ema_width") == run.ema_width:
            scored = ((name, value) for name, value in values.items() if name.startswith(SCORES))
            figures = (f"{name} {value:.4g}" if is_number(value) else f"{name} {value}" for name, value in scored)
            found[f"{path.parent.name}, {values.get('n')} images"] = ", ".join(figures)
    return found


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


if __name__ == "__main__":
    cli.command(main, __doc__)

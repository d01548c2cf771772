"""A run's weights for others to use: `python export.py ckpt=RUN out=FOLDER`, keys in configs/export.yaml.

    format=safetensors   a folder: model.safetensors, config.json and README.md, a model card with the run's figures
    format=dit           a .pt in official DiT's layout, {"ema": ..., "args": ...}; the prediction stays the run's own
    format=sit           a .pt that official SiT samples from unchanged: our flow with time and sign reversed
    format=diffusers     a folder for DiTPipeline.from_pretrained: a DiT with objective=ddpm, its schedule and its VAE

The first three are valid ckpt=: each carries the config with the weights, which come back bit for bit. dtype=float16
halves the file and rounds them. push=owner/name uploads a folder with its card to the Hugging Face hub, as the user
that `hf auth login` has logged in.

ema_width=0.07: of a run with ema=power, the average of that width.
"""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file

from autoencoder import PixelCodec
from checkpoints.foreign import CONFIG_KEY, reverse_time
from checkpoints.load import Run, load_run
from cost import cost_table
from ddpm import DDPM
from dit import DiT
from evaluation.table import SCORES, finite
from system import UserError, cli
from system.files import usual_mode

KEPT = ["model", "objective", "sampler", "data", "train", "optimizer", "seed"]  # of the config: no paths
DTYPES = {"float32": torch.float32, "float16": torch.float16}


def main(overrides: list[str]) -> None:
    if set(overrides) & {"-h", "--help"}:
        print(__doc__.strip())
        return
    settings = cli.load_config("export", overrides)
    if settings.format not in ("safetensors", "dit", "sit", "diffusers"):
        raise UserError(f"format={settings.format}; needed: safetensors, dit, sit or diffusers")
    if settings.dtype not in DTYPES:
        raise UserError(f"dtype={settings.dtype}; needed: {', '.join(DTYPES)}")
    out = Path(settings.out)
    if out.exists():
        raise UserError(f"out={out} exists already")
    if settings.push is not None:
        if settings.format not in ("safetensors", "diffusers") or not re.fullmatch(r"[\w.-]+/[\w.-]+", settings.push):
            raise UserError(f"push={settings.push}; needed: owner/name, and format=safetensors or diffusers, a folder")
        with reaching_hub(settings.push) as hub:
            hub.create_repo(settings.push, exist_ok=True)
    run = load_run(settings.ckpt, settings.weights, ema_width=settings.ema_width, device="cpu")
    tensors = {key: value.to(DTYPES[settings.dtype]).contiguous() for key, value in run.model.state_dict().items()}
    config = portable_config(run.config)
    out.parent.mkdir(parents=True, exist_ok=True)
    if settings.format == "safetensors":
        export_folder(run, tensors, config, out)
    elif settings.format == "diffusers":
        export_pipeline(run, tensors, config, out)
    else:
        export_pt(run, tensors, config, out, settings.format)
    width = "" if run.ema_width is None else f" of width {run.ema_width:g}"
    print(f"{settings.weights} weights{width} of {run.checkpoint}, step {run.step}: {out}")
    if settings.push is not None:
        with reaching_hub(settings.push) as hub:
            hub.upload_folder(repo_id=settings.push, folder_path=out, commit_message=f"step {run.step}")
        print(f"uploaded: {settings.push}")


@contextmanager
def reaching_hub(name: str) -> Iterator:
    """huggingface_hub's HfApi. A name that the hub refuses, a missing login or network inside become a UserError."""
    from huggingface_hub import HfApi

    try:
        yield HfApi()
    except Exception as error:  # the hub's client and the HTTP library under it each raise their own
        raise UserError(f"push={name}: {(str(error).strip() or type(error).__name__).splitlines()[0]}") from None


def portable_config(config: DictConfig) -> DictConfig:
    """The part that rebuilds and describes the network, without this machine's paths."""
    kept = OmegaConf.masked_copy(config, [key for key in KEPT if key in config])
    for key in ("path", "prepare"):
        kept.data.pop(key, None)
    return kept


def export_folder(run: Run, tensors: dict[str, torch.Tensor], config: DictConfig, out: Path) -> None:
    out.mkdir()
    metadata = {CONFIG_KEY: OmegaConf.to_yaml(config), "layout": "dit", "step": str(run.step), "format": "pt"}
    with usual_mode(out / "model.safetensors"):
        save_file(tensors, out / "model.safetensors", metadata)
    width = {} if run.ema_width is None else {"ema_width": run.ema_width}
    facts = finite({"step": run.step, "weights": run.weights, **width, **OmegaConf.to_container(config)})
    (out / "config.json").write_text(json.dumps(facts, indent=2) + "\n")
    (out / "README.md").write_text(model_card(run, config, "    python sample.py ckpt=model.safetensors"))


def export_pt(run: Run, tensors: dict[str, torch.Tensor], config: DictConfig, out: Path, layout: str) -> None:
    """layout: dit or sit. Raises UserError for a network that is not theirs, and for SiT's where it is not a flow."""
    if config.model._target_ not in ("dit.DiT", "lightningdit.LightningDiT"):
        raise UserError(
            f"format={layout} is another project's, which cannot open a {config.model._target_}; needed: safetensors"
        )
    args = {"layout": layout, CONFIG_KEY: OmegaConf.to_yaml(config), "model": config.model.size}
    if layout == "sit":
        if run.objective.predicts != "velocity":
            found = f"{run.checkpoint} predicts {run.objective.predicts}"
            raise UserError(f"format=sit needs a flow (objective=rf); {found}")
        tensors = reverse_time(tensors)
        args |= {"model": config.model.size.replace("DiT", "SiT"), "path_type": "Linear", "prediction": "velocity"}
    torch.save({"ema": tensors, "args": args, "step": run.step}, out)


# The last line of the loop: diffusers spaces the frequencies of DiT's time embedding by 1/127 of their range, official
# DiT, and so this network, by 1/128. It holds for the DiT weights that diffusers hosts, too.
PIPELINE_USE = """
    from diffusers import DiTPipeline
    pipeline = DiTPipeline.from_pretrained("this folder")
    for block in pipeline.transformer.transformer_blocks:  # time frequencies as trained; without it, images differ
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    pipeline(class_labels=[0, 1, 2], guidance_scale=1.5, num_inference_steps=50).images[0]
""".strip("\n")
NULL_LABEL = 1000  # DiTPipeline's, whatever the number of classes


def export_pipeline(run: Run, tensors: dict[str, torch.Tensor], config: DictConfig, out: Path) -> None:
    """The folder of a DiTPipeline with a DDIMScheduler. Raises UserError for a network that is not a DiT with noise
    prediction and at most 1000 classes."""
    if type(run.model) is not DiT or not isinstance(run.objective, DDPM) or run.num_classes > NULL_LABEL:
        found = f"{run.checkpoint} is a {type(run.model).__name__} with {type(run.objective).__name__}"
        needed = f"a DiT with objective=ddpm and at most {NULL_LABEL} classes"
        raise UserError(f"format=diffusers needs {needed}; {found} and {run.num_classes} classes")
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    model, schedule = run.model, config.objective
    heads, width = model.blocks[0].attn.num_heads, model.pos_embed.shape[-1]
    transformer = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, in_channels=model.in_channels,
        out_channels=model.out_channels, num_layers=len(model.blocks), sample_size=model.input_size,
        patch_size=model.patch_size, num_embeds_ada_norm=NULL_LABEL, norm_eps=1e-6, norm_num_groups=1,
    )  # fmt: skip
    transformer.load_state_dict(diffusers_layout(tensors, len(model.blocks), run.num_classes))
    scheduler = DDIMScheduler(schedule.num_steps, schedule.beta_start, schedule.beta_end, clip_sample=False)
    if isinstance(run.codec, PixelCodec):
        vae = pixel_vae(model.in_channels)
    else:
        if run.codec.scale.ndim or run.codec.bias.any():
            raise UserError("format=diffusers needs latents of one scale and no bias; these have one per channel")
        vae = run.codec.vae
        vae.register_to_config(scaling_factor=round(run.codec.scale.item(), 8))  # as written: float32 has 7 digits
    names = {i: str(i) for i in range(run.num_classes)}
    pipeline = DiTPipeline(transformer.to(tensors["x_embedder.proj.weight"].dtype), vae, scheduler, id2label=names)
    pipeline.register_to_config(id2label=names)
    pipeline.save_pretrained(out)
    (out / "README.md").write_text(model_card(run, config, PIPELINE_USE))


def diffusers_layout(tensors: dict[str, torch.Tensor], depth: int, num_classes: int) -> dict[str, torch.Tensor]:
    """DiT's tensors under DiTTransformer2DModel's names, where each block has time and label embeddings of its own."""
    labels = tensors["y_embedder.embedding_table.weight"]  # (classes + 1, D), the null label last
    table = labels.new_zeros(NULL_LABEL + 1, labels.shape[1])
    table[:num_classes], table[NULL_LABEL] = labels[:num_classes], labels[num_classes]
    renamed = {"norm1.emb.class_embedder.embedding_table.weight": table}
    for part in ("weight", "bias"):
        for ours, theirs in (("0", "linear_1"), ("2", "linear_2")):
            renamed[f"norm1.emb.timestep_embedder.{theirs}.{part}"] = tensors[f"t_embedder.mlp.{ours}.{part}"]
    layout = {f"transformer_blocks.{i}.{name}": value for i in range(depth) for name, value in renamed.items()}
    outside = {"x_embedder.proj": "pos_embed.proj", "final_layer.linear": "proj_out_2"}
    outside["final_layer.adaLN_modulation.1"] = "proj_out_1"
    inside = {"adaLN_modulation.1": "norm1.linear", "attn.proj": "attn1.to_out.0"}
    inside |= {"mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}
    for part in ("weight", "bias"):
        layout |= {f"{theirs}.{part}": tensors[f"{ours}.{part}"] for ours, theirs in outside.items()}
        for i in range(depth):
            block = f"transformer_blocks.{i}"
            layout |= {
                f"{block}.{theirs}.{part}": tensors[f"blocks.{i}.{ours}.{part}"] for ours, theirs in inside.items()
            }
            for name, value in zip("qkv", tensors[f"blocks.{i}.attn.qkv.{part}"].chunk(3)):
                layout[f"{block}.attn1.to_{name}.{part}"] = value
    return layout


def pixel_vae(channels: int) -> torch.nn.Module:
    """An AutoencoderKL whose decoder hands pixels (B, C, h, w) on, a grey one three times, to 1e-3 of [-1, 1].

    Its one GroupNorm cannot be left out. Two constant channels, +M and -M, outweigh the pixels in it, so it divides by
    nearly a constant, and tell the mean that it has subtracted; far from 0, SiLU is the identity.
    """
    from diffusers import AutoencoderKL

    M, shift, width, colors = 256.0, 16.0, channels + 2, 3 if channels == 1 else channels
    vae = AutoencoderKL(
        in_channels=colors, out_channels=colors, latent_channels=channels, block_out_channels=(width,),
        norm_num_groups=1, layers_per_block=1, scaling_factor=1.0, mid_block_add_attention=False, use_quant_conv=False,
        use_post_quant_conv=False,
    ).requires_grad_(False)  # fmt: skip
    for p in vae.parameters():
        p.zero_()
    decoder, std = vae.decoder, M * (2 / width) ** 0.5
    for c in range(channels):
        decoder.conv_in.weight[c, c, 1, 1] = 1
    decoder.conv_in.bias[-2:] = torch.tensor([M, -M])
    decoder.conv_norm_out.weight.fill_(std)
    decoder.conv_norm_out.bias[:] = torch.tensor([shift] * channels + [M + shift] * 2)
    for color in range(colors):
        decoder.conv_out.weight[color, color % channels, 1, 1] = 1
        decoder.conv_out.weight[color, -2:, 1, 1] = -0.5  # the mean, with the sign that it was subtracted with
        decoder.conv_out.bias[color] = M  # - shift + (M + shift)
    return vae


def model_card(run: Run, config: DictConfig, use: str) -> str:
    """Markdown: the network, how to `use` it, its training, and every score in the run folder."""
    model = run.model
    lines = [
        f"# {run.folder.name}, step {run.step}", "",
        f"{config.model.size} for {config.data.name}: {model.in_channels} x {model.input_size} x {model.input_size}, "
        f"{run.num_classes} classes; {run.weights} weights.", "",
        use, "",
        "| | |", "|---|---|",
    ]  # fmt: skip
    facts = {"objective": config.objective._target_, "codec": config.data.codec._target_, "sha256": run.sha256}
    if "train" in config:
        names = ("global_batch_size", "lr", "label_dropout", "ema_decay", "precision")
        facts |= {name: config.train[name] for name in names if name in config.train}
    if run.ema_width is not None:
        facts |= {"ema_width": run.ema_width}
        facts.pop("ema_decay", None)
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
        if values.get("checkpoint_sha256") == run.sha256 and values.get("ema_width") == run.ema_width:
            figures = [f"{name} {value:.4g}" for name, value in values.items() if name.startswith(SCORES)]
            found[f"{path.parent.name}, {values['n']} images"] = ", ".join(figures)
    return found


if __name__ == "__main__":
    with cli.user_errors():
        main(sys.argv[1:])

"""The settings of a run, as its config.yaml holds them: configs/config.yaml with its groups, as dataclasses.

model, objective, sampler and data.codec stay plain: what they may hold is said by the constructors that take them.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal

import yaml

from guidance import Guidance
from system import UserError
from system.limits import SEEDS, TEXT_TOKENS
from system.settings import (
    Check,
    Count,
    Kind,
    Names,
    PerChannel,
    Positive,
    above,
    at_least,
    at_most,
    between,
    parse,
    refuse_interpolations,
)

FORMAT = 1  # of config.yaml and of exports

Share = Annotated[float, between(0, 1)]
# Of a power average; the plain mean of all steps, gamma = 0, has 0.2887.
Width = Annotated[float, Check("between 0 and 0.28, both left out", lambda width: 0 < width < 0.28)]
Weights = Literal["ema", "raw"]
Precision = Literal["auto", "fp32", "bf16"]
Seeds = int | str | tuple[int | str, ...]  # parse_seeds
Extractor = Literal["mnist", "fashion", "inception", "dinov2"]
Metrics = tuple[Literal["fd", "sfid", "is", "pr", "kid"], ...]


def parse_seeds(seeds: Seeds) -> list[int]:
    """ "0-3" or ["0-3", 7] -> [0, 1, 2, 3, 7]. Raises UserError."""
    parsed = []
    for part in seeds if isinstance(seeds, tuple | list) else str(seeds).split(","):
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", str(part).strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not 0 <= last - first < SEEDS - len(parsed):
            needed = "numbers and ranges, such as 0-63 or [1,5,9-12]"
            raise UserError(f"seeds={seeds}; needed: {needed}" + f", at most {SEEDS} seeds" * (first <= last))
        parsed += range(first, last + 1)
    return parsed


@dataclass(frozen=True)
class Train:
    dry_run: bool = False
    max_steps: Positive = 1800
    global_batch_size: Positive = 64
    micro_batch_size: Positive | None = None
    lr: Annotated[float, at_least(0)] = 3e-3
    warmup_steps: Count = 100
    decay_steps: Count = 900
    grad_clip: Annotated[float, above(0)] | None = 1.0
    label_dropout: Share = 0.1
    dense_last: Annotated[float, at_least(0), at_most(1)] = 0.0
    ema_decay: Share = 0.999
    ema_ramp: bool = True
    precision: Precision = "auto"
    compile: Literal["blocks", "off"] = "blocks"
    deterministic: bool = False
    gradient_checkpointing: bool = False
    log_every: Positive = 50
    val_every: Count = 900
    val_samples: Positive = 500
    save_every: Count = 900
    keep_last: Positive = 2
    keep_every: Positive | None = None
    max_hours: Annotated[float, at_least(0)] | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped: Count = 10
    timeout_s: Positive = 600
    check_replicas_every: Count = 1000
    middle_weight: Annotated[float, above(0)] = 0.5

    @property
    def routed_steps(self) -> int:
        """The last step with routes."""
        return self.max_steps - round(self.dense_last * self.max_steps)


@dataclass(frozen=True)
class Data:
    """input_size: of square latents, or their [height, width]. path: None = not given, and not needed by a dry run.

    classes: their names; None = those of meta.json, if it has any. usual_codec: where neither codec nor meta.json names
    one. text_length: tokens that texts are padded to. text_encoder, text_sha256: what made the texts (data/texts.py),
    and the hash of its weights, as meta.json says.
    """

    name: str
    channels: Positive
    input_size: Positive | tuple[Positive, Positive]
    codec: dict[str, Any]
    path: str | None = None
    condition: Literal["class", "text", "none"] = "class"
    num_classes: Positive | None = None
    classes: Names | None = None
    text_width: Positive | None = None
    text_length: Annotated[int, between(1, TEXT_TOKENS + 1)] | None = None
    text_encoder: str | None = None
    text_sha256: str | None = None
    num_workers: Count = 0
    prepare: Literal["mnist", "fashion", "idx", "emoji", "pictures"] | None = None
    source: str | None = None
    kind: Kind | None = None
    on_error: Literal["stop", "skip"] = "stop"
    usual_codec: dict[str, Any] | None = None

    def __post_init__(self):
        object.__setattr__(self, "codec", {k: None if v == "auto" else v for k, v in self.codec.items()})
        for condition, key in (("class", "num_classes"), ("text", "text_width")):
            if self.condition == condition and getattr(self, key) is None:
                raise UserError(f"condition={condition} needs {key}, a whole number of at least 1")
        if self.condition == "class" and len(self.classes or ()) > self.num_classes:
            raise UserError(f"{len(self.classes)} classes have names, and num_classes={self.num_classes}")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)"""
        return self.channels, *(self.input_size if isinstance(self.input_size, tuple) else (self.input_size,) * 2)


@dataclass(frozen=True)
class Optimizer:
    """momentum and what follows are Muon's. ns_precision: a file without it was trained in bf16."""

    name: Literal["adamw", "muon"] = "adamw"
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Annotated[float, at_least(0)] = 1e-8
    weight_decay: Annotated[float, at_least(0)] = 0.0
    momentum: Share = 0.95
    nesterov: bool = True
    ns_steps: Annotated[int, at_least(1), at_most(99)] = 5
    ns_precision: Precision = "bf16"


@dataclass(frozen=True)
class Ema:
    widths: tuple[Width, ...] | None = None


@dataclass(frozen=True)
class Alignment:
    """What the tokens after `block` are aligned with. target: layersync's. teacher and the widths: repa's."""

    name: Literal["none", "layersync", "repa"] = "none"
    weight: Annotated[float, at_least(0)] | None = None
    block: Count = 0
    target: Count = 1
    teacher: str = "mnist"
    teacher_width: Positive = 64
    projector_width: Positive = 2048

    def __post_init__(self):
        if self.weight is None and self.name != "none":
            raise UserError(f"alignment.name={self.name} without a weight; needed: alignment={self.name}")
        if self.target <= self.block and self.name == "layersync":
            raise UserError(f"block={self.block}, target={self.target}; needed: a target after the block")

    @property
    def on(self) -> bool:
        return self.name != "none" and self.weight > 0


@dataclass(frozen=True)
class Preview(Guidance):
    every: Count = 900
    num_images: Positive = 40


@dataclass(frozen=True)
class Generation(Guidance):
    """What images depend on besides the run and the sampler, and how many are made at once."""

    batch_size: Positive = 64
    weights: Weights = "ema"
    seeds: Seeds = "0-999"
    labels: Literal["balanced", "random"] | Count = "random"
    steps: Positive | None = None
    precision: Precision = "auto"

    def __post_init__(self):
        super().__post_init__()
        _ = self.all_seeds

    @cached_property
    def all_seeds(self) -> list[int]:
        return parse_seeds(self.seeds)


@dataclass(frozen=True)
class Scoring(Generation):
    """What a score depends on: the keys of configs/fid.yaml that `eval` has, too."""

    extractor: Extractor = "mnist"
    extractor_weights: str | None = None
    extractor_sha256: str | None = None
    ref: str | None = None
    digits: str = "datasets/mnist"
    fashion: str = "datasets/fashion"
    metrics: Metrics | None = None


@dataclass(frozen=True)
class Eval(Scoring):
    every: Count = 0
    weights: Literal["ema"] = "ema"
    metrics: Metrics | None = ("fd",)


@dataclass(frozen=True)
class Codec:
    """What decodes latents; None = the run's own."""

    path: str | None = None
    scale: PerChannel | None = None
    bias: PerChannel | None = None


@dataclass(frozen=True)
class Hardware:
    peak_tflops: Annotated[float, above(0)] = 312.0
    mfu: Annotated[float, above(0), at_most(1)] = 0.35
    memory_gb: Annotated[float, above(0)] | None = None


@dataclass(frozen=True)
class Wandb:
    project: str = "tread"


@dataclass(frozen=True)
class Settings:
    """eval.precision is train.precision, always."""

    model: dict[str, Any]
    data: Data
    objective: dict[str, Any]
    sampler: dict[str, Any]
    optimizer: Optimizer = Optimizer()
    ema: Ema = Ema()
    alignment: Alignment = Alignment()
    preview: Preview = Preview()
    eval: Eval = Eval()
    run_name: str | None = None
    results_dir: str = "runs"
    resume: str | None = "auto"
    resume_allow: tuple[str, ...] = ()
    init_from: str | None = None
    seed: int = 0
    train: Train = Train()
    hardware: Hardware = Hardware()
    log: Annotated[
        tuple[Literal["jsonl", "tensorboard", "wandb", "trackio"], ...],
        Check("and jsonl among them, which resuming reads", lambda log: "jsonl" in log),
    ] = ("jsonl",)
    wandb: Wandb = Wandb()

    def __post_init__(self):
        if self.eval.precision not in ("auto", self.train.precision):
            raise UserError(f"eval.precision={self.eval.precision}; needed: {self.train.precision}, as train.precision")
        object.__setattr__(self, "eval", replace(self.eval, precision=self.train.precision))


def to_yaml(settings: Settings) -> str:
    """The text of config.yaml."""
    plain = {"format": FORMAT} | asdict(settings)
    if settings.optimizer.name != "muon":  # whose settings the others are
        plain["optimizer"] = {key: plain["optimizer"][key] for key in ("name", "betas", "eps", "weight_decay")}
    if settings.alignment.name == "none":
        del plain["alignment"]
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def from_file(values: Mapping, source: str) -> Settings:
    """The settings that a file holds, `source` being its name. A missing key takes its default. Raises UserError."""
    if not isinstance(values, Mapping):
        raise UserError(f"{source}: its config is damaged; needed: the settings of a run")
    if values.get("format") != FORMAT:
        raise UserError(f"{source}: its config has format {values.get('format')!r:.20}; needed: format {FORMAT}")
    refuse_interpolations(values, source)
    try:
        return parse(Settings, {key: value for key, value in values.items() if key != "format"})
    except UserError as error:
        raise UserError(f"{source}: {error}") from None

"""Settings: every value is converted by its field's annotation, and every mistake is one line that names its key."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

from checkpoints import config
from checkpoints.config import Settings, from_file, parse_seeds, to_yaml
from checkpoints.naming import LONGEST, name_of, settings_name, shortened
from evaluation.evaluate import score_name
from guidance import Guidance
from routing_module import Route
from system import UserError, cli
from system.building import build
from system.settings import above, at_least, at_most, between, convert, parse, read_yaml, refuse_interpolations


@pytest.fixture(scope="module", autouse=True)
def composed():
    """composed(overrides) -> configs/config.yaml as plain values."""
    with initialize_config_dir(str(cli.CONFIG_DIR), version_base="1.3"):
        yield lambda *overrides: OmegaConf.to_container(compose("config", list(overrides)), resolve=True)


@pytest.fixture(scope="module")
def default(composed):
    return parse(Settings, composed())


def refused(call, *arguments):
    """The one line that a call is refused with."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


Least = Annotated[int, at_least(1)]
CONVERTED = [
    (True, bool, True), (3, int, 3), (1e3, int, 1000), (-2, int, -2), (1, float, 1.0), (1e-5, float, 1e-5),
    ("a b", str, "a b"), (None, None | str, None), (None, int | None, None), (2.0, int | None, 2),
    (False, Literal["blocks", "off"], "off"), (True, Literal["on", "off"], "on"),
    ("blocks", Literal["blocks"], "blocks"), (7, int | str, 7),
    ([1.0, 2], list[int], [1, 2]), ([1, 2], tuple[float, ...], (1.0, 2.0)), ([0.9, 1], tuple[float, float], (0.9, 1.0)),
    ((), tuple[int, ...], ()), (["a"], Sequence[str], ["a"]), ([1, 2.5], int | list[float], [1.0, 2.5]),
    ("0-3", int | str | list[int], "0-3"), ({"a": [1]}, dict[str, Any], {"a": [1]}), ({"a": 1}, Mapping, {"a": 1}),
    ({"a": 1}, Any, {"a": 1}), (1, Least, 1), (5e-1, Annotated[float, above(0)], 0.5),
    (0, Annotated[float, between(0, 1)], 0.0),
    (None, Annotated[int, at_most(3)] | None, None), (7, Literal["random"] | Annotated[int, at_least(0)], 7),
    ([{"selection_ratio": 0, "start_layer_idx": 2e0, "end_layer_idx": 4}], Sequence[Route | Mapping], [Route(0, 2, 4)]),
]  # fmt: skip


@pytest.mark.parametrize("value, annotation, expected", CONVERTED)
def test_a_value_becomes_what_its_annotation_says(value, annotation, expected):
    found = convert(value, annotation, "key")
    assert found == expected and type(found) is type(expected)
    if isinstance(found, (list, tuple)):
        assert list(map(type, found)) == list(map(type, expected))


REFUSED = [
    (1, bool, "k=1; needed: true or false"), ("true", bool, "k=true; needed: true or false"),
    (True, int, "k=true; needed: a whole number"), (2.5, int, "k=2.5; needed: a whole number"),
    ("many", int, "k=many; needed: a whole number"), (float("inf"), int, "k=Infinity; needed: a whole number"),
    (None, float, "k=null; needed: a number"), (float("nan"), float, "k=NaN; needed: a number"),
    (True, float, "k=true; needed: a number"), (10**400, float, "needed: a number"), (3, str, "k=3; needed: text"),
    (2.5, int | None, "k=2.5; needed: a whole number or null"),
    ("", str | None, "k= is empty; needed: a value, or k=null for none"), (" ", int, "k= is empty"),
    ("lion", Literal["adamw", "muon"], "k=lion; needed: adamw or muon"),
    (True, Literal["blocks", "off"], "k=true; needed: blocks or off"), ([1], Literal["a"], "k=[1]; needed: a"),
    (0, Least, "k=0; needed: a whole number of at least 1"),
    (0, Annotated[float, above(0)] | None, "k=0; needed: a number above 0 or null"),
    (1, Annotated[float, between(0, 1)], "k=1; needed: a number in [0, 1)"),
    (0.28, config.Width, "k=0.28; needed: a number between 0 and 0.28, both left out"),
    (100, Annotated[int, at_least(1), at_most(99)], "k=100; needed: a whole number of at least 1 and of at most 99"),
    (0.05, tuple[float, ...] | None, "k=0.05; needed: a list, each a number or null"),
    ("fd", list[str], "k=fd; needed: a list, each text"),
    ([0.9], tuple[float, float], "k=[0.9]; needed: a list of 2, each a number"),
    ([1, "a"], list[int], 'k=[1, "a"]; needed: a list, each a whole number'),
    ([], dict[str, Any], "k=[]; needed: a section of keys"), ("a\nb", int, "k=a b; needed: a whole number"),
]  # fmt: skip


@pytest.mark.parametrize("value, annotation, line", REFUSED)
def test_any_other_value_is_refused(value, annotation, line):
    found = refused(convert, value, annotation, "k")
    assert found == line or line.startswith(("k= is", "needed")) and line in found


@dataclass(frozen=True)
class Inner:
    max_steps: Least
    lr: float = 0.1


@dataclass(frozen=True)
class Outer:
    train: Inner
    out: str | None = None
    from_: str | None = None

    def __post_init__(self):
        if self.out == self.from_ == "same":
            raise UserError("out and from are the same")


def test_sections_are_parsed_in_place():
    assert parse(Outer, {"train": {"max_steps": 4e1}, "from": "a"}) == Outer(Inner(40), from_="a")
    assert parse(Outer, {"train": {"max_steps": 4}, "out": "???"}) == Outer(Inner(4))


SECTIONS = [
    ({"train": {"maxsteps": 1}}, "unknown key 'train.maxsteps'; did you mean train.max_steps?"),
    ({"train": {"max_steps": 1, "x": 1}}, "unknown key 'train.x'; needed: max_steps, lr"),
    ({1: 2}, "unknown key '1'; needed: train, out, from"),
    ({"train": {"max_steps": 1}, "from_": "a"}, "unknown key 'from_'; did you mean from?"),
    ({"train": {"lr": "fast", "max_steps": 1}}, "train.lr=fast; needed: a number"),
    ({"train": 3}, "train=3; needed: a section of the keys max_steps, lr"),
    ({"train": None}, "train=null; needed: a section of the keys max_steps, lr"),
    ({"train": {}}, "train.max_steps is missing; needed: a whole number of at least 1"),
    ({"train": {"max_steps": "???"}}, "train.max_steps is missing; needed: a whole number of at least 1"),
    ({"train": {"max_steps": 1}, "out": "same", "from": "same"}, "out and from are the same"),
]


@pytest.mark.parametrize("values, line", SECTIONS)
def test_a_mistake_in_a_section_names_its_key(values, line):
    assert refused(parse, Outer, values) == line


# Building


class Base:
    pass


@cache
def root_file(tmp_path):
    """A folder with files as at the repository's root, and marks where one is imported."""
    (tmp_path / "made_network.py").write_text(
        "from tests.test_settings import Base\nfrom collections.abc import Callable\n"
        "def function(): pass\nalias = Base\n"
        "class Net(Base):\n"
        "    def __init__(self, width: int, depth: int | None = None, block: Callable | None = None, free=1):\n"
        "        self.width, self.depth, self.block = width, depth, block\n"
        "        if depth == 0:\n            raise ValueError('no depth')\n"
        "class Bare(Base): pass\nclass Other: pass\nclass Open(Base):\n    def __init__(self, *args, **kwargs): pass\n"
        "if True:\n    class Within(Base): pass\n"
    )
    (tmp_path / "imported.py").write_text(
        f"open({str(tmp_path / 'was_imported')!r}, 'w')\nfrom json import JSONDecoder\n"
    )
    (tmp_path / "json.py").write_text("class JSONDecoder: pass\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("class Net: pass\n")
    return tmp_path


@pytest.fixture
def root(tmp_path_factory, monkeypatch):
    folder = root_file(tmp_path_factory.getbasetemp())
    monkeypatch.setattr("system.building.ROOT", folder)
    monkeypatch.syspath_prepend(folder)
    return folder


def test_a_class_of_the_root_is_built_from_plain_values(root):
    net = build({"_target_": "made_network.Net", "width": 8e0}, Base, "model")
    assert (net.width, net.depth) == (8, None) and type(net.width) is int
    assert type(build({"_target_": "made_network.Bare"}, Base, "model")).__name__ == "Bare"
    with pytest.raises(ValueError, match="^no depth$"):
        build({"_target_": "made_network.Net", "width": 8, "depth": 0}, Base, "model")


HOSTILE = [
    "os.system", "builtins.eval", "subprocess.Popen", "made_network", "made_network.function", "made_network.alias",
    "made_network.Base", "made_network.Other", "made_network.Within", "made_network.Net.__init__", "package.Net",
    "package.__init__.Net", "imported.JSONDecoder", "json.JSONDecoder", "tests.test_settings.Base", ".Net",
    "../made_network.Net", "functools.partial", "torch.nn.Linear", "hydra.utils.get_method", "", None, 3,
    ["made_network.Net"], {"_target_": "made_network.Net"}, "made_network.Net\n", " made_network.Net",
    "MADE_NETWORK.Net", "made_network.", "made_network\0.Net",
]  # fmt: skip


@pytest.mark.parametrize("target", HOSTILE, ids=repr)
def test_no_other_target_is_built(root, target):
    line = refused(build, {"_target_": target, "width": 1}, Base, "model")
    assert line.startswith("model._target_=") and line.endswith("; needed: module.Class, a Base that a file at the "
                                                                "repository's root defines")  # fmt: skip
    assert not (root / "was_imported").exists()


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"widht": 1}, "unknown key 'model.widht'; did you mean model.width?"),
        ({"width": 1, "free": 2}, "unknown key 'model.free'; needed: width, depth"),
        ({"width": 1, "block": "os.system"}, "unknown key 'model.block'"),
        ({"width": "wide"}, "model.width=wide; needed: a whole number"),
        ({}, "model.width is missing; needed: a whole number"),
        ({"width": 1, "_args_": [1]}, "model._args_ is no setting"),
        ({"width": 1, "_partial_": True}, "model._partial_ is no setting"),
        ({"width": 1, "_convert_": "all"}, "model._convert_ is no setting"),
        ({"width": {"_target_": "os.system"}}, "model.width._target_ is no setting"),
        ({"width": [{"a": {"_recursive_": 1}}]}, "model.width[0].a._recursive_ is no setting"),
    ],
)
def test_settings_that_a_constructor_does_not_take_are_named(root, settings, line):
    assert refused(build, {"_target_": "made_network.Net"} | settings, Base, "model").startswith(line)


def test_what_is_open_takes_nothing(root):
    assert "needed: no key" in refused(build, {"_target_": "made_network.Open", "args": 1}, Base, "model")
    assert "needed: no key" in refused(build, {"_target_": "made_network.Open", "self": 1}, Base, "model")
    assert "has no _target_" in refused(build, {"width": 1}, Base, "model")
    assert "has no _target_" in refused(build, None, Base, "model")


# Runs


MUONS = {"momentum", "nesterov", "ns_steps", "ns_precision"}


def test_the_defaults_are_those_of_the_configs(composed, default):
    values = composed()
    for section in ("train", "ema", "preview", "eval", "hardware", "optimizer", "wandb"):
        cls = type(getattr(default, section))
        assert getattr(default, section) == cls(), section
        assert set(values[section]) == set(asdict(cls())) - MUONS, section
    for field in fields(Settings):
        if field.name not in ("model", "data", "objective", "sampler"):
            assert getattr(default, field.name) == field.default, field.name
    assert set(values) == {field.name for field in fields(Settings)}
    muon = composed("optimizer=muon")["optimizer"]
    assert parse(config.Optimizer, muon) == config.Optimizer("muon", ns_precision="auto") and set(muon) == set(
        asdict(config.Optimizer())
    )


EXPERIMENTS = sorted(p.stem for p in (cli.CONFIG_DIR / "experiment").glob("*.yaml"))
OVERRIDES = [[f"experiment={name}"] for name in EXPERIMENTS]
GROUPS = ("model", "data", "objective", "sampler", "optimizer", "ema", "guidance@preview", "guidance@eval")
OVERRIDES += [
    [f"{group}={path.stem}"]
    for group in GROUPS
    for path in sorted((cli.CONFIG_DIR / group.partition("@")[0]).glob("*.yaml"))
    if path.stem != "pictures"  # whose sizes are settled by the pictures: tests/test_pictures.py
]
OVERRIDES += [
    ["experiment=imagenet256", f"model={m}", f"objective={o}"] for m, o in zip(("dit", "sprint"), ("ddpm", "rf"))
]
OVERRIDES += [["ema=power", "optimizer=muon"], ["train.compile=off"]]
OVERRIDES += [["guidance@preview=sg_fid", "guidance@eval=cfg", "preview.interval=[0.2,3]", "eval.seeds=[0-3,7]"]]


@pytest.mark.parametrize("overrides", OVERRIDES, ids=" ".join)
def test_every_config_parses_and_comes_back_from_its_yaml(composed, overrides):
    settings = parse(Settings, composed(*overrides))
    text = to_yaml(settings)
    assert text.startswith("format: 1\n")
    assert from_file(read_yaml(text, "config.yaml"), "config.yaml") == settings
    assert (MUONS <= set(yaml.safe_load(text)["optimizer"])) == (settings.optimizer.name == "muon")


def test_an_objective_and_a_data_set_bring_their_defaults(composed):
    for objective, takes in (("edm", "denoised"), ("rf", "velocity"), ("ddpm", "denoised")):
        assert composed(f"objective={objective}")["sampler"]["takes"] == takes
    assert composed("objective=rf", "sampler=edm")["sampler"]["takes"] == "denoised"
    assert composed("experiment=sprint", "sampler=sde")["sampler"]["solver"] == "sde"
    assert composed()["objective"]["P_mean"] == -0.4 and composed("data=fashion")["objective"]["P_mean"] == -1.2


@pytest.mark.parametrize(
    "overrides", [["model=dit"], ["experiment=sprint"], ["experiment=maskdit"], ["data=folder"]], ids=str
)
def test_every_part_is_built(composed, overrides):
    small = ["model.depth=8", "model.hidden_size=32", "model.num_heads=2"]
    settings = parse(Settings, composed(*overrides, *small))
    assert isinstance(build(settings.model, nn.Module, "model"), nn.Module)
    for section, key in ((settings.objective, "objective"), (settings.data.codec, "data.codec")):
        assert build(section, object, key)


RUNS = [
    ("train", "max_steps", 0, "train.max_steps=0; needed: a whole number of at least 1"),
    ("train", "grad_clip", 0, "train.grad_clip=0; needed: a number above 0 or null"),
    ("train", "precision", "fp16", "train.precision=fp16; needed: auto, fp32 or bf16"),
    ("train", "label_dropout", 1, "train.label_dropout=1; needed: a number in [0, 1)"),
    ("optimizer", "betas", [0.9, 1], "optimizer.betas=[0.9, 1]; needed: a list of 2, each a number in [0, 1)"),
    ("optimizer", "momentum", 1.5, "optimizer.momentum=1.5; needed: a number in [0, 1)"),
    ("ema", "widths", 0.05, "ema.widths=0.05; needed: a list, each a number between 0 and 0.28, both left out or null"),
    ("preview", "scale", -1, "preview.scale=-1; needed: a number of at least 0"),
    ("preview", "interval", [3, 1], "preview: interval=[3.0, 1.0]; needed: [lo, hi] with lo <= hi"),
    ("preview", "gamma_weak", 1, "preview.gamma_weak=1; needed: a number in [0, 1)"),
    ("preview", "weak_label", "any", "preview.weak_label=any; needed: same, none or random"),
    ("eval", "seeds", "5-1", "eval: seeds=5-1; needed: numbers and ranges, such as 0-63 or [1,5,9-12]"),
    ("eval", "weights", "raw", "eval.weights=raw; needed: ema"),
    ("eval", "precision", "bf16", "eval.precision=bf16; needed: auto, as train.precision"),
    ("eval", "metrics", "fd", "eval.metrics=fd; needed: a list, each fd, sfid, is, pr or kid or null"),
    ("hardware", "mfu", 1.5, "hardware.mfu=1.5; needed: a number above 0 and of at most 1"),
    ("data", "input_size", [4], "data.input_size=[4]; needed: a whole number of at least 1 or a list of 2, each a "
                                "whole number of at least 1"),
    ("data", "num_classes", None, "data: condition=class needs num_classes, a whole number of at least 1"),
    ("data", "condition", "text", "data: condition=text needs text_width, a whole number of at least 1"),
    ("data", "kind", "odd", "data.kind=odd; needed: sample_scaled, sample_raw, moments_logvar, mean_std or null"),
]  # fmt: skip


@pytest.mark.parametrize("section, key, value, line", RUNS)
def test_each_field_of_a_run_is_checked(default, section, key, value, line):
    values = yaml.safe_load(to_yaml(default))
    values[section][key] = value
    assert refused(from_file, values, "FILE") == f"FILE: {line}"
    del values["format"]
    assert refused(parse, Settings, values) == line


def test_log_needs_jsonl():
    line = refused(convert, ["wandb"], Settings.__annotations__["log"], "log")
    assert line.endswith("each jsonl, tensorboard, wandb or trackio and jsonl among them, which resuming reads")


def test_evaluations_have_the_precision_of_training(default):
    chosen = replace(default, train=replace(default.train, precision="bf16"))
    assert chosen.eval.precision == "bf16" and from_file(yaml.safe_load(to_yaml(chosen)), "x") == chosen


def test_latents_may_be_wide(composed):
    data = parse(Settings, composed("data.input_size=[8,16]", "data.channels=4")).data
    assert data.latent_shape == (4, 8, 16) and replace(data, input_size=8).latent_shape == (4, 8, 8)


@pytest.mark.parametrize(
    "change, line",
    [
        ({"format": 2}, "x.yaml: its config has format 2; needed: format 1"),
        ({"format": None}, "x.yaml: its config has format None; needed: format 1"),
        ({"trian": {}}, "x.yaml: unknown key 'trian'; did you mean train?"),
        ({"seed": True}, "x.yaml: seed=true; needed: a whole number"),
        ({"run_name": "${oc.env:SECRET}"}, "x.yaml: run_name refers to something else (${...}); needed: a plain value"),
        ({"model": {"routes": [{"a": "x${b}"}]}}, "x.yaml: model.routes[0].a refers to something else (${...}); "
                                                  "needed: a plain value"),
    ],
)  # fmt: skip
def test_a_config_that_came_with_a_file_is_held_to_its_format(default, change, line):
    assert refused(from_file, yaml.safe_load(to_yaml(default)) | change, "x.yaml") == line


def test_missing_keys_take_their_defaults_and_no_mapping_is_no_config(default):
    values = yaml.safe_load(to_yaml(default))
    kept = {key: values[key] for key in ("format", "model", "objective", "sampler", "data", "seed")}
    assert from_file(kept, "x") == default
    assert refused(from_file, [kept], "x") == "x: its config is damaged; needed: the settings of a run"
    refuse_interpolations({"a": ["$", {"b": 1}]}, "x")


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "\0",
        "a: !!python/object/apply:os.system [ls]",
        "? [a]\n: 1",
        "a: &x 1\nb: *x",
        "[" * 9999,
        "a: 2024-99-99",
    ],
)
def test_damaged_yaml_is_one_line(text):
    assert refused(read_yaml, text, "x.yaml").startswith("x.yaml: its config is damaged (")


def test_more_names_than_classes():
    told = {"name": "x", "channels": 1, "input_size": 8, "codec": {}, "classes": ["a", "b"]}
    assert parse(config.Data, told | {"num_classes": 3}).classes == ("a", "b")
    assert "2 classes have names, and num_classes=1" in refused(parse, config.Data, told | {"num_classes": 1})


def test_seeds():
    assert parse_seeds("0-3") == [0, 1, 2, 3] and parse_seeds(7) == [7] and parse_seeds(("0-1", 7)) == [0, 1, 7]
    assert parse(config.Generation, {"seeds": ["0-3", 7]}).all_seeds == [0, 1, 2, 3, 7]
    assert "at most 16777216 seeds" in refused(parse_seeds, "0-99999999999")
    for wrong in ("abc", "5-1", "-1", -1, "²", "9" * 5000, ("a",)):
        assert "needed: numbers and ranges" in refused(parse_seeds, wrong)


# Names


@dataclass(frozen=True)
class Named(Guidance):
    sampler: dict | None = None
    out: str | None = None
    compile: str = "off"


def test_a_name_tells_the_settings_that_differ():
    assert settings_name(Named()) == "default" and settings_name(Named(out="a"), ("out",)) == "default"
    assert settings_name(Named(2.0, weak_label="same", weak_ckpt="a")) == "scale-2.0_weak_label-same_weak_ckpt-a"
    assert settings_name(Named(compile="blocks")) == "compile-blocks"
    assert settings_name(Named(sampler={"a": 1, "b": 2})) == settings_name(Named(sampler={"b": 2, "a": 1}))
    assert settings_name(parse(config.Scoring, {"seeds": ["0-3", 7]})).startswith("seeds-0-3-7-")


def test_names_need_no_quotes_and_never_meet():
    odd = ["a/b", "a-b", "a b", "a_b", "é", "ü", "-a-b", "a=b", "..", "~", "a\nb", "$x", "*", "a'b"]
    names = [settings_name(Named(weak_ckpt=value)) for value in odd]
    names += [settings_name(Named(interval=(0.1, hi))) for hi in (0.25, 2.5)]
    names += [settings_name(Named(sampler={"steps": steps})) for steps in (1, 11)]
    assert len({name.lower() for name in names}) == len(names)
    assert all(shlex.quote(name) == name and "/" not in name for name in names)
    assert name_of([("train.lr", "1e-3"), ("guidance@eval", "cfg")]) == "train.lr-1e-3_guidance-eval-cfg"


def test_long_names_end_in_a_digest():
    fits = settings_name(Named(out="a" * (LONGEST - len("out-"))))
    assert len(fits) == LONGEST and fits.endswith("aaa")
    longer = [settings_name(Named(out="a" * LONGEST + end)) for end in ("", "a", "b")]
    assert len(set(longer)) == 3 and all(len(name) == LONGEST for name in longer)
    assert len(shortened("é" * LONGEST).encode()) <= LONGEST and shortened("é" * 100) == "é" * 100


def test_so_do_the_names_of_scores():
    ratios = {f"gamma_{name}": 0.2123456 + (name > "t") / 2 for name in ("strong", "weak", "strong_end", "weak_end")}
    more = dict(interval=(0.1234567, 0.9), seeds="0-9,20-29", labels="balanced", steps=20)
    settings = config.Scoring(scale=1.234567, scale_end=1.345678, **more, **ratios)
    names = [score_name(settings, SimpleNamespace(name="mnist"), 20, precision) for precision in ("fp32", "bf16")]
    assert len(set(names)) == 2 and [len(name) for name in names] == [LONGEST] * 2

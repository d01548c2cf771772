"""Each kind of condition from data configs alone: texts, and none, on latents (4, 8, 16); sampled, scored, refused."""

import json
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import fid
import sample
import train as training
from checkpoints.load import load_run
from checkpoints.run_folder import latest_checkpoint
from data.encoding import LatentEncoding
from data.shards import finalize, shard_name, write_shard
from evaluation.evaluate import describe_run
from evaluation.features import Classifier
from system import UserError
from tests.conftest import numbers
from tests.made_runs import made_settings

WIDTH, SHAPE = 8, (4, 8, 16)  # of the texts' states; of the latents


def write_latents(folder: Path, kind: str, shape: tuple[int, int, int], counts: tuple[int, int] = (80, 20)) -> Path:
    """Noise in a train and a val split, with random embeddings of 1 to 5 tokens, three classes, or nothing."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(kind))

    def condition(i: int):
        text = rng.standard_normal((1 + i % 5, WIDTH)).astype(np.float32)
        return {"text": text, "class": i % 3, "none": None}[kind]

    for split, count in zip(("train", "val"), counts):
        arrays = [(f"{split}{i:03d}", (0.5 * rng.standard_normal(shape)).astype(np.float32)) for i in range(count)]
        samples = [(key, array, condition(i)) for i, (key, array) in enumerate(arrays)]
        write_shard(folder / shard_name(split, 0), samples)
    finalize(folder, LatentEncoding("sample_scaled"))
    return folder


def any_size(monkeypatch) -> None:
    """extractor=mnist, of images of any size."""
    forward = Classifier.forward
    smaller = lambda images: F.interpolate(images.float(), (28, 28)).to(torch.uint8)
    monkeypatch.setattr(Classifier, "forward", lambda self, images: forward(self, smaller(images)))


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """An AutoencoderKL that takes a moment: latents (4, h, w) to images (3, 4 h, 4 w)."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[8] * 3, layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32,
    ).save_pretrained(path)  # fmt: skip
    return path


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return {kind: write_latents(folder / kind, kind, SHAPE, (80, 100)) for kind in ("text", "class", "none")}


@pytest.fixture(scope="module")
def keys(sets, vae):
    """keys(kind): what a data config of that kind says."""

    def keys(kind):
        classes, width = 3 if kind == "class" else "null", WIDTH if kind == "text" else "null"
        return [
            "data=folder", f"data.path={sets[kind]}", "data.num_workers=0", "data.channels=4", "data.input_size=[8,16]",
            f"data.condition={kind}", f"data.num_classes={classes}", f"data.text_width={width}",
            f"data.codec.path={vae}", "data.codec.scale=1",
        ]  # fmt: skip

    return keys


SMALL = [
    "model.size=DiT-XS/2", "model.depth=6", "model.hidden_size=32", "model.num_heads=2", "sampler.num_steps=2",
    "train.global_batch_size=8", "train.max_steps=3", "train.warmup_steps=0", "train.decay_steps=0",
    "train.compile=off", "train.precision=fp32", "train.log_every=1", "train.save_every=2", "train.val_every=3",
    "train.val_samples=8", "preview.every=3", "preview.num_images=4",
]  # fmt: skip
RUNS = {  # name: (model, kind)
    "tread": ("tread", "text"), "sprint": ("sprint", "text"), "maskdit": ("maskdit", "none"),
    "alone": ("tread", "none"), "classes": ("tread", "class"),
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(keys, tmp_path_factory):
    """trained(name) -> the run folder, trained at its first use."""
    results = tmp_path_factory.mktemp("runs")

    def trained(name):
        model, kind = RUNS[name]
        if not (results / name).exists():
            named = [f"results_dir={results}", f"run_name={name}"]
            assert training.train(made_settings([f"model={model}", *keys(kind), *SMALL, *named])) == 0
        return results / name

    return trained


def drawn(ckpt, out, *overrides):
    """The PNGs of four seeds, in fp32."""
    sample.main([f"ckpt={ckpt}", "seeds=0-3", "steps=2", "precision=fp32", f"out={out}", *overrides])
    return [path.read_bytes() for path in sorted(out.glob("images/*/*.png"))]


def nearly_equal(a, b):
    """PNGs whose pixels differ by one at most: other batches round otherwise."""
    a, b = (np.stack([np.asarray(Image.open(BytesIO(png))).astype(int) for png in pngs]) for pngs in (a, b))
    return np.abs(a - b).max() <= 1


@pytest.mark.parametrize("name", RUNS)
def test_it_trains_and_keeps_what_it_needs_to_sample(name, trained):
    folder, (_, kind) = trained(name), RUNS[name]
    assert len({line["train/loss"] for line in numbers(folder) if "train/loss" in line}) == 3
    assert (folder / "samples" / "step_0000003.png").is_file()
    for checkpoint in (folder / "checkpoints").glob("step_*"):
        listed = json.loads((checkpoint / "manifest.json").read_text())["files"]
        assert (
            ("conditions.safetensors" in listed) == (checkpoint / "conditions.safetensors").exists() == (kind == "text")
        )
    run = load_run(folder, device="cpu")
    assert run.model.latent_shape == SHAPE and run.model.num_tokens == 32
    if kind == "text":
        kept = load_file(latest_checkpoint(folder) / "conditions.safetensors")
        assert kept["states"].shape == (64, 5, WIDTH) and torch.equal(run.pool.states, kept["states"])
        assert kept["mask"].sum(dim=1).tolist() != [5] * 64


def test_texts_that_were_kept_are_hashed(trained, tmp_path):
    copy = Path(shutil.copytree(trained("tread"), tmp_path / "copy"))
    path = latest_checkpoint(copy) / "conditions.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0\0")
    with pytest.raises(UserError, match="conditions.safetensors"):
        load_run(copy, device="cpu")
    path.unlink()
    with pytest.raises(UserError, match="conditions.safetensors is missing"):
        load_run(copy, device="cpu")


@pytest.mark.parametrize("name", RUNS)
def test_it_is_sampled_without_its_data(name, trained, sets, tmp_path):
    folder, kind = trained(name), RUNS[name][1]
    hidden = sets[kind].with_name(f"hidden {kind}")
    sets[kind].rename(hidden)
    try:
        plain = drawn(folder, tmp_path / "plain")
        assert len(set(plain)) == 4 and nearly_equal(drawn(folder, tmp_path / "again", "batch_size=1"), plain)
        random = drawn(folder, tmp_path / "random", "labels=random")
        assert (random == plain) == (kind == "none")
        if kind != "none":
            guided = [drawn(folder, tmp_path / how, f"guidance={how}", "scale=3") for how in ("cfg", "icg")]
            assert guided[0] != plain != guided[1] != guided[0]
    finally:
        hidden.rename(sets[kind])


def test_a_kept_text_is_named_by_its_number(trained, tmp_path):
    folder = trained("tread")
    plain = drawn(folder, tmp_path / "plain")
    assert (
        drawn(folder, tmp_path / "first", "labels=0")[0] == plain[0] != drawn(folder, tmp_path / "last", "labels=63")[0]
    )


def test_other_texts_come_from_data_path(trained, sets, tmp_path):
    folder, other = trained("tread"), write_latents(tmp_path / "set", "text", SHAPE, (9, 5))
    plain = drawn(folder, tmp_path / "plain")
    assert drawn(folder, tmp_path / "same", f"data.path={sets['text']}") == plain  # those that it kept
    shutil.rmtree(tmp_path / "others", ignore_errors=True)
    others = drawn(folder, tmp_path / "others", f"data.path={other}")
    assert len(set(others)) == 4 and not set(others) & set(plain)
    about = json.loads((tmp_path / "others" / "samples.json").read_text())
    assert about["settings"]["data"] == str(other)
    told = []
    for path in (None, sets["text"], other):  # by which fid.py knows what has been scored before
        settings = fid.Calc(ckpt=str(folder), data=sample.Source(path and str(path)))
        told.append(describe_run(fid.load_scored(settings), settings))
    assert told[0] == told[1] and told[0]["texts_sha256"] != told[2]["texts_sha256"]


@pytest.mark.parametrize("name", ["tread", "sprint", "maskdit"])
def test_it_is_scored(name, trained, tmp_path, monkeypatch):
    any_size(monkeypatch)
    out, references = tmp_path / "images", tmp_path / "ref.npz"
    sample.main([f"ckpt={trained(name)}", "seeds=0-9", "steps=2", f"out={out}"])
    fid.main(["ref", f"images={out / 'images'}", "extractor=mnist", f"out={references}"])
    call = ["calc", f"ckpt={trained(name)}", "extractor=mnist", f"ref={references}", "metrics=[fd]", "steps=2"]
    fid.main([*call, "seeds=0-9", "labels=balanced", f"out={tmp_path / 'same'}"])
    fid.main([*call, "seeds=10-19", f"out={tmp_path / 'other'}"])
    same, other = (json.loads((tmp_path / which / "metrics.json").read_text()) for which in ("same", "other"))
    (distance,) = (key for key in same if key.startswith("fd"))
    assert abs(same[distance]) < 1e-3 < other[distance] and "class_accuracy" not in same


@pytest.mark.parametrize(
    "name, overrides, message",
    [
        ("tread", ["class_idx=0"], "class_idx=0, and the network takes texts; needed: labels="),
        ("alone", ["class_idx=0"], "class_idx=0, and the network takes no condition; needed: seeds= alone"),
        ("tread", ["labels=64"], "label 64; needed: balanced, random or a text 0..63"),
        ("alone", ["labels=0"], "label 0; needed: balanced, random; the network takes no condition"),
        ("alone", ["guidance=cfg"], "takes no condition; needed: weak_label=same"),
        ("alone", ["guidance=icg"], "takes no condition; needed: weak_label=same"),
        ("tread", ["data.path={class}"], "holds class labels beside its latents, not texts"),
        ("classes", ["data.path={class}"], "is for its texts, and the network takes class labels; needed: without"),
        ("alone", ["data.path={none}"], "is for its texts, and the network takes no condition; needed: without"),
    ],
)  # fmt: skip
def test_what_a_network_is_not_told_is_refused(name, overrides, message, trained, sets, tmp_path):
    overrides = [override.format(**sets) for override in overrides]
    with pytest.raises(UserError, match=message) as refusal:
        sample.main([f"ckpt={trained(name)}", "seeds=0-3", f"out={tmp_path / 'out'}", *overrides])
    assert "\n" not in str(refusal.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "given, held, message",
    [
        ("class", "text", "holds texts beside its latents, not class labels; needed: data.condition=text"),
        ("text", "class", "holds class labels beside its latents, not texts; needed: data.condition=class"),
        ("text", "none", "holds no condition beside its latents, not texts; needed: data.condition=none"),
    ],
)
def test_training_names_a_condition_of_another_kind(given, held, message, keys, sets, tmp_path):
    settings = [*keys(given), f"data.path={sets[held]}", *SMALL, f"results_dir={tmp_path}", "run_name=none"]
    with pytest.raises(UserError, match=message) as refusal:
        training.train(made_settings(["model=tread", *settings]))
    assert "\n" not in str(refusal.value) and not list(tmp_path.iterdir())


def test_texts_of_another_width_are_refused(keys, tmp_path):
    settings = [*keys("text"), "data.text_width=9", *SMALL, f"results_dir={tmp_path}", "run_name=none"]
    with pytest.raises(UserError, match="has texts of width 8, not data.text_width=9"):
        training.train(made_settings(["model=tread", *settings]))

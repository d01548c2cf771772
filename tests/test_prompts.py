"""Prompts on the command line: what they draw, how the grid is labelled, what is refused, and the CLIP score."""

import json
import sys
import zlib
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import conditions
import export
import fid
import sample
from checkpoints import gallery
from checkpoints.generate import generate_latents, load_weak, sampler_of
from checkpoints.load import load_run
from conditions import Text, TextStats
from data.encoding import LatentEncoding
from data.shards import TextSource, finalize, shard_name, write_shard
from guidance import Guidance
from routing_module import Routing
from system import UserError
from tests import started
from tests.conftest import ROOT, TORCHRUN, assert_same_run, numbers
from tests.made_runs import made_settings, make_run
from training.prepare import start_from
from training.stopping import EXIT_START_AGAIN, PreemptionHandler

WIDTH, LENGTH, HASH = 8, 6, "0" * 64
KEYS = [
    "data=folder", "data.path=nowhere", "data.channels=3", "data.input_size=16", "data.condition=text",
    f"data.text_width={WIDTH}", f"data.text_length={LENGTH}", f"+data.text_sha256={HASH}", "+data.text_encoder=made",
    "data.num_classes=null", "data.codec._target_=autoencoder.PixelCodec", "~data.codec.path", "~data.codec.scale",
    "~data.codec.bias", "model.size=DiT-XS/4", "model.depth=6", "model.hidden_size=32", "model.num_heads=2",
    "objective=rf", "model=tread",
]  # fmt: skip
STATS = TextStats(torch.full((WIDTH,), 0.5), torch.full((WIDTH,), 2.0), torch.ones(2, WIDTH))


@dataclass
class Encoder:
    """A token for each word, of numbers that the word gives."""

    length: int

    def __call__(self, captions):
        words = [caption.split()[: self.length] for caption in captions]
        states, mask = torch.zeros(len(words), self.length, WIDTH), torch.zeros(len(words), self.length).bool()
        for i, row in enumerate(words):
            for j, word in enumerate(row):
                g = torch.Generator().manual_seed(zlib.crc32(word.encode()))
                states[i, j], mask[i, j] = torch.randn(WIDTH, generator=g), True
        return Text(states.half(), mask)


@pytest.fixture(autouse=True)
def encoder(monkeypatch):
    def load(name, sha256=None, length=None, device="cpu"):
        if name != "made":
            raise UserError(f"text encoder {name} cannot be loaded")
        assert (sha256, length) == (HASH, LENGTH)
        return Encoder(length)

    monkeypatch.setattr(sample, "load_encoder", load)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(LENGTH) < torch.tensor([[1], [6], [4]])
    kept = Text(torch.randn(3, LENGTH, WIDTH, generator=g), mask)
    return make_run(tmp_path_factory.mktemp("runs") / "words", KEYS, kept=kept, stats=STATS)


def draw(folder, out, *overrides):
    """{path within the folder: bytes} of the PNGs."""
    sample.main([f"ckpt={folder}", "steps=2", "precision=fp32", f"out={out}", *overrides])
    return {str(path.relative_to(out / "images")): path.read_bytes() for path in sorted(out.glob("images/*/*.png"))}


PROMPTS = ["a red disc", "a big blue square, in a frame of gold", "nothing"]


def test_a_file_of_prompts_is_its_prompts_one_by_one(folder, tmp_path):
    first, *others = (f"  {prompt} ".replace("big blue", "big\u2028blue") for prompt in PROMPTS)  # no end of a line
    lines = "\r".join([first, "\r\n\n".join(others)])
    (tmp_path / "prompts.txt").write_bytes(f"\ufeff{lines}".encode())
    whole = draw(folder, tmp_path / "whole", f"prompts={tmp_path / 'prompts.txt'}", "seeds=3-5", "batch_size=4")
    assert list(whole) == [f"{i:06d}/{seed:06d}.png" for i in range(3) for seed in (3, 4, 5)]
    assert len(set(whole.values())) == 9
    for i, prompt in enumerate(PROMPTS):
        alone = draw(folder, tmp_path / f"alone{i}", f"prompt={prompt}", "seeds=3-5")
        for seed in (3, 4, 5):
            paths = (tmp_path / "whole" / f"images/{i:06d}", tmp_path / f"alone{i}" / "images/000000")
            a, b = (np.asarray(Image.open(path / f"{seed:06d}.png")).astype(int) for path in paths)
            assert np.abs(a - b).max() <= 1 and len(alone) == 3
    about = json.loads((tmp_path / "whole" / "samples.json").read_text())
    assert about["settings"]["prompts"] == PROMPTS and about["settings"]["text_sha256"] == HASH and about["n"] == 9
    lost = tmp_path / "whole" / "images" / "000001" / "000004.png"
    lost.unlink()
    assert draw(folder, tmp_path / "whole", f"prompts={tmp_path / 'prompts.txt'}", "seeds=3-5") == whole  # and no other
    with pytest.raises(UserError, match="holds images of other settings .prompts was"):
        draw(folder, tmp_path / "whole", "prompt=a red disc", "seeds=3-5")


def test_a_run_of_texts_by_another_encoder(folder, tmp_path):
    """Its states mean something else: no weak branch for these, and a network that starts from it is told."""
    other = make_run(
        tmp_path / "other", [*KEYS, "data.text_sha256=" + "a" * 64], kept=load_run(folder).pool, stats=STATS
    )
    run, how = load_run(folder, device="cpu"), Guidance(scale=2.0, weak_ckpt=str(other))
    with pytest.raises(UserError, match="is for other .*text encoder"):
        load_weak(run, how)
    assert load_weak(run, replace(how, weak_ckpt=str(folder))) is not run
    told = start_from(str(other), run.model, run.objective, run.settings.data)
    assert told == "the states of texts are another encoder's"
    assert start_from(str(folder), run.model, run.objective, run.settings.data) == ""


@pytest.mark.parametrize("guidance", [{}, {"scale": 2.0, "weak_label": "none"}, {"scale": 2.0, "gamma_weak": 0.6}])
def test_a_batch_of_prompts_is_each_alone(folder, guidance):
    run, seeds, how = load_run(folder, device="cpu"), [1, 2, 3], Guidance(**guidance)
    text = sample.encode_prompts(run, PROMPTS)
    assert text.mask.sum(1).tolist() == [3, 6, 1]
    whole = generate_latents(run, how, seeds, text, sampler_of(run, 3))
    for i, n in enumerate(text.mask.sum(1).tolist()):
        one = Text(text.states[i : i + 1, :n], text.mask[i : i + 1, :n])
        alone = generate_latents(run, how, seeds[i : i + 1], one, sampler_of(run, 3))
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-5, atol=1e-5)


def test_prompts_are_normalised_and_guided_against_the_empty_caption(folder):
    run = load_run(folder, device="cpu")
    states, mask = sample.encode_prompts(run, ["disc"])
    expected = (Encoder(LENGTH)(["disc"]).states[0, 0].float() - 0.5) / 2
    torch.testing.assert_close(states[0, 0].float(), expected, rtol=1e-3, atol=1e-3)
    assert not states[0, 1:].any() and mask.sum() == 1
    null = run.model.null_condition
    assert torch.equal(null.states, torch.full((1, 2, WIDTH), 0.25)) and null.mask.all()
    how = Guidance(scale=3.0, weak_label="none")
    text = sample.encode_prompts(run, PROMPTS)
    guided = generate_latents(run, how, [1, 2, 3], text, sampler_of(run, 2))
    run.model.null_condition = conditions.rows(text, [1])
    assert not torch.allclose(generate_latents(run, how, [1, 2, 3], text, sampler_of(run, 2)), guided, atol=1e-3)


def test_an_export_alone_takes_a_prompt(folder, tmp_path):
    export.main([f"ckpt={folder}", f"out={tmp_path / 'out'}"])
    for how in ("none", "cfg"):
        ours, theirs = (
            draw(ckpt, tmp_path / f"{how}-{ckpt.name}", "prompt=a red disc", "seeds=0-1", f"guidance={how}", "scale=2")
            for ckpt in (folder, tmp_path / "out")
        )
        assert ours == theirs


def test_grids_are_labelled(tmp_path):
    images = torch.randint(1, 256, (7, 3, 32, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    gallery.save_grid(images, tmp_path / "plain.png", 3)
    gallery.save_grid(images, tmp_path / "labelled.png", 3, ["one"] * 2 + ["a second, " * 30] * 4 + ["Supercali" * 9])
    plain, labelled = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("plain", "labelled"))
    assert plain.shape == (2 + 3 * 130, 2 + 3 * 66, 3) and labelled.shape[1] == 2 + 3 * 130
    assert np.array_equal(plain[2:130:4, 2:66:4], images[0].permute(1, 2, 0)) and not plain[:2].any()
    large = images.repeat_interleave(8, 2).repeat_interleave(8, 3).permute(0, 2, 3, 1).numpy()
    top, row = 0, labelled.any(axis=(1, 2))
    for first in (0, 3, 6):  # each row of images, below its band
        top = next(y for y in range(top, len(labelled)) if np.array_equal(labelled[y : y + 256, 2:130], large[first]))
        assert labelled[top - 30 : top - 2, 4:].any() and not labelled[top - 1].any() and row[top]
        top += 256
    gallery.save_grid(images, tmp_path / "short.png", 3, gallery.class_names(torch.tensor([2] * 7), ["a", "b", "Bag"]))
    with Image.open(tmp_path / "short.png") as short:
        assert short.width == 2 + 3 * 66 and short.height == 2 + 3 * (130 + 19)
    assert gallery.class_names(torch.tensor([7]), None) == ["7"] and gallery.class_names(None, None) is None
    font = gallery.label_font(13)
    for text, width in (("a second, " * 30, 124), ("Supercali" * 9, 124), ("one", 900), ("a", 124), ("ab " * 2000, 60)):
        lines = gallery.wrapped(text, font, width)
        assert 0 < len(lines) <= gallery.MOST_LINES and max(map(font.getlength, lines)) <= width
    assert gallery.wrapped("one two", font, 900) == ["one two"]


@pytest.mark.parametrize(
    "text, parsed",
    [("a, b", "a, b"), ("[x] {y}=${z}", "[x] {y}=${z}"), ('it\'s "so"', 'it\'s "so"'), ("42", "42"), ("\\", "\\")],
)
def test_a_prompt_is_words_whatever_they_hold(text, parsed):
    from system import cli

    assert cli.load_config("sample", [f"prompt={text}"])["prompt"] == parsed


BAD = [
    (["prompts={empty}"], "empty.txt is empty; needed: a file with a prompt in each line"),
    (["prompts={binary}"], "is no UTF-8 text"),
    (["prompt=a", "class_idx=1"], "class_idx=1 and prompt=a both say what to draw"),
    (["prompt=a", "prompts={empty}"], "both say what to draw"),
    (["prompt=a", "labels=random"], "labels=random and prompt=a both say what to draw"),
    (["class_idx=1"], "class_idx=1, and the network takes texts; needed: .* or prompt="),
    (["prompt=a", "data.path=somewhere"], "prompts and data.path=somewhere both say what to draw"),
    (["labels=1", "data.text_encoder=made"], "data.text_encoder=made is for prompts, and there are none"),
    (["prompt=a", "data.text_encoder=other"], "text encoder other cannot be loaded"),
]


@pytest.mark.parametrize("overrides, message", BAD)
def test_what_cannot_be_drawn_is_one_line(overrides, message, folder, tmp_path):
    files = {"empty": tmp_path / "empty.txt", "binary": tmp_path / "binary.txt"}
    files["empty"].write_text("\n \n")
    files["binary"].write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match=message) as refusal:
        draw(folder, tmp_path / "out", *(override.format(**files) for override in overrides))
    assert "\n" not in str(refusal.value) and not (tmp_path / "out").exists()


def test_networks_for_classes_take_no_prompt(tmp_path):
    done = started.run([sys.executable, "sample.py", "prompt=a cat", f"out={tmp_path / 'out'}"], cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1
    assert "a prompt is given, and the network takes class labels; needed: class_idx=" in done.stderr


def test_a_run_that_does_not_say_its_encoder(folder):
    run = load_run(folder, device="cpu")
    run.settings = replace(run.settings, data=replace(run.settings.data, text_encoder=None))
    with pytest.raises(UserError, match="does not say what made its texts; needed: data.text_encoder=NAME"):
        sample.encode_prompts(run, ["a"])


class Clip:
    """Scores an image by the number of its caption's words, so that a wrong caption is seen."""

    name, sha256 = "made", "1" * 64

    def __call__(self, images, captions):
        assert len(images) == len(captions)
        return torch.tensor([float(len(caption.split())) for caption in captions])


def test_prompts_are_scored(folder, tmp_path, monkeypatch):
    from tests.test_kinds import any_size

    any_size(monkeypatch)
    monkeypatch.setattr(fid, "load_clip", lambda name, sha256: Clip())
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    images = draw(folder, tmp_path / "images", f"prompts={tmp_path / 'prompts.txt'}", "seeds=0-9")
    fid.main(["ref", f"images={tmp_path / 'images' / 'images'}", "extractor=mnist", f"out={tmp_path / 'ref.npz'}"])
    call = [
        "calc",
        f"ckpt={folder}",
        f"ref={tmp_path / 'ref.npz'}",
        "metrics=[fd]",
        "steps=2",
        "seeds=0-9",
        "clip=made",
    ]
    call += [f"prompts={tmp_path / 'prompts.txt'}", "labels=balanced", "batch_size=4", "precision=fp32"]
    fid.main([*call, f"out={tmp_path / 'scores'}"])
    metrics = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    words = [len(PROMPTS[seed % 3].split()) for seed in range(10)]
    assert metrics["clip_score"] == pytest.approx(np.mean(words)) and len(images) == 30
    assert (metrics["clip"], metrics["clip_sha256"], metrics["prompts"]) == ("made", "1" * 64, 3)
    assert len(metrics["prompts_sha256"]) == 64
    for wrong, message in (
        (["prompts=null"], "clip=made compares images with what was asked for; needed: prompts=FILE"),
        (["data.path=somewhere"], "prompts and data.path=somewhere both say what to draw"),
    ):
        with pytest.raises(UserError, match=message):
            fid.main([*call, *wrong])


def test_without_transformers_the_clip_score_is_one_line(monkeypatch):
    from evaluation.clip import load_clip

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="clip=x needs the package transformers: pip install transformers"):
        load_clip("x")


def test_clip_of_transformers(tmp_path):
    """Its own image processor and model, beside ours; another kind of model and another hash are refused."""
    transformers = pytest.importorskip("transformers")
    from evaluation.clip import load_clip

    vocab = {
        token: i
        for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *"abcdef", *(f"{c}</w>" for c in "abcdef")])
    }
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    tokenizer.save_pretrained(tmp_path / "clip")
    part = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    text = part | dict(vocab_size=len(vocab), max_position_embeddings=8, bos_token_id=0, eos_token_id=1)
    config = transformers.CLIPConfig(text_config=text, vision_config=part | dict(image_size=24, patch_size=8))
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(tmp_path / "clip")
    load_clip.cache_clear()
    clip = load_clip(str(tmp_path / "clip"))
    noise = torch.rand(3, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(60 + 130 * noise, (40, 30), mode="bilinear").to(torch.uint8)
    captions = ["a b", "c", "d e f a b c d e f"]
    scores = clip(images, captions)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=24)
    pixels = processor([image.permute(1, 2, 0).numpy() for image in images], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(clip.pixels(images), pixels, rtol=0, atol=0.03)
    for i, caption in enumerate(captions):
        tokens = clip.tokenizer([caption], truncation=True, max_length=8, return_tensors="pt")
        out = clip.model(**tokens, pixel_values=clip.pixels(images[i : i + 1]))
        cosine = (out.image_embeds @ out.text_embeds.T).item()
        assert scores[i].item() == pytest.approx(100 * max(cosine, 0), abs=1e-3)
    with pytest.raises(UserError, match=f"has the sha256 {clip.sha256}; needed: 1234"):
        load_clip(str(tmp_path / "clip"), "1234")
    with pytest.raises(UserError, match="cannot be loaded; needed: a CLIP on the hub, or its folder"):
        load_clip(str(tmp_path / "nowhere"))
    transformers.CLIPTextModel(config.text_config).save_pretrained(tmp_path / "text")
    with pytest.raises(UserError, match="is a model of the type clip_text_model"):
        load_clip(str(tmp_path / "text"))
    tensors = load_file(tmp_path / "clip/model.safetensors")
    del tensors["text_projection.weight"]
    save_file(tensors, tmp_path / "clip/model.safetensors", {"format": "pt"})
    load_clip.cache_clear()
    with pytest.raises(UserError, match="clip=.* cannot be loaded.*: its file lacks text_projection.weight"):
        load_clip(str(tmp_path / "clip"))


def test_runs_on_texts_are_the_same_on_two_processes_and_after_a_stop(tmp_path):
    """With the empty caption as the null, which both kinds of guidance and every checkpoint's network then have."""
    import train as training

    folder, rng = tmp_path / "set", np.random.default_rng(0)
    folder.mkdir()
    arrays = 0.5 * rng.standard_normal((24, 3, 16, 16)).astype(np.float32)
    states = [rng.standard_normal((1 + i % LENGTH, WIDTH)).astype(np.float16) for i in range(24)]
    samples = [(f"{i:02d}", *both) for i, both in enumerate(zip(arrays, states))]
    write_shard(folder / shard_name("train", 0), samples)
    null = rng.standard_normal((2, WIDTH)).astype(np.float16)
    finalize(folder, LatentEncoding("sample_scaled"), condition=TextSource(null, "made", HASH, LENGTH))
    told = [key for key in KEYS if not key.startswith(("data.path", "data.text_length", "+"))]
    told += [
        f"data.path={folder}", "data.num_workers=0", "train.global_batch_size=8", "train.max_steps=4",
        "train.warmup_steps=0", "train.decay_steps=0", "train.compile=off", "train.precision=fp32", "train.log_every=1",
        "train.label_dropout=0.5", "train.save_every=0", "train.val_every=2", "train.val_samples=8", "preview.every=0",
        "optimizer=muon", f"results_dir={tmp_path}",
    ]  # fmt: skip

    def train(name, stop_after=None):
        with pytest.MonkeyPatch.context() as patch:
            if stop_after is not None:
                patch.setattr(PreemptionHandler, "should_stop", lambda self, step: step == stop_after)
            return training.train(made_settings([*told, f"run_name={name}"]))

    assert train("whole") == 0 and train("cut", stop_after=2) == EXIT_START_AGAIN and train("cut") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    done = started.run([*TORCHRUN, "train.py", *told, "run_name=two"], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for a, b in zip(numbers(tmp_path / "whole"), numbers(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=2e-3)
    run = load_run(tmp_path / "whole", device="cpu")
    assert (run.settings.data.text_length, run.settings.model["text_length"]) == (LENGTH, LENGTH)
    assert run.model.null_condition.states.shape == (1, 2, WIDTH) and run.model.macs() == run.model.macs(Routing(0.0))
    kept = torch.from_numpy(np.concatenate(states)).float()
    expected = (torch.from_numpy(null).float() - kept.mean(0)) / kept.std(0, correction=0)
    torch.testing.assert_close(run.model.null_condition.states[0].float(), expected, rtol=0.01, atol=0.01)
    assert len(draw(tmp_path / "whole", tmp_path / "images", "prompt=a red disc", "seeds=0", "guidance=cfg")) == 1

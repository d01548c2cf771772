"""Sampling from run folders: an image is its seed's alone; commands, files, and what they refuse."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.utils import counters

import conditions
import export
import rf
import sample
from autoencoder import VAECodec, to_uint8
from checkpoints import gallery, generate
from checkpoints.generate import check_request, generate_latents, load_weak
from checkpoints.load import load_run
from checkpoints.naming import settings_name
from guidance import Guidance
from system import UserError, cli, files
from system.settings import parse
from tests import started
from tests.made_runs import make_run

SPARSE = Guidance(1.5, gamma_strong=0.2, gamma_weak=0.7, weak_label="random")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_overrides):
    """name -> run folder: edm and rf with routes, dense without, large of other latents."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        "edm": make_run(folder / "edm", tiny_overrides, steps=(1, 2)),
        "rf": make_run(folder / "rf", [*tiny_overrides, "objective=rf"], steps=(1, 2)),
        "dense": make_run(folder / "dense", [*tiny_overrides, "model=dit", "objective=rf"]),
        "large": make_run(folder / "large", [*tiny_overrides, "objective=rf", "data.input_size=16"]),
    }


def latents(run, seeds, guidance=SPARSE, **sampler):
    condition = conditions.choose("random", seeds, run.pool)
    return generate_latents(run, guidance, seeds, condition, run.settings.sampler | sampler)


def images(folder, seeds):
    return np.stack(list(gallery.read_images(folder, seeds)))


def assert_same_images(a, b):
    """At most one grey level, in at most 0.1 % of the pixels."""
    difference = np.abs(a.astype(int) - b.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() <= 0.001


def command(*arguments, **options):
    return started.run([sys.executable, *arguments], **options)


@pytest.mark.parametrize("name, sampler", [("edm", {"S_churn": 10}), ("rf", {}), ("rf", {"solver": "sde"})])
def test_an_image_depends_on_its_seed_alone(runs, name, sampler):
    run, sampler = load_run(runs[name]), sampler | {"num_steps": 20}
    whole = latents(run, list(range(64)), **sampler)
    for seed in (0, 17, 63):
        torch.testing.assert_close(latents(run, [seed], **sampler), whole[seed : seed + 1], rtol=0, atol=1e-5)
    assert (whole[:-1] - whole[1:]).abs().amax(dim=(1, 2, 3)).min() > 0.01


def test_two_processes_make_what_one_makes(runs, tmp_path):
    call = ["sample.py", f"ckpt={runs['rf']}", "guidance=sparse", "seeds=0-9", "batch_size=4", "precision=fp32"]
    done = command(*call, f"out={tmp_path / 'two'}", processes=2)
    assert done.returncode == 0, done.stderr
    sample.main([*call[1:], f"out={tmp_path / 'one'}"])
    assert_same_images(images(tmp_path / "two", range(10)), images(tmp_path / "one", range(10)))
    one, two = (json.loads((tmp_path / name / "samples.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2) and one["settings"] == two["settings"]
    assert one["network_calls"] == two["network_calls"] and one["gmacs_per_image"] == two["gmacs_per_image"]


def test_folder_holds_png_npz_grid_and_manifest(runs, tmp_path, capsys):
    out = tmp_path / "out"
    sample.main([f"ckpt={runs['edm']}", "seeds=[1,3,998-1001]", "guidance=cfg", "steps=2", "npz=true", f"out={out}"])
    assert "6 of 6" in capsys.readouterr().out
    seeds = [1, 3, 998, 999, 1000, 1001]
    assert (out / "images/000000/000999.png").is_file() and (out / "images/001000/001000.png").is_file()
    with np.load(out / "samples.npz", allow_pickle=False) as archive:
        assert archive["arr_0"].dtype == np.uint8 and np.array_equal(archive["arr_0"], images(out, seeds))
        assert archive["arr_0"].shape == (6, 8, 8, 3)
    with Image.open(out / "grid.png") as grid:
        assert grid.size[0] == 6 * (64 + 2) + 2 and grid.size[1] > 64 + 4  # enlarged 8 times, with labels above
    manifest = json.loads((out / "samples.json").read_text())
    assert manifest["n"] == 6 and manifest["network_calls"] == 2 * 3 and manifest["images_per_s"] > 0
    run = load_run(runs["edm"])
    assert manifest["gmacs_per_image"] == pytest.approx(6 * run.model.macs() / 1e9)
    assert manifest["settings"]["checkpoint_sha256"] == run.sha256 and manifest["settings"]["scale"] == 1.5


def test_compiled_is_the_same_but_for_rounding_and_says_so(runs, tmp_path):
    call = [f"ckpt={runs['rf']}", "guidance=sparse", "steps=4", "seeds=0-5", "precision=fp32"]
    sample.main([*call, f"out={tmp_path / 'eager'}"])
    counters.clear()
    sample.main([*call, f"out={tmp_path / 'compiled'}", "compile=blocks", "batch_size=4"])
    # a trial, the block, the final layer; none for the last, smaller batch
    assert counters["stats"]["unique_graphs"] <= 3
    torch.compiler.reset()
    assert_same_images(images(tmp_path / "eager", range(6)), images(tmp_path / "compiled", range(6)))
    settings = [json.loads((tmp_path / n / "samples.json").read_text())["settings"] for n in ("eager", "compiled")]
    assert [s.pop("compile") for s in settings] == ["off", "blocks"] and settings[0] == settings[1]


def vae_of(channels, decode=None):
    return SimpleNamespace(decode=decode, config=SimpleNamespace(latent_channels=channels))


def test_latents_are_unscaled_channel_by_channel():
    mean, std = torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.tensor([0.5, 2.0, 1.0, 4.0])  # as VA-VAE's files say them
    codec = VAECodec(scale=(1 / std).tolist(), bias=(-mean / std).tolist())
    seen = []
    codec._vae = vae_of(4, lambda z: seen.append(z) or SimpleNamespace(sample=z[:, :3]))
    z = torch.randn(2, 4, 8, 8)
    codec.decode((z - mean[:, None, None]) / std[:, None, None])
    torch.testing.assert_close(seen[0], z)
    for wrong in ({"scale": 0}, {"scale": "much"}, {"scale": [[1.0]]}, {"scale": [1.0, 2.0], "bias": [0.0]}):
        with pytest.raises(ValueError, match="codec.scale"):
            VAECodec(**wrong)


@pytest.mark.parametrize(
    "codec, needed",
    [
        (VAECodec(None), "nothing says which VAE"),
        (VAECodec("sd"), "makes latents of 1 channels, the codec sd has 4 latents; needed: codec.path="),
        (VAECodec("sd", [1.0, 1.0]), "codec.path="),
    ],
)
def test_a_codec_of_other_latents_is_refused_before_the_first_step(runs, codec, needed, monkeypatch):
    run = load_run(runs["rf"], device="cpu")
    run.codec = codec
    codec._vae = codec.path and vae_of(4)
    monkeypatch.setattr(generate, "generate_latents", None)
    with pytest.raises(ValueError, match=needed):
        list(sample.generate(run, Guidance(), [0, 1]))


def test_the_codec_of_a_call_replaces_the_runs_own(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(VAECodec, "vae", vae_of(1, lambda z: SimpleNamespace(sample=z.expand(-1, 3, -1, -1))))
    call = [f"ckpt={runs['rf']}", "seeds=0-1", "steps=1"]
    for name, bias in (("a", "[0.0]"), ("b", "[5.0]")):
        sample.main([*call, "codec.path=my vae", "codec.scale=[1.0]", f"codec.bias={bias}", f"out={tmp_path / name}"])
    a, b = (images(tmp_path / name, [0, 1]).mean() for name in "ab")
    assert b < a - 50  # (z - 5) / 1
    with pytest.raises(ValueError, match="codec_bias was .0.0., is .5.0."):
        sample.main([*call, "codec.path=my vae", "codec.scale=[1.0]", "codec.bias=[5.0]", f"out={tmp_path / 'a'}"])


def test_the_vae_decodes_as_many_at_once_as_fit():
    seen = []

    def decode(latents):
        seen.append(len(latents))
        return SimpleNamespace(sample=latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3))

    codec = VAECodec(scale=2.0)
    codec._vae = SimpleNamespace(decode=decode)
    latents = torch.randn(11, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    pixels = codec.decode(latents)
    assert seen == [8, 3] and torch.equal(pixels[:, :, ::8, ::8], to_uint8(latents[:, :3] / 2))
    codec.decode(torch.zeros(3, 4, 64, 64))
    assert seen[2:] == [2, 1]


def test_only_missing_seeds_are_made(runs, tmp_path, capsys):
    out, call = tmp_path / "out", [f"ckpt={runs['rf']}", "guidance=sparse", "steps=2", "precision=fp32"]
    sample.main([*call, "seeds=0-7", f"out={out}"])
    assert not (out / "samples.npz").exists()  # a second copy of every image, only where it is asked for
    whole, kept = images(out, range(8)), gallery.image_path(out, 0).stat().st_mtime_ns
    for seed in (3, 5):
        gallery.image_path(out, seed).unlink()
    capsys.readouterr()
    sample.main([*call, "seeds=0-9", f"out={out}", "batch_size=3", "npz=true"])
    assert "4 of 10" in capsys.readouterr().out
    assert_same_images(images(out, range(8)), whole)
    assert gallery.image_path(out, 0).stat().st_mtime_ns == kept
    with np.load(out / "samples.npz", allow_pickle=False) as archive:
        assert len(archive["arr_0"]) == 10
    with pytest.raises(ValueError, match="other settings.*scale was 1.5, is 2"):
        sample.main([*call, "seeds=0-9", "scale=2", f"out={out}"])


@pytest.mark.parametrize(
    "wrong",
    [
        "steps=0", "sampler=rf sampler.solver=rk4", "sampler=edm sampler.rho=-1", "sampler=edm sampler.rho=abc",
        "+sampler.foo=1", "sampler=rf sampler.num_steps=1.5", "sampler=rf sampler.shift=abc",
        "sampler=sde sampler.last_step=[1]",
    ],
)  # fmt: skip
def test_a_refused_call_does_not_claim_its_folder(runs, tmp_path, wrong):
    call = [f"ckpt={runs['rf']}", "seeds=0-1", f"out={tmp_path / 'out'}"]
    with pytest.raises(UserError, match="steps|solver|rho|foo|shift|last_step"):
        sample.main([*call, *wrong.split()])
    assert not (tmp_path / "out").exists()
    sample.main([*call, "steps=1"])  # the corrected call


def test_a_samplers_settings_are_refused_before_training_too(runs):
    run = load_run(runs["rf"], device="cpu")
    run = replace(run, settings=replace(run.settings, sampler={"takes": "velocity", "shift": "a"}))
    with pytest.raises(UserError, match="sampler.shift=a; needed: a number"):
        check_request(run, run.settings.preview, torch.tensor([0]))


def test_killed_and_started_again(runs, tmp_path):
    call = ["sampler=rf", f"ckpt={runs['rf']}", "seeds=0-39", "batch_size=1", "steps=8"]
    out = tmp_path / "out"
    process = started.Process([sys.executable, "sample.py", *call, f"out={out}"], stdout=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not gallery.image_path(out, 1).exists() and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(gallery.missing(out, range(40))) < 40
    sample.main([*call, f"out={out}"])  # on other threads, where precision=auto might choose otherwise
    precision = json.loads((out / "samples.json").read_text())["settings"]["precision"]
    sample.main([*call, f"precision={precision}", f"out={tmp_path / 'undisturbed'}"])
    assert np.array_equal(images(out, range(40)), images(tmp_path / "undisturbed", range(40)))


def test_images_are_written_while_the_next_are_made_and_none_is_lost(tmp_path, monkeypatch):
    save_image, free = gallery.save_image, threading.Event()

    def slow(image, path):
        assert free.wait(30)
        if path.stem == "000001":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save_image(image, path)

    def batches():
        for i in range(3):
            yield torch.full((2, 3, 4, 4), i, dtype=torch.uint8)
            free.set()  # by the time that the second batch is asked for, the first is not written
        pytest.fail("sampling went on after the error")

    monkeypatch.setattr(gallery, "save_image", slow)
    with pytest.raises(OSError, match="No space"):
        gallery.store(tmp_path, range(6), batches())
    assert gallery.missing(tmp_path, range(6)) == [1, 4, 5] and not list(tmp_path.rglob(".tmp*"))
    monkeypatch.setattr(gallery, "save_image", save_image)
    gallery.store(tmp_path, [1, 4, 5], iter([torch.full((3, 3, 4, 4), 7, dtype=torch.uint8)]))
    assert images(tmp_path, range(6))[:, 0, 0, 0].tolist() == [0, 7, 1, 1, 7, 7]


def test_labels_are_balanced_random_or_one_class(runs, tmp_path):
    pool = torch.arange(3)
    assert conditions.choose("balanced", range(5), pool).tolist() == [0, 1, 2, 0, 1]
    drawn, later = (conditions.choose("random", range(start, 300), pool) for start in (0, 100))
    assert torch.equal(drawn[100:], later) and drawn.bincount().min() > 60
    made = {}
    for label in (1, 2):
        sample.main([f"ckpt={runs['rf']}", "seeds=0-2", f"class_idx={label}", f"out={tmp_path / str(label)}"])
        made[label] = images(tmp_path / str(label), range(3))
    sample.main([f"ckpt={runs['rf']}", "seeds=0-2", "labels=balanced", f"out={tmp_path / 'balanced'}"])
    balanced = images(tmp_path / "balanced", range(3))
    assert not np.array_equal(made[1], made[2])
    assert np.array_equal(balanced[1], made[1][1]) and np.array_equal(balanced[2], made[2][2])


def test_sample_tread_reads_the_label(runs, tmp_path):
    """Both branches are conditional: another class is another image from the same seed."""
    made = []
    for label in (0, 1):
        out = tmp_path / str(label)
        rf.main(["sample_tread", f"ckpt={runs['rf']}", f"class_idx={label}", "seeds=0", f"out={out}", "scale=1.5"])
        made.append(images(out, [0]))
        settings = json.loads((out / "samples.json").read_text())["settings"]
        assert (settings["weak_label"], settings["gamma_strong"], settings["gamma_weak"]) == ("same", 0.2, 0.7)
    assert not np.array_equal(*made)


def test_weights_of_either_objective_run_on_either_sampler(runs, tmp_path):
    for name in ("edm", "rf"):
        made = []
        for sampler in ("edm", "rf"):
            out = tmp_path / f"{name}-{sampler}"
            call = [f"ckpt={runs[name]}", f"sampler={sampler}", "sampler.solver=heun", "steps=60", "seeds=0-3"]
            sample.main([*call, f"out={out}"])
            made.append(images(out, range(4)).astype(float))
        assert np.abs(made[0] - made[1]).mean() < 4 < np.abs(made[0] - made[0][::-1]).mean()


def hashed_files(monkeypatch):
    """The names of the files that are hashed from now on."""
    names, sha256_of = [], files.sha256_of
    monkeypatch.setattr(files, "sha256_of", lambda path: names.append(path.name) or sha256_of(path))
    return names


def test_loading_reads_the_weights_that_it_needs_and_no_others(runs, tmp_path, monkeypatch):
    folder = shutil.copytree(runs["dense"], tmp_path / "run")
    checkpoint = folder / "checkpoints" / "step_0000001"
    hashed = hashed_files(monkeypatch)
    for name in ("model.safetensors", "optimizer.safetensors"):
        (checkpoint / name).write_bytes(b"")
    for _ in range(2):  # of two rows of a table, the second finds what the first has verified
        run = load_run(folder, device="cpu")
        assert sorted(hashed) == ["config.yaml", "ema.safetensors"]
    assert run.sha256 == files.sha256_of(checkpoint / "ema.safetensors")
    with pytest.raises(ValueError, match="model.safetensors does not match"):
        load_run(folder, "raw", device="cpu")
    with pytest.raises(ValueError, match="ema or raw"):
        load_run(folder, "best", device="cpu")
    with open(checkpoint / "ema.safetensors", "r+b") as file:  # of the same size
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(ValueError, match="ema.safetensors does not match"):
        load_run(folder, device="cpu")


def test_a_table_hashes_the_weak_branchs_file_once(runs, tmp_path, monkeypatch):
    export.main([f"ckpt={runs['rf']}", f"out={tmp_path / 'weak'}"])
    hashed = hashed_files(monkeypatch)
    run = load_run(runs["rf"])
    for _ in range(2):
        generate.load_cached.cache_clear()  # as other rows' weak branches do
        weak = load_weak(run, Guidance(1.5, weak_label="same", weak_ckpt=str(tmp_path / "weak")))
        assert len(weak.sha256) == 64 and hashed.count("model.safetensors") == 1


def test_bf16_weights_are_what_autocast_rounds_to(runs):
    run, rounded = load_run(runs["rf"]), load_run(runs["rf"], precision="bf16")
    run.precision = "bf16"
    assert torch.equal(latents(run, [0, 1]), latents(rounded, [0, 1]))
    assert rounded.model.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert rounded.model.final_layer.linear.weight.dtype == torch.float32


def test_without_ckpt_the_shipped_run_serves(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "SHIPPED", tmp_path / "assets")
    overrides = [f"ckpt={runs['rf']}", f"out={tmp_path / 'assets' / 'mnist-tread-rf'}", "dtype=float16"]
    export.main(overrides)
    monkeypatch.chdir(tmp_path)
    rf.main(["sample_tread", "seeds=0-5"])
    said = capsys.readouterr().out
    assert "mnist-tread-rf/model.safetensors" in said and "step 2" in said
    (made,) = (tmp_path / "runs" / "mnist-tread-rf" / "samples").iterdir()
    assert len(list((made / "images").rglob("*.png"))) == 6
    shipped, own = (load_run(path) for path in (tmp_path / "assets" / "mnist-tread-rf", runs["rf"]))
    assert all(p.dtype == torch.float32 for p in shipped.model.parameters())
    assert (latents(shipped, [0, 1]) - latents(own, [0, 1])).abs().max() < 0.01


def test_weak_branch_of_the_runs_own_early_checkpoint(runs):
    run = load_run(runs["rf"])
    weak = load_weak(run, Guidance(1.5, weak_label="same", weak_ckpt="earliest"))
    assert weak.step == 1 and run.step == 2 and load_weak(run, Guidance(1.0, weak_ckpt="earliest")) is run
    sg_fid = sampling("guidance=sg_fid").alone
    guided, plain = (torch.cat(list(sample.generate(run, g, range(4)))) for g in (sg_fid, Guidance()))
    assert guided.shape == (4, 3, 8, 8) and not torch.equal(guided, plain)


def sampling(*overrides):
    return parse(sample.Sampling, cli.load_config("sample", overrides))


def test_every_setting_has_its_own_folder_name(runs):
    settings = [
        [], ["gamma_strong=0.3"], ["scale=1.5"], ["scale=2.5"], ["scale=1.5", "weak_label=random"],
        ["scale=1.5", "scale_end=2.0"], ["scale=1.5", "interval=[0.2,0.6]"], ["scale=1.5", "cfg_channels=3"],
        ["guidance=sparse"], ["guidance=sparse", "weak_label=none"], ["scale=1.5", "weak_label=same", "gamma_weak=0.7"],
        ["scale=1.5", "weak_label=same", "gamma_weak=0.7", "gamma_weak_end=0.0"],
        ["scale=1.5", "weak_label=same", "weak_ckpt=earliest"], ["scale=1.5", "weak_ckpt=a"],
        ["scale=1.5", "weak_ckpt=b"], ["weights=raw"], ["labels=random"], ["class_idx=1"], ["sampler=rf"],
        ["sampler=rf", "sampler.shift=2"], ["codec.bias=1.0"], ["data.path=a"], ["compile=blocks"], ["precision=bf16"],
    ]  # fmt: skip
    names = {settings_name(sampling(*chosen, *steps)) for chosen in settings for steps in ([], ["steps=20"])}
    assert len(names) == 2 * len(settings) and not any("/" in name for name in names)
    sparse = sampling("guidance=sparse", "steps=20")
    assert settings_name(sparse) == "scale-1.5_gamma_strong-0.2_gamma_weak-0.7_weak_label-same_steps-20"
    run, told = load_run(runs["rf"]), "step_0000002-scale-1.5_gamma_strong-0.2_gamma_weak-0.7_weak_label-same_steps-20"
    assert sample.default_folder(run, sparse) == runs["rf"] / "samples" / told
    # What no image depends on is not in the name, and no precision=auto that came to what the default is.
    unnamed = sampling("guidance=sparse", "steps=20", "seeds=0-3", "npz=true", "batch_size=3", "precision=fp32")
    assert sample.default_folder(run, unnamed) == sample.default_folder(run, sparse)
    run.precision, run.compile = "bf16", "blocks"
    assert sample.default_folder(run, sparse).name == f"{told}_precision-bf16_compile-blocks"


def test_a_long_name_is_cut_and_ends_with_its_digest():
    long, other = (settings_name(sampling(f"weak_ckpt={'a' * 300}{end}")) for end in "xy")
    assert len(long) == len(other) == 200 and long != other and long[:187] == other[:187]


BAD = [
    ("rf", ["class_idx=3"], "class 0..2"),
    ("rf", ["labels=some"], "balanced, random or a whole number"),
    ("rf", ["seeds=9-1"], "0-63"),
    ("rf", ["guidance=sparse", "gamma_weak=1.0"], r"\[0, 1\)"),
    ("rf", ["guidance=sparse", "gamma_strong=0.8"], "gamma_strong <"),
    ("rf", ["guidance=cfg", "scale=-1"], "scale"),
    ("rf", ["guidance=cfg", "scale=high"], "number"),
    ("rf", ["guidance=cfg", "interval=[0.9,0.1]"], "interval"),
    ("rf", ["guidance=cfg", "interval=[0.9]"], "interval"),
    ("rf", ["guidance=cfg", "interval=0.9"], "interval"),
    ("rf", ["guidance=cfg", "scale_end=high"], "scale_end"),
    ("rf", ["guidance=cfg", "cfg_channels=few"], "cfg_channels"),
    ("rf", ["guidance=cfg", "cfg_channels=9"], "cfg_channels"),
    ("rf", ["guidance=apg"], "one of"),
    ("rf", ["gama_weak=0.5"], "unknown key .gama_weak"),
    ("rf", ["guidance=auto", "weak_ckpt={large}"], "latents"),
    ("rf", ["guidance=auto", "weak_ckpt={edm}"], "predictions"),
    ("rf", ["guidance=auto", "weak_ckpt=nowhere"], "no such"),
    ("rf", ["sampler=dpm"], "one of"),
    ("rf", ["sampler=edm", "sampler.solver=rk4"], "heun, euler"),
    ("rf", ["sampler=edm", "sampler.shift=2"], "unknown key"),
    ("rf", ["sampler=edm", "sampler.sigma_min=low"], "low"),
    ("rf", ["batch_size=0"], "batch_size"),
    ("rf", ["steps=0"], "steps=0; needed: a whole number of at least 1"),
    ("rf", ["steps=few"], "steps"),
    ("rf", ["weights=best"], "ema or raw"),
    ("rf", ["precision=fp16"], "fp32 or bf16"),
    ("rf", ["compile=yes"], "blocks or off"),
    ("edm", ["sampler=rf", "sampler.t_start=1"], "t_start"),
    ("dense", ["guidance=sparse"], "trained with routes"),
    ("dense", ["guidance=auto"], "no earlier checkpoint"),
]


@pytest.mark.parametrize("name, overrides, needed", BAD)
def test_bad_input_is_one_line_and_leaves_no_image(runs, tmp_path, capsys, name, overrides, needed):
    overrides = [override.format(**runs) for override in overrides]
    with pytest.raises(SystemExit) as left, cli.user_errors():
        sample.main([f"ckpt={runs[name]}", "seeds=0-1", f"out={tmp_path / 'out'}", *overrides])
    assert left.value.code == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: ") and "\n" not in line
    assert re.search(needed, line), line
    assert not (tmp_path / "out" / "images").exists()

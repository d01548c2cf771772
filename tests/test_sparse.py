"""What holds for every token-sparse method alike: TREAD structured, SPRINT, MaskDiT, and their second stages."""

import copy
import sys
from functools import partialmethod

import pytest
import torch
from torch._dynamo.utils import counters

import cost
import train as training
from checkpoints.generate import branches, generate_latents, streams
from checkpoints.load import Run, build_network, load_run, round_linears
from checkpoints.run_folder import latest_checkpoint
from dit import DiT
from edm import EDM
from guidance import Guidance
from maskdit import MaskDiT
from randomness import seeded_generator
from routing_blocks import block_tokens
from routing_module import Route, Routing, draw_keep_ids
from sprint import Sprint
from system import UserError
from system.compiling import compile_blocks
from tests import started
from tests.conftest import COMPARED, assert_same_run, loss_of, numbers, poison
from tests.made_runs import made_settings, make_run
from training.stopping import EXIT_NOT_FINITE, EXIT_START_AGAIN


def tokens_of(net, routing):
    """The number of tokens in each of the network's blocks."""
    return block_tokens(net.routes, routing, len(net.blocks), net.num_tokens)


METHODS = {
    "tread": [
        "model=tread",
        "model.routes=[{selection_ratio:0.5,start_layer_idx:1,end_layer_idx:-2,selection:structured}]",
    ],
    "sprint": ["model=sprint", "model.path_drop=0.3"],
    "sprint, stage 2": ["model=sprint", "model.selection_ratio=0", "model.path_drop=0.3"],
    "sprint on lightningdit": ["model=lightningdit_sprint", "objective=rf", "model.selection=random"],
    "maskdit": ["model=maskdit"],
    "maskdit, unmasked": ["model=maskdit", "model.selection_ratio=0"],
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_resume_is_exact_and_checkpointing_changes_no_number(run, method):
    settings = [*METHODS[method], "train.max_steps=5", "train.val_every=2"]
    _, golden = run("golden", *settings)
    lines = numbers(golden)
    assert len({line["train/loss"] for line in lines if "train/loss" in line}) == 5
    assert "val/loss_routed" in next(line for line in lines if "val/loss_dense" in line)
    assert run("cut", *settings, stop_after=3)[0] == EXIT_START_AGAIN
    code, cut = run("cut", *settings)
    assert code == 0
    assert_same_run(golden, cut)
    assert_same_run(golden, run("again", *settings, "train.gradient_checkpointing=true")[1])


@pytest.mark.parametrize("method", ["sprint", "maskdit", "maskdit, unmasked"])
def test_two_processes_train_the_run_of_one(method, run, tiny_overrides, tmp_path):
    settings = [*METHODS[method], "train.max_steps=4", "train.val_every=4", "train.check_replicas_every=1"]
    run("one", *settings)
    command = [sys.executable, "train.py", *tiny_overrides, *settings, f"results_dir={tmp_path}", "run_name=two"]
    done = started.run(command, processes=2)
    assert done.returncode == 0, done.stderr
    one, two = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    assert len(one) == len(two) == 5
    for a, b in zip(one, two):
        assert a == pytest.approx(b, rel=1e-3), a["step"]
    assert one[0] == pytest.approx(two[0], rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_accumulation_is_the_same_step(run, method):
    _, whole = run("whole", *METHODS[method], "train.max_steps=3")
    _, parts = run("parts", *METHODS[method], "train.max_steps=3", "train.micro_batch_size=4")
    for a, b in zip(numbers(whole), numbers(parts), strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5)


@pytest.mark.parametrize("method", ["sprint", "maskdit"])
def test_a_step_that_is_not_finite_updates_nothing(run, method, monkeypatch):
    _, before = run("before", *METHODS[method], "train.max_steps=2")
    poison(monkeypatch, 3)
    code, folder = run("stops", *METHODS[method], "train.save_every=1", "train.log_every=7")
    assert code == EXIT_NOT_FINITE
    for name in COMPARED[:2]:
        saved = (latest_checkpoint(folder) / name).read_bytes()
        assert latest_checkpoint(folder).name == "step_0000002"
        assert saved == (latest_checkpoint(before) / name).read_bytes()


@pytest.mark.parametrize("first, second", [("sprint", "sprint, stage 2"), ("maskdit", "maskdit, unmasked")])
def test_the_second_stage_starts_from_the_first(run, first, second, tmp_path):
    _, folder = run("first", *METHODS[first], "train.max_steps=2")
    code, then = run("second", *METHODS[second], f"init_from={folder}", "train.max_steps=1", "train.lr=0")
    assert code == 0
    before, after = (load_run(path, weights, device="cpu").model for path, weights in ((folder, "ema"), (then, "raw")))
    assert all(torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values()))
    assert set(tokens_of(after, Routing())) == {16}


def networks():
    """(network, graphs of its blocks in training and evaluation together)."""
    shape = dict(input_size=16, patch_size=2, in_channels=4, hidden_size=32, depth=8, num_heads=2, num_classes=10)
    as_dit = dict(norm="layer", mlp="gelu", qk_norm=False, rotary=False, sincos=True)
    decoder = dict(decoder_hidden_size=16, decoder_depth=2, decoder_num_heads=2)
    return {
        "tread": (lambda: DiT(**shape, learn_sigma=False, routes=[Route(0.75, 2, -4, "structured")]), 3),
        "sprint": (lambda: Sprint(**shape, **as_dit), 3),
        "sprint, rotary": (lambda: Sprint(**shape), 4),
        "maskdit": (lambda: MaskDiT(**shape, **decoder), 4),  # a graph for the encoder and one for the decoder
    }


@pytest.mark.parametrize(
    "name, checkpointed",
    [
        ("tread", False), ("sprint", True), pytest.param("sprint, rotary", False, marks=pytest.mark.slow),
        ("maskdit", True),
    ],
)  # fmt: skip
def test_one_graph_a_token_count(name, checkpointed, monkeypatch):
    """Training: one for each token count of equal blocks. Evaluation: one for all, or two where positions differ by
    sample or not. The final layer: one for each."""
    torch.compiler.reset()
    eager = partialmethod(torch.nn.Module.compile, backend="aot_eager")  # graphs are counted, none is built
    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    make, of_blocks = networks()[name]
    net = make()
    for block in net.all_blocks:
        block.recompute = checkpointed
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    round_linears(ema)
    compile_blocks(net.all_blocks, "blocks")
    compile_blocks(ema.all_blocks, "blocks", dynamic=True)
    counters.clear()
    x, y = torch.randn(4, 4, 16, 16), torch.zeros(4, dtype=torch.int64)

    def train(step):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(net, EDM(), x, y, seeded_generator(step)).sum()
        loss.backward()

    def evaluate():
        run = Run(ema, EDM(), None, None, torch.device("cpu"), "bf16")
        guidances = [Guidance(), Guidance(scale=2.0), Guidance(1.5, None, 0.25, 0.75, "same")]
        guidances += [Guidance(3.0, weak_path="drop")] if isinstance(net, Sprint) else []
        for guidance in guidances:
            for n in (5, 3):
                generate_latents(run, guidance, range(n), torch.zeros(n, dtype=torch.int64), {"num_steps": 2})

    for step in range(2):
        train(step)
        evaluate()
    assert counters["stats"]["unique_graphs"] == of_blocks + 2 and not counters["graph_break"]
    with torch.compiler.set_stance("fail_on_recompile"):
        train(2)
        evaluate()
    torch.compiler.reset()


@pytest.mark.parametrize("name", networks())
def test_sparse_guidance_takes_a_ratio_for_each_branch(name):
    net = networks()[name][0]().eval().requires_grad_(False)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    run = Run(net, EDM(), None, None, torch.device("cpu"))
    y = torch.tensor([0, 1, 2])
    strong, weak = branches(run, run, Guidance(1.5, None, 0.25, 0.75, "same"), range(3), y)
    x, t = torch.randn(3, 4, 16, 16), torch.tensor(0.7)
    seen = []
    for block in net.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    strong(x, t), weak(x, t)
    assert seen == tokens_of(net, Routing(0.25)) + tokens_of(net, Routing(0.75))
    assert min(seen[:8]) == 48 and min(seen[8:]) == 16
    alone = branches(run, run, Guidance(1.5, None, 0.25, 0.75, "same"), [1], y[1:2])[1](x[1:2], t)
    again = branches(run, run, Guidance(1.5, None, 0.25, 0.75, "same"), range(3), y)[1](x, t)
    torch.testing.assert_close(alone, again[1:2], rtol=1e-4, atol=1e-4)  # an image depends on its own seed alone


SMALL = ["model.depth=6", "model.hidden_size=32", "model.num_heads=2", "sampler.num_steps=2"]


@pytest.mark.parametrize("model", ["sprint", "maskdit"])
def test_show_routes_shows_the_tokens_that_sampling_keeps(model, tmp_path):
    from scripts import show_routes

    folder = make_run(tmp_path / "run", [f"model={model}", *SMALL])
    run = load_run(folder, device="cpu")
    (kept,) = show_routes.kept_tokens(run, [4, 9], None, 0)
    (route,) = run.model.routes
    masks = streams([4, 9], "strong")
    ids = draw_keep_ids(2, run.model.num_tokens, route.selection_ratio, generators=masks, selection=route.selection)
    assert torch.equal(kept.nonzero()[:, 1].view(2, -1), ids)
    passes = show_routes.through_blocks(run, [kept])
    inside, blocks = tokens_of(run.model, Routing()), len(run.model.all_blocks)  # SPRINT's output, MaskDiT's decoder
    assert passes.sum(dim=2).tolist() == [inside + [run.model.num_tokens] * (blocks - len(inside))] * 2
    show_routes.main([f"ckpt={folder}", "seeds=0-1", f"out={tmp_path / 'routes.png'}"])
    assert (tmp_path / "routes.png").stat().st_size > 5000


@pytest.mark.parametrize("model", ["sprint", "maskdit"])
def test_the_bench_knows_it(model):
    from scripts import bench

    settings = ["train.global_batch_size=8", "train.compile=off", "train.precision=fp32", "train.micro_batch_size=4"]
    report = bench.bench(made_settings([f"model={model}", *SMALL[:3], *settings]), compare=False, rounds=2)
    dense, routed = (report["kinds"][f"ours {way}"] for way in ("dense", "routed"))
    for row in (dense, routed):
        assert row["gmacs_counted"] == pytest.approx(row["gmacs"], rel=0.02) and row["host_waits"] == 0
    assert report["speedup_predicted"] == dense["gmacs"] / routed["gmacs"] > 1
    assert routed["step_gb"] < dense["step_gb"] and (report["graph_breaks"], report["recompiles"]) == (0, 0)


def test_cost_before_a_run():
    def table(name: str) -> str:
        settings = made_settings([f"model={name}", "data=imagenet256", "model.size=DiT-XL/2"])
        with torch.device("meta"):
            return cost.cost_table(build_network(settings), settings)

    assert "42.515 routed (blocks 2..25 at 0.75): 0.3564, 2.806x cheaper" in table("sprint")
    assert "65.451 routed (blocks 0..27 at 0.5)" in table("maskdit")


def test_guidance_of_previews_is_refused_before_the_first_step(run):
    with pytest.raises(UserError, match="drop_path needs a network with a deep path"):
        run("dit", "model=dit", "guidance@preview=path_drop", "train.dry_run=true", "preview.every=1")


PUBLISHED = {
    "sprint": dict(selection_ratio=0.75, steps=2_000_000, batch=256, lr=1e-4, warmup=0),
    "sprint_finetune": dict(selection_ratio=0.0, steps=200_000, batch=1024, lr=2e-4, warmup=5000),
    "maskdit": dict(selection_ratio=0.5, steps=2_000_000, batch=1024, lr=1e-4, warmup=0),
    "maskdit_finetune": dict(selection_ratio=0.0, steps=100_000, batch=1024, lr=5e-5, warmup=0),
}


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_the_stages_have_the_papers_setting(experiment):
    cfg, wanted = made_settings([f"experiment={experiment}", "results_dir=runs"]), PUBLISHED[experiment]
    with torch.device("meta"):
        net = build_network(cfg)
    assert (len(net.blocks), net.pos_embed.shape[-1], net.num_tokens) == (28, 1152, 256)
    assert net.routes[0].selection_ratio == wanted["selection_ratio"]
    train = cfg.train
    assert (train.max_steps, train.global_batch_size, train.lr, train.warmup_steps) == tuple(list(wanted.values())[1:])
    clip = 1.0 if experiment.startswith("sprint") else None  # MaskDiT's own code does not
    assert (train.ema_decay, train.label_dropout, train.decay_steps, train.grad_clip) == (0.9999, 0.1, 0, clip)
    assert (cfg.optimizer.betas, cfg.optimizer.weight_decay) == ((0.9, 0.999), 0)
    if experiment.startswith("sprint"):
        assert cfg.objective["timesteps"] == "logit_normal" and net.path_drop == 0.1
        names = set(net.state_dict())
        assert {
            "blocks.0.attn.q_norm.weight",
            "blocks.0.mlp.w12.weight",
        } <= names and "blocks.0.norm1.weight" not in names
    else:
        assert [cfg.objective[key] for key in ("P_mean", "P_std", "sigma_data")] == [-1.2, 1.2, 0.5]
        assert net.mae_weight == 0.1 and len(net.decoder_blocks) == 8
    if experiment.endswith("finetune"):
        first = made_settings([f"experiment={experiment.removesuffix('_finetune')}"])
        model, objective = ("sprint", "rf") if "sprint" in experiment else ("maskdit", "edm")
        assert (
            first.run_name is None
            and cfg.init_from == f"runs/imagenet256-{model}-{objective}" != f"runs/{cfg.run_name}"
        )
        assert train.precision == ("fp32" if "maskdit" in experiment else "auto")


ROWS = [f"experiment={name}" for name in PUBLISHED] + [
    f"experiment=imagenet256 model={m}" for m in ("sprint", "maskdit")
]


@pytest.mark.parametrize("row", ROWS)
def test_each_stage_dry_runs(row, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "open_data", None)  # no data is asked for
    small = [
        "model.depth=6",
        "model.hidden_size=64",
        "model.num_heads=2",
        "train.global_batch_size=2",
        "init_from=null",
    ]
    settings = [*row.split(), *small, "train.dry_run=true", f"results_dir={tmp_path}", "run_name=dry"]
    assert training.train(made_settings(settings)) == 0
    out = capsys.readouterr().out
    assert "GPU-hours" in out and "dry run    one step" in out and "nan" not in out
    assert not list(tmp_path.iterdir())

"""The hot path by counters, which no machine's speed can change (the GPU's path on made-up tensors)."""

import copy
import math
from collections import Counter
from contextlib import nullcontext
from functools import partialmethod

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

import lightningdit
import train as training
from checkpoints.generate import generate_latents
from checkpoints.load import Run, round_linears
from conditions import Text
from cost import BYTES_PER_PARAMETER
from data import BatchPlan
from dit import Block, DiT
from edm import EDM
from guidance import Guidance
from randomness import seeded_generator, uniform
from rf import RectifiedFlow
from routing_module import Routing
from scripts.bench import OpCounter
from system import kernels
from system.compiling import compile_blocks
from system.kernels import gelu
from tests.conftest import loss_of
from tests.made_runs import made_settings
from training.ema import update_averages
from training.guard import FiniteGuard
from training.prepare import TrainedEma, TrainingData, TrainState

TREAD = [dict(selection_ratio=0.5, start_layer_idx=2, end_layer_idx=-4)]
TEXT = dict(condition="text", text_width=6, text_length=5)


def settings(**train):
    keys = {"precision": "bf16"} | train
    return made_settings([f"train.{key}={'null' if value is None else value}" for key, value in keys.items()])


def state_on(device, routes=TREAD, size="DiT-S/2", objective=None, told=()):
    torch.manual_seed(0)
    with torch.device(device):
        model = DiT(size=size, learn_sigma=False, routes=routes, **dict(told))
        ema = DiT(size=size, learn_sigma=False, routes=routes, **dict(told)).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return state_of(model, {"ema": ema}, optimizer, device, objective or EDM())


def state_of(model, averages, optimizer, device="cpu", objective=None, mode="stop"):
    """A TrainState before step 1."""
    device = torch.device(device)
    ema = TrainedEma(averages.get("ema"), objective, None, None, device)
    return TrainState(model, model, averages, optimizer, FiniteGuard(optimizer, device, mode), objective, ema, step=1)


def latents_of(plan):
    return TrainingData(Latents, Latents, plan)


class Latents:
    @staticmethod
    def to_model_input(raw, rows):
        return raw.float()


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("objective, told", [(EDM(), {}), (RectifiedFlow(), {}), (EDM(), TEXT)])
def test_a_cuda_step_never_waits_and_copies_only_its_batch(objective, told, monkeypatch):
    """With the null of texts. Under FakeTensorMode anything that needs a value on the host raises, as does a tensor on
    the wrong device."""
    if torch.version.cuda is not None and not torch.cuda.is_available():
        # A CUDA build cannot walk backwards without a driver. The walk itself asks for no value: see the test below.
        monkeypatch.setattr(torch.Tensor, "backward", made_up_gradients)
    monkeypatch.setattr(training, "seeded_generator", lambda *key, device: None)  # there is no CUDA generator to make
    monkeypatch.setattr(BatchPlan, "slice", lambda self, generator, micro: None)
    attended, attention = [], torch.nn.functional.scaled_dot_product_attention
    watched = lambda q, k, v, attn_mask: attended.append(q.shape) or attention(q, k, v, attn_mask)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    config, plan = settings(global_batch_size=8, micro_batch_size=4), BatchPlan(8, 4, 2, 0, 1)
    with FakeTensorMode():
        state = state_on("cuda", objective=objective, told=told)
        raw, y = torch.empty(4, 4, 32, 32, dtype=torch.float16), torch.empty(4, dtype=torch.int64)
        if told:
            y = Text(torch.empty(4, 5, 6, dtype=torch.float16), torch.empty(4, 5, dtype=torch.bool))
        for step in (1, 2):
            with OpCounter() as counter:
                state.step = step
                training.train_step(config, latents_of(plan), state, iter([(raw, y)] * 2))
                update_averages(state.averages, state.model, step, 0.999, False)
    batch_bytes = 2 * (
        raw.nbytes + (sum(part.nbytes for part in (*y, *state.model.null_condition)) if told else y.nbytes)
    )
    assert counter.to_cpu == 0 and counter.to_gpu == batch_bytes and counter.blocking == 0
    assert len(attended) == 2 * 2 * 12  # two steps of two micro-batches through twelve blocks
    assert counter.calls["_fused_adamw_"] == 1 and counter.calls["_foreach_lerp_"] == 1


def recompute(net, on):
    """Gradient checkpointing, as train.gradient_checkpointing sets it."""
    for block in net.all_blocks:
        block.recompute = on


def made_up_gradients(loss):
    """Every parameter that the loss depends on gets a gradient of ones."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            node.variable.grad = torch.ones_like(node.variable)
        waiting += [following for following, _ in node.next_functions]


def test_the_backward_pass_asks_for_no_value():
    net = DiT(size="DiT-XS/4", num_classes=10, learn_sigma=False, routes=TREAD)
    y = torch.zeros(2, dtype=torch.int64)
    loss = loss_of(net, EDM(), torch.randn(2, 4, 32, 32), y, torch.Generator().manual_seed(0)).mean()
    with OpCounter() as counter:
        loss.backward()
    assert counter.waits == 0 and sum(counter.calls.values()) > 100


def test_a_sync_would_be_noticed():
    with FakeTensorMode():
        x = torch.ones(3, device="cuda")
        with pytest.raises(Exception, match="_local_scalar_dense"):
            x.sum().item()


def test_optimizer_and_ema_are_few_calls():
    state = state_on("cpu", size="DiT-XS/4")
    for p in state.model.parameters():
        p.grad = torch.zeros_like(p)
    state.optimizer.step()  # makes its state
    state.optimizer.grad_scale = torch.ones(())  # as train_step clips
    with OpCounter() as counter:
        state.optimizer.step()
        update_averages(state.averages, state.model, 1, 0.999, False)
    assert sum(counter.calls.values()) - counter.calls.get("detach", 0) <= 8, counter.calls


@pytest.mark.parametrize("fp32_after_route, in_fp32", [(False, 0.0), (True, 0.119)])
def test_nearly_all_matrix_work_is_bf16(fp32_after_route, in_fp32):
    """P7, of a routed B/2; the backward pass has the same types twice. TREAD's own code has an eighth in float32."""
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16), OpCounter() as counter:
        net = state_on("cpu", size="DiT-B/2").model
        net.blocks[9].keeps_fp32 = fp32_after_route
        net(torch.randn(2, 4, 32, 32), torch.rand(2), torch.zeros(2, dtype=torch.int64), routing=Routing())
    work = {torch.bfloat16: 0, torch.float32: 0}
    for (dtype, ((a, _), (b, _))), count in counter.products.items():
        work[dtype] += count * math.prod(a) * b[-1]
    assert work[torch.float32] / sum(work.values()) == pytest.approx(in_fp32, abs=0.01)


def test_float32_after_a_route_where_it_is_asked_for():
    for network in (DiT, lightningdit.LightningDiT):
        sizes = dict(size="DiT-XS/4", input_size=16, in_channels=4, num_classes=10, learn_sigma=False)
        net = network(**sizes, routes=TREAD, fp32_after_route=True)
        assert [i for i, block in enumerate(net.blocks) if block.keeps_fp32] == [9]
        round_linears(net)  # bf16 sampling
        inputs = torch.randn(2, 4, 16, 16), torch.rand(2), torch.zeros(2, dtype=torch.int64)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), OpCounter() as counter:
            for routing in (Routing(), None):
                before = Counter(counter.products)
                net(*inputs, routing=routing)
                exact = sum(n for (dtype, _), n in (counter.products - before).items() if dtype == torch.float32)
                assert exact >= 7 if routing else exact <= 4  # time embedding and output are float32 anyway


@pytest.mark.parametrize("checkpointed, ratio", [(False, 3.0), (True, 4.0)])
def test_a_training_step_is_three_forward_passes_or_four(checkpointed, ratio):
    with FakeTensorMode():
        net = state_on("cpu", size="DiT-B/2").model
        recompute(net, checkpointed)
        x, t, y = torch.randn(2, 4, 32, 32), torch.rand(2), torch.zeros(2, dtype=torch.int64)
        with FlopCounterMode(display=False) as step:
            loss = net(x, t, y, routing=Routing()).sum()
            with torch.no_grad(), FlopCounterMode(display=False) as forward:
                net(x, t, y, routing=Routing())
            loss.backward()
    assert step.get_total_flops() / forward.get_total_flops() - 1 == pytest.approx(ratio, abs=0.02)


def test_one_full_size_copy_a_route():
    net = DiT(size="DiT-XS/4", num_classes=10, learn_sigma=False, routes=TREAD)
    x, y, t = torch.randn(2, 4, 32, 32), torch.zeros(2, dtype=torch.int64), torch.rand(2)
    with torch.no_grad(), OpCounter() as dense:
        net(x, t, y)
    with torch.no_grad(), OpCounter() as routed:
        net(x, t, y, routing=Routing(generators=torch.Generator().manual_seed(0)))
    assert routed.calls["gather"] == 1 and routed.calls["scatter"] == 1
    assert routed.calls.get("clone", 0) == dense.calls.get("clone", 0)


@pytest.mark.parametrize(
    "network, of_blocks, checkpointed",
    [
        (DiT, 3, False), (lightningdit.LightningDiT, 4, True), pytest.param(DiT, 3, True, marks=pytest.mark.slow),
        pytest.param(lightningdit.LightningDiT, 4, False, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_training_evaluation_and_guidance_share_at_most_four_graphs(network, of_blocks, checkpointed, monkeypatch):
    """Routed training: one a token count. EMA evaluation, at any batch size and token count, guided or not: one for
    DiT; two where positions differ by sample or not. The final layer: one for training and one for evaluation."""
    torch.compiler.reset()
    eager = partialmethod(torch.nn.Module.compile, backend="aot_eager")  # graphs are counted, none is built
    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    net = network(16, 4, 4, hidden_size=32, depth=8, num_heads=2, num_classes=10, learn_sigma=False, routes=TREAD)
    recompute(net, checkpointed)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    cpu = torch.device("cpu")
    compile_blocks(net.all_blocks, "blocks")
    compile_blocks(ema.all_blocks, "blocks", dynamic=True)
    counters.clear()
    x, y, t = torch.randn(4, 4, 16, 16), torch.zeros(4, dtype=torch.int64), torch.rand(4)

    def train(step):
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(x, t, y, routing=Routing(generators=torch.Generator().manual_seed(step))).sum()
        loss.backward()

    def evaluate():
        run = Run(ema, EDM(), None, None, cpu, "bf16")
        cfg, sparse = Guidance(scale=2.0), Guidance(1.5, None, 0.3, 0.7, "same")
        for guidance in (Guidance(), cfg, sparse):
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


def test_the_networks_of_a_sweep_are_compiled_in_one_process(monkeypatch):
    """Torch alone gives up at the ninth graph of one function."""
    torch.compiler.reset()
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    for width in range(8, 88, 8):
        block = Block(width, 2, 4.0)
        compile_blocks([block], "blocks")
        assert block(torch.ones(2, 3, width), torch.ones(2, width)).isfinite().all()
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize(
    "precision, backend, K",
    [
        ("fp32", "aot_eager", 32),
        ("bf16", "aot_eager", 32),
        pytest.param("bf16", "inductor", 98, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("block", [Block(128, 4, 4.0), lightningdit.LightningBlock(128, 4, 4.0, qk_norm=True)])
def test_what_blocks_do_apart_where_cpus_compile_them_is_as_exact(block, precision, backend, K):
    """Bias, GELU and scores: outputs and gradients are as far from float64's as those of the eager block.

    98 tokens are no multiple of a vector: compiled scores had gradients of NaN there, on a Xeon with AMX.
    """
    seeded = torch.Generator().manual_seed(0)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=seeded)
    x, c = torch.randn(8, K, 128, generator=seeded), torch.randn(8, 128, generator=seeded)
    where = () if type(block) is Block else tuple(torch.randn(2, 8, K, 32, generator=seeded))

    def run(block, x, c, *where):
        for p in block.parameters():
            p.grad = None
        x.grad, x.requires_grad = None, True
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16" and x.dtype == torch.float32):
            out = block(x, c, None, *where)
        out.square().mean().backward()
        return [out, x.grad, *(p.grad for p in block.parameters())]

    exact = run(copy.deepcopy(block).double(), *(tensor.double() for tensor in (x, c, *where)))
    far = lambda got: [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, exact)]
    eager = far(run(block, x, c, *where))
    torch.compiler.reset()
    compiled = far(run(torch.compile(copy.deepcopy(block), backend=backend, fullgraph=True), x, c, *where))
    torch.compiler.reset()
    assert max(compiled) < (3e-6 if precision == "fp32" else 3e-2)
    assert sum(compiled) <= 1.1 * sum(eager) + 1e-6


def test_gelu_is_one_function_in_both_its_forms():
    x = torch.linspace(-12, 12, 4001).requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(gelu, backend="aot_eager")(x)
    for value, expected in ((gelu(x), F.gelu(x, approximate="tanh")), (compiled, F.gelu(x, approximate="tanh"))):
        (slope,), (wanted,) = (torch.autograd.grad(out.sum(), x, retain_graph=True) for out in (value, expected))
        torch.testing.assert_close(value, expected, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(slope, wanted, rtol=5e-6, atol=5e-6)
    torch.compiler.reset()


def test_a_compiled_backward_pass_takes_no_exponential_for_gelu():
    x = torch.randn(8, 8).requires_grad_()
    torch.compiler.reset()
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.compile(gelu, backend="aot_eager_decomp_partition")(x).sum()  # decides what is kept, as for real
    with OpCounter() as counter:
        out.backward()
    assert counter.calls["_foreach_mul"] == 1 and not {"sigmoid", "exp", "tanh", "pow"} & counter.calls.keys()
    torch.compiler.reset()


@pytest.mark.parametrize("grad_clip", [1e-3, 1e3, None])
def test_a_step_clips_as_pytorch_does(grad_clip):
    config = settings(global_batch_size=4, label_dropout=0.0, precision="fp32", grad_clip=grad_clip)
    plan = BatchPlan(4, 4, 1, 0, 1)
    batch = torch.randn(4, 4, 32, 32), torch.zeros(4, dtype=torch.int64)
    state, other = (state_on("cpu", size="DiT-XS/4", objective=RectifiedFlow()) for _ in range(2))
    for optimizer in (state.optimizer, other.optimizer):
        optimizer.param_groups[0]["eps"] = 1e-3  # or AdamW's first step would not depend on the gradient's size
    _, grad_norm = training.train_step(config, latents_of(plan), state, iter([batch]))
    other.optimizer.param_groups[0]["lr"] = training.learning_rate(1, config.train)

    rows = plan.slice(seeded_generator(config.seed, "train", 1), 0)
    uniform((4,), rows)  # of the label dropout
    loss_of(other.model, RectifiedFlow(), *batch, rows).mean().backward()
    expected = torch.nn.utils.clip_grad_norm_(other.model.parameters(), grad_clip or math.inf)
    other.optimizer.step()
    torch.testing.assert_close(grad_norm, expected)
    assert grad_clip is None or (expected > grad_clip) == (grad_clip < 1)
    for ours, theirs in zip(state.model.parameters(), other.model.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def activation_peaks(size, *ways):
    """Bytes at batch 256, on made-up tensors, for each (routed, gradient_checkpointing)."""
    peaks = []
    with FakeTensorMode():
        model = DiT(size=size, learn_sigma=False, routes=TREAD)
        for routed, gradient_checkpointing in ways:
            recompute(model, gradient_checkpointing)
            model.zero_grad()
            tracker = MemTracker()
            tracker.track_external(model)
            x, t, y = torch.randn(256, 4, 32, 32), torch.rand(256), torch.zeros(256, dtype=torch.int64)
            with tracker:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(x, t, y, routing=Routing() if routed else None).square().mean()
                loss.backward()
            (snapshot,) = tracker.get_tracker_snapshot("peak").values()
            peaks.append(next(n for kind, n in snapshot.items() if getattr(kind, "name", kind) == "ACT"))
    return peaks


@pytest.mark.parametrize("size, bar", [("DiT-B/2", 0.74), pytest.param("DiT-XL/2", 0.62, marks=pytest.mark.slow)])
def test_routing_saves_memory_as_well(size, bar, monkeypatch):
    """P8. Where all that is kept is linear in tokens, the limits are 0.708 and 0.589. Attention as on GPUs."""
    monkeypatch.setattr(kernels, "plain_on", set())
    routed, dense = activation_peaks(size, (True, False), (False, False))
    assert 0.58 < routed / dense <= bar


def test_gradient_checkpointing_keeps_little():
    little, all_of_it = activation_peaks("DiT-S/2", (True, True), (True, False))
    assert little < 0.3 * all_of_it


def test_state_is_twenty_bytes_a_parameter():
    state = state_on("cpu", size="DiT-XS/4")
    for p in state.model.parameters():
        p.grad = torch.zeros_like(p)
    state.optimizer.step()
    moments = [value for held in state.optimizer.state.values() for value in held.values()]
    parameters = list(state.model.parameters())
    weights = [*state.model.state_dict().values(), *state.averages["ema"].state_dict().values()]
    held = [*weights, *(p.grad for p in parameters), *moments]
    used = sum(tensor.numel() * tensor.element_size() for tensor in held)
    assert 1 <= used / (BYTES_PER_PARAMETER * sum(p.numel() for p in parameters)) <= 1.02


@pytest.mark.parametrize("objective", [EDM(), RectifiedFlow()])
def test_sampling_asks_the_device_for_no_value(objective, monkeypatch):
    """On a device without values, whoever asks for one raises."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # knows no such device
    net = DiT(16, size="DiT-XS/4", num_classes=10, learn_sigma=False, routes=TREAD).to("meta")
    run = Run(net, objective, None, None, torch.device("meta"), pool=torch.arange(10))
    seeds, labels = range(3), torch.zeros(3, dtype=torch.int64)
    sparse, random = Guidance(1.5, None, 0.3, 0.7, "same"), Guidance(2.0, (0.1, 0.9), weak_label="random")
    for guidance in (Guidance(), Guidance(2.0), sparse, random):
        latents = generate_latents(run, guidance, seeds, labels, {"num_steps": 3})
        assert latents.shape == (3, 4, 16, 16) and latents.device.type == "meta"

"""The hot path by counters, which no machine's speed can change (the GPU's path on made-up tensors)."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import cli
import train as training
from dit import build
from edm import EDM
from guard import FiniteGuard
from prepare import BatchPlan, State
from rf import RectifiedFlow
from routing_module import Routing

TREAD = [dict(selection_ratio=0.5, start_layer_idx=2, end_layer_idx=-4)]


class Counter(TorchDispatchMode):
    """Names of operators and, of copies between devices, their bytes."""

    def __init__(self):
        super().__init__()
        self.calls, self.to_gpu, self.to_cpu, self.blocking = {}, 0, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        out = function(*args, **kwargs)
        if name in ("_to_copy", "copy_") and isinstance(out, torch.Tensor):
            source = args[1] if name == "copy_" else args[0]
            devices = source.device.type, out.device.type
            moved = source.numel() * source.element_size()
            self.to_gpu += moved * (devices == ("cpu", "cuda"))
            self.to_cpu += moved * (devices == ("cuda", "cpu"))
            self.blocking += devices == ("cpu", "cuda") and not kwargs.get("non_blocking", False)
        return out


def settings(**train):
    config = cli.load_config("config", [f"train.{key}={value}" for key, value in train.items()])
    config.train.precision = "bf16"
    return config


def state_on(device, routes=TREAD, size="DiT-S/2"):
    torch.manual_seed(0)
    with torch.device(device):
        model = build(size, input_size=32, in_channels=4, num_classes=1000, routes=routes)
        ema = build(size, input_size=32, in_channels=4, num_classes=1000, routes=routes).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return State(model, model, ema, optimizer, FiniteGuard(optimizer, torch.device(device), "stop"))


class Latents:
    @staticmethod
    def to_model_input(raw, rows):
        return raw.float()


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("objective", [EDM(), RectifiedFlow()])
def test_a_cuda_step_never_waits_and_copies_only_its_batch(objective, monkeypatch):
    """Under FakeTensorMode anything that needs a value on the host raises, as does a tensor on the wrong device."""
    if torch.version.cuda is not None and not torch.cuda.is_available():
        # A CUDA build cannot walk backwards without a driver. The walk itself asks for no value: see the test below.
        monkeypatch.setattr(torch.Tensor, "backward", made_up_gradients)
    monkeypatch.setattr(training, "seeded_generator", lambda *key, device: None)  # there is no CUDA generator to make
    monkeypatch.setattr(BatchPlan, "rows", lambda self, generator, micro: None)
    attended, attention = [], torch.nn.functional.scaled_dot_product_attention
    watched = lambda q, k, v: attended.append(q.shape) or attention(q, k, v)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    config, plan = settings(global_batch_size=8, micro_batch_size=4), BatchPlan(8, 4, 2, 0, 1)
    with FakeTensorMode():
        state = state_on("cuda")
        raw, y = torch.empty(4, 4, 32, 32, dtype=torch.float16), torch.empty(4, dtype=torch.int64)
        for step in (1, 2):
            with Counter() as counter:
                training.set_learning_rate(state.optimizer, step, config.train)
                training.train_step(state, objective, Latents, iter([(raw, y)] * 2), step, plan, config)
                training.update_ema(state.ema, state.model, 0.999)
    batch_bytes = 2 * (raw.numel() * 2 + y.numel() * 8)
    assert counter.to_cpu == 0 and counter.to_gpu == batch_bytes and counter.blocking == 0
    assert len(attended) == 2 * 2 * 12  # two steps of two micro-batches through twelve blocks
    assert counter.calls["_fused_adamw_"] == 1 and counter.calls["_foreach_lerp_"] == 1


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
    net = build("DiT-XS/4", input_size=32, in_channels=4, num_classes=10, routes=TREAD)
    y = torch.zeros(2, dtype=torch.int64)
    routed = lambda x, t, y: net(x, t, y, routing=Routing(generators=torch.Generator().manual_seed(0)))  # noqa: E731
    loss = EDM().loss(routed, torch.randn(2, 4, 32, 32), y, torch.Generator().manual_seed(0)).mean()
    with Counter() as counter:
        loss.backward()
    asking = {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select"}
    assert not asking & counter.calls.keys() and sum(counter.calls.values()) > 100


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
    with Counter() as counter:
        state.optimizer.step()
        training.update_ema(state.ema, state.model, 0.999)
    assert sum(counter.calls.values()) - counter.calls.get("detach", 0) <= 8, counter.calls


def test_nearly_all_matrix_work_is_bf16():
    """Multiply-adds of a routed B/2's products, by type; the backward pass has the same types twice."""
    flops = {}

    class ByType(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function.overloadpacket.__name__ in ("mm", "addmm", "bmm"):
                a, b = args[-2:]
                work = a.shape[-2] * a.shape[-1] * b.shape[-1] * (a.shape[0] if a.ndim == 3 else 1)
                flops[out.dtype] = flops.get(out.dtype, 0) + work
            return out

    torch.manual_seed(0)
    net = build("DiT-B/2", input_size=32, in_channels=4, num_classes=10, routes=TREAD, depth=12)
    x, y = torch.randn(2, 4, 32, 32), torch.zeros(2, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16), ByType():
        net(x, torch.rand(2), y, routing=Routing(generators=torch.Generator().manual_seed(0)))
    assert flops[torch.bfloat16] / sum(flops.values()) >= 0.99


def test_one_full_size_copy_a_route():
    net = build("DiT-XS/4", input_size=32, in_channels=4, num_classes=10, routes=TREAD)
    x, y, t = torch.randn(2, 4, 32, 32), torch.zeros(2, dtype=torch.int64), torch.rand(2)
    with torch.no_grad(), Counter() as dense:
        net(x, t, y)
    with torch.no_grad(), Counter() as routed:
        net(x, t, y, routing=Routing(generators=torch.Generator().manual_seed(0)))
    assert routed.calls["gather"] == 1 and routed.calls["scatter"] == 1
    assert routed.calls.get("clone", 0) == dense.calls.get("clone", 0)


def test_compiled_blocks_are_one_graph_a_token_count_without_breaks():
    torch.compiler.reset()
    counters.clear()
    net = build(
        "DiT-XS/4", input_size=16, in_channels=4, num_classes=10, depth=8, hidden_size=32, num_heads=2, routes=TREAD
    )
    for block in net.blocks:
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    x, y, t = torch.randn(4, 4, 16, 16), torch.zeros(4, dtype=torch.int64), torch.rand(4)
    for step in range(3):
        net(x, t, y, routing=Routing(generators=torch.Generator().manual_seed(step))).sum().backward()
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    with torch.compiler.set_stance("fail_on_recompile"):
        net(x, t, y, routing=Routing(generators=torch.Generator().manual_seed(9))).sum().backward()
    torch.compiler.reset()

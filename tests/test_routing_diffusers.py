"""Routes through tiny random transformers of the seven families of diffusers that routing_diffusers.py knows."""

import copy
import inspect
import os
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from randomness import BatchSlice
from routing_blocks import routing
from routing_diffusers import FAMILIES, ListedBlocks, route, unroute
from routing_module import draw_keep_ids
from tests.started import free_port

ROOT = Path(__file__).resolve().parent.parent
B, T, CHANNELS, TEXT = 2, 6, 4, 8  # samples, text tokens, latent channels, width of the text's embeddings


def image(side, channels=CHANNELS):
    return torch.randn(B, channels, side, side)


def text(width=TEXT):
    return torch.randn(B, T, width)


def timestep():
    return torch.tensor([300.0, 700.0])


def dit(side):
    return dict(hidden_states=image(side), timestep=timestep().long(), class_labels=torch.tensor([1, 9]))


def pixart(side, **more):
    mask = torch.tensor([[1] * T, [1] * (T - 2) + [0] * 2])
    return dict(
        hidden_states=image(side), encoder_hidden_states=text(), encoder_attention_mask=mask, timestep=timestep(),
        added_cond_kwargs=dict(resolution=None, aspect_ratio=None), **more,
    )  # fmt: skip


def pixart_masked(side):
    return pixart(side, attention_mask=(torch.rand(B, (side // 2) ** 2) > 0.3).long())


def sd3(side):
    pooled = torch.randn(B, TEXT)
    return dict(hidden_states=image(side), encoder_hidden_states=text(), pooled_projections=pooled, timestep=timestep())


def flux(side):
    rows, columns = torch.meshgrid(torch.arange(side // 2), torch.arange(side // 2), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float()
    return dict(
        hidden_states=torch.randn(B, len(places), CHANNELS), encoder_hidden_states=text(), timestep=timestep() / 1000,
        pooled_projections=torch.randn(B, TEXT), img_ids=places, txt_ids=torch.zeros(T, 3),
    )  # fmt: skip


def lumina2(side, lengths=(T, T)):
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    return dict(
        hidden_states=image(side), timestep=timestep() / 1000, encoder_hidden_states=text(), encoder_attention_mask=mask
    )


def lumina2_ragged(side):
    return lumina2(side, (3, T))


def wan(side):
    return dict(hidden_states=image(side)[:, :, None], timestep=timestep(), encoder_hidden_states=text())


def wan_per_token(side):
    return wan(side) | dict(timestep=torch.rand(B, (side // 2) ** 2) * 1000)


def auraflow(side):
    return dict(hidden_states=image(side), encoder_hidden_states=text(), timestep=timestep() / 1000)


HEADS = dict(num_attention_heads=2, attention_head_dim=8)
CONFIGS = {
    "DiTTransformer2DModel": HEADS | dict(
        in_channels=CHANNELS, num_layers=5, sample_size=8, patch_size=2, norm_num_groups=1, num_embeds_ada_norm=10,
    ),
    "PixArtTransformer2DModel": HEADS | dict(
        in_channels=CHANNELS, out_channels=CHANNELS, num_layers=5, sample_size=8, patch_size=2, norm_num_groups=1,
        cross_attention_dim=16, caption_channels=TEXT, use_additional_conditions=False,
    ),
    "SD3Transformer2DModel": HEADS | dict(
        in_channels=CHANNELS, out_channels=CHANNELS, num_layers=5, sample_size=8, patch_size=2,
        joint_attention_dim=TEXT, caption_projection_dim=16, pooled_projection_dim=TEXT, pos_embed_max_size=8,
        dual_attention_layers=(1,), qk_norm="rms_norm",
    ),
    "FluxTransformer2DModel": HEADS | dict(
        in_channels=CHANNELS, num_layers=3, num_single_layers=3, joint_attention_dim=TEXT, pooled_projection_dim=TEXT,
        axes_dims_rope=(2, 2, 4),
    ),
    "Lumina2Transformer2DModel": dict(
        hidden_size=16, in_channels=CHANNELS, sample_size=8, num_layers=5, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(16, 16, 16), cap_feat_dim=TEXT,
    ),
    "WanTransformer3DModel": HEADS | dict(
        in_channels=CHANNELS, out_channels=CHANNELS, num_layers=5, text_dim=TEXT, freq_dim=8, ffn_dim=32,
        rope_max_seq_len=16,
    ),
    "AuraFlowTransformer2DModel": HEADS | dict(
        in_channels=CHANNELS, sample_size=8, num_mmdit_layers=3, num_single_dit_layers=3, joint_attention_dim=TEXT,
        caption_projection_dim=16, pos_embed_max_size=64,
    ),
}  # fmt: skip

# name: class, arguments of a call, first and last block of the route
CASES = {
    "dit": ("DiTTransformer2DModel", dit, 0, 2),
    "pixart": ("PixArtTransformer2DModel", pixart, 1, -2),
    "pixart, masked": ("PixArtTransformer2DModel", pixart_masked, 1, -2),
    "sd3": ("SD3Transformer2DModel", sd3, 1, -2),
    "sd3, to the last": ("SD3Transformer2DModel", sd3, 2, -1),
    "flux, double": ("FluxTransformer2DModel", flux, 1, 2),
    "flux, single": ("FluxTransformer2DModel", flux, 3, 4),
    "flux, both": ("FluxTransformer2DModel", flux, 1, -2),
    "lumina2": ("Lumina2Transformer2DModel", lumina2, 1, -2),
    "lumina2, ragged": ("Lumina2Transformer2DModel", lumina2_ragged, 0, -1),
    "wan": ("WanTransformer3DModel", wan, 1, -2),
    "wan, per token": ("WanTransformer3DModel", wan_per_token, 1, -2),
    "auraflow, joint": ("AuraFlowTransformer2DModel", auraflow, 1, 1),
    "auraflow, single": ("AuraFlowTransformer2DModel", auraflow, 3, -2),
    "auraflow, both": ("AuraFlowTransformer2DModel", auraflow, 1, -2),
}
FAMILY = ["dit", "pixart, masked", "sd3", "flux, both", "lumina2, ragged", "wan, per token", "auraflow, both"]
N = 16  # image tokens of side 8


def make(name):
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**CONFIGS[name])
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model.eval()  # without DiT's dropped labels


@pytest.fixture(params=CASES)
def case(request):
    name, arguments, start, end = CASES[request.param]
    model, torch_state = make(name), torch.get_rng_state()
    depth = sum(len(blocks) for _, blocks in lists_of(model))
    span = range(start % depth, end % depth + 1)
    inputs = lambda side=8: torch.set_rng_state(torch_state) or arguments(side)
    return SimpleNamespace(name=name, model=model, inputs=inputs, start=start, end=end, span=span)


def lists_of(model):
    return [(row.name, getattr(model, row.name)) for row in FAMILIES[type(model).__name__] if row.routed]


def blocks_of(model):
    return [block for _, blocks in lists_of(model) for block in blocks]


def call(model, inputs):
    return model(**inputs, return_dict=False)[0]


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def drawn(ratio=0.5):
    return draw_keep_ids(B, N, ratio, generators=seeded())


def sample_of(arguments, b):
    """Sample b of all that has samples, as a batch of one."""
    one = lambda value: value[b : b + 1] if isinstance(value, torch.Tensor) and len(value) == B else value
    return {key: one(value) for key, value in arguments.items()}


def arguments_of(block, args, kwargs):
    return dict(zip(inspect.signature(block.forward).parameters, args)) | kwargs


def by_hand(case, keep_ids, inputs, stash_at=None):
    """The plain model's output where the span was run a sample at a time, on the tokens and rows that stay. stash_at:
    the block before which the others are as they return; None = the span's first."""
    model, number, stash = copy.deepcopy(case.model), 0, []
    if stash_at is not None:
        keep = lambda block, args, kwargs: stash.append(arguments_of(block, args, kwargs)["hidden_states"])
        blocks_of(model)[stash_at].register_forward_pre_hook(keep, with_kwargs=True)
    for name, blocks in lists_of(model):
        span = [block for i, block in enumerate(blocks, number) if i in case.span]
        number += len(blocks)
        if span:
            enter, leave = tampering(span, {}, name, keep_ids, inputs, stash)
            span[0].register_forward_pre_hook(enter, with_kwargs=True)
            span[-1].register_forward_hook(leave)
    with torch.no_grad():
        return call(model, inputs)


def tampering(span, seen, name, keep_ids, inputs, stash):
    def enter(block, args, kwargs):
        seen.update(arguments_of(block, args, kwargs))

    def leave(block, args, output):
        rows_out = [run_alone(span, seen, name, b, ids.tolist(), inputs) for b, ids in enumerate(keep_ids)]
        x = (stash[0] if stash else seen["hidden_states"]).clone()
        for b, (rows, _, tokens) in enumerate(rows_out):
            x[b, rows] = tokens[0]
        if not isinstance(output, tuple):
            return x
        return None if output[0] is None else torch.cat([other for _, other, _ in rows_out]), x

    return enter, leave


def run_alone(span, seen, name, b, ids, inputs):
    """Sample b through the span's blocks: (rows of the sequence that stay, the text's stream, the tokens)."""
    x = seen["hidden_states"]
    front = x.shape[1] - N  # rows of a joint sequence that are not the image's
    if name == "layers":
        front = int(inputs["encoder_attention_mask"][b].sum())
    rows = [*range(front), *(front + i for i in ids), *range(front + N, x.shape[1])]
    own = sample_of(seen, b)
    own["hidden_states"] = x[b : b + 1, rows]
    if seen.get("image_rotary_emb") is not None and name == "layers":
        own["image_rotary_emb"] = seen["image_rotary_emb"][b : b + 1, rows]
    elif seen.get("image_rotary_emb") is not None:
        own["image_rotary_emb"] = tuple(part[[*range(T), *(T + i for i in ids)]] for part in seen["image_rotary_emb"])
    if "rotary_emb" in seen:
        own["rotary_emb"] = tuple(part[:, ids] for part in seen["rotary_emb"])
        own["temb"] = own["temb"][:, ids] if own["temb"].ndim == 4 else own["temb"]
    if seen.get("attention_mask") is not None:
        mask = own["attention_mask"]
        own["attention_mask"] = mask[:, rows] if name == "layers" else mask[:, :, ids]
    for block in span:
        out = block.forward(**own)  # without the hooks
        if isinstance(out, tuple):
            own["encoder_hidden_states"], out = out
        own["hidden_states"] = out
    return rows, own.get("encoder_hidden_states"), out


def test_off_and_ratio_0_are_the_model_bit_for_bit(case):
    plain, names = copy.deepcopy(case.model), list(case.model.state_dict())
    inputs, routed = case.inputs(), route(case.model, case.start, case.end, 0.5)
    with torch.no_grad():
        dense = call(plain, inputs)
        assert torch.equal(call(routed, inputs), dense)
        with routing(0.0, seeded()):
            assert torch.equal(call(routed, inputs), dense)
        with routing(0.5, seeded()):
            with routing(0.0):
                assert torch.equal(call(routed, inputs), dense)
            assert (call(routed, inputs) - dense).abs().max() > 1e-4
        assert list(routed.state_dict()) == names
        routed.load_state_dict(plain.state_dict())
        assert torch.equal(call(unroute(routed), inputs), dense)
    assert list(routed.state_dict()) == names and not any(isinstance(m, ListedBlocks) for m in routed.modules())


def test_routed_is_the_span_by_hand_on_the_tokens_that_stay(case):
    inputs = case.inputs()
    expected = by_hand(case, drawn(), inputs)
    with torch.no_grad(), routing(generators=seeded()):
        found = call(route(case.model, case.start, case.end, 0.5), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # float32 products of another order


class Swapped(nn.Module):
    """A model's rotary embedding in which two image tokens have changed places, text before them in each sample."""

    def __init__(self, rope, pair, text):
        super().__init__()
        self.rope, self.pair, self.text = rope, pair, text

    def forward(self, *args):
        out = self.rope(*args)
        if len(out) == 2:  # Wan: cosine and sine (1, N, 1, D/H)
            return tuple(swap_rows(part, self.pair) for part in out)
        x, of_text, of_image, of_both, *lengths = out  # Lumina2
        joint = torch.stack([swap_rows(a[None], [n + i for i in self.pair])[0] for a, n in zip(of_both, self.text)])
        return x, of_text, swap_rows(of_image, self.pair), joint, *lengths


def swap_rows(x, pair):
    order = torch.arange(x.shape[1])
    order[pair] = order[pair[::-1]]
    return x[:, order]


def swap_patches(x, pair):
    """x (..., 8, 8) with two of its 4 x 4 patches in each other's place."""
    places = [(..., slice(i // 4 * 2, i // 4 * 2 + 2), slice(i % 4 * 2, i % 4 * 2 + 2)) for i in pair]
    out = x.clone()
    out[places[0]], out[places[1]] = x[places[1]], x[places[0]]
    return out


@pytest.mark.parametrize("name", ["flux, double", "flux, single", "flux, both", "lumina2", "lumina2, ragged", "wan"])
def test_a_kept_token_keeps_its_own_angle(name):
    """Two kept tokens that change places with their angles change places in the output, and not without them."""
    class_name, arguments, start, end = CASES[name]
    model, inputs = make(class_name), arguments(8)
    both = sorted(set.intersection(*(set(ids) for ids in drawn().tolist())))  # kept in each sample
    pair, swap, turned = [both[0], both[-1]], swap_patches, {}
    if "flux" in name:
        swap, turned = swap_rows, dict(img_ids=swap_rows(inputs["img_ids"][None], pair)[0])
    moved = inputs | dict(hidden_states=swap(inputs["hidden_states"], pair))
    route(model, start, end, 0.5)

    def routed(inputs):
        with torch.no_grad(), routing(generators=seeded()):
            return call(model, inputs)

    expected = swap(routed(inputs), pair)
    assert (routed(moved) - expected).abs().max() > 1e-3
    if not turned:
        rope = "rope" if name == "wan" else "rope_embedder"
        lengths = inputs["encoder_attention_mask"].sum(1).tolist() if name != "wan" else None
        setattr(model, rope, Swapped(getattr(model, rope), pair, lengths))
    torch.testing.assert_close(routed(moved | turned), expected)


def test_blocks_of_the_route_see_all_of_the_text_and_k_tokens_of_the_image(case):
    dense, inputs, seen = copy.deepcopy(case.model), case.inputs(), {}
    model = route(case.model, case.start, case.end, 0.5)
    for net in (dense, model):
        for i, block in enumerate(blocks_of(net)):
            keep = lambda block, a, k, key=(net, i): seen.update({key: arguments_of(block, a, k)})
            block.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad(), routing(generators=seeded()):
        call(dense, inputs), call(model, inputs)
    for i in range(len(blocks_of(model))):
        was, now = seen[dense, i], seen[model, i]
        length, streams = was["hidden_states"].shape[1], "encoder_hidden_states" in was
        assert now["hidden_states"].shape[1] == (length - N // 2 if i in case.span else length)
        if streams and was["encoder_hidden_states"] is not None:
            assert now["encoder_hidden_states"].shape == was["encoder_hidden_states"].shape
        if i == case.span[0]:  # nothing has happened yet but the selection
            lengths = (
                inputs["encoder_attention_mask"].sum(1).tolist() if "lumina" in case.name.lower() else [length - N] * B
            )
            for b, n in enumerate(lengths):
                assert torch.equal(now["hidden_states"][b, :n], was["hidden_states"][b, :n])
                expected = was["hidden_states"][b, n + drawn()[b]]
                assert torch.equal(now["hidden_states"][b, n : n + N // 2], expected)
            if streams and was["encoder_hidden_states"] is not None:
                assert torch.equal(now["encoder_hidden_states"], was["encoder_hidden_states"])


def test_every_parameter_gets_a_gradient_as_without_routes(case):
    inputs, model = case.inputs(), case.model
    learn = lambda: (
        model.zero_grad(), call(model, inputs).square().mean().backward(),
        {name: p.grad.norm().item() if p.grad is not None else 0 for name, p in model.named_parameters()},
    )[-1]  # fmt: skip
    dense, _ = learn(), route(model, case.start, case.end, 0.5)
    with routing(generators=seeded()):
        routed = learn()
    assert [name for name in routed if routed[name] == 0] == [name for name in dense if dense[name] == 0]
    assert sum(norm > 0 for norm in routed.values()) >= 0.95 * len(routed)  # a shift of all keys has none


def test_gradient_checkpointing_runs_blocks_again_on_the_same_tokens(case):
    """After another pass, outside the context, in another thread: as the engine of a GPU does it."""
    inputs, model, gradients = case.inputs(), route(case.model, case.start, case.end, 0.5), []
    for on in (False, True):
        model.enable_gradient_checkpointing() if on else model.disable_gradient_checkpointing()
        model.zero_grad()
        with routing(generators=seeded()):
            loss = call(model, inputs).square().mean()
            call(model, inputs)
        worker = threading.Thread(target=loss.backward)
        worker.start()
        worker.join()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(checkpointed, plain)


def test_50_steps_with_diffusers_own_scheduler_lower_the_loss(case):
    inputs, model = case.inputs(), route(case.model, case.start, case.end, 0.5)
    for name, p in model.named_parameters():
        nn.init.normal_(p, std=0.02) if p.ndim > 1 else nn.init.constant_(p, float("norm" in name and "weight" in name))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    clean, noise = inputs["hidden_states"], torch.randn_like(inputs["hidden_states"])
    times = scheduler.timesteps[[300, 700]]
    inputs["hidden_states"] = scheduler.scale_noise(clean, times, noise)
    optimizer, losses, generator = torch.optim.AdamW(model.parameters(), lr=3e-3), [], seeded()
    for _ in range(50):
        with routing(generators=generator):
            loss = (call(model, inputs) - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_flops_fall_to_those_of_the_tokens_that_stay(case):
    """A quarter stays: as many as an image of half the side has. Only the route's blocks become cheaper."""

    def count(model, side):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call(model, case.inputs(side))
        flops = {key.partition(".")[2]: sum(ops.values()) for key, ops in counter.get_flop_counts().items()}
        names = [f"{name}.{i}" for name, blocks in lists_of(model) for i in range(len(blocks))]
        return counter.get_total_flops(), [flops[name] for name in names]

    (total, each), (_, of_quarter) = count(case.model, 8), count(case.model, 4)
    expected = total - sum(each[i] - of_quarter[i] for i in case.span)
    with routing(0.75, seeded()):
        assert count(route(case.model, case.start, case.end, 0.5), 8)[0] == expected < total


WHOLE = pytest.mark.skipif(torch.__version__ < (2, 14), reason="Dynamo cannot read the context: refused")


SOON = ("flux, both", "lumina2, ragged")  # the other compilations are slow


@WHOLE
@pytest.mark.parametrize(
    "name", [name if name in SOON else pytest.param(name, marks=pytest.mark.slow) for name in FAMILY]
)
def test_a_compiled_model_routes_and_stops_routing(name):
    """One graph, but for Lumina2, whose own forward reads the captions' lengths."""
    class_name, arguments, start, end = CASES[name]
    model, inputs = route(make(class_name), start, end, 0.5), arguments(8)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph="lumina" not in name)
    with torch.no_grad():
        dense = call(model, inputs)
        assert torch.equal(call(compiled, inputs), dense)
        outputs = []
        for net in (model, compiled):
            torch.manual_seed(3)
            with routing():
                outputs.append(call(net, inputs))
        assert torch.equal(*outputs) and not torch.equal(outputs[0], dense)
        assert torch.equal(call(compiled, inputs), dense)


@pytest.mark.parametrize("name", ["flux, both", pytest.param("wan", marks=pytest.mark.slow)])
def test_compiled_blocks_train_without_breaks(name):
    """diffusers' way, a block at a time: the selection is drawn outside, from any generator."""
    class_name, arguments, start, end = CASES[name]
    model, inputs, gradients = route(make(class_name), start, end, 0.5), arguments(8), []
    torch.compiler.reset()
    for compiled in (False, True):
        if compiled:
            model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        model.zero_grad()
        with routing(generators=seeded()):
            call(model, inputs).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, compiled in zip(*gradients):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)


def test_threads_and_copies_have_routes_of_their_own():
    name, arguments, start, end = CASES["flux, both"]
    model, inputs = route(make(name), start, end, 0.5), arguments(8)
    copied = copy.deepcopy(model)
    ratios, outputs, ready = [None, 0.25, 0.5, 0.75], {}, threading.Barrier(4)

    def work(ratio):
        ready.wait()
        for turn in range(5):
            with torch.no_grad(), nullcontext() if ratio is None else routing(ratio, seeded()):
                outputs[ratio, turn] = call(model, inputs)

    workers = [threading.Thread(target=work, args=[ratio]) for ratio in ratios]
    [w.start() for w in workers], [w.join() for w in workers]
    for ratio in ratios:
        with torch.no_grad(), routing(ratio or 0.0, seeded()):
            expected = call(copied, inputs)
        assert all(torch.equal(outputs[ratio, turn], expected) for turn in range(5))


def gradients_of_a_rank(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for case in FAMILY:
        class_name, arguments, start, end = CASES[case]
        model = route(make(class_name), start, end, 0.5)
        own = {
            k: v[rank : rank + 1] if isinstance(v, torch.Tensor) and len(v) == B else v for k, v in arguments(8).items()
        }
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # a parameter without a gradient would show in the second pass
            with routing(generators=BatchSlice(seeded(), rank, B)):
                loss = call(parallel, own).square().mean()
            model.zero_grad()
            loss.backward()
        torch.save({n: p.grad for n, p in model.named_parameters()}, folder / f"{case}_{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradient_of_one(tmp_path):
    torch.multiprocessing.spawn(gradients_of_a_rank, args=(free_port(), tmp_path), nprocs=2)
    for case in FAMILY:
        class_name, arguments, start, end = CASES[case]
        model = route(make(class_name), start, end, 0.5)
        with routing(generators=seeded()):
            call(model, arguments(8)).square().mean().backward()
        whole = torch.stack([p.grad.norm() for p in model.parameters()]).norm()  # some are zero but for rounding
        for rank in range(2):
            found = torch.load(tmp_path / f"{case}_{rank}.pt", weights_only=True)
            for name, p in model.named_parameters():
                assert (found[name] - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-6 * whole, (case, name)


def test_the_example_learns_and_leaves_a_transformer_of_diffusers(tmp_path):
    def run(*overrides):
        command = [sys.executable, "scripts/finetune_diffusers.py", *overrides]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    done = run(f"out={tmp_path}", "steps=50", "batch=8")
    assert done.returncode == 0, done.stderr
    first, last = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert last < 0.5 * first
    assert len(diffusers.FluxTransformer2DModel.from_pretrained(tmp_path).single_transformer_blocks) == 4
    for override, message in (
        ("end=6", "error: route 1..6 does not fit a network of 6 blocks"),
        ("transformer=nobody/nothing", "error: nobody/nothing"),
    ):
        done = run(override)
        assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(message), done.stderr


def test_a_second_route_and_what_does_not_fit():
    model, inputs = route(make("WanTransformer3DModel"), 0, 1, 0.5), wan(8)
    assert route(model, -2, -1, 0.75) is model
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, output: seen.append(output.shape[1]))
    with torch.no_grad(), routing():
        call(model, inputs)
    assert seen == [8, 8, 16, 4, 4]
    for start, end, ratio, message in (
        (1, 2, 0.5, "routes overlap: 0..1 and 1..2"),
        (2, 5, 0.5, "route 2..5 does not fit a network of 5 blocks"),
        (2, 2, 1.0, "in \\[0, 1\\); got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            route(model, start, end, ratio)
    assert [len(model.blocks), model.blocks[0].attn1.heads, type(model.blocks[1:])] == [5, 2, ListedBlocks]
    with pytest.raises(ValueError, match="^Linear is none of DiTTransformer2DModel.*RoutedBlocks.*per_token=.names"):
        route(nn.Linear(1, 1), 0, 0, 0.5)
    with pytest.raises(ValueError, match="selection_ratio"), routing(1.5):
        pass
    without = diffusers.Lumina2Transformer2DModel(**CONFIGS["Lumina2Transformer2DModel"] | dict(num_refiner_layers=0))
    with pytest.raises(ValueError, match="without context_refiner"):
        route(without, 1, 2, 0.5)

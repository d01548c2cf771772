"""Routed models under what trainers put around them: FSDP2, LoRA, quantized weights; and the example script."""

import copy
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from torch.distributed.fsdp import fully_shard

from randomness import BatchSlice
from routing_blocks import routing
from routing_diffusers import route, routes_of, unroute
from tests.started import run
from tests.test_routing_diffusers import B, call, flux, make, seeded
from tests.test_texts import write_texts


def routed_flux():
    return route(make("FluxTransformer2DModel"), 1, -2, 0.5), flux(8)


def shard_and_step(folder: Path) -> None:
    """In each of two processes: gradients of its sample under FSDP2, whole again."""
    torch.distributed.init_process_group("gloo")
    rank, (model, inputs) = torch.distributed.get_rank(), routed_flux()
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        fully_shard(block)
    fully_shard(model)
    own = {k: v[rank : rank + 1] if len(v) == B else v for k, v in inputs.items()}
    with routing(generators=BatchSlice(seeded(), rank, B)):
        call(model, own).square().mean().backward()
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    if rank == 0:
        torch.save(gradients, folder / "gradients.pt")
    torch.distributed.destroy_process_group()


def test_fsdp2_has_the_gradients_of_one_process(tmp_path):
    done = run([sys.executable, "-m", "tests.test_routing_wrapped", tmp_path], processes=2)
    assert done.returncode == 0, done.stderr
    found, (model, inputs) = torch.load(tmp_path / "gradients.pt", weights_only=True), routed_flux()
    with routing(generators=seeded()):
        call(model, inputs).square().mean().backward()
    for name, p in model.named_parameters():
        assert (found[name] - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-6, name


def test_weights_that_are_a_subclass_of_tensors_are_routed_alike():
    """torchao's int8 weights: forced ids in a routed pass, and on tokens that were cut out beforehand."""
    quantization = pytest.importorskip("torchao.quantization")
    model, inputs = routed_flux()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert type(model.transformer_blocks[1].attn.to_q.weight) is not torch.nn.Parameter
    ids = torch.arange(0, 16, 2).repeat(B, 1)  # the same for each sample, so that the angles of a batch are alike
    with torch.no_grad(), routing(keep_ids=ids):
        found = call(route(unroute(model), 0, -1, 0.5), inputs)
        few = inputs | dict(hidden_states=inputs["hidden_states"][:, ::2], img_ids=inputs["img_ids"][::2])
    with torch.no_grad():
        torch.testing.assert_close(found[:, ::2], call(model, few), rtol=1e-5, atol=1e-5)


def test_lora_around_a_routed_model_learns_on_the_kept_tokens():
    peft = pytest.importorskip("peft")
    model, inputs = routed_flux()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights="gaussian"))
    with routing(generators=seeded()):
        found = call(wrapped, inputs)
        found.square().mean().backward()
    assert sum(p.grad is not None and p.grad.norm() > 0 for p in wrapped.parameters()) == 6
    plain, plain_inputs = routed_flux()
    with routing(generators=seeded()):
        torch.testing.assert_close(call(plain, plain_inputs), found)  # B is zero at first
    with pytest.raises(ValueError, match="^PeftModel wraps a FluxTransformer2DModel; needed: the latter is routed"):
        route(wrapped, 1, 2, 0.5)


def test_two_experts_are_routed_alike():
    """Wan 2.2's: the second takes the first one's routes."""
    high = route(make("WanTransformer3DModel"), 1, -2, 0.5)
    low = route(copy.deepcopy(unroute(make("WanTransformer3DModel"))), routes=routes_of(high))
    assert routes_of(low) == routes_of(high) and len(routes_of(low)) == 1


def finetune(*overrides):
    return run([sys.executable, "scripts/finetune_diffusers.py", "steps=50", "batch=8", *overrides])


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    text_of = lambda width: lambda i: np.random.default_rng(i).standard_normal((1 + i % 3, width)).astype(np.float16)
    folder = tmp_path_factory.mktemp("texts")
    return write_texts(folder / "set", text_of(64)), write_texts(folder / "wide", text_of(6))


def test_the_example_reads_shards_with_texts(texts, tmp_path):
    done = finetune(f"shards={texts[0]}", f"out={tmp_path}")
    assert done.returncode == 0, done.stderr
    first, last = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert last < first
    assert len(diffusers.FluxTransformer2DModel.from_pretrained(tmp_path).single_transformer_blocks) == 4
    done = finetune(f"shards={texts[1]}")
    assert done.returncode == 2 and "texts of width 6; needed: patches of 16 numbers, texts of width 64" in done.stderr


def test_the_example_trains_a_lora_that_diffusers_loads(texts, tmp_path):
    try:
        import peft  # noqa: F401
    except ImportError:
        done = finetune("lora_rank=4")
        assert done.returncode == 2 and done.stderr.splitlines()[-1] == "error: lora_rank needs peft: pip install peft"
        return
    done = finetune("lora_rank=4", "lr=1e-2", f"shards={texts[0]}", f"out={tmp_path}")
    assert done.returncode == 0, done.stderr
    sys.path.insert(0, "scripts")
    model = diffusers.FluxTransformer2DModel(**__import__("finetune_diffusers").TINY)
    model.load_lora_adapter(str(tmp_path), weight_name="pytorch_lora_weights.safetensors", use_safetensors=True)
    assert any("lora_B" in name and p.any() for name, p in model.named_parameters())


if __name__ == "__main__":
    shard_and_step(Path(sys.argv[1]))

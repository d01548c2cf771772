"""CLIP score: the cosine between an image and its caption in a CLIP's space (arXiv 2104.08718), times 100, at least 0.

The CLIP is one of the optional package transformers, by its name on the Hugging Face hub or its folder. Its weights are
read from safetensors alone, and no code that came with them is run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from data.texts import check_tokens, load_pretrained
from system import UserError, hub
from system.processes import start_processes
from system.tensors import weights_sha256

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training pixels


@dataclass(frozen=True, eq=False)
class Clip:
    """images, uint8 (B, 3, H, W), and their captions -> scores (B,) float32, on the model's device."""

    name: str
    model: Any
    tokenizer: Any
    sha256: str  # of the weights

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        longest = self.model.config.text_config.max_position_embeddings
        how = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
        tokens = self.tokenizer(list(captions), return_attention_mask=True, **how).to(self.model.device)
        check_tokens(tokens["input_ids"], self.model.text_model, f"clip={self.name}")
        pixels = self.pixels(images.to(self.model.device))
        out = self.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
        return 100 * F.cosine_similarity(out.image_embeds, out.text_embeds).clamp(min=0)

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """As CLIP's own preprocessing: the shorter side resized, bicubic, the centre cut out, normalised."""
        size = self.model.config.vision_config.image_size
        H, W = (max(size, round(side * size / min(images.shape[2:]))) for side in images.shape[2:])
        images = F.interpolate(images.float(), (H, W), mode="bicubic", antialias=True)
        top, left = (H - size) // 2, (W - size) // 2
        images = images[:, :, top : top + size, left : left + size].clamp(0, 255).round() / 255
        mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
        return (images - mean) / std


@cache
def load_clip(name: str, sha256: str | None = None) -> Clip:
    """Raises UserError where it or transformers cannot be loaded, and for weights without the hash `sha256`."""
    try:
        import transformers
    except ImportError:
        raise UserError(f"clip={name} needs the package transformers: pip install transformers") from None
    state, place = start_processes(), str(hub.local(name))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    told = f"clip={name} cannot be loaded; needed: a CLIP on the hub, or its folder"

    def whole(config: Any) -> tuple[Any, Any]:
        if config.model_type != "clip":
            raise UserError(f"it is a model of the type {config.model_type}, not of both texts and images")
        return config, transformers.CLIPModel

    with hub.refusals(told), state.main_process_first():
        model, tokenizer, lacking = load_pretrained(place, whole)
        if lacking:
            raise UserError(f"its file lacks {lacking[0]}")
    found = weights_sha256(model)
    if sha256 not in (None, found):
        raise UserError(f"clip={name} has the sha256 {found}; needed: {sha256}")
    clip = Clip(name, model.float().eval().requires_grad_(False).to(state.device), tokenizer, found)
    with hub.refusals(told):
        clip(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [""])
    return clip

"""Latents on disk: read in place, in an order that can be replayed. `python -m data` inspects and converts them."""

from data.latents import Latents, channel_stats, scale_warning
from data.loader import BatchPlan, Order, loader_died, make_loader
from data.prepared import prepare, prepare_pictures, settle_pictures
from data.shards import has_split, open_latents

__all__ = [
    "BatchPlan", "Latents", "Order", "channel_stats", "has_split", "loader_died", "make_loader", "open_latents",
    "prepare", "prepare_pictures", "scale_warning", "settle_pictures",
]  # fmt: skip

"""Latents on the disk: read in place, in an order that can be replayed. `python -m data` inspects and converts them."""

from data.latents import Latents, open_latents
from data.loader import make_loader
from data.manifest import has_split
from data.mnist import prepare_mnist
from data.order import Order
from data.stats import channel_stats, scale_warning

__all__ = [
    "Latents",
    "Order",
    "channel_stats",
    "has_split",
    "make_loader",
    "open_latents",
    "prepare_mnist",
    "scale_warning",
]

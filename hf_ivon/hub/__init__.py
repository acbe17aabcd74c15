"""The Hub: posteriors downloaded alone, uploaded beside their mean, and the card that says what they are."""

from hf_ivon.hub.card import write_card
from hf_ivon.hub.transfer import download, push, upload

__all__ = ["download", "push", "upload", "write_card"]

"""The losses as equations in eager PyTorch: the oracle that every kernel is compared with."""

from .mcld import mcld_loss, mcld_terms

__all__ = ["mcld_loss", "mcld_terms"]

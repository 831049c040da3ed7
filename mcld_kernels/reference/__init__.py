"""The losses as equations in eager PyTorch: the oracle that every kernel is compared with."""

from .kd import kd_loss
from .mcld import mcld_loss, mcld_terms

__all__ = ["kd_loss", "mcld_loss", "mcld_terms"]

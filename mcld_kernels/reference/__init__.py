"""The losses as equations in eager PyTorch: the oracle that every kernel is compared with."""

from .info_nce import info_nce
from .kd import kd_loss
from .mcld import mcld_loss, mcld_terms

__all__ = ["info_nce", "kd_loss", "mcld_loss", "mcld_terms"]

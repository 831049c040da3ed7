"""The losses as equations in eager PyTorch: the oracle that every kernel is compared with."""

from .ckd import ckd_loss, ckd_terms
from .clkd import clkd_loss, clkd_terms
from .info_nce import info_nce
from .kd import kd_loss
from .mcld import mcld_loss, mcld_terms
from .mlkd import mlkd_loss, mlkd_terms

__all__ = [
    "ckd_loss",
    "ckd_terms",
    "clkd_loss",
    "clkd_terms",
    "info_nce",
    "kd_loss",
    "mcld_loss",
    "mcld_terms",
    "mlkd_loss",
    "mlkd_terms",
]

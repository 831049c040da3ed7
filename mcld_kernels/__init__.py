"""Multi-perspective contrastive logit distillation (MCLD) at large batch: fused kernels and a PyTorch reference."""

from . import backends, reference
from .accumulation import accumulate
from .losses.kd import KDLoss, kd_loss
from .losses.mcld import MCLDLoss, mcld_loss, mcld_terms
from .options import MCLDTerms
from .version import __version__

__all__ = [
    "KDLoss",
    "MCLDLoss",
    "MCLDTerms",
    "__version__",
    "accumulate",
    "backends",
    "kd_loss",
    "mcld_loss",
    "mcld_terms",
    "reference",
]

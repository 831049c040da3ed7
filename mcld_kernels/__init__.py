"""Multi-perspective contrastive logit distillation (MCLD) at large batch: fused kernels and a PyTorch reference."""

from . import backends, reference
from .arguments import MCLDTerms
from .functional import mcld_loss, mcld_terms
from .modules import MCLDLoss

__version__ = "0.1.0"

__all__ = ["MCLDLoss", "MCLDTerms", "backends", "mcld_loss", "mcld_terms", "reference"]

"""Multi-perspective contrastive logit distillation (MCLD) at large batch: fused kernels and a PyTorch reference."""

from . import backends, reference
from .arguments import MCLDTerms
from .functional import mcld_loss, mcld_terms
from .modules import MCLDLoss
from .version import __version__

__all__ = ["MCLDLoss", "MCLDTerms", "__version__", "backends", "mcld_loss", "mcld_terms", "reference"]

"""Multi-perspective contrastive logit distillation (MCLD) at large batch: fused kernels and a PyTorch reference."""

from . import backends, reference
from .accumulation import accumulate
from .family_options import CKDTerms, CLKDTerms, MLKDTerms
from .losses.ckd import CKDLoss, ckd_loss, ckd_terms
from .losses.clkd import CLKDLoss, clkd_loss, clkd_terms
from .losses.info_nce import InfoNCELoss, info_nce
from .losses.kd import KDLoss, kd_loss
from .losses.mcld import MCLDLoss, mcld_loss, mcld_terms
from .losses.mlkd import MLKDLoss, mlkd_loss, mlkd_terms
from .losses.teacher_queue import TeacherQueue
from .options import MCLDTerms
from .version import __version__

__all__ = [
    "CKDLoss",
    "CKDTerms",
    "CLKDLoss",
    "CLKDTerms",
    "InfoNCELoss",
    "KDLoss",
    "MCLDLoss",
    "MCLDTerms",
    "MLKDLoss",
    "MLKDTerms",
    "TeacherQueue",
    "__version__",
    "accumulate",
    "backends",
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
    "reference",
]

"""The door: `mcld_loss` and `mcld_terms`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import arguments, backends, ops, reference
from .arguments import MCLDTerms, Options


def mcld_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Sequence[float] = 0.1,
    weight: Sequence[float] | Tensor = (1.0, 1.0, 1.0),
    direction: str = "student",
    mask_same_class: bool = False,
    present_only: bool = False,
    ignore_index: int = -100,
    eps: float = 1e-12,
    backend: str = "auto",
    process_group: Any = None,
) -> Tensor:
    r"""Multi-perspective contrastive logit distillation: three InfoNCE losses between student and teacher logits.

    With ``rn``/``cn`` dividing rows/columns by their L2 norm and ``t`` a term's temperature,

    .. math::
        a = rn(S)\, rn(T)^\top / t, \qquad b = cn(S)^\top cn(T) / t

        L_{instance} = mean_i (logsumexp_j a_{ij} - a_{ii})

        L_{sample} = mean_i (logsumexp_j a_{ij} - mean_{j: y_j = y_i} a_{ij})

        L_{category} = mean_k (logsumexp_l b_{kl} - b_{kk})

        L = w_{instance} L_{instance} + w_{sample} L_{sample} + w_{category} L_{category}

    In eager PyTorch, with the default options::

        rows = F.normalize(student) @ F.normalize(teacher).T / temperature  # (batch, batch)
        columns = F.normalize(student, dim=0).T @ F.normalize(teacher, dim=0) / temperature  # (classes, classes)
        same = (target[:, None] == target).float()  # (batch, batch)
        loss = (
            F.cross_entropy(rows, torch.arange(len(rows)))
            + F.cross_entropy(rows, same / same.sum(1, keepdim=True))
            + F.cross_entropy(columns, torch.arange(len(columns)))
        )

    The formulas are a reconstruction of MCLD (Wang and Zhou, "Multi-perspective Contrastive Logit Distillation",
    arXiv 2411.10693) from its published description; constants of the paper are not claimed. Cross-entropy with the
    labels is the task's own loss and not part of this one.

    Args:
        student: logits, (batch, classes), float16, bfloat16, float32 or float64, any strides.
        teacher: logits of the same shape and device. Usually a constant; if it requires grad (mutual learning) it gets
            its gradient, from backends "torch" and "reference". Logits of two dtypes are computed in the wider one.
        target: labels, (batch,), int64, in [0, classes) or ``ignore_index``. Needed by the sample-wise term,
            ``mask_same_class`` and ``present_only``.
        temperature: > 0; one for all terms, or three (instance, sample, category).
        weight: (instance, sample, category), >= 0. A weight of 0 removes the term and its cost. A tensor of shape (3,)
            on the logits' device costs all three terms, can change without recompiling, and gets its gradient.
        direction: which side anchors the row terms: "student", "teacher", or "symmetric" (the mean of both).
        mask_same_class: for the instance-wise term, drop candidates with the anchor's label (other than its positive)
            from the denominator.
        present_only: for the category-wise term, only classes that occur in ``target`` are anchors.
        ignore_index: label of rows without a class. They stay candidates and instance-wise anchors, but are no anchor
            of the sample-wise term, are of the same class as no row, and do not make a class present.
        eps: a row or column with L2 norm <= eps has no direction: it is normalised to zeros and gets no gradient.
        backend: "auto" (the fastest that can run), "reference", "torch", "triton" or "cuda"; see
            :func:`mcld_kernels.backends.explain`. All give the same loss and gradient; only "reference" can be
            differentiated twice.
        process_group: reserved for the loss over a global batch; only None for now.

    Returns:
        Tensor of shape (), float64 for float64 logits and float32 otherwise: statistics and sums are taken in that
        dtype. The gradient has the logits' dtype. Products follow the logits' dtype, for float32 the float32 matmul
        precision of torch; autocast does not change them. An empty batch, and a term without anchors, give 0.

        NaN or infinite logits give NaN. A row whose sum of squares overflows counts as infinite.

    Raises:
        ValueError: shapes, devices, values or options do not fit, labels are missing, soft, or out of range.
        TypeError: a dtype or type does not fit.
        NotImplementedError: ``process_group`` is given.
        mcld_kernels.backends.BackendUnavailable: the backend asked for cannot run; the message says why.

    Labels out of range raise for labels on the CPU. Reading labels on a GPU would synchronise it, so there, and under
    torch.compile, they make the terms that use labels NaN.
    """
    chosen, weights = arguments.options(
        temperature=temperature,
        weight=weight,
        direction=direction,
        mask_same_class=mask_same_class,
        present_only=present_only,
        ignore_index=ignore_index,
        eps=eps,
        process_group=process_group,
    )
    return evaluate(student, teacher, target, weights, chosen, backend).loss


def mcld_terms(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Sequence[float] = 0.1,
    weight: Sequence[float] | Tensor = (1.0, 1.0, 1.0),
    direction: str = "student",
    mask_same_class: bool = False,
    present_only: bool = False,
    ignore_index: int = -100,
    eps: float = 1e-12,
    backend: str = "auto",
    process_group: Any = None,
) -> MCLDTerms:
    """:func:`mcld_loss` and its parts: ``MCLDTerms(loss, instance, sample, category)``, each of shape ().

    ``loss`` is what :func:`mcld_loss` returns, with its gradient; the three terms are unweighted and detached, for
    logging. A term with weight 0 is not computed and reads 0. Arguments and errors as :func:`mcld_loss`.
    """
    chosen, weights = arguments.options(
        temperature=temperature,
        weight=weight,
        direction=direction,
        mask_same_class=mask_same_class,
        present_only=present_only,
        ignore_index=ignore_index,
        eps=eps,
        process_group=process_group,
    )
    return evaluate(student, teacher, target, weights, chosen, backend)


def evaluate(
    student: Tensor, teacher: Tensor, target: Tensor | None, weight: Tensor | None, chosen: Options, backend: str
) -> MCLDTerms:
    """Check the tensors and run a backend."""
    backends.check_name(backend)
    arguments.check(student, teacher, target, weight, chosen)
    if backend == "reference":
        return reference.evaluate(student, teacher, target, weight, chosen)
    loss, terms = ops.evaluate(student, teacher, target, weight, chosen, backend)
    return MCLDTerms(loss, terms[0], terms[1], terms[2])

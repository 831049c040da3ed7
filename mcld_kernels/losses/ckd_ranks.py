r"""CKD with negatives="student" over ranks: this rank's part of the loss of the global batch, and its gradient.

Of all B rows, with Z_i as in `losses.ckd`, rank r computes the anchors it holds. Two gathers serve: of the student's
unit rows, and, for the gradient, of log Z_i, since a row is a negative of every other rank's anchors too:

    dL/ds_i = (sum_{j != i} e_ij (1 / Z_i + 1 / Z_j) s_j - q_i t_i) / (tau B)

The gradient by the teacher's rows is local.
"""

from __future__ import annotations

import torch

from ..distributed import Ranks
from ..gram import add_mm
from ..infonce import GradBuffer
from ..kernels import KernelSet, LossInputs, LossOutputs
from ..over_ranks.own_rows import Chunks, through_normalization


def compute_over_ranks(kernels: KernelSet, inputs: LossInputs, ranks: Ranks) -> LossOutputs:
    """This rank's part of loss and term, and its gradients, for a global batch that is not empty."""
    options, acc, temperature = inputs.options, inputs.acc_dtype, inputs.options.temperature
    assert options.negatives == "student"  # the other form is MCLD's
    student_grad = GradBuffer(inputs.student, inputs.student_grad)
    teacher_grad = GradBuffer(inputs.teacher, inputs.teacher_grad)
    term = inputs.student.new_zeros((), dtype=acc)
    weight = options.term_weight if inputs.weight is None else inputs.weight[0].to(acc) * options.term_weight
    if options.term_weight != 0:
        operand = kernels.operand_dtype(inputs.dtype)
        student, teacher = (
            KernelSet.l2_normalize(kernels, x, operand, options.eps) for x in (inputs.student, inputs.teacher)
        )
        everything = ranks.all_gather(student.rows.contiguous())
        positive = (student.rows.to(acc) * teacher.rows.to(acc)).sum(1) / temperature
        neg_lse = torch.empty_like(positive)
        chunks = Chunks([(student.rows, everything)], ranks, acc, kernels.tuning.chunk_bytes, 4)
        for chunk in chunks:
            neg_lse[chunk.rows] = chunk.without_self(chunk.cosines[0], temperature).logsumexp(1)
        factor = ranks.count / ranks.total * (1.0 if ranks.poison is None else ranks.poison.to(acc))
        term = torch.logaddexp(torch.zeros_like(positive), neg_lse - positive).sum() * factor
        lse = torch.logaddexp(neg_lse, positive)
        pull = (neg_lse - lse).exp()  # 1 - the probability of the positive
        scale = factor * weight / temperature
        if student_grad.needed:
            lse_of_all, out = ranks.all_gather(lse), student_grad.view(False)
            for chunk in chunks:
                a, rows = chunk.without_self(chunk.cosines[0], temperature), chunk.rows
                w = (a - lse[rows, None]).exp_().add_((a - lse_of_all).exp_())
                g = teacher.rows[rows].to(acc) * -pull[rows, None]
                add_mm(g, w, everything)
                out[rows] = through_normalization(g, student, rows) * scale
            student_grad.is_written = True
        if teacher_grad.needed:
            rows = slice(0, teacher.n)
            g = through_normalization(student.rows.to(acc) * -pull[:, None], teacher, rows)
            teacher_grad.view(False)[:] = g * scale
            teacher_grad.is_written = True
    return LossOutputs(
        loss=term * weight,
        terms=term.reshape(1),
        student_grad=student_grad.result(),
        teacher_grad=teacher_grad.result(),
    )

"""Decoupled knowledge distillation, the baseline of the experiments, against its definition in loops."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parent.parent / "python"))

from distillation.dkd import DKDLoss, dkd_loss


def by_loops(student, teacher, target, alpha, beta, temperature):
    """The definition, a row and a class at a time."""
    total = 0.0
    for s, t, y in zip(student.tolist(), teacher.tolist(), target.tolist()):
        p, q = ([math.exp(v / temperature) for v in row] for row in (t, s))
        p, q = ([v / sum(row) for v in row] for row in (p, q))
        others = [k for k in range(len(p)) if k != y]
        p_rest, q_rest = sum(p[k] for k in others), sum(q[k] for k in others)
        tckd = p[y] * math.log(p[y] / q[y]) + p_rest * math.log(p_rest / q_rest)
        nckd = sum(p[k] / p_rest * math.log((p[k] / p_rest) / (q[k] / q_rest)) for k in others)
        total += temperature**2 * (alpha * tckd + beta * nckd)
    return total / len(student)


@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.parametrize("options", [{}, {"alpha": 0.3, "beta": 2.0, "temperature": 1.0}])
def test_the_loss_is_its_definition_in_loops(classes, options):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 9, classes, dtype=torch.float64) * 3
    target = torch.randint(classes, (9,))
    expected = by_loops(student, teacher, target, **{"alpha": 1.0, "beta": 8.0, "temperature": 4.0, **options})
    assert float(DKDLoss(**options)(student, teacher, target)) == pytest.approx(expected, rel=1e-12)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: dkd_loss(s, teacher, target, **options), student)


def test_with_the_teachers_doubt_as_beta_it_is_knowledge_distillation():
    """TCKD + (1 - p_y) NCKD = KL(p || q), row by row (section 3.1 of the paper)."""
    torch.manual_seed(1)
    student, teacher = torch.randn(2, 5, 6, dtype=torch.float64)
    target = torch.randint(6, (5,))
    for s, t, y in zip(student[:, None], teacher[:, None], target[:, None]):
        doubt = 1 - float((t / 4).softmax(1)[0, y])
        kd = 16 * F.kl_div((s / 4).log_softmax(1), (t / 4).log_softmax(1), reduction="batchmean", log_target=True)
        torch.testing.assert_close(dkd_loss(s, t, y, beta=doubt), kd, rtol=1e-12, atol=1e-14)


def test_far_logits_and_an_empty_batch_give_finite_losses():
    far = torch.tensor([[300.0, -300.0, 0.0]])
    assert dkd_loss(-far, far, torch.tensor([0])).isfinite()
    assert float(dkd_loss(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))) == 0


@pytest.mark.parametrize(
    ("change", "fault", "message"),
    [
        ({"teacher": torch.zeros(4, 2)}, ValueError, r"got \(4, 3\) and \(4, 2\)"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"must have shape \(4,\); got \(3,\)"),
        ({"target": torch.zeros(4, 3)}, TypeError, "int64"),
        ({"temperature": 0.0}, ValueError, "must be > 0; got 0.0"),
    ],
)
def test_bad_input_is_named(change, fault, message):
    call = {"student": torch.zeros(4, 3), "teacher": torch.zeros(4, 3), "target": torch.zeros(4, dtype=torch.int64)}
    call |= change
    with pytest.raises(fault, match=message):
        dkd_loss(call.pop("student"), call.pop("teacher"), call.pop("target"), **call)

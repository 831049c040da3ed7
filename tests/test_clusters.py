"""Late in training with label positives: classes lie far apart, and a gradient is the small rest of two means.

The mean that the softmax takes of the candidates all but agrees with the mean of the label, so a rounding of either
shows. Gradients of bf16 rows are held to twice eager's error on every backend and path.
"""

import pytest
import torch
from family import on_the_cpu

import mcld_kernels
from mcld_kernels import backends, reference

LOSSES = {
    "info_nce": (
        lambda s, t, y, **more: mcld_kernels.info_nce(s, t, positives="label", anchor_target=y, **more),
        lambda s, t, y: reference.info_nce(s, t, positives="label", anchor_target=y),
    ),
    "mcld": (
        lambda s, t, y, **more: mcld_kernels.mcld_loss(s, t, y, weight=(0.0, 1.0, 0.0), **more),
        lambda s, t, y: reference.mcld_loss(s, t, y, weight=(0.0, 1.0, 0.0)),
    ),
    "mlkd": (
        lambda s, t, y, **more: mcld_kernels.mlkd_loss(s, t, y, weight=(0.0, 0.0, 1.0), **more),
        lambda s, t, y: reference.mlkd_loss(s, t, y, weight=(0.0, 0.0, 1.0)),
    ),
    "mlkd, one view": (
        lambda s, t, y, **more: mcld_kernels.mlkd_loss(s, t, y, weight=(0.0, 0.0, 1.0), views=1, **more),
        lambda s, t, y: reference.mlkd_loss(s, t, y, weight=(0.0, 0.0, 1.0), views=1),
    ),
}


def gradients(loss, student, teacher, target, teacher_grad):
    leaves = student.clone().requires_grad_(), teacher.clone().requires_grad_(teacher_grad)
    loss(*leaves, target).backward()
    return [leaf.grad.double() for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", ["torch", "triton", "cuda"])
def test_the_rest_of_two_means_keeps_its_digits(backend, name):
    ours, eager = LOSSES[name]
    is_torch = backend == "torch"
    rows, teacher_grad = 512 if is_torch else 96, is_torch and name != "mlkd, one view"
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(5, (rows,), generator=generator)
    centre = 15 * torch.randn(5, 40, generator=generator)
    student, teacher = ((torch.randn(rows, 40, generator=generator) + centre[target]).bfloat16() for _ in range(2))
    exact = gradients(eager, student.double(), teacher.double(), target, teacher_grad)
    bars = gradients(eager, student, teacher, target, teacher_grad)
    # Chunks of a part of the batch: the sums over them must be kept as well.
    with on_the_cpu(backend), backends.tuned(chunk_bytes=1 << 19) if is_torch else backends.tuned():
        got = gradients(lambda s, t, y: ours(s, t, y, backend=backend), student, teacher, target, teacher_grad)
    for side, want, bar, value in zip(("student", "teacher"), exact, bars, got, strict=False):
        assert float((value - want).norm()) <= 2 * float((bar - want).norm()), side

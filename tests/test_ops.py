"""The operator itself: PyTorch's own checks of it, and the shapes and dtypes it promises while tracing."""

import pytest
import torch
from cases import DTYPES, labels, logits, short
from torch._subclasses.fake_tensor import FakeTensorMode

import mcld_kernels

MCLD = torch.ops.mcld_kernels.mcld.default

OPTIONS = {
    "default": {},
    "teacher": {"direction": "teacher"},
    "symmetric": {"direction": "symmetric"},
    "mask": {"mask_same_class": True, "present_only": True},
    "instance": {"term_weight": [1.0, 0.0, 0.0], "target": None},
    "weight": {"weight": torch.tensor([1.0, 0.5, 2.0])},
    "no terms": {"term_weight": [0.0, 0.0, 0.0], "target": None},
}


def arguments(student, teacher, target=None, *, student_grad=True, teacher_grad=False, **changed):
    values = {
        "target": target,
        "weight": None,
        "temperature": [0.1, 0.2, 0.3],
        "term_weight": [1.0, 1.0, 1.0],
        "direction": "student",
        "mask_same_class": False,
        "present_only": False,
        "ignore_index": -100,
        "eps": 1e-12,
        "backend": "torch",
        "student_grad": student_grad,
        "teacher_grad": teacher_grad,
    }
    values.update(changed)
    return (student, teacher, *values.values())


@pytest.mark.parametrize("needed", [(False, False), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_opcheck(options, needed):
    student, teacher = logits("random", 9, 7, torch.float32)
    options = {"target": labels(9, 7), "student_grad": needed[0], "teacher_grad": needed[1], **options}
    values = arguments(student, teacher, **options)
    torch.library.opcheck(MCLD, values)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", [(0, 5), (1, 5), (5, 1)], ids=str)
def test_opcheck_of_small_shapes(shape, dtype):
    student, teacher = logits("random", *shape, dtype) if shape[0] else (torch.empty(shape, dtype=dtype),) * 2
    target = labels(*shape)
    torch.library.opcheck(MCLD, arguments(student, teacher.clone(), target))


@pytest.mark.parametrize("student_dtype", DTYPES, ids=short)
@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=short)
@pytest.mark.parametrize("needed", [(False, False), (True, True)], ids=str)
@pytest.mark.parametrize("batch", [0, 6])
def test_fake_tensors_are_like_the_real_ones(batch, needed, student_dtype, teacher_dtype):
    student, teacher = torch.randn(batch, 4, dtype=student_dtype), torch.randn(batch, 4, dtype=teacher_dtype)
    target = torch.zeros(batch, dtype=torch.int64)
    options = {"student_grad": needed[0], "teacher_grad": needed[1]}
    real = MCLD(*arguments(student, teacher, target, **options))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (student, teacher, target)]
        fake = MCLD(*arguments(*fakes, **options))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


@pytest.mark.parametrize("direction", ["student", "symmetric"])
@pytest.mark.parametrize(
    "layout", [lambda x: x.T.contiguous().T, lambda x: x.repeat(1, 2)[:, ::2]], ids=["columns", "gap"]
)
def test_opcheck_of_other_layouts(layout, direction):
    student, teacher = logits("random", 9, 8, torch.float32)
    values = arguments(layout(student), layout(teacher), labels(9, 8), teacher_grad=True, direction=direction)
    torch.library.opcheck(MCLD, values)


def test_meta_tensors_give_shapes():
    student, teacher = torch.empty(6, 4, device="meta"), torch.empty(6, 4, device="meta")
    target = torch.empty(6, dtype=torch.int64, device="meta")
    loss = mcld_kernels.mcld_loss(student.requires_grad_(), teacher, target)
    assert loss.shape == () and loss.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton", "cuda"])
def test_opcheck_on_a_gpu(backend):
    if (why := mcld_kernels.backends.unavailable_reason(backend)) is not None:
        pytest.skip(f"backend {backend!r}: {why}")
    student, teacher = logits("random", 130, 70, torch.float32, device="cuda")
    values = arguments(student, teacher, labels(130, 70, device="cuda"), backend=backend, direction="symmetric")
    torch.library.opcheck(MCLD, values)

"""The CUDA kernels, compiled for the host, under info_nce, soft labels and further candidates."""

import pytest
import torch
from cases import WEIGHT
from test_candidates import FURTHER, mixup, run
from test_candidates import problem as mcld_problem
from test_csrc_host import PATHS, emulated, module  # noqa: F401 (fixtures)
from test_info_nce import CASES, hold_to_the_bar

from mcld_kernels import backends, mcld_terms, reference

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("path", PATHS)
def test_info_nce_fp32(path, name):
    with backends.tuned(**PATHS[path]):
        hold_to_the_bar("cuda", name, torch.float32, (40, 75, 33), draws=1, normalize=name != "label")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_info_nce_16_bit(path, dtype):
    with backends.tuned(**PATHS[path]):
        hold_to_the_bar("cuda", "diagonal", dtype, (40, 75, 33), draws=4)
        hold_to_the_bar("cuda", "soft", dtype, (40, 75, 33), draws=4, normalize=False)


def test_a_temperature_that_is_not_read():
    with backends.tuned(scales_by_temperature=True):
        hold_to_the_bar("cuda", "mask", torch.float32, (40, 75, 33), draws=1)
        hold_to_the_bar("cuda", "label", torch.bfloat16, (40, 75, 33), draws=1)


@pytest.mark.parametrize("direction", ["student", "symmetric"])
@pytest.mark.parametrize("further", ["none", "labels"])
def test_mcld_with_soft_labels_and_candidates(further, direction):
    student, teacher, candidates, _, theirs = (
        x.float() if x.is_floating_point() else x for x in mcld_problem(20, 12, 7)
    )
    target = mixup(20, 12)[0].float()
    options = {"weight": WEIGHT, "direction": direction, **FURTHER[further](candidates, theirs)}
    exact = {key: value.double() if key == "candidates" else value for key, value in options.items()}
    want = run(reference.mcld_terms, student.double(), teacher.double(), target.double(), **exact)
    got = run(lambda *args, **kw: mcld_terms(*args, backend="cuda", **kw), student, teacher, target, **options)
    for ours, value in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), value, rtol=1e-5, atol=1e-6)

"""The loss over ranks where ranks differ, are refused their arguments, end, or do not come."""

import pytest
import ranks
import torch
import torch.distributed as dist
from cases import labels, logits
from test_distributed import OPTIONS, arguments, one_process, over_ranks, part, problem, relative

import mcld_kernels
from mcld_kernels import MCLDLoss, distributed

DIFFERENCES = {
    "temperature": (lambda s, t, y: ((s, t, y), {"temperature": 0.2}), ["temperature", "rank 1 has [0.2, 0.2, 0.2]"]),
    "direction": (lambda s, t, y: ((s, t, y), {"direction": "teacher"}), ["direction", "rank 1 has 'teacher'"]),
    "active terms": (lambda s, t, y: ((s, t, y), {"weight": (1, 0, 1)}), ["term_weight", "rank 1 has [1.0, 0.0, 1.0]"]),
    "gather": (lambda s, t, y: ((s, t, y), {"gather": "ring"}), ["gather", "rank 1 has 'ring'"]),
    "even": (lambda s, t, y: ((s, t, y), {"even": True}), ["even", "rank 1 has True"]),
    "weights": (lambda s, t, y: ((s, t, y), {"weight": torch.ones(3)}), ["weight tensor", "rank 1 has [1.0, 1.0,"]),
    "dtype": (lambda s, t, y: ((s.detach().double(), t.double(), y), {}), ["student dtype", "torch.float64"]),
    "classes": (lambda s, t, y: ((s[:, :4], t[:, :4], y.clamp(max=3)), {}), ["classes", "rank 0 has 5, rank 1 has 4"]),
    "gradient": (lambda s, t, y: ((s.detach(), t, y), {}), ["student gradient", "rank 1 has False"]),
    "backend": (lambda s, t, y: ((s, t, y), {"backend": "reference"}), ["operands", "rank 1 has 'of the reference'"]),
    "no labels": (lambda s, t, y: ((s, t, None), {}), ["target is None", "rank 1"]),
    "bad label": (lambda s, t, y: ((s, t, y + 5), {}), ["labels must be in [0, 5)", "rank 1"]),
    "shapes": (lambda s, t, y: ((s, t[1:], y), {}), ["the same shape", "rank 1"]),
    "bad option": (lambda s, t, y: ((s, t, y), {"direction": "both"}), ["direction must be one of", "rank 1"]),
    "unavailable": (lambda s, t, y: ((s, t, y), {"backend": "cuda"}), ["backend 'cuda' cannot run", "rank 1"]),
}  # fmt: skip


def differ(group):
    found, rank = {}, dist.get_rank(group)
    for name, (change, _) in DIFFERENCES.items():
        inputs, options = change(*arguments(group)) if rank == 1 else (arguments(group), {})
        try:
            mcld_kernels.mcld_loss(*inputs, process_group=group, **options)
            found[name] = None
        except (ValueError, TypeError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
        # The group is as good as before.
        loss = mcld_kernels.mcld_loss(*arguments(group), process_group=group)
        assert loss.isfinite()
    return found


def test_ranks_that_differ_raise_on_all_of_them(pool):
    results = pool.run(differ, ranks=3)
    for name, (_, words) in DIFFERENCES.items():
        for rank, found in enumerate(results):
            assert found[name] is not None, (name, rank)
            assert "Error" in found[name] or "BackendUnavailable" in found[name]
            expected = words[:1] if rank == 1 else words  # a rank that refuses its own arguments need not name itself
            assert all(word in found[name] for word in expected), (name, rank, found[name])


def die(group):
    rank = dist.get_rank(group)
    mcld_kernels.mcld_loss(*arguments(group), process_group=group)
    if rank == 2:
        import os

        os._exit(0)
    try:
        mcld_kernels.mcld_loss(*arguments(group), process_group=group)
    except RuntimeError as error:
        return str(error)


def stall(group):
    """Rank 1 never comes."""
    if dist.get_rank(group) == 1:
        return None
    try:
        mcld_kernels.mcld_loss(*arguments(group), process_group=group)
    except RuntimeError as error:
        return str(error)


def test_a_rank_that_ends_or_does_not_come_is_named():
    pool = ranks.Pool(3, timeout_s=2)  # of the group of two; a rank that has ended is noticed at once
    try:
        late, _ = pool.run(stall, ranks=2)
        replies = pool.run(die)
    finally:
        pool.close()
    assert "failed on rank 0 of 2" in late and "from rank 1: ended, or in other code" in late, late
    for reply in replies[:2]:
        assert "exchange over process group" in reply and "from rank 2: ended" in reply, reply


def evenly(group):
    rank = dist.get_rank(group)
    sizes = (4,) * 3
    student, teacher, target, options = problem(sizes, 6, OPTIONS["masked-symmetric"])
    truth = one_process(group, sizes, student, teacher, target, backend="reference", **options)
    for is_read in (True, False):
        if not is_read:  # as on a GPU
            distributed._is_read = lambda even, device: not even
        got = over_ranks(group, sizes, student, teacher, target, even=True, **options)
        assert max(relative(got, truth).values()) < 1e-10
        inputs = part(student, sizes, group), part(teacher, sizes, group), part(target, sizes, group)
        temperature = 0.2 if rank == 1 else 0.1
        if is_read:
            with pytest.raises(ValueError, match="temperature: rank 0 has .*rank 1 has"):
                mcld_kernels.mcld_loss(*inputs, process_group=group, even=True, temperature=temperature)
            with pytest.raises(ValueError, match="rows: rank 0 has 4, rank 1 has 3"):
                mcld_kernels.mcld_loss(*(x[: 3 if rank == 1 else 4] for x in inputs), process_group=group, even=True)
            continue
        for chosen in ({}, {"present_only": True, "mask_same_class": True}, {"backend": "reference"}):
            terms = mcld_kernels.mcld_terms(*inputs, process_group=group, even=True, temperature=temperature, **chosen)
            assert terms.loss.isnan()


def test_even_ranks_say_so(pool):
    """On a GPU, where nothing is read, ranks that differ get NaN; elsewhere they raise."""
    pool.run(evenly, ranks=3)


def test_arguments_that_are_no_group():
    student, teacher = logits("random", 4, 3)
    target = labels(4, 3)
    with pytest.raises(ValueError, match="no group named 'somewhere'"):
        mcld_kernels.mcld_loss(student, teacher, target, process_group="somewhere")
    with pytest.raises(ValueError, match="not a member"):
        mcld_kernels.mcld_loss(student, teacher, target, process_group=dist.GroupMember.NON_GROUP_MEMBER)
    with pytest.raises(TypeError, match="pass a torch.distributed.ProcessGroup, its name, or None"):
        MCLDLoss(process_group=3)

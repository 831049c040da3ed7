"""The state of replays: memory, threads, streams, devices, autograd, and the order of results."""

# Imported fixtures are arguments of tests.
# ruff: noqa: F401, F811

import contextlib
import dataclasses
import gc
import threading
import types
import weakref
from functools import partial

import pytest
import torch
from replays import (
    BATCH,
    CLASSES,
    FORMS,
    checked,
    inputs,
    loss_of,
    module,
    unreadable_labels,
    value_and_gradient,
    warm,
)
from torch.utils.checkpoint import checkpoint

import mcld_kernels
from mcld_kernels import backends, ops, plain_call, replay
from mcld_kernels.backends.cuda import extension, plans


def _equal_to_full_path(call):
    """`call` gives what it gives without a plan; both leave what they made to this function."""
    got = call()
    with backends.tuned(plans=False):
        want = call()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("form", ["low latency", "library product"])
@pytest.mark.parametrize("alias", ["teacher", "target", "both"])
def test_inputs_that_share_memory(form, alias, checked):
    """Recorded with tensors of their own; a later call has the same key, and one memory for several of them."""
    student, teacher, target = (x.detach() for x in inputs(3))
    labels = torch.full_like(target, 1)
    if alias != "teacher":
        # The labels, 64 bits with small values, are numbers of the student's logits.
        memory = torch.cat([student.flatten(), torch.zeros(2 * BATCH)])
        memory[-2 * BATCH :].view(torch.int64).copy_(target.clamp(min=0))
        memory = memory[-BATCH * CLASSES :]
        student, labels = memory.view(BATCH, CLASSES), memory[-2 * BATCH :].view(torch.int64)
    if alias != "target":
        teacher = student
    with backends.tuned(**FORMS[form]), torch.no_grad():
        warm()
        count = len(checked)
        loss_of(student, teacher, labels)
        assert len(checked) == count
        _equal_to_full_path(lambda: [loss_of(student, teacher, labels)])


@pytest.mark.parametrize("form", ["low latency", "two products"])
def test_tensors_at_any_address(form, checked):
    """Recorded with aligned tensors, replayed with tensors that begin at any element."""

    def shifted(x):
        return torch.cat([x.new_zeros(1), x.detach().flatten()])[1:].view(x.shape)

    with backends.tuned(**FORMS[form]):
        warm()
        count = len(checked)
        call = [shifted(x) for x in inputs(3)]
        assert all(x.data_ptr() % 16 for x in call)
        call[0].requires_grad_()
        loss_of(*call)
        assert len(checked) == count
        _equal_to_full_path(lambda: value_and_gradient(loss_of, *call))


def test_deterministic_algorithms_and_inference_mode():
    before = torch.are_deterministic_algorithms_enabled()
    with backends.tuned(**FORMS["two products"]):
        warm()
        try:
            torch.use_deterministic_algorithms(True)
            _equal_to_full_path(lambda: value_and_gradient(loss_of, *inputs(3)))
        finally:
            torch.use_deterministic_algorithms(before)
        with torch.inference_mode():
            for _ in range(3):
                _equal_to_full_path(lambda: [loss_of(*inputs(3))])


def test_the_order_of_the_results_is_the_plans_own(monkeypatch):
    """A plan whose results come in another order, as another loss may record them."""
    monkeypatch.setattr(plans, "_RESULTS", ("student_grad", "terms", "loss", "teacher_grad"))
    warm()
    assert len(replay._REPLAYS) == 1
    _equal_to_full_path(lambda: value_and_gradient(loss_of, *inputs(3)))


class _Launches:
    """A plan of the module whose launches wait for ``together`` calls, and note where they go."""

    def __init__(self, plan, together=1):
        self.plan, self.barrier, self.calls = plan, threading.Barrier(together), []

    def run(self, bases, device, stream, first, last):
        self.calls.append((list(bases), device, stream))
        self.barrier.wait(timeout=30)
        self.plan.run(bases, device, stream, first, last)


def _noted(together=1):
    """The replay that is kept, with its launches noted; returns both and the launcher."""
    ((key, again),) = replay._REPLAYS.items()
    plan, (launch,) = again.func.__self__, again.args
    launches = _Launches(plan.plan, together)
    replay._REPLAYS[key] = partial(dataclasses.replace(plan, plan=launches).replay, launch)
    return launches, launch


def test_two_calls_at_once_share_no_memory():
    warm()
    want = [loss_of(*inputs(seed)) for seed in (3, 4)]
    launches, _ = _noted(together=2)
    module, got = extension.load()[0], {}

    def thread(seed):
        with extension.use(module):
            got[seed] = loss_of(*inputs(seed))

    threads = [threading.Thread(target=thread, args=(seed,)) for seed in (3, 4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(timeout=60)
    assert len(launches.calls) == 2, "a thread took the full path"
    first, second = (set(bases) for bases, _, _ in launches.calls)
    assert len(first) == len(second) == 7 and not first & second
    assert all(torch.equal(got[seed], value) for seed, value in zip((3, 4), want))


def test_the_stream_and_the_device_are_those_of_the_call(monkeypatch):
    warm()
    launches, launch = _noted()
    for place in ((0, 0), (1, 77), (1, 78)):
        monkeypatch.setattr(type(launch), "place", lambda self, place=place: place)
        loss_of(*inputs(3))
        assert launches.calls[-1][1:] == place
    assert len(launches.calls) == 3


def test_a_replay_on_another_device_makes_it_current(monkeypatch):
    made = []

    class Device(contextlib.nullcontext):
        def __init__(self, device):
            super().__init__()
            made.append(device)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Device)
    assert ops.call_context(torch.device("cuda", 0)) is ops.call_context(torch.device("cpu")) is None
    with ops.call_context(torch.device("cuda", 1)):
        assert made == [torch.device("cuda", 1)]
    warm()
    monkeypatch.setattr(plain_call, "call_context", lambda device: Device(device))
    launches, _ = _noted()
    loss_of(*inputs(3))
    assert made[1:] == [torch.device("cpu")] and len(launches.calls) == 1


def test_a_replay_keeps_no_tensor():
    warm()
    student, teacher, target = inputs(3)
    leaf = student.detach().clone().requires_grad_()
    refs = [weakref.ref(x) for x in (teacher, target, leaf)]
    loss = loss_of(leaf, teacher, target)
    del teacher, target
    assert [ref() is None for ref in refs] == [True, True, False]
    del loss, leaf
    assert refs[2]() is None
    todo, seen = [replay._REPLAYS], set()
    while todo:
        x = todo.pop()
        if id(x) in seen or isinstance(x, (type, types.ModuleType, types.FunctionType)):
            continue
        seen.add(id(x))
        assert not isinstance(x, (torch.Tensor, torch.UntypedStorage))
        todo += gc.get_referents(x)


def test_results_may_be_changed_in_place():
    warm()
    student, *rest = inputs(3)
    want, of_student = value_and_gradient(loss_of, student, *rest, factor=6.0)
    loss = loss_of(student, *rest)
    loss.mul_(2.0)
    (gradient,) = torch.autograd.grad(3 * loss, student, retain_graph=True)
    assert torch.equal(loss.detach(), 2 * want)
    torch.testing.assert_close(gradient, of_student)
    kept = gradient.clone()
    gradient.zero_()
    torch.testing.assert_close(torch.autograd.grad(3 * loss, student)[0], kept)
    with torch.no_grad():
        loss_of(student, *rest).zero_()
    assert torch.equal(loss_of(student, *rest).detach(), want)


def test_the_student_must_not_change_before_backward():
    warm()
    student, *rest = inputs(3)
    x = student * 1.0
    loss = loss_of(x, *rest)
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_checkpointing_may_compute_again_by_a_replay(checked):
    """The first computation takes the full path and the second a replay, or the other way round: both save the same."""
    student, teacher, target = inputs(3)
    want = value_and_gradient(loss_of, student, teacher, target, factor=1.0)[1]
    counts = []
    for forget in (False, False, True):
        x = student.detach().clone().requires_grad_()
        loss = checkpoint(lambda x: loss_of(x * 1.0, teacher, target), x, use_reentrant=False)
        counts.append(len(checked))
        if forget:
            replay._REPLAYS.clear()
        (gradient,) = torch.autograd.grad(loss, x)
        counts.append(len(checked))
        assert torch.equal(gradient, want)
    assert counts == [2, 2, 2, 2, 2, 3]


def test_process_groups_and_other_losses_ask_for_no_replay(monkeypatch):
    warm()
    kept = dict(replay._REPLAYS)
    monkeypatch.setattr(replay, "call_key", None)
    student, teacher, target = inputs(3)
    with pytest.raises(ValueError, match="group"):
        loss_of(student, teacher, target, process_group="no such group")
    with pytest.raises(ValueError, match="group"):
        mcld_kernels.MCLDLoss(backend="cuda", process_group="no such group")(student, teacher, target)
    for loss in (mcld_kernels.info_nce, mcld_kernels.kd_loss, mcld_kernels.ckd_loss, mcld_kernels.mcld_terms):
        arguments = (target,) if loss is mcld_kernels.mcld_terms else ()
        for _ in range(3):
            loss(student, teacher, *arguments, backend="torch" if loss is mcld_kernels.kd_loss else "cuda")
    assert replay._REPLAYS == kept

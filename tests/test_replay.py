"""Replays on the "cuda" backend, compiled for the host: what takes them, what does not, and that no bit differs."""

# Imported fixtures are arguments of tests.
# ruff: noqa: F401, F811

import os
import sys
import types
from pathlib import Path

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
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench is not installed

import mcld_kernels
from bench.harness import providers
from bench.harness.cases import Case
from mcld_kernels import backends, calibrate, options, plain_call, replay
from mcld_kernels.backends import timings
from mcld_kernels.backends.cuda import extension
from mcld_kernels.backends.environment import raw_values


@pytest.mark.parametrize(
    ("form", "dtype", "is_module"),
    [
        ("low latency", torch.float16, False),
        ("flash", torch.bfloat16, True),
        ("two products", torch.float32, True),
        ("library product", torch.float32, False),  # the CPU's library sums 16-bit operands into no other dtype
    ],
    ids=str,
)
def test_a_replay_is_the_call(form, dtype, is_module, checked):
    loss = mcld_kernels.MCLDLoss(backend="cuda") if is_module else loss_of
    with backends.tuned(**FORMS[form]):
        warm(loss, dtype=dtype)
        assert len(replay._REPLAYS) == 1
        count = len(checked)
        got = [value_and_gradient(loss, *inputs(seed, dtype)) for seed in (2, 3)]
        assert len(checked) == count, "the call was checked again"
        with backends.tuned(plans=False):
            want = [value_and_gradient(loss, *inputs(seed, dtype)) for seed in (2, 3)]
    for (a, b), (c, d) in zip(got, want):
        assert torch.equal(a, c) and torch.equal(b, d) and b.dtype is dtype and a.dtype is c.dtype


def test_a_benchmark_and_the_calibration_time_replays(checked):
    """Their calls are those of a user, who comes back to a kind of call: not four times the host's cost."""
    student, *rest = inputs()
    tensors, case = (student.detach(), *rest), Case(BATCH, CLASSES)
    for step in (
        providers.choose("cuda")[0].make(case, *tensors),
        providers.tuned_backend("cuda:low_latency_limit=0").make(case, *tensors),
        calibrate._step("cuda", *tensors),
    ):
        first, _ = step(), step()
        count = len(checked)
        again, _ = step(), step()
        assert len(checked) == count, "the call was checked again"
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_replay_without_a_gradient(checked):
    with torch.no_grad():
        values = [loss_of(*inputs(3)) for _ in range(3)]
    assert len(checked) == 2 and all(torch.equal(value, values[0]) for value in values)
    assert not values[2].requires_grad


def test_a_result_stays_when_the_next_call_comes():
    warm()
    student, *rest = inputs(5)
    first = loss_of(student, *rest)
    value = first.item()
    loss_of(*inputs(6))
    assert first.item() == value
    (gradient,) = torch.autograd.grad(first, student)
    assert torch.equal(gradient, value_and_gradient(loss_of, *inputs(5), factor=1.0)[1])


def _with_gradient_by_teacher(student, teacher, target):
    with pytest.raises(backends.BackendUnavailable, match="teacher requires grad"):
        loss_of(student, teacher.detach().requires_grad_(), target)


def _forward_mode(student, teacher, target):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(student, torch.ones_like(student))
        assert dual.requires_grad  # the key of the calls that are kept
        loss_of(dual, teacher, target)


def _in_functorch(student, teacher, target):
    torch.func.grad(lambda s: loss_of(s, teacher, target))(student.detach())


def _captured(student, teacher, target):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "_is_captured", lambda tensor: True)
        loss_of(student, teacher, target)


def _fake(student, teacher, target):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(x) for x in (student, teacher, target)]
        assert loss_of(*fake).shape == ()


def _vmapped(student, teacher, target):
    torch.func.vmap(lambda s: loss_of(s, teacher, target))(student.detach()[None])


def _compiled(student, teacher, target):
    torch.compile(loss_of, backend="eager")(student.detach(), teacher, target)


def _watched(student, teacher, target):
    from launches import Counted

    with Counted():
        loss_of(student, teacher, target)


class _Sub(torch.Tensor):
    pass


def _subclass(student, teacher, target):
    loss_of(student, teacher.as_subclass(_Sub), target)


def _other_shape(student, teacher, target):
    with pytest.raises(ValueError, match="same shape"):
        loss_of(student, teacher[:-1], target)
    with pytest.raises(ValueError, match="target"):
        loss_of(student, teacher, target[:-1])


def _other_kinds(student, teacher, target):
    for bad in (teacher.to_sparse(), teacher.long(), None):
        with pytest.raises(TypeError):
            loss_of(student, bad, target)
    with pytest.raises((TypeError, ValueError), match="target"):
        loss_of(student, teacher, target.int())


def _without_labels(student, teacher, target):
    with pytest.raises(ValueError, match="target"):
        loss_of(student, teacher, None)


def _tensor_of_weights(student, teacher, target):
    loss_of(student, teacher, target, weight=torch.ones(3))


def _candidates(student, teacher, target):
    loss_of(student, teacher, target, candidates=teacher + 1)


@pytest.mark.parametrize(
    "call",
    [
        _with_gradient_by_teacher, _forward_mode, _in_functorch, _vmapped, _compiled, _fake, _captured, _watched,
        _subclass, _other_shape, _other_kinds, _without_labels, _tensor_of_weights, _candidates,
    ],
    ids=lambda call: call.__name__,
)  # fmt: skip
def test_the_full_path_takes(call, checked, monkeypatch):
    warm()
    assert len(replay._REPLAYS) == 1
    monkeypatch.setattr(plain_call._PlainLoss, "apply", None)
    checked.clear()
    call(*inputs(3))
    assert checked


@pytest.mark.parametrize("side", ["student", "teacher", "target"])
@pytest.mark.parametrize(
    "made",
    [lambda x: torch._neg_view(-x), lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype)],
    ids=["negated", "zeros"],
)
def test_a_tensor_whose_memory_has_other_numbers_is_no_replay(side, made, checked):
    """Its memory holds the negated numbers, or there is none; the key has all else in common with one that is kept."""
    names = ("student", "teacher", "target")
    with torch.no_grad():
        warm()
        assert len(replay._REPLAYS) == 1
        call = dict(zip(names, inputs(3)))
        call[side] = made(call[side])
        assert replay.call_key(*call.values(), options.instance_term(0.1, 1e-12), "cuda") is None
        count = len(checked)
        got = loss_of(*call.values())
        with backends.tuned(plans=False):
            want = loss_of(*(x.clone() for x in call.values()))
    assert len(checked) == count + 2 and torch.equal(got, want)


def test_what_a_call_depends_on_makes_another_kind(monkeypatch, matmul_precision):
    student, teacher, target = inputs()

    def key(student=student, teacher=teacher, target=target, settings=None, backend="cuda"):
        return replay.call_key(student, teacher, target, settings or options.instance_term(0.1, 1e-12), backend)

    def transposed(x):
        return x.detach().T.contiguous().T

    first = key()
    assert first == key() and hash(first) == hash(key())
    kinds = [
        first, key(settings=options.instance_term(0.2, 1e-12)), key(target=None), key(student=student.detach()),
        key(teacher=transposed(teacher)), key(student=transposed(student).requires_grad_()),
        key(student=student[:5], teacher=teacher[:5]), key(teacher=teacher.bfloat16()),
        key(target=torch.stack([target, target], 1)[:, 0]),
    ]  # fmt: skip
    with backends.tuned(one_epilogue=False):
        kinds.append(key())
    with backends.tuned(one_epilogue=False):
        kinds.append(key())  # of another `tuned`
    for name in ("MCLD_CHUNK_MB", "MCLD_HOPPER", "TRITON_INTERPRET"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "0" if name == "TRITON_INTERPRET" else "1")
            kinds.append(key())
    with extension.use(types.ModuleType("other")):
        kinds.append(key())
    for rows in ((), (timings.Row(dtype="float32", precision="highest", batch=9, classes=6, milliseconds={}),)):
        table = timings.Table(path=Path("table"), gpu="GPU", date="", rows=rows)
        with monkeypatch.context() as patch:
            patch.setattr(timings, "in_use", lambda x, table=table: table)
            kinds.append(key())
    matmul_precision("high")
    kinds.append(key())
    assert None not in kinds and len(set(kinds)) == len(kinds)
    for none in (key(backend="auto"), key(backend="torch"), key(backend="reference"), key(backend="triton")):
        assert none is None  # of CPU tensors


def test_a_key_sees_every_change_of_the_environment(monkeypatch):
    values = []
    for value in (None, "", "0", "1", "\u00e9"):
        if value is not None:
            monkeypatch.setenv("MCLD_HOPPER", value)
        values.append(raw_values("MCLD_HOPPER", "MCLD_CHUNK_MB"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", {"MCLD_HOPPER": "2"})  # a plain dict in its place
        values.append(raw_values("MCLD_HOPPER", "MCLD_CHUNK_MB"))
    assert values[0] == (None, None) and values[-1] == ("2", None) and len(set(values)) == len(values)
    monkeypatch.delenv("MCLD_HOPPER")
    assert raw_values("MCLD_HOPPER", "MCLD_CHUNK_MB") == values[0]


def test_labels_that_can_be_read_are_checked_in_each_call(monkeypatch):
    monkeypatch.undo()
    student, teacher, target = inputs()
    for _ in range(3):
        loss_of(student, teacher, target)
    assert not replay._REPLAYS
    target[0] = CLASSES
    with pytest.raises(ValueError, match="target"):
        loss_of(student, teacher, target)


def test_the_module_keeps_what_it_counts_and_learns(checked):
    for criterion in (
        mcld_kernels.MCLDLoss(backend="cuda", warmup_steps=4),
        mcld_kernels.MCLDLoss(backend="cuda", uncertainty_weighting=True),
        mcld_kernels.MCLDLoss(backend="cuda", weight=torch.ones(3)),
    ):
        for seed in range(3):
            criterion(*inputs(seed))
        assert criterion.steps == (3 if criterion.warmup_steps else 0)
    assert len(checked) == 9 and not replay._REPLAYS


def test_derivatives_of_a_replay():
    warm()
    student, *rest = inputs(3)
    loss = loss_of(student, *rest)
    assert type(loss.grad_fn).__name__ == "_PlainLossBackward"
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()
    loss = loss_of(student, *rest)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(student.grad, 2 * gradient.detach())
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_autocast_does_not_change_a_replay():
    tuning = FORMS["library product"]
    with backends.tuned(**tuning):
        warm()
        want = value_and_gradient(loss_of, *inputs(3))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = value_and_gradient(loss_of, *inputs(3))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_as_many_kinds_are_kept_as_a_process_comes_back_to():
    for number in range(replay.MOST_REPLAYS + 3):
        replay.keep((number,), lambda tensors: (tensors[0], None))
    assert len(replay._REPLAYS) == 3 and replay.find((replay.MOST_REPLAYS,)) is not None

"""Arguments that are nearly right: an index in a tensor, labels of two kinds, sparse labels, one element as (1,)."""

import functools

import numpy
import pytest
import torch
from torch import nn

from mcld_kernels import CKDLoss, InfoNCELoss, MCLDLoss, MLKDLoss, ckd_loss, info_nce, mcld_loss, mlkd_loss, reference

N, D, C = 8, 5, 4
BACKENDS = ["reference", "torch"]


def rows(n=N, seed=0, dtype=torch.float64):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labels(n=N):
    return torch.arange(n) % C


def soft(n=N):
    return torch.softmax(torch.randn(n, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 1)


class TestAnIndexInATensor:
    """Its value counts at each call, also after it was changed in place."""

    CALLS = {
        "info_nce.offset": (lambda value: info_nce(rows(), rows(16, 1), offset=value), 0, 8),
        "info_nce.ignore_index": (
            lambda value: info_nce(rows(), rows(), positives="label", anchor_target=labels(), ignore_index=value), 0, 2
        ),
        "mcld_loss.ignore_index": (lambda value: mcld_loss(rows(), rows(8, 1), labels(), ignore_index=value), -100, 2),
        "mlkd_loss.ignore_index": (lambda value: mlkd_loss(rows(), rows(8, 1), labels(), ignore_index=value), -100, 2),
        "mlkd_loss.views": (lambda value: mlkd_loss(rows(), rows(8, 1), labels(), views=value), 1, 2),
        "reference.info_nce.offset": (lambda value: reference.info_nce(rows(), rows(16, 1), offset=value), 0, 8),
    }  # fmt: skip

    @pytest.mark.parametrize("name", CALLS)
    @pytest.mark.parametrize("make", [torch.tensor, numpy.array], ids=["tensor", "array"])
    def test_counts_by_its_value(self, name, make):
        call, first, second = self.CALLS[name]
        assert call(first) != call(second)
        value = make(first)
        assert call(value) == call(first)
        value += second - first
        assert call(value) == call(second)

    @pytest.mark.parametrize(
        "kind, name", [(InfoNCELoss, "offset"), (InfoNCELoss, "ignore_index"), (MCLDLoss, "ignore_index"),
                       (MLKDLoss, "ignore_index"), (MLKDLoss, "views")]
    )  # fmt: skip
    def test_is_an_int_in_a_module(self, kind, name):
        value = torch.tensor(1)
        module = kind(**{name: value})
        value += 1
        assert type(getattr(module, name)) is int and getattr(module, name) == 1
        setattr(module, name, value)
        assert type(getattr(module, name)) is int and getattr(module, name) == 2
        value -= 1
        assert getattr(module, name) == 2

    @pytest.mark.parametrize("value", [torch.tensor(0.5), torch.tensor([1, 2])], ids=["float", "two"])
    def test_that_is_no_index_is_named(self, value):
        for call in (
            lambda: info_nce(rows(), rows(), offset=value),
            lambda: mcld_loss(rows(), rows(), labels(), ignore_index=value),
            lambda: mlkd_loss(rows(), rows(), labels(), ignore_index=value),
        ):
            with pytest.raises(TypeError, match=r"(offset|ignore_index) must be an int; got a tensor"):
                call()

    def test_three_weights_of_a_sequence_that_changes(self):
        from collections.abc import Sequence

        class Weights(Sequence):
            def __init__(self, *values):
                self.values = list(values)

            def __len__(self):
                return len(self.values)

            def __getitem__(self, index):
                return self.values[index]

        for call in (
            lambda weight: mcld_loss(rows(), rows(8, 1), labels(), weight=weight),
            lambda weight: mlkd_loss(rows(), rows(8, 1), labels(), weight=weight),
            lambda value: mcld_loss(rows(), rows(8, 1), labels(), temperature=value),
        ):
            weights = Weights(1.0, 1.0, 1.0)
            assert call(weights) == call((1.0, 1.0, 1.0))
            weights.values[2] = 3.0
            assert call(weights) == call((1.0, 1.0, 3.0))

    @pytest.mark.parametrize("name", ["temperature", "eps"])
    def test_a_number_in_a_tensor_is_refused_or_read(self, name):
        """No cache holds it: a temperature of info_nce is a tensor with a gradient, all others are refused."""
        value = torch.tensor(0.5)
        with pytest.raises((TypeError, ValueError), match=name):
            mcld_loss(rows(), rows(8, 1), labels(), **{name: value})
        with pytest.raises((TypeError, ValueError), match=name):
            ckd_loss(rows(), rows(8, 1), **{name: value})


class TestHardLabelsBesideSoftOnes:
    OPTIONS = [{"positives": "label"}, {"mask_same_class": True}]

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("options", OPTIONS, ids=["label", "mask"])
    @pytest.mark.parametrize("hard_side", ["anchor", "candidate"])
    def test_out_of_range_raise(self, backend, options, hard_side):
        bad = labels()
        bad[3] = 9
        soft_side = "candidate" if hard_side == "anchor" else "anchor"
        targets = {f"{hard_side}_target": bad, f"{soft_side}_target": soft()}
        message = rf"{hard_side}_target holds 9; labels must be in \[0, 4\), the classes of {soft_side}_target"
        with pytest.raises(ValueError, match=message):
            info_nce(rows(), rows(8, 1), **options, **targets, backend=backend)
        value = info_nce(rows(), rows(8, 1), **options, **targets, ignore_index=9, backend=backend)
        assert value.isfinite()

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("options", OPTIONS, ids=["label", "mask"])
    def test_out_of_range_make_the_loss_nan_where_they_are_not_read(self, backend, options, monkeypatch):
        monkeypatch.setattr("mcld_kernels.info_nce_options.is_readable", lambda tensor: False)
        bad = labels()
        bad[3] = 9
        targets = {"anchor_target": bad, "candidate_target": soft()}
        assert info_nce(rows(), rows(8, 1), **options, **targets, backend=backend).isnan()

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_of_mcld_s_candidates_raise(self, backend):
        further = {"candidates": torch.randn(6, C), "backend": backend}
        student, teacher = torch.randn(2, N, C)
        bad = torch.tensor([0, 1, 2, 3, 9, 0])
        with pytest.raises(ValueError, match="candidate_target holds 9"):
            mcld_loss(student, teacher, soft().float(), candidate_target=bad, **further)
        with pytest.raises(ValueError, match="target holds 6"):
            mcld_loss(student, teacher, labels() + 6, candidate_target=soft(6).float(), **further)


class TestSparseLabels:
    @pytest.mark.parametrize("name", ["anchor_target", "candidate_target"])
    @pytest.mark.parametrize("layout", ["coo", "csr", "hard"])
    def test_are_refused_with_the_way_out(self, name, layout):
        sparse = {
            "coo": lambda: soft().to_sparse(),
            "csr": lambda: soft().to_sparse_csr(),
            "hard": lambda: labels().to_sparse(),
        }[layout]()
        targets = {"anchor_target": soft(), "candidate_target": soft()} | {name: sparse}
        with pytest.raises(TypeError, match=rf"{name} must be a dense tensor; got layout .*: pass {name}.to_dense\(\)"):
            info_nce(rows(), rows(8, 1), positives="label", **targets)


def assert_same_as_scalar(run):
    """The same loss and gradients of ``run(shape)``, the last by the value of that shape, for (1,) as for ()."""
    (*results, by_value), wanted = run((1,)), run(())
    assert by_value.shape == (1,)
    for got, want in zip((*results, by_value.reshape(())), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    return results[0]


class TestOneElement:
    """A temperature, and CKD's weight, of shape (1,): as open_clip's nonscalar_logit_scale, and what FSDP shards."""

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_temperature_gets_a_gradient_of_its_shape(self, backend, reduction):
        def run(shape):
            value = torch.full(shape, 0.3, dtype=torch.float64, requires_grad=True)
            anchors = rows().requires_grad_()
            loss = info_nce(anchors, rows(8, 1), temperature=value, reduction=reduction, backend=backend)
            return loss.detach(), *torch.autograd.grad(loss.square().sum(), (anchors, value))

        assert_same_as_scalar(run)

    def test_temperature_with_torch_func(self):
        value = torch.tensor([0.3], dtype=torch.float64)
        for backend in BACKENDS:
            gradient = torch.func.grad(lambda t: info_nce(rows(), rows(8, 1), temperature=t, backend=backend))(value)  # noqa: B023
            assert gradient.shape == (1,)

    def test_temperature_compiles_whole(self):
        loss = functools.partial(info_nce, backend="torch")
        value = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        results = [f(rows(), rows(8, 1), temperature=value) for f in (compiled, loss)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(x, value)[0] for x in results))

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("negatives", ["teacher", "student"])
    def test_weight_of_ckd(self, backend, negatives):
        def run(shape):
            value = torch.full(shape, 3.0, dtype=torch.float64, requires_grad=True)
            student = rows().requires_grad_()
            loss = ckd_loss(student, rows(8, 1), weight=value, negatives=negatives, backend=backend)
            return loss.detach(), *torch.autograd.grad(loss, (student, value))

        assert assert_same_as_scalar(run).shape == ()

    def test_in_modules(self):
        learned = InfoNCELoss(temperature=nn.Parameter(torch.tensor([0.3])))
        clip = InfoNCELoss(temperature=torch.tensor([0.3]), learnable=True)
        buffer = InfoNCELoss(temperature=torch.tensor([0.3]))
        wanted = InfoNCELoss(temperature=0.3)
        anchors, candidates = rows(dtype=torch.float32), rows(8, 1, torch.float32)
        for module in (learned, clip, buffer):
            torch.testing.assert_close(module(anchors, candidates), wanted(anchors, candidates))
            assert module.temperature.shape == (1,) and "temperature=" in repr(module)
        for module in (learned, clip):
            module(anchors, candidates).backward()
            (parameter,) = module.parameters()
            assert parameter.shape == parameter.grad.shape == (1,)
            for value in (0.5, torch.tensor(0.5), torch.tensor([0.5])):
                module.temperature = value
                assert parameter.shape == (1,) and module.temperature.tolist() == pytest.approx([0.5])
        scalar = InfoNCELoss(learnable=True)
        scalar.temperature = torch.tensor([0.5])
        assert scalar.log_temperature.shape == () and scalar.temperature.item() == pytest.approx(0.5)
        weighted = CKDLoss(weight=nn.Parameter(torch.tensor([3.0])))
        weighted(anchors, candidates).backward()
        assert weighted.weight.grad.shape == (1,)
        weighted.weight = 2.0
        assert weighted.weight.tolist() == [2.0]

    def test_more_elements_raise_with_what_to_pass(self):
        with pytest.raises(ValueError, match=r"temperature as a tensor must have shape \(\) or \(1,\); got \(3,\)"):
            info_nce(rows(), rows(8, 1), temperature=torch.full((3,), 0.3))
        with pytest.raises(ValueError, match=r"got \(1, 1\): pass temperature.reshape\(\(\)\)"):
            info_nce(rows(), rows(8, 1), temperature=torch.full((1, 1), 0.3))
        with pytest.raises(ValueError, match=r"weight as a tensor must have shape \(\) or \(1,\); got \(3,\)"):
            ckd_loss(rows(), rows(8, 1), weight=torch.ones(3))
        with pytest.raises(ValueError, match=r"got \(1, 1\): pass weight.reshape\(\(\)\)"):
            ckd_loss(rows(), rows(8, 1), weight=torch.ones(1, 1))
        with pytest.raises(ValueError, match="temperature must be positive"):
            info_nce(rows(), rows(8, 1), temperature=torch.tensor([-0.3]))

"""info_nce at its edges: empty sides, zero rows, labels without a class, and the messages for what does not fit."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from test_info_nce import labelled, problem

from mcld_kernels import backends, info_nce, reference


class TestEdges:
    @pytest.mark.parametrize("backend", ["reference", "torch"])
    def test_no_anchors_give_0(self, backend):
        for reduction, shape in (("mean", ()), ("sum", ()), ("none", (0,))):
            anchors = torch.empty(0, 5, requires_grad=True)
            value = info_nce(anchors, torch.randn(3, 5), reduction=reduction, backend=backend)
            assert value.shape == shape
            value.sum().backward()
            assert float(value.sum()) == 0 and anchors.grad.shape == (0, 5)

    @pytest.mark.parametrize("backend", ["reference", "torch"])
    def test_anchors_without_a_positive_do_not_count(self, backend):
        anchors, candidates, _, _ = problem(5, 9)
        target = torch.tensor([0, 1, -100, 7, 0])
        theirs = torch.tensor([0, 1, 1, -100, 0, 2, 2, 3, 0])
        counted = [0, 1, 4]
        options = {"positives": "label", "candidate_target": theirs, "backend": backend}
        for tuning in ({}, {"low_latency": False}):
            with backends.tuned(**tuning):
                leaf = anchors.clone().requires_grad_()
                each = info_nce(leaf, candidates, anchor_target=target, reduction="none", **options)
                assert not each[[2, 3]].any()
                loss = info_nce(leaf, candidates, anchor_target=target, **options)
                assert float(loss) == pytest.approx(float(each[counted].mean()), rel=1e-12)
                loss.backward()
                assert not leaf.grad[[2, 3]].any()
                none = info_nce(leaf, candidates, anchor_target=torch.full((5,), 9), **options)
                assert float(none) == 0
                nothing = info_nce(
                    leaf, candidates[:0], anchor_target=target, **{**options, "candidate_target": theirs[:0]}
                )
                nothing.backward()
                assert float(nothing) == 0

    @pytest.mark.parametrize("normalize", [True, False], ids=["unit", "dot"])
    def test_one_candidate_has_no_loss(self, normalize):
        for tuning in ({}, {"low_latency": False}):
            with backends.tuned(**tuning):
                leaf = torch.randn(1, 5, requires_grad=True)
                value = info_nce(leaf, torch.randn(1, 5), normalize=normalize, backend="torch")
                value.backward()
                assert float(value) == 0 and not leaf.grad.any()

    def test_more_anchors_than_candidates(self):
        """As against prototypes: label positives need no partner."""
        anchors, candidates, hard, _ = problem(20, 4)
        hard[1] = torch.arange(4)
        options = {"positives": "label", **labelled(hard)}
        leaves = anchors.requires_grad_(), candidates.requires_grad_()
        for tuning in ({}, {"low_latency": False}):
            with backends.tuned(**tuning):
                got, want = (f(*leaves, **options) for f in (info_nce, reference.info_nce))
                torch.testing.assert_close(got, want)
                results = [torch.autograd.grad(x, leaves) for x in (got, want)]
                torch.testing.assert_close(*results)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("normalize", [True, False], ids=["unit", "dot"])
    def test_what_is_not_finite_shows(self, value, normalize):
        for side in range(2):
            for tuning in ({}, {"low_latency": False}):
                pair = list(problem()[:2])
                pair[side] = pair[side].clone()
                pair[side][2, 1] = value
                with backends.tuned(**tuning):
                    assert not info_nce(*pair, normalize=normalize, backend="torch").isfinite()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("mask", [False, True], ids=["plain", "masked"])
    @pytest.mark.parametrize("frozen", [True, False])
    def test_infinite_dot_products_are_those_of_eager(self, dtype, mask, frozen):
        """A positive of +inf is NaN, not a loss of 0; a negative of -inf leaves a loss, but not its gradient."""
        start = torch.tensor([[1.0, 2], [2, 1], [-1, 0.5]])
        more = torch.tensor([[1, 1.5], [1.5, 1], [-0.5, 1], [0.3, -1]])
        ours, theirs = torch.tensor([0, 1, 0]), torch.tensor([0, 1, 0, 0])
        options = {"mask_same_class": True, "anchor_target": ours, "candidate_target": theirs} if mask else {}
        dropped = (ours[:, None] == theirs) & ~torch.eye(3, 4, dtype=torch.bool) & mask
        large = torch.finfo(dtype).max / 2
        for side, row, value in itertools.product(range(2), range(4), (math.inf, -math.inf, large, -large)):
            pair = [start.to(dtype), more.to(dtype)]
            if row >= len(pair[side]):
                continue
            pair[side][row, 0] = value
            similarities = (pair[0] @ pair[1].T / 0.1).masked_fill(dropped, -torch.inf)
            want = F.cross_entropy(similarities, torch.arange(3), reduction="none")
            for tuning, temperature in itertools.product(({}, {"low_latency": False}), (0.1, torch.tensor(0.1))):
                anchors, candidates = pair[0].clone().requires_grad_(), pair[1].clone().requires_grad_(not frozen)
                with backends.tuned(**tuning):
                    each = info_nce(
                        anchors, candidates, temperature=temperature, normalize=False, reduction="none",
                        backend="torch", **options,
                    )  # fmt: skip
                assert torch.equal(each.isfinite(), want.isfinite())
                torch.testing.assert_close(each[want.isfinite()], want[want.isfinite()])
                each.sum().backward()
                if math.isinf(value) and side == 1 and not mask:
                    assert not anchors.grad.isfinite().all()

    def test_zero_rows_get_no_gradient(self):
        anchors, candidates, _, _ = problem()
        anchors[2], candidates[4] = 0, 0
        leaves = anchors.requires_grad_(), candidates.requires_grad_()
        results = []
        for function in (info_nce, reference.info_nce):
            value = function(*leaves)
            results.append((value.detach(), *torch.autograd.grad(value, leaves)))
        torch.testing.assert_close(*results)
        assert not results[0][1][2].any() and not results[0][2][4].any()

    def test_strides_change_nothing(self):
        anchors, candidates, _, _ = problem()
        want = info_nce(anchors, candidates)
        wide = anchors.new_full((18, 19), math.nan)
        wide[::2, 1::3] = anchors
        for tuning in ({}, {"low_latency": False}):
            with backends.tuned(**tuning):
                torch.testing.assert_close(info_nce(wide[::2, 1::3], candidates.T.contiguous().T), want)
                torch.testing.assert_close(
                    info_nce(anchors, candidates[:1].expand(14, 6), normalize=False, backend="torch"),
                    torch.tensor(math.log(14), dtype=torch.float64),
                )

    def test_a_bad_temperature_on_the_device_makes_nan(self):
        anchors, candidates, _, _ = problem()
        with FakeReading(), backends.tuned(scales_by_temperature=True):
            assert info_nce(anchors, candidates, temperature=torch.tensor(-1.0), backend="torch").isnan()

    BAD = {
        "widths": ({"candidates": torch.zeros(4, 2)}, ValueError, r"same d; got \(4, 3\) and \(4, 2\)"),
        "rank": ({"anchors": torch.zeros(4)}, ValueError, r"anchors must have shape \(rows, d\); got \(4,\)"),
        "integers": ({"candidates": torch.zeros(4, 3).long()}, TypeError, "candidates must be of a floating dtype"),
        "list": ({"anchors": [[1.0]]}, TypeError, "anchors must be a tensor of embeddings .* got list"),
        "device": ({"candidates": torch.zeros(4, 3, device="meta")}, ValueError, "one device; .* candidates.to"),
        "no width": (
            {"anchors": torch.zeros(4, 0), "candidates": torch.zeros(4, 0)},
            ValueError,
            "at least one column",
        ),
        "too few": ({"offset": 1}, ValueError, "4 anchors and offset=1 need 5 candidates; got 4"),
        "negative offset": ({"offset": -1}, ValueError, "offset must be >= 0"),
        "offset text": ({"offset": "1"}, TypeError, "offset must be an int; got str"),
        "offset of labels": ({"positives": "label", "offset": 1}, ValueError, "it must be 0; got 1"),
        "positives": ({"positives": "all"}, ValueError, "one of 'diagonal', 'label'; got 'all'"),
        "reduction": ({"reduction": "max"}, ValueError, "one of 'mean', 'sum', 'none'; got 'max'"),
        "temperature": ({"temperature": 0.0}, ValueError, "temperature must be positive and finite; got 0.0"),
        "temperature 0": ({"temperature": torch.tensor(0.0)}, ValueError, "positive and finite; got 0.0"),
        "two": ({"temperature": torch.ones(2)}, ValueError, r"must have shape \(\) or \(1,\); got \(2,\)"),
        "int": ({"temperature": torch.tensor(1)}, TypeError, "floating dtype; got torch.int64"),
        "elsewhere": ({"temperature": torch.ones((), device="meta")}, ValueError, "device cpu; got meta: move it"),
        "no labels": ({"positives": "label"}, ValueError, "anchor_target is None, but positives='label' needs"),
        "no labels to mask": ({"mask_same_class": True}, ValueError, "mask_same_class=True needs labels"),
        "mask of labels": (
            {"positives": "label", "mask_same_class": True, "anchor_target": torch.zeros(4).long()},
            ValueError,
            "all of them are positives: pass mask_same_class=False",
        ),
        "one side": ({"candidate_target": torch.zeros(4).long()}, ValueError, "candidate_target without anchor_target"),
        "theirs": (
            {"positives": "label", "anchor_target": torch.zeros(4).long(), "candidates": torch.zeros(6, 3)},
            ValueError,
            "4 anchors and 6 candidates: pass candidate_target",
        ),
        "negative label": (
            {"positives": "label", "anchor_target": torch.tensor([0, -1, 0, 0])},
            ValueError,
            "anchor_target holds -1",
        ),
        "label type": (
            {"anchor_target": torch.zeros(4)},
            TypeError,
            r"int64, or soft labels .* anchor_target.long\(\)",
        ),
        "label list": ({"anchor_target": [0] * 4}, TypeError, r"got list: pass torch.as_tensor\(anchor_target\)"),
        "few labels": ({"anchor_target": torch.zeros(3).long()}, ValueError, r"shape \(4,\)"),
        "one-hot labels": (
            {"anchor_target": torch.eye(4, 2).long()},
            ValueError,
            r"got \(4, 2\): of one-hot rows pass anchor_target.long\(\).argmax\(dim=1\)",
        ),
        "labels elsewhere": (
            {"anchor_target": torch.zeros(4, device="meta").long()},
            ValueError,
            r"got meta: pass anchor_target.to\('cpu'\)",
        ),
        "few soft labels": ({"anchor_target": torch.ones(3, 1)}, ValueError, r"\(4, classes\); got \(3, 1\)"),
        "classes": (
            {"anchor_target": torch.ones(4, 1), "candidate_target": torch.ones(4, 2) / 2},
            ValueError,
            "same number of classes; got 1 and 2",
        ),
        "sum": ({"positives": "label", "anchor_target": torch.ones(4, 3)}, ValueError, "row 0 has a sum of 3"),
        "backend": ({"backend": "numpy"}, ValueError, "backend must be one of"),
        "ignore": ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int"),
        "flag": ({"normalize": 1}, TypeError, "normalize must be a bool"),
    }

    @pytest.mark.parametrize(("change", "error", "words"), BAD.values(), ids=BAD)
    def test_bad_input_says_what_came(self, change, error, words):
        arguments = {"anchors": torch.ones(4, 3), "candidates": torch.ones(4, 3), **change}
        for function in (info_nce, reference.info_nce):
            if function is info_nce or "backend" not in change:
                with pytest.raises(error, match=words):
                    function(arguments["anchors"], arguments["candidates"], **_without(arguments))


def _without(arguments):
    return {key: value for key, value in arguments.items() if key not in ("anchors", "candidates")}


class FakeReading:
    """Inside, values count as unreadable, as they are on a GPU."""

    def __enter__(self):
        from mcld_kernels import info_nce_options

        self.module, self.before = info_nce_options, info_nce_options.is_readable
        info_nce_options.is_readable = lambda tensor: False

    def __exit__(self, *_):
        self.module.is_readable = self.before

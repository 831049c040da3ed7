"""MCLDLoss: the function as a module, its warm-up, its state, copies and pickles."""

import copy
import math
import pickle

import pytest
import torch
from cases import WEIGHT, labels, logits

import mcld_kernels
from mcld_kernels import MCLDLoss


class TestModule:
    def test_is_the_function(self):
        student, teacher = logits("random", 9, 7)
        target = labels(9, 7)
        options = {
            "temperature": (0.1, 0.2, 0.3),
            "weight": WEIGHT,
            "direction": "symmetric",
            "mask_same_class": True,
            "present_only": True,
            "ignore_index": 2,
            "eps": 1e-6,
        }
        module = MCLDLoss(**options)
        assert torch.equal(
            module(student, teacher, target), mcld_kernels.mcld_loss(student, teacher, target, **options)
        )
        for a, b in zip(
            module.terms(student, teacher, target),
            mcld_kernels.mcld_terms(student, teacher, target, **options),
            strict=True,
        ):
            assert torch.equal(a, b)

    def test_warmup(self):
        """The category-wise term comes in over the epochs; the others are there from the start."""
        student, teacher = logits("random", 9, 7)
        target = labels(9, 7)
        module = MCLDLoss(weight=WEIGHT, warmup=4)
        for epoch, ramp in ((None, 0.0), (0, 0.0), (1, 0.25), (2.5, 0.625), (4, 1.0), (100, 1.0), (1, 0.25)):
            if epoch is not None:
                module.set_epoch(epoch)
            want = mcld_kernels.mcld_loss(student, teacher, target, weight=(WEIGHT[0], WEIGHT[1], ramp * WEIGHT[2]))
            torch.testing.assert_close(module(student, teacher, target), want)
            terms = module.terms(student, teacher, target)
            assert float(terms.category) > 0  # before the warm-up, for logging

    def test_no_warmup_ignores_the_epoch(self):
        student, teacher = logits("random", 9, 7)
        module = MCLDLoss()
        before = module(student, teacher, labels(9, 7))
        module.set_epoch(0)
        assert torch.equal(module(student, teacher, labels(9, 7)), before)

    def test_a_weight_of_0_stays_removed_in_a_warmup(self):
        student, teacher = logits("random", 9, 7)
        module = MCLDLoss(weight=(1.0, 0.0, 1.0), warmup=2)
        terms = module.terms(student, teacher)  # and needs no labels
        assert float(terms.sample) == 0

    @pytest.mark.parametrize("epoch", [-1, math.nan, math.inf, "1", None, True])
    def test_bad_epoch(self, epoch):
        with pytest.raises(ValueError, match="epoch must be a finite number >= 0; got"):
            MCLDLoss(warmup=3).set_epoch(epoch)

    @pytest.mark.parametrize("warmup", [-1, math.nan, math.inf, "1", None, True])
    def test_bad_warmup(self, warmup):
        with pytest.raises(ValueError, match="warmup must be a finite number of epochs >= 0; got"):
            MCLDLoss(warmup=warmup)

    @pytest.mark.parametrize("weight", [(1.0, 0.5, 2.0), torch.tensor([1.0, 0.5, 2.0])], ids=["floats", "tensor"])
    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
    )
    def test_copies_keep_everything(self, copied, weight):
        student, teacher = logits("random", 9, 7)
        target = labels(9, 7)
        module = MCLDLoss(weight=weight, direction="symmetric", warmup=4)
        module.set_epoch(1)
        other = copied(module)
        assert repr(other) == repr(module)
        assert torch.equal(other(student, teacher, target), module(student, teacher, target))
        other.set_epoch(4)
        assert not torch.equal(other(student, teacher, target), module(student, teacher, target))

    def test_state_dict(self):
        assert not MCLDLoss(warmup=3).state_dict()  # a checkpoint of a model with the loss inside gains no keys
        module = MCLDLoss(weight=torch.tensor(WEIGHT))
        assert list(module.state_dict()) == ["weight"]
        other = MCLDLoss(weight=torch.ones(3))
        other.load_state_dict(module.state_dict())
        assert torch.equal(other.weight, torch.tensor(WEIGHT))

    def test_a_learned_weight_is_a_parameter(self):
        student, teacher = logits("random", 9, 7, torch.float32)
        module = MCLDLoss(weight=torch.nn.Parameter(torch.tensor(WEIGHT)), warmup=2)
        module.set_epoch(1)
        module(student, teacher, labels(9, 7)).backward()
        terms = module.terms(student, teacher, labels(9, 7))
        want = torch.stack([terms.instance, terms.sample, terms.category / 2])
        assert list(dict(module.named_parameters())) == ["weight"]
        torch.testing.assert_close(module.weight.grad, want)

    def test_moves_and_casts(self):
        """half() and double() reach buffers too; the loss keeps following the logits' dtype."""
        student, teacher = logits("random", 9, 7)
        target = labels(9, 7)
        module = MCLDLoss(weight=WEIGHT, warmup=4)
        module.set_epoch(1)
        want = module(student, teacher, target)
        for cast in (module.half(), module.double()):
            got = cast(student, teacher, target)
            assert got.dtype == torch.float64
            torch.testing.assert_close(got, want)

    def test_shows_its_options(self):
        text = repr(MCLDLoss(temperature=0.2, weight=(1, 0.5, 2), direction="teacher", warmup=2.5, backend="torch"))
        for word in (
            "temperature=0.2",
            "weight=(1.0, 0.5, 2.0)",
            "direction='teacher'",
            "mask_same_class=False",
            "present_only=False",
            "ignore_index=-100",
            "eps=1e-12",
            "warmup=2.5",
            "backend='torch'",
        ):
            assert word in text
        assert "temperature=(0.1, 0.2, 0.3)" in repr(MCLDLoss(temperature=(0.1, 0.2, 0.3)))
        assert "weight=tensor([1., 1., 1.])" in repr(MCLDLoss(weight=torch.ones(3)))

    def test_takes_keywords_only(self):
        with pytest.raises(TypeError):
            MCLDLoss(0.1)
        with pytest.raises(TypeError):
            mcld_kernels.mcld_loss(*logits("random", 4, 3), labels(4, 3), 0.1)

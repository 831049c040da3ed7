"""MCLDLoss: the function as a module, its warm-up, its state, copies and pickles."""

import copy
import math
import pickle

import pytest
import torch
import torch._dynamo.testing
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
        module = MCLDLoss(weight=WEIGHT, warmup=4).eval()
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
        module = MCLDLoss(weight=(1.0, 0.0, 1.0), warmup=2).eval()
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


class TestWarmupBySteps:
    """For frameworks that tell a loss no epoch."""

    def inputs(self):
        return *logits("random", 9, 7), labels(9, 7)

    def expected(self, ramp):
        return mcld_kernels.mcld_loss(*self.inputs(), weight=(WEIGHT[0], WEIGHT[1], ramp * WEIGHT[2]))

    def test_the_module_counts_its_training_steps(self):
        module = MCLDLoss(weight=WEIGHT, warmup_steps=4)
        for step in range(7):
            torch.testing.assert_close(module(*self.inputs()), self.expected(min(step / 4, 1)))

    def test_neither_evaluation_nor_no_grad_counts(self):
        module = MCLDLoss(weight=WEIGHT, warmup_steps=4)
        module.eval()(*self.inputs())
        with torch.no_grad():
            module.train()(*self.inputs())
        assert int(module.steps) == 0

    def test_a_resumed_module_goes_on(self):
        module = MCLDLoss(weight=WEIGHT, warmup_steps=4)
        for _ in range(3):
            module(*self.inputs())
        other = MCLDLoss(weight=WEIGHT, warmup_steps=4)
        other.load_state_dict(module.state_dict())
        torch.testing.assert_close(other(*self.inputs()), self.expected(0.75))

    def test_set_epoch_takes_precedence(self):
        module = MCLDLoss(weight=WEIGHT, warmup=2, warmup_steps=4)
        for _ in range(3):
            module(*self.inputs())
        module.set_epoch(0.5)
        torch.testing.assert_close(module(*self.inputs()), self.expected(0.25))

    def test_one_warning_where_no_epoch_ever_comes(self, recwarn):
        module = MCLDLoss(weight=WEIGHT, warmup=4)
        for _ in range(3):
            module(*self.inputs())
        assert len([w for w in recwarn if "set_epoch() has not" in str(w.message)]) == 1

    @pytest.mark.parametrize("prepare", [lambda m: m.set_epoch(0), lambda m: m.eval()], ids=["epoch", "eval"])
    def test_no_warning_otherwise(self, prepare, recwarn):
        module = MCLDLoss(warmup=4)
        prepare(module)
        module(*self.inputs())
        MCLDLoss(warmup=4, warmup_steps=3)(*self.inputs())
        MCLDLoss()(*self.inputs())
        assert not recwarn.list

    @pytest.mark.parametrize("steps", [-1, 1.5, "3", True, None])
    def test_bad_steps(self, steps):
        with pytest.raises(ValueError, match="warmup_steps must be a whole number of training steps >= 0; got"):
            MCLDLoss(warmup_steps=steps)

    def test_the_effective_weight_shows_the_ramp(self):
        module = MCLDLoss(weight=WEIGHT, warmup_steps=4)
        for step in range(6):
            want = torch.tensor([WEIGHT[0], WEIGHT[1], WEIGHT[2] * min(step / 4, 1)])
            torch.testing.assert_close(module.effective_weight, want)
            module(*self.inputs())
        tensor = MCLDLoss(weight=torch.tensor(WEIGHT), warmup=4)
        tensor.set_epoch(1)
        torch.testing.assert_close(tensor.effective_weight, torch.tensor([WEIGHT[0], WEIGHT[1], WEIGHT[2] / 4]))
        assert torch.equal(MCLDLoss(weight=WEIGHT).effective_weight, torch.tensor(WEIGHT))

    def test_set_epoch_inside_a_compiled_step_compiles_few_programs(self):
        module = MCLDLoss(weight=WEIGHT, warmup=4)
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

        @torch.compile(backend=counter, fullgraph=True)
        def step(student, teacher, target, epoch):
            module.set_epoch(epoch)
            return module(student, teacher, target)

        for i in range(14):
            torch.testing.assert_close(step(*self.inputs(), i / 2), self.expected(min(i / 8, 1)))
        assert counter.frame_count <= 4  # the first epoch, any epoch before the end of the warm-up, and after it


class TestConstruction:
    def test_on_the_meta_device(self):
        """The FSDP2 recipe: made on "meta", to_empty, reset_parameters."""
        with torch.device("meta"):
            module = MCLDLoss(weight=WEIGHT, warmup_steps=4)
        module = module.to_empty(device="cpu")
        module.steps.fill_(99)
        module.epoch_ramp.fill_(12345)
        module.reset_parameters()
        student, teacher = logits("random", 9, 7)
        want = mcld_kernels.mcld_loss(student, teacher, labels(9, 7), weight=(WEIGHT[0], WEIGHT[1], 0.0))
        torch.testing.assert_close(module(student, teacher, labels(9, 7)), want)

    def test_reset_restores_the_weights(self):
        module = MCLDLoss(weight=torch.nn.Parameter(torch.tensor(WEIGHT)), uncertainty_weighting=True)
        with torch.no_grad():
            module.weight.add_(1)
            module.log_variance.add_(1)
        module.reset_parameters()
        assert torch.equal(module.weight, torch.tensor(WEIGHT)) and not module.log_variance.any()

    def test_half_and_back_leaves_the_ramp_exact(self):
        student, teacher = logits("random", 9, 7)
        module = MCLDLoss(weight=WEIGHT, warmup=3)
        module.set_epoch(1)
        want = module(student, teacher, labels(9, 7))
        assert torch.equal(module.half().float()(student, teacher, labels(9, 7)), want)


class TestChangesAfterwards:
    def test_an_assigned_temperature_counts(self):
        student, teacher = logits("random", 9, 7)
        module = MCLDLoss()
        module.temperature = 0.5
        assert module.temperature == (0.5, 0.5, 0.5)
        want = mcld_kernels.mcld_loss(student, teacher, labels(9, 7), temperature=0.5)
        assert torch.equal(module(student, teacher, labels(9, 7)), want)
        with pytest.raises(ValueError, match="temperature must be positive"):
            module.temperature = 0.0

    def test_a_weight_that_has_become_negative_is_refused(self):
        student, teacher = logits("random", 9, 7)
        module = MCLDLoss(weight=torch.nn.Parameter(torch.tensor(WEIGHT)))
        with torch.no_grad():
            module.weight[1] = -0.5
        with pytest.raises(ValueError, match=r"weight must be finite and >= 0; got .*-0.5.*uncertainty_weighting=True"):
            module(student, teacher, labels(9, 7))
        with pytest.raises(ValueError, match=r"got \(1.0, -0.5, 1.0\)$"):  # nobody learns this one
            MCLDLoss(weight=torch.tensor([1.0, -0.5, 1.0]))

    def test_an_optimizer_drives_a_bare_weight_below_0_and_not_a_learned_one(self):
        student, teacher = logits("random", 32, 7)
        bare = MCLDLoss(weight=torch.nn.Parameter(torch.ones(3)))
        learned = MCLDLoss(uncertainty_weighting=True)
        message = "learn its logarithm"
        with pytest.raises(ValueError, match=message):  # what docs/hyperparameters.md says of it
            descend(bare, student, teacher, 200)
        losses = descend(learned, student, teacher, 200)
        weight = learned.effective_weight
        assert all(map(math.isfinite, losses)) and (weight > 0).all() and losses[-1] < losses[0]
        terms = torch.stack(learned.terms(student, teacher, labels(32, 7))[1:])
        torch.testing.assert_close(weight, (1 / (2 * terms)).to(weight), rtol=0.05, atol=0)  # the minimum


def descend(module, student, teacher, steps):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = module(student, teacher, labels(*student.shape))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


class TestUncertaintyWeighting:
    def test_is_the_formula(self):
        student, teacher = logits("random", 9, 7)
        module = MCLDLoss(weight=WEIGHT, uncertainty_weighting=True)
        with torch.no_grad():
            module.log_variance.copy_(torch.tensor([0.3, -0.2, 0.1]))
        loss, *terms = module.terms(student, teacher, labels(9, 7))
        s = module.log_variance.detach().double()
        want = sum(w * (-s[i]).exp() * terms[i] + s[i] / 2 for i, w in enumerate(WEIGHT))
        torch.testing.assert_close(loss.detach(), want, rtol=1e-6, atol=0)
        loss.backward()
        by_s = torch.stack([-w * (-s[i]).exp() * terms[i] + 0.5 for i, w in enumerate(WEIGHT)])
        torch.testing.assert_close(module.log_variance.grad.double(), by_s, rtol=1e-5, atol=0)

    def test_a_removed_term_adds_nothing(self):
        student, teacher = logits("random", 9, 7)
        module = MCLDLoss(weight=(1.0, 0.0, 0.0), uncertainty_weighting=True)
        with torch.no_grad():
            module.log_variance.copy_(torch.tensor([0.0, 5.0, 5.0]))
        want = mcld_kernels.mcld_loss(student, teacher, weight=(1.0, 0.0, 0.0))
        torch.testing.assert_close(module(student, teacher), want, check_dtype=False, rtol=1e-6, atol=0)

    def test_it_finds_a_minimum(self):
        """Where a plain weight would run to 0 and below, the learned variance settles at twice the term."""
        student, teacher = logits("random", 9, 7)
        module = MCLDLoss(uncertainty_weighting=True)
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
        for _ in range(300):
            optimizer.zero_grad()
            module(student, teacher, labels(9, 7)).backward()
            optimizer.step()
        terms = torch.stack(module.terms(student, teacher, labels(9, 7))[1:])
        torch.testing.assert_close(module.log_variance.detach().exp().double(), 2 * terms, rtol=1e-2, atol=0)

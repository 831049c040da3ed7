"""info_nce: the reference against its definition in loops, each backend against the reference in fp64, and edges."""

import loops
import pytest
import torch
from cases import DTYPES, logits, short
from test_low_latency import NEEDS_MODULE, _Operations
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import mcld_kernels
from mcld_kernels import InfoNCELoss, backends, info_nce, reference

NAMES = ("anchors", "candidates", "temperature")


def soft(rows, classes, seed=0):
    """Soft labels (rows, classes) fp64, of which one row has no class."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(rows, classes, generator=generator, dtype=torch.float64)
    weights = torch.where(weights < 0.5, 0.0, weights)
    weights[1:2] = 0
    return weights / weights.sum(1, keepdim=True).clamp(min=1e-30)


def problem(n=9, m=14, d=6, seed=0):
    """Anchors, candidates, and labels of every kind for both."""
    generator = torch.Generator().manual_seed(seed + 7 * n + m)
    anchors, candidates = (torch.randn(k, d, generator=generator, dtype=torch.float64) for k in (n, m))
    candidates[: min(n, m)] += anchors[: min(n, m)]  # positives that matter
    hard = [torch.randint(5, (k,), generator=generator) for k in (n, m)]
    hard[0][::4], hard[1][1::5] = -100, -100
    return anchors, candidates, hard, [soft(n, 5, 1), soft(m, 5, 2)]


def labelled(pair):
    return {"anchor_target": pair[0], "candidate_target": pair[1]}


def cases_of(hard, weights):
    """Options that take different ways, with their labels."""
    return {
        "diagonal": {"offset": 3},
        "mask": {"offset": 3, "mask_same_class": True, **labelled(hard)},
        "soft mask": {"mask_same_class": True, **labelled(weights)},
        "label": {"positives": "label", **labelled(hard)},
        "soft": {"positives": "label", **labelled(weights)},
        "soft anchors": {"positives": "label", **labelled((weights[0], hard[1]))},
        "soft candidates": {"positives": "label", **labelled((hard[0], weights[1]))},
    }


CASES = list(cases_of([None] * 2, [None] * 2))


def evaluate(function, tensors, upstream, **options):
    """The loss and its gradients by `NAMES`; ``upstream`` holds at least as many factors as the loss has entries."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    loss = function(leaves[0], leaves[1], temperature=leaves[2], **options)
    loss.backward(upstream[: loss.numel()].reshape(loss.shape).to(loss.dtype))
    return dict(zip(("loss", *NAMES), [loss.detach(), *(x.grad for x in leaves)], strict=True))


class TestDefinition:
    @pytest.mark.parametrize("normalize", [True, False], ids=["unit", "dot"])
    @pytest.mark.parametrize("name", CASES)
    def test_the_reference_is_the_loops(self, name, normalize):
        anchors, candidates, hard, weights = problem(5, 9, 3)
        options = {**cases_of(hard, weights)[name], "normalize": normalize}
        lists = {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in options.items()}
        ours, theirs = lists.pop("anchor_target", None), lists.pop("candidate_target", None)

        def by_loops(rows, others, temperature=0.4):
            return loops.info_nce(rows, others, ours, theirs, temperature=temperature, **lists)

        each = reference.info_nce(anchors, candidates, temperature=0.4, reduction="none", **options)
        want = by_loops(anchors.tolist(), candidates.tolist())
        torch.testing.assert_close(
            each, torch.tensor([x or 0.0 for x in want], dtype=torch.float64), rtol=1e-12, atol=1e-12
        )
        for reduction in ("mean", "sum"):
            got = evaluate(
                reference.info_nce,
                (anchors, candidates, torch.tensor(0.4, dtype=torch.float64)),
                torch.ones(1),
                reduction=reduction,
                **options,
            )
            assert float(got["loss"]) == pytest.approx(loops.reduce(want, reduction), rel=1e-12)
            rows, others = anchors.tolist(), candidates.tolist()

            def total(*args, reduction=reduction):
                return loops.reduce(by_loops(*args), reduction)

            slopes = [
                loops.slopes(lambda x, total=total, others=others: total(x, others), rows),
                loops.slopes(lambda x, total=total, rows=rows: total(rows, x), others),
                loops.slopes(lambda t, total=total, both=(rows, others): total(*both, t[0][0]), [[0.4]])[0][0],
            ]
            for key, slope in zip(NAMES, slopes, strict=True):
                torch.testing.assert_close(got[key], torch.tensor(slope, dtype=torch.float64), rtol=1e-6, atol=1e-7)


# How a backend is run on the CPU: its tuning and the dtypes that are exact enough for 1e-10.
WAYS = {
    "torch": ("torch", {"low_latency": False, "chunk_bytes": 14 * 8 * 4}),
    "torch, whole": ("torch", {}),
    "torch, scaled": ("torch", {"low_latency": False, "scales_by_temperature": True}),
    "triton, flash": ("triton", {}),
    "triton, products": ("triton", {"flash_pitch": 16}),
    "triton, scaled": ("triton", {"scales_by_temperature": True}),
}
ALL_WAYS = pytest.mark.parametrize("way", WAYS)


def skip_without(backend):
    if (reason := backends.unavailable_reason(backend)) is not None:
        pytest.skip(f"backend {backend!r}: {reason}")
    if backend == "triton" and not backends.triton.interpreted():
        pytest.skip("the kernels are compiled here: tests marked gpu run them")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("temperature", [0.3, 0.01], ids=["fixed shift", "maximum"])
@pytest.mark.parametrize("name", CASES)
@ALL_WAYS
def test_fp64_is_the_reference(way, name, temperature):
    """Loss and gradients by both sides and the temperature, for every reduction, of rows of unit length or not."""
    backend, tuning = WAYS[way]
    skip_without(backend)
    anchors, candidates, hard, weights = problem()
    options = cases_of(hard, weights)[name]
    tensors = anchors, candidates, torch.tensor(temperature, dtype=torch.float64)
    upstream = torch.linspace(-0.5, 1.5, len(anchors), dtype=torch.float64)
    for reduction, normalize in (("mean", True), ("sum", False), ("none", True), ("none", False)):
        if backend == "triton" and (reduction, normalize) in (("sum", False), ("none", True)):
            continue  # the interpreter is slow, and these differ outside the kernels
        both = {**options, "reduction": reduction, "normalize": normalize}
        want = evaluate(reference.info_nce, tensors, upstream[-1:] if reduction != "none" else upstream, **both)
        with backends.tuned(**tuning):
            got = evaluate(
                lambda *args, **kwargs: info_nce(*args, backend=backend, **kwargs),
                tensors,
                upstream[-1:] if reduction != "none" else upstream,
                **both,
            )
            leaf = anchors.clone().requires_grad_()  # frozen candidates and a number: the whole-matrix path takes them
            frozen = info_nce(leaf, candidates, temperature=temperature, backend=backend, **both)
            frozen.backward((upstream[-1:] if reduction != "none" else upstream).reshape(frozen.shape))
        for key, value in want.items():
            torch.testing.assert_close(got[key], value, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(frozen.detach(), want["loss"], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(leaf.grad, want["anchors"], rtol=1e-10, atol=1e-12)


def unit_rows(x):
    return torch.nn.functional.normalize(x)


def hold_to_the_bar(backend, name, dtype, shape, device="cpu", draws=3, **options):
    """Twice eager's error at the dtype, of each anchor's loss and of the gradients, over several draws."""
    options = {"normalize": True, "reduction": "none", **options}
    temperature = 0.1 if options["normalize"] else 2.0
    stat = torch.float64 if dtype == torch.float64 else torch.float32
    totals = {key: [0.0, 0.0, 0.0] for key in ("loss", *NAMES)}
    for seed in range(draws):
        anchors, candidates, hard, weights = problem(*shape, seed)
        both = {**cases_of(hard, weights)[name], **options}
        exact = [x.to(dtype).double() for x in (anchors, candidates)]
        exact.append(torch.tensor(temperature, dtype=stat).double())
        upstream = torch.randn(shape[0], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        want = evaluate(reference.info_nce, exact, upstream, **both)
        unit = (unit_rows(x) if options["normalize"] else x for x in exact[:2])
        largest = (next(unit) @ next(unit).T).abs().amax(1) / temperature  # similarity of each anchor
        given = [x.to(dtype).to(device) for x in exact[:2]] + [exact[2].to(stat).to(device)]
        there = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in both.items()}
        eager = evaluate(reference.info_nce, given, upstream.to(device), **there)
        got = evaluate(
            lambda *args, **kwargs: info_nce(*args, backend=backend, **kwargs), given, upstream.to(device), **there
        )
        assert (got["loss"].dtype, got["anchors"].dtype, got["candidates"].dtype) == (stat, dtype, dtype)
        for key, value in want.items():
            # A similarity is off by the rounding of its exponent, which is relative to 1 / temperature.
            natural = float(value.norm()) + float(upstream.norm()) * (1 / temperature if key == "temperature" else 1)
            floor = (
                torch.finfo(got[key].dtype).eps * float(value.norm())
                + 16 * torch.finfo(stat).eps * natural / temperature
            )
            if key == "temperature":
                # One number, in which rounding may cancel: of exponentials and operands, times the similarities.
                floor += torch.finfo(dtype).eps / 2 * float((upstream * largest).norm()) / temperature
            errors = (*(float((x[key].double().cpu() - value).norm()) for x in (got, eager)), floor)
            totals[key] = [total + error**2 for total, error in zip(totals[key], errors, strict=True)]
    for key, (ours, theirs, floor) in totals.items():
        assert ours**0.5 <= 2 * theirs**0.5 + floor**0.5, (key, ours**0.5, theirs**0.5, floor**0.5)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("name", ["diagonal", "mask", "soft"])
@pytest.mark.parametrize("shape", [(3, 6, 3), (40, 70, 33), (70, 75, 64)], ids=str)
def test_torch_within_the_error_bar(shape, name, dtype):
    for options in ({}, {"normalize": False}):
        hold_to_the_bar("torch", name, dtype, shape, **options)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=short)
@pytest.mark.parametrize("name", ["diagonal", "label"])
@pytest.mark.parametrize("tuning", [{}, {"flash_pitch": 16}, {"scales_by_temperature": True}], ids=str)
def test_triton_within_the_error_bar(tuning, name, dtype):
    skip_without("triton")
    import triton_interpreter

    with triton_interpreter.faithful(), backends.tuned(**tuning):
        hold_to_the_bar("triton", name, dtype, (40, 150, 33), draws=1, normalize=name == "diagonal")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["torch", "triton", "cuda"])
def test_a_gpu_within_the_error_bar(backend, name, dtype):
    tensors = [torch.zeros(1, 1, dtype=dtype, device="cuda")] * 2
    if (reason := backends.unsupported_reason(backend, *tensors, False)) is not None:
        pytest.skip(f"backend {backend!r}: {reason}")
    for normalize in (True, False):
        hold_to_the_bar(backend, name, dtype, (300, 700, 128), "cuda", normalize=normalize)


@pytest.mark.parametrize("width", [64, 4096])
def test_any_width(width):
    hold_to_the_bar("torch", "diagonal", torch.float32, (33, 65, width), draws=1)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=NEEDS_MODULE)], ids=["torch", "compiled"])
@pytest.mark.parametrize("n", [1, 9, 70, 260])
def test_pairs_in_fp32(n, compiled):
    """Frozen candidates, as many as anchors: whole matrices, by the compiled module where it is built."""
    anchors, candidates = logits("random", n, 33, torch.float32)
    for temperature in (0.1, torch.tensor(0.3), 0.01):
        results = []
        for function, dtype in (
            (info_nce, torch.float32),
            (reference.info_nce, torch.float32),
            (reference.info_nce, torch.float64),
        ):
            leaf = anchors.detach().to(dtype, copy=True).requires_grad_()
            with backends.tuned(compiled=compiled):
                loss = function(leaf, candidates.to(dtype), temperature=temperature)
            loss.backward()
            results.append((loss.detach(), leaf.grad))
        for ours, eager, want in zip(*results, strict=True):
            errors = [float((x.double() - want).norm()) for x in (ours, eager)]
            assert errors[0] <= 2 * errors[1] + 1e-6 * (1 + float(want.norm())), (temperature, errors)


def test_a_small_loss_keeps_its_digits():
    """Where the positive dominates, a log-sum-exp less the positive would be rounding alone."""
    generator = torch.Generator().manual_seed(0)
    candidates = torch.randn(80, 128, generator=generator)
    anchors = candidates[:64] + 1e-3 * torch.randn(64, 128, generator=generator)
    want = reference.info_nce(anchors.double(), candidates.double(), temperature=0.05)
    for tuning in ({}, {"low_latency": False}):
        with backends.tuned(**tuning):
            got = info_nce(anchors, candidates, temperature=0.05, backend="torch")
        assert 0 < float(want) < 1e-5 and float(got) == pytest.approx(float(want), rel=1e-4)


class TestOperator:
    def arguments(self, positives="diagonal", reduction="mean", needed=(True, False), tensor=True):
        anchors, candidates, hard, _ = problem()
        anchors, candidates = anchors.float(), candidates.float()
        options = (1.0 if tensor else 0.2, positives, 0, False, True, reduction, -100, 1e-12, tensor)
        temperature = torch.tensor(0.2) if tensor else None
        return (anchors, candidates, hard[0], temperature, *options, "torch", *needed, hard[1], None)

    @pytest.mark.parametrize("needed", [(False, False), (True, False), (True, True)], ids=str)
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("positives", ["diagonal", "label"])
    def test_opcheck(self, positives, reduction, needed):
        operator = torch.ops.mcld_kernels.info_nce.default
        for tensor in (True, False):
            torch.library.opcheck(operator, self.arguments(positives, reduction, needed, tensor))

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("name", ["diagonal", "label", "soft"])
    def test_gradcheck(self, name, reduction):
        anchors, candidates, hard, weights = problem(4, 7, 3)
        options = {**cases_of(hard, weights)[name], "reduction": reduction}
        tensors = anchors, candidates, torch.tensor(0.3, dtype=torch.float64)

        def function(rows, others, temperature):
            return info_nce(rows, others, temperature=temperature, backend="torch", **options)

        assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in tensors])

    def test_flop(self):
        anchors, candidates, _, _ = problem()
        with FlopCounterMode(display=False) as counter:
            info_nce(anchors, candidates, backend="torch")
        assert counter.get_total_flops() == 2 * 9 * 14 * 6
        with FlopCounterMode(display=False) as counter:
            info_nce(anchors.requires_grad_(), candidates, backend="torch").backward()
        assert counter.get_total_flops() == 4 * 9 * 14 * 6
        with FlopCounterMode(display=False) as counter:
            info_nce(anchors, candidates.requires_grad_(), backend="torch").backward()
        assert counter.get_total_flops() == 6 * 9 * 14 * 6

    def test_compiles_whole_for_any_batch(self):
        counter = CompileCounterWithBackend("aot_eager")

        def loss(rows, others, temperature, reduction):
            return info_nce(rows, others, temperature=temperature.exp(), reduction=reduction)

        for reduction in ("mean", "none"):
            torch._dynamo.reset()
            counter.frame_count = 0
            compiled = torch.compile(loss, backend=counter, fullgraph=True)
            for n in (9, 5, 8, 7):
                results = []
                for function in (compiled, loss):
                    leaves = [x.float().requires_grad_() for x in problem(n, n + 3)[:2]]
                    leaves.append(torch.tensor(-1.0, requires_grad=True))
                    value = function(*leaves, reduction)
                    value.backward(torch.linspace(0.5, 1, value.numel()).reshape(value.shape))
                    results.append((value.detach(), *(x.grad for x in leaves)))
                torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
            assert counter.frame_count <= 2

    def test_autocast_changes_nothing(self):
        anchors, candidates = (x.float() for x in problem()[:2])
        want = info_nce(anchors, candidates)
        for tuning in ({}, {"low_latency": False}):
            with torch.autocast("cpu", dtype=torch.bfloat16), backends.tuned(**tuning):
                torch.testing.assert_close(info_nce(anchors, candidates), want)

    def test_number_of_operations(self):
        """With the gradient and without it; eager PyTorch takes 39 and 16 for the first, with autograd's own cost."""
        anchors, candidates, hard, _ = problem(64, 64, 32)
        anchors, candidates = anchors.float(), candidates.float()
        for options, most in (({}, (30, 19)), ({"positives": "label", "anchor_target": hard[0]}, (42, 31))):
            for with_grad, count in zip((True, False), most, strict=True):
                inputs = self.inputs(anchors, candidates, with_grad, options)
                with backends.tuned(compiled=False):
                    kernels = backends.kernel_set("torch", anchors, candidates)
                with _Operations() as seen:
                    kernels.info_nce_low_latency(inputs)(inputs)
                assert len(seen.names) <= count, (len(seen.names), seen.names)

    def inputs(self, anchors, candidates, with_grad, options):
        from mcld_kernels.info_nce_options import InfoNCEOptions
        from mcld_kernels.kernels import LossInputs

        values = InfoNCEOptions(0.1, options.get("positives", "diagonal"), 0, False, True, "mean", -100, 1e-12)
        return LossInputs(
            student=anchors,
            teacher=candidates,
            target=options.get("anchor_target"),
            weight=None,
            options=values,
            student_grad=with_grad,
            teacher_grad=False,
            labels_are_classes=True,
            extra={"candidate_target": None, "anchor_weight": None},
        )


class TestDerivatives:
    """Beyond backward(): right, or an error with the way out."""

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_second_ones_raise(self, reduction):
        anchors, candidates, _, _ = problem()
        leaves = anchors.requires_grad_(), candidates.requires_grad_()
        value = info_nce(*leaves, reduction=reduction, backend="torch").sum()
        for gradient in torch.autograd.grad(value, leaves, create_graph=True):
            with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
                gradient.square().sum().backward(retain_graph=True)

    def test_transforms(self):
        anchors, candidates, _, _ = problem()
        directions = torch.randn_like(anchors), torch.randn_like(candidates)
        for reduction in ("mean", "none"):

            def fast(rows, others, r=reduction):
                return info_nce(rows, others, reduction=r, backend="torch")

            def slow(rows, others, r=reduction):
                return reference.info_nce(rows, others, reduction=r)

            by_anchors = [
                torch.func.jvp(lambda x, f=f: f(x, candidates), (anchors,), directions[:1]) for f in (fast, slow)
            ]
            torch.testing.assert_close(*by_anchors, rtol=1e-10, atol=1e-12)
            jacobians = [torch.func.jacrev(f, argnums=(0, 1))(anchors, candidates) for f in (fast, slow)]
            torch.testing.assert_close(*jacobians, rtol=1e-10, atol=1e-12)
        both = [torch.func.jvp(f, (anchors, candidates), directions) for f in (info_nce, reference.info_nce)]
        torch.testing.assert_close(*both, rtol=1e-10, atol=1e-12)
        with pytest.raises(NotImplementedError, match="reduction='mean' has"):
            torch.func.jvp(fast, (anchors, candidates), directions)
        stacked = torch.stack((anchors, 2 * anchors + 1))
        got = torch.func.vmap(torch.func.grad(lambda rows: info_nce(rows, candidates)))(stacked)
        want = torch.stack([torch.func.grad(lambda rows: reference.info_nce(rows, candidates))(x) for x in stacked])
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


class TestModule:
    def test_it_is_the_function(self):
        anchors, candidates, hard, _ = problem()
        module = InfoNCELoss(temperature=0.3, positives="label", reduction="sum")
        want = info_nce(anchors, candidates, temperature=0.3, positives="label", reduction="sum", **labelled(hard))
        assert torch.equal(module(anchors, candidates, *hard), want)
        assert "temperature=0.3" in repr(module) and "positives='label'" in repr(module)
        with pytest.raises(ValueError, match="temperature"):
            InfoNCELoss(temperature=-1)

    def test_a_learnable_temperature_stays_positive(self):
        anchors, candidates, _, _ = problem()
        module = InfoNCELoss(temperature=0.5, learnable=True).double()
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        before = module(anchors, candidates)
        for _ in range(5):
            optimizer.zero_grad()
            module(anchors, candidates).backward()
            optimizer.step()
        assert float(module(anchors, candidates)) < float(before) and "log_temperature" in module.state_dict()
        assert "learnable=True" in repr(module)

    def test_a_parameter_and_a_buffer(self):
        anchors, candidates, _, _ = problem()
        parameter = torch.nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
        module = InfoNCELoss(temperature=parameter)
        module(anchors, candidates).backward()
        assert parameter.grad is not None and list(module.parameters()) == [parameter]
        assert "temperature_tensor" in InfoNCELoss(temperature=torch.tensor(0.2)).state_dict()


def test_the_reference_has_second_derivatives():
    anchors, candidates, _, _ = problem(3, 5, 2)
    assert torch.autograd.gradgradcheck(
        lambda rows, others: mcld_kernels.info_nce(rows, others, temperature=0.7, backend="reference"),
        (anchors.requires_grad_(), candidates.requires_grad_()),
    )


def test_inputs_of_other_dtypes_are_computed_in_the_wider_one():
    anchors, candidates = logits("random", 12, 7)
    leaf = anchors.to(torch.bfloat16).requires_grad_()
    value = info_nce(leaf, candidates.float(), backend="torch")
    value.backward()
    want = reference.info_nce(leaf.detach().float(), candidates.float())
    torch.testing.assert_close(value.detach(), want)
    assert value.dtype == torch.float32 and leaf.grad.dtype == torch.bfloat16

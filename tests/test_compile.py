"""torch.compile without graph breaks or needless recompiling, and no host synchronisation anywhere."""

import pytest
import torch
from cases import WEIGHT, labels, logits, options_of
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import mcld_kernels
from mcld_kernels import InfoNCELoss, MCLDLoss, TeacherQueue, backends, ops, reference
from mcld_kernels.kernels import LossInputs
from mcld_kernels.losses import info_nce, mcld
from mcld_kernels.losses.module_options import Fixed, Option

BACKENDS = ("reference", "torch")
OPTIONS = {
    "default": {},
    "symmetric": {"direction": "symmetric", "mask_same_class": True, "present_only": True},
    "cold": {"temperature": (0.005, 0.1, 0.01), "weight": WEIGHT},
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(function, student, teacher, target):
    student = student.clone().requires_grad_()
    loss = function(student, teacher, target)
    loss.backward()
    return loss.detach(), student.grad


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_compiled_is_eager(options, backend):
    def loss(student, teacher, target):
        return mcld_kernels.mcld_loss(student, teacher, target, backend=backend, **options)

    student, teacher = logits("random", 9, 7, torch.float32)
    target = labels(9, 7, ignored=0.2)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    close(step(compiled, student, teacher, target), step(loss, student, teacher, target))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_changing_batch_size_recompiles_once(backend):
    """The second size makes the batch dynamic; all others, odd ones too, run the same program."""

    def loss(student, teacher, target):
        return mcld_kernels.mcld_loss(student, teacher, target, backend=backend)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for batch in (16, 9, 31, 16, 5, 64, 33):
        student, teacher = logits("random", batch, 7, torch.float32)
        target = labels(batch, 7)
        close(step(compiled, student, teacher, target), step(loss, student, teacher, target))
    assert counter.frame_count <= 2


def test_a_new_epoch_does_not_recompile():
    module = MCLDLoss(warmup=10, weight=WEIGHT)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    student, teacher = logits("random", 9, 7, torch.float32)
    target = labels(9, 7)
    losses = []
    for epoch in (0, 1, 2.5, 7, 10, 30):
        module.set_epoch(epoch)
        got = step(compiled, student, teacher, target)
        close(got, step(module, student, teacher, target))
        losses.append(float(got[0]))
    assert losses[:5] == sorted(set(losses[:5])) and losses[5] == losses[4]
    assert counter.frame_count == 1


def test_a_weight_tensor_does_not_recompile():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mcld_kernels.mcld_loss, backend=counter, fullgraph=True)
    student, teacher = logits("random", 9, 7, torch.float32)
    target = labels(9, 7)
    for scale in (1.0, 0.5, 0.0):
        weight = scale * torch.tensor(WEIGHT)
        got = compiled(student, teacher, target, weight=weight)
        close(got, mcld_kernels.mcld_loss(student, teacher, target, weight=weight))
    assert counter.frame_count == 1


def test_mutual_learning_compiles():
    def loss(student, teacher, target):
        return mcld_kernels.mcld_loss(student, teacher, target, direction="symmetric")

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, loss):
        student, teacher = logits("random", 9, 7, torch.float32)
        function(student.requires_grad_(), teacher.requires_grad_(), labels(9, 7)).backward()
        results.append((student.grad, teacher.grad))
    close(*results)


def test_inside_a_compiled_training_step():
    """With a network before it and another loss beside it, as a trainer compiles it."""
    model, criterion = torch.nn.Linear(5, 7), MCLDLoss(warmup=2)
    criterion.set_epoch(1)
    _, teacher = logits("random", 9, 7, torch.float32)
    x, target = torch.randn(9, 5), labels(9, 7)

    def loss():
        student = model(x)
        return torch.nn.functional.cross_entropy(student, target) + criterion(student, teacher, target)

    gradients = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        function().backward()
        gradients.append(model.weight.grad.clone())
    close(*gradients)


def test_what_is_traced_reads_no_descriptor(monkeypatch):
    """torch 2.6 traces neither those of a module's options nor `_make` and `_replace` of a NamedTuple."""
    modules, queue = (MCLDLoss(), InfoNCELoss()), TeacherQueue(16, 7)
    (student, teacher), target = logits("random", 9, 7, torch.float32), labels(9, 7)

    def refuse(option, *_):
        raise AssertionError(f"the descriptor {option.name} was read")

    for descriptor in (Option, Fixed):
        monkeypatch.setattr(descriptor, "__get__", refuse)
    for module in modules:
        assert module(student.requires_grad_(), teacher, target).isfinite()
    queue.enqueue(teacher, target)
    for function in (ops._Call.of, ops._forward_call, MCLDLoss._terms, info_nce.evaluate):
        assert not {"_make", "_replace"} & set(function.__code__.co_names), function


def test_terms_under_compile():
    student, teacher = logits("random", 9, 7, torch.float32)
    target = labels(9, 7)
    compiled = torch.compile(mcld_kernels.mcld_terms, backend="aot_eager", fullgraph=True)
    got, want = compiled(student, teacher, target), mcld_kernels.mcld_terms(student, teacher, target)
    assert type(got) is mcld_kernels.MCLDTerms
    close(tuple(got), tuple(want))


def test_bad_input_is_still_refused_under_compile():
    compiled = torch.compile(mcld_kernels.mcld_loss, backend="eager")
    with pytest.raises(ValueError, match="same shape"):
        compiled(torch.randn(4, 3), torch.randn(3, 3), torch.zeros(4, dtype=torch.int64))


def test_inductor():
    """One case through the whole compiler."""

    def loss(student, teacher, target):
        return 2 * mcld_kernels.mcld_loss(student * 0.5, teacher, target).square()

    student, teacher = logits("random", 9, 7, torch.float32)
    target = labels(9, 7)
    got = step(torch.compile(loss, fullgraph=True), student, teacher, target)
    close(got, step(loss, student, teacher, target))


class RefuseToWait(TorchDispatchMode):
    """Fails on operators that read a value back to the host, or whose shape depends on one."""

    FORBIDDEN = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "unique2", "is_nonzero", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__.strip("_")
        assert name not in [x.strip("_") for x in self.FORBIDDEN], f"{function} waits for the device"
        if name in ("index", "index_put"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), (
                f"{function} by a mask waits for the device"
            )
        return function(*args, **(kwargs or {}))


def run_all(student, teacher, target, weight, backend, **options):
    student = student.clone().requires_grad_()
    loss = mcld_kernels.mcld_loss(student, teacher, target, weight=weight, backend=backend, **options)
    loss.backward()


@pytest.mark.parametrize("needed", [(False, False), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_computation_waits_for_nothing(backend, options, needed, small_chunks):
    """On the CPU, where waiting costs nothing and shows nowhere, the operators themselves are watched.

    Behind the checks of arguments (which may read labels on the CPU) and behind the operator (which hides its own).
    """
    small_chunks(4, 9)
    student, teacher = (x.requires_grad_(w) for x, w in zip(logits("random", 9, 7, torch.float32), needed, strict=True))
    target, weight = labels(9, 7), torch.tensor(WEIGHT)
    options, _ = options_of(**options)
    with RefuseToWait():
        if backend == "reference":
            loss = reference.mcld.evaluate(student, teacher, target, weight, options).loss
            if any(needed):
                loss.backward()
        else:
            # The compiled pass of a CPU reads weights, which are there; a GPU goes by the operators.
            with torch.no_grad(), backends.tuned(compiled_contrast=False):
                inputs = LossInputs(
                    student=student,
                    teacher=teacher,
                    target=target,
                    weight=weight,
                    options=options,
                    student_grad=needed[0],
                    teacher_grad=needed[1],
                )
                mcld.compute(backends.kernel_set("torch", student, teacher), inputs)


def test_the_watch_sees_waiting():
    x = torch.tensor([1.0, 0.0])
    for wait in (x.sum().item, x.nonzero, lambda: x[x > 0], lambda: bool(x[0])):
        with pytest.raises(AssertionError, match="waits"), RefuseToWait():
            wait()


@pytest.mark.gpu
class TestOnAGpu:
    @pytest.fixture(params=["reference", "torch", "triton", "cuda"])
    def backend(self, request):
        if (why := backends.unavailable_reason(request.param)) is not None:
            pytest.skip(f"backend {request.param!r}: {why}")
        return request.param

    def inputs(self, batch=130, classes=70):
        student, teacher = logits("random", batch, classes, torch.float32, device="cuda")
        return student, teacher, labels(batch, classes, device="cuda")

    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_no_host_synchronisation(self, options, backend):
        student, teacher, target = self.inputs()
        weight = torch.tensor(WEIGHT, device="cuda")
        options = {k: v for k, v in options.items() if k != "weight"}
        run_all(student, teacher, target, weight, backend, **options)  # compiles and loads
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run_all(student, teacher, target, weight, backend, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_capture_in_a_graph(self, backend):
        student, teacher, target = self.inputs()
        student.requires_grad_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                (want,) = torch.autograd.grad(
                    mcld_kernels.mcld_loss(student, teacher, target, backend=backend), student
                )
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = mcld_kernels.mcld_loss(student, teacher, target, backend=backend)
            (gradient,) = torch.autograd.grad(loss, student)
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(gradient, want)

    def test_the_current_stream_is_used(self, backend):
        student, teacher, target = self.inputs()
        want = mcld_kernels.mcld_loss(student, teacher, target, backend=backend)
        late = torch.empty_like(student)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            late.copy_(student)
            got = mcld_kernels.mcld_loss(late, teacher, target, backend=backend)
        stream.synchronize()
        torch.testing.assert_close(got, want)

    def test_bad_labels_are_nan_and_read_nothing_out_of_bounds(self, backend):
        student, teacher, target = self.inputs()
        for bad in (70, -1, 2**40, -(2**40)):
            target[3] = bad
            terms = mcld_kernels.mcld_terms(student, teacher, target, present_only=True, backend=backend)
            torch.cuda.synchronize()
            assert torch.isfinite(terms.instance)
            assert torch.isnan(terms.sample) and torch.isnan(terms.category) and torch.isnan(terms.loss)

    @pytest.mark.parametrize("batch", [64, 130])
    def test_inductor_on_a_gpu(self, batch, backend):
        def loss(student, teacher, target):
            return mcld_kernels.mcld_loss(student, teacher, target, backend=backend)

        values = self.inputs(batch)
        close(step(torch.compile(loss, fullgraph=True), *values), step(loss, *values))

"""The "cuda" backend on a GPU: the grid of tests/test_csrc_host.py on hardware, and tests that need hardware.

Launches on the current stream and device, graph capture, no synchronization, large tiles and large offsets.
"""

import cases
import pytest
import torch

import mcld_kernels
from mcld_kernels import backends, replay
from mcld_kernels.backends import cuda

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 7), (5, 1), (65, 130), (131, 37), (257, 1000), (1031, 101), (2050, 517))


@pytest.fixture(autouse=True)
def available():
    reason = cuda.unavailable_reason()
    if reason is not None:
        pytest.skip(f"backend 'cuda' cannot run: {reason}")
    logits = torch.zeros(2, 3, device="cuda")
    reason = cuda.unsupported_reason(logits, logits)
    if reason is not None:
        pytest.skip(reason)


PATHS = {
    "low latency": {},
    "flash": {"low_latency_limit": 0},
    "two products": {"low_latency_limit": 0, "flash_row_bytes": 0},
}


@pytest.fixture(params=PATHS)
def path(request):
    with backends.tuned(**PATHS[request.param]):
        yield request.param


def logits(batch, classes, dtype=torch.bfloat16):
    student, teacher = cases.logits("random", batch, classes, dtype, device="cuda")
    return student, teacher, cases.labels(batch, classes, device="cuda")


@pytest.mark.parametrize("options", cases.KERNEL_OPTIONS.values(), ids=cases.KERNEL_OPTIONS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.short)
@pytest.mark.parametrize(("batch", "classes"), SHAPES)
def test_against_the_truth(path, batch, classes, dtype, options, poison):
    cases.check("cuda", "cuda", "random", batch, classes, dtype, draws=2, ignored=0.1, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.short)
@pytest.mark.parametrize("kind", cases.KINDS[1:])
def test_kinds_of_logits(path, kind, dtype, poison):
    cases.check("cuda", "cuda", kind, 300, 141, dtype, draws=2, mask_same_class=True)
    cases.check("cuda", "cuda", kind, 300, 141, dtype, draws=2, direction="symmetric")


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_float32_matmul_precision(path, precision, matmul_precision):
    """Eager's own products follow the same setting on a GPU; at "medium" they may take tf32, where ours take bf16."""
    matmul_precision(precision)
    student, teacher, target = logits(1031, 300, torch.float32)
    want = cases.truth(student, teacher, target)
    bars = {"highest": 1e-5, "high": 4e-3, "medium": 3e-2}
    got = cases.run("cuda", student, teacher, target)
    assert float((got.student.double() - want.student).norm() / want.student.norm()) <= bars[precision]


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.short)
@pytest.mark.parametrize("direction", ["student", "teacher", "symmetric"])
def test_large_tiles_in_chunks(dtype, direction, poison):
    with backends.tuned(chunk_bytes=8 << 20):
        cases.check("cuda", "cuda", "random", 3001, 1003, dtype, draws=1, direction=direction)


def test_repeats_bitwise(path):
    student, teacher, target = logits(700, 333)
    first, *others = (cases.run("cuda", student, teacher, target, direction="symmetric") for _ in range(5))
    for other in others:
        assert torch.equal(first.loss, other.loss) and torch.equal(first.student, other.student)


def test_graph_capture_replays_on_new_logits(path):
    student, teacher, target = logits(300, 130)
    static = student.clone().requires_grad_()

    def step():
        static.grad = None
        mcld_kernels.mcld_loss(static, teacher, target, backend="cuda").backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    with torch.no_grad():
        static.copy_(teacher)
    graph.replay()
    want = cases.run("cuda", teacher, teacher, target)
    assert torch.equal(static.grad, want.student)


def test_no_synchronization_and_the_current_stream(path):
    student, teacher, target = logits(300, 130)
    want = cases.run("cuda", student, teacher, target)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):
            loss = mcld_kernels.mcld_loss(student, teacher, target, backend="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side.synchronize()
    assert torch.equal(loss, want.loss)


def test_a_replay_runs_on_the_stream_of_its_call(path):
    """The first call, the recorded one and a replay on one stream, then a replay on another, with late logits."""
    student, teacher, target = logits(300, 130)
    # Another test may have recorded calls of this kind.
    replay._REPLAYS.clear()
    cuda._kernel_set.cache_clear()
    one, other = torch.cuda.Stream(), torch.cuda.Stream()
    late = torch.empty_like(student)
    results, kinds = [], []
    for stream in (one, one, one, other):
        late.fill_(torch.nan)  # what another stream would read
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            late.copy_(student)
            leaf = late.detach().requires_grad_()
            loss = mcld_kernels.mcld_loss(leaf, teacher, target, backend="cuda")
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
            kinds.append(type(loss.grad_fn).__name__)
        stream.synchronize()
    assert len(replay._REPLAYS) == 1 and kinds == ["_EagerLossBackward"] * 2 + ["_PlainLossBackward"] * 2
    for again in results[1:]:
        assert all(torch.equal(x, first) for x, first in zip(again, results[0], strict=True))
    assert torch.isfinite(results[0][0]) and torch.isfinite(results[0][1]).all()


def test_offsets_past_32_bits():
    """65600 x 65600 similarities: element numbers pass 2^32. The truth is the torch backend in fp32."""
    batch = 65600
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    student, teacher = (torch.randn(batch, 300, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    options = {"weight": (1.0, 0.0, 0.0)}
    got = cases.run("cuda", student, teacher, **options)
    want = cases.run("torch", student.float(), teacher.float(), **options)
    assert float((got.loss - want.loss).abs()) <= 1e-3 * float(want.loss)
    error = (got.student.float() - want.student.float()).norm() / want.student.float().norm()
    assert float(error) <= 2e-2


def test_bad_labels_make_their_terms_nan(path):
    student, teacher, target = logits(300, 130)
    target[7] = 130
    terms = mcld_kernels.mcld_terms(student, teacher, target, backend="cuda")
    assert terms.sample.isnan() and not terms.instance.isnan() and not terms.category.isnan()


def test_explains_itself():
    student, teacher, _ = logits(8, 10)
    assert backends.explain(student, teacher)["cuda"] == "can run"
    assert "fp64" in backends.explain(student.double(), teacher.double())["cuda"]
    assert "CUDA tensors" in backends.explain(student.cpu(), teacher.cpu())["cuda"]

"""The benchmark's harness: counts, gate, providers, memory and clocks."""

import re
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("psutil", reason="psutil is not installed: the benchmark is not tested")
pytest.importorskip("rich", reason="rich is not installed: the benchmark is not tested")
pytest.importorskip("matplotlib", reason="matplotlib, with pillow, is not installed: the benchmark is not tested")
sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench is not installed

from bench import run
from bench.harness import (
    closed_form,
    gate,
    goals,
    losses,
    mcld_chunks,
    memory,
    peers,
    providers,
    report,
    timing,
)
from bench.harness.cases import MODES, TERMS, Case, default_grid, inputs
from mcld_kernels import installation, reference

CPU = torch.device("cpu")
TERM_SETS = (("instance",), ("sample",), ("category",), ("instance", "sample"), TERMS)


def verdict_of(case, tensors, result):
    exact = gate.truth(case, *tensors)
    of_eager = gate.error(eager(case, *tensors), exact)
    return gate.judge(gate.error(result, exact), gate.allowed_error(case, *tensors, exact, of_eager))


def eager(case, student, teacher, target):
    return providers.all_providers()["reference"].make(case, student, teacher, target)()


@pytest.mark.parametrize(
    "terms, mode, flop",
    [
        (("instance",), "forward", 2 * 30 * 30 * 7),
        (("instance", "sample"), "forward-backward", 4 * 30 * 30 * 7),  # one shared matrix
        (("category",), "forward-backward", 4 * 7 * 7 * 30),
        (TERMS, "forward-backward", 4 * 30 * 30 * 7 + 4 * 7 * 7 * 30),
    ],
)
def test_flop_count(terms, mode, flop):
    assert Case(30, 7, terms=terms, mode=mode).flop == flop


def test_byte_count_follows_the_dtype():
    assert Case(10, 3, "float32").bytes == 3 * 10 * 3 * 4
    assert Case(10, 3, "bfloat16", mode="forward").bytes == 2 * 10 * 3 * 2


@pytest.mark.parametrize(
    "bad",
    [
        {"batch": 0},
        {"classes": -1},
        {"dtype": "int8"},
        {"terms": ()},
        {"terms": ("rows",)},
        {"mode": "backward"},
        {"loss": "nothing"},
        {"loss": "kd", "terms": ("instance",)},
    ],
)
def test_a_case_rejects_bad_values(bad):
    with pytest.raises(ValueError, match="must be"):
        Case(**({"batch": 4, "classes": 4} | bad))


def test_the_default_grids_cover_the_regimes():
    on_gpu = default_grid(torch.device("cuda"))
    regimes = {name for case in on_gpu for name in goals.regimes({**vars(case), "terms": list(case.terms)})}
    assert regimes == {goal.regime for goal in goals.GOALS}
    assert len(set(on_gpu)) == len(on_gpu)
    assert all(case.batch <= 4096 for case in default_grid(CPU))


@pytest.mark.parametrize("terms", TERM_SETS, ids="+".join)
@pytest.mark.parametrize("mode", MODES)
def test_the_chunked_truth_is_the_reference(terms, mode):
    case = Case(23, 17, "float64", terms, mode)
    student, teacher, target = inputs(case, CPU)
    five_rows = 5 * 8 * 23  # the last chunk is ragged
    loss, gradient = mcld_chunks.loss_and_gradient(case, student, teacher, target, torch.float64, five_rows)
    expected, expected_gradient = eager(case, student, teacher, target)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    if mode == "forward":
        assert gradient is None
    else:
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eager_in_chunks_errs_as_eager_does(dtype):
    case = Case(150, 40, dtype)
    tensors = inputs(case, CPU)
    exact = gate.truth(case, *tensors)
    whole = gate.error(eager(case, *tensors), exact)
    chunks = gate.eager_error(case, *tensors, exact)
    assert chunks.gradient == pytest.approx(whole.gradient, rel=0.3)
    assert chunks.gradient > (1e-3 if dtype == "bfloat16" else 1e-8)


class TestGate:
    case = Case(60, 20)

    def verdict(self, loss=1.0, gradient=1.0, case=case):
        tensors = inputs(case, CPU)
        exact = gate.truth(case, *tensors)
        result = eager(case, *tensors)
        allowed = gate.allowed_error(case, *tensors, exact, gate.error(result, exact))
        changed = (result[0] * loss, result[1] * gradient)
        return gate.judge(gate.error(changed, exact), allowed)

    def test_eager_itself_passes(self):
        assert self.verdict().passed and self.verdict().ratio <= 1

    @pytest.mark.parametrize("change", [{"loss": 1 + 1e-4}, {"gradient": 1 + 1e-4}, {"gradient": -1.0}])
    def test_a_wrong_result_fails(self, change):
        verdict = self.verdict(**change)
        assert not verdict.passed and verdict.ratio > 1

    @pytest.mark.parametrize("change", [{"loss": float("nan")}, {"gradient": float("nan")}, {"loss": float("inf")}])
    def test_a_result_that_is_not_finite_fails(self, change):
        assert not self.verdict(**change).passed

    def test_half_precision_allows_its_own_rounding_and_no_more(self):
        half = Case(60, 20, "bfloat16")
        assert self.verdict(gradient=1 + 1e-3, case=half).passed
        assert not self.verdict(gradient=1 + 5e-2, case=half).passed

    def test_if_eager_is_not_finite_only_the_floor_applies(self):
        tensors = inputs(self.case, CPU)
        broken = gate.Error(float("inf"), float("nan"))
        allowed = gate.allowed_error(self.case, *tensors, gate.truth(self.case, *tensors), broken)
        assert allowed == gate.Error(gate.LOSS_FLOOR["float32"], gate.GRADIENT_FLOOR["float32"])

    def test_a_missing_gradient_is_a_fault(self):
        exact = gate.truth(self.case, *inputs(self.case, CPU))
        with pytest.raises(ValueError, match="none"):
            gate.error((exact.loss, None), exact)

    @pytest.mark.parametrize("terms", [("instance",), TERMS], ids="+".join)
    @pytest.mark.parametrize("classes", [1, 10, 100, 1000])
    @pytest.mark.parametrize("name", ["torch", "library"])
    def test_a_batch_of_one_has_a_zero_gradient_and_passes(self, terms, classes, name):
        case = Case(1, classes, terms=terms)
        tensors = inputs(case, CPU)
        verdict = verdict_of(case, tensors, providers.all_providers()[name].make(case, *tensors)())
        assert verdict.passed, verdict

    def test_a_batch_of_one_with_a_gradient_fails(self):
        case = Case(1, 100, terms=("instance",))
        tensors = inputs(case, CPU)
        wrong = torch.zeros(()), torch.full((1, 100), 1e-3)
        assert not verdict_of(case, tensors, wrong).passed
        assert not verdict_of(case, tensors, (torch.tensor(0.1), torch.zeros(1, 100))).passed

    @pytest.mark.parametrize("batch, classes", [(1, 100), (2, 100), (60, 20)])
    def test_medium_precision_allows_operands_in_bf16(self, batch, classes, matmul_precision):
        """Eager does not take bf16 operands at every shape; a backend that does is not wrong."""
        case = Case(batch, classes)
        tensors = inputs(case, CPU)
        operands = [x.bfloat16().float() for x in tensors[:2]]
        result = eager(case, *operands, tensors[2])
        assert batch == 1 or not verdict_of(case, tensors, result).passed
        matmul_precision("medium")
        assert verdict_of(case, tensors, result).passed
        assert not verdict_of(case, tensors, (result[0], 1.1 * result[1] + 0.01)).passed


@pytest.mark.parametrize("terms", TERM_SETS, ids="+".join)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("attend", [closed_form.matrix, closed_form.flash])
def test_the_library_paths_pass_the_gate(terms, dtype, attend):
    case = Case(75, 37, dtype, terms)
    tensors = inputs(case, CPU)
    verdict = verdict_of(case, tensors, closed_form.loss_and_gradient(case, *tensors, attend))
    assert verdict.passed, verdict


def test_the_torch_backend_keeps_the_bar_where_a_column_is_long():
    """Sums over the batch that are not pairwise lose an order of magnitude here."""
    case = Case(16384, 64, terms=("category",))
    tensors = inputs(case, CPU)
    verdict = verdict_of(case, tensors, providers.all_providers()["torch"].make(case, *tensors)())
    assert verdict.passed, verdict


@pytest.mark.parametrize("peer", [peer for peer in peers.PEERS if not peer.cuda_only], ids=lambda peer: peer.name)
def test_the_peers_compute_the_instance_term(peer):
    case = Case(40, 12, "float64", ("instance",))
    student, teacher, target = inputs(case, CPU)
    loss = peer.build(case.temperature)(student, teacher)
    expected = reference.mcld_loss(student, teacher, weight=case.weight)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("peer", [peer for peer in peers.PEERS if not peer.cuda_only], ids=lambda peer: peer.name)
def test_the_peers_memory_is_predicted(peer):
    case = Case(150, 20, terms=("instance",))
    known = providers.all_providers()[peer.name]
    step = known.make(case, *inputs(case, CPU))
    step()
    assert 0.8 <= known.extra_bytes(case) / memory.peak_extra(step, CPU)["allocator"] <= 3


@pytest.mark.parametrize(
    "loss, candidates", [("info_nce", 0), ("info_nce", 23), ("moco", 23), ("simclr", 0), ("supcon", 0)]
)
def test_peers_and_lines_of_embedding_losses_agree(loss, candidates):
    """Each provider of a loss of embeddings that is no backend, and the reasons of the others."""
    case = Case(6, 5, "float64", loss=loss, candidates=candidates)
    tensors = inputs(case, CPU)
    known = providers.all_providers()
    expected, gradient = known["reference"].make(case, *tensors)()
    names = ["library", *(peer.name for peer in peers.EMBEDDING_PEERS)]
    reasons = {name: known[name].unsupported_reason(case, *tensors[:2]) for name in names}
    of_loss = {"library", *(peer.name for peer in peers.EMBEDDING_PEERS if loss in peer.losses)}
    assert {name for name in names if reasons[name] is None} == of_loss, reasons
    assert all(known[name].extra_bytes(case) > 0 for name in names), "it is asked of every provider"
    for name in of_loss:
        got = known[name].make(case, *tensors)()
        torch.testing.assert_close(got, (expected, gradient), rtol=1e-6, atol=1e-9)


def test_every_provider_runs_or_has_a_reason():
    case = Case(300, 300)
    student, teacher, _ = inputs(case, CPU)
    reasons = {name: p.unsupported_reason(case, student, teacher) for name, p in providers.all_providers().items()}
    assert reasons["reference"] is reasons["torch"] is reasons["library"] is None
    assert "256 columns" in reasons["sdpa"]
    assert "instance-wise term alone" in reasons["info-nce"]
    # Interpreted or emulated on a CPU they have no speed.
    assert reasons["triton"] and reasons["cuda"] and reasons["hopper"]


def test_choosing_providers():
    assert [provider.name for provider in providers.choose("torch, reference")] == ["reference", "torch"]
    with pytest.raises(ValueError, match="nothing"):
        providers.choose("torch,nothing")


def test_a_provider_with_fields_of_its_tuning(monkeypatch):
    names = "triton:product_stages=4,torch:chunk_bytes=4096,hopper:hopper_skew=2+library_product=False,reference"
    assert [provider.name for provider in providers.choose(names)] == [
        "reference", "triton:product_stages=4", "torch:chunk_bytes=4096", "hopper:hopper_skew=2+library_product=False",
    ]  # fmt: skip
    assert not any(":" in provider.name for provider in providers.choose(None)), "of one call alone"
    chosen = []
    tuned = providers.backends.tuned
    monkeypatch.setattr(providers.backends, "tuned", lambda **fields: chosen.append(fields) or tuned(**fields))
    logits = torch.randn(4, 3)
    case = run.cases.Case(batch=4, classes=3)
    providers.choose("torch:chunk_bytes=4096")[0].make(case, logits, logits, torch.arange(4) % 3)()
    assert chosen == [{"hopper": False, "chunk_bytes": 4096}]
    wrong_fields = ("hopper:nothing=1", "hopper:hopper_skew=two", "hopper:hopper=True", "triton:product_stages=0",
                    "hopper:hopper_skew=-1", "hopper:hopper_cluster=3")  # fmt: skip
    for wrong in ("compile:x=1", "torch:", *wrong_fields):
        with pytest.raises(ValueError, match=wrong.partition(":")[0]):
            providers.choose(wrong)


def test_a_record_names_no_folder_of_the_machine():
    command, origin = installation.cuda_command(), installation.source()[0]
    assert Path(origin).is_absolute() and origin in command
    recorded = report.recordable({"reason": f"run `{command}`", "values": [1.0, float("nan")]})
    assert recorded == {"reason": f"run `{command.replace(origin, '.')}`", "values": [1.0, None]}


class TestMemory:
    def test_the_peak_of_a_known_step(self):
        def step():
            first = torch.ones(1000, 1000)  # 4 MB
            second = first + 1  # 8 MB
            del first
            return torch.ones(250, 1000) + second[:250]  # 4 + 1 + 1 MB

        assert memory.peak_extra(step, CPU)["allocator"] == pytest.approx(8e6, rel=0.01)

    def test_memory_held_before_does_not_count(self):
        before = torch.ones(1000, 1000)
        assert memory.peak_extra(lambda: before.add_(1), CPU)["allocator"] < 1e5

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from Linux's /proc")
    def test_resident_memory_agrees_where_allocations_are_large(self):
        peak = memory.peak_extra(lambda: torch.ones(20_000_000), CPU)  # 80 MB, which malloc gives back to the system
        assert peak["allocator"] == pytest.approx(80e6, rel=0.01)
        assert peak["resident"] == pytest.approx(80e6, rel=0.1)

    @pytest.mark.parametrize("terms", TERM_SETS, ids="+".join)
    @pytest.mark.parametrize("mode", MODES)
    def test_eager_is_predicted_from_above(self, terms, mode):
        case = Case(600, 500, terms=terms, mode=mode)
        step = providers.all_providers()["reference"].make(case, *inputs(case, CPU))
        measured = memory.peak_extra(step, CPU)["allocator"]
        assert 0.95 * measured <= losses.LOSSES["mcld"].eager_bytes(case) <= 3.2 * measured

    def test_a_step_that_would_not_fit_is_not_tried(self):
        assert memory.shortage(1 << 20, CPU) is None
        assert re.search(r"about 1024\.0 GiB", memory.shortage(1 << 40, CPU))


class TestClocks:
    def test_a_sample_is_the_time_of_one_step(self):
        sample = timing.cpu_sample(lambda: time.sleep(3e-3))
        assert 3e-3 <= sample() < 50e-3

    def test_short_steps_are_repeated(self):
        count = 0

        def step():
            nonlocal count
            count += 1

        sample = timing.cpu_sample(step)
        assert sample() < 1e-4
        assert count > 100

    def test_a_sample_on_cuda_holds_no_allocation_of_the_driver(self, monkeypatch):
        """With a clock and an allocator in place of CUDA's: a step that finds its memory taken is timed again."""
        now, segments, missing = 0.0, 0, 0

        class Event:
            def __init__(self, enable_timing):
                pass

            def record(self):
                self.at = now

            def elapsed_time(self, end):
                return end.at - self.at

        def step():
            nonlocal now, segments, missing
            now += 2.0 + (100.0 if missing else 0.0)
            segments, missing = segments + (missing > 0), max(0, missing - 1)

        for name, value in {
            "Event": Event,
            "synchronize": lambda device: None,
            "get_device_properties": lambda device: None,
            "memory_stats": lambda device: {"segment.all.allocated": segments},
        }.items():
            monkeypatch.setattr(timing.torch.cuda, name, value)
        sample = timing.CudaClock(CPU).sample(step)
        assert sample() == pytest.approx(2e-3) and now == 2.0
        missing = 1  # another step has the memory in its cache
        assert sample() == pytest.approx(2e-3)
        missing = 1000  # a step that always allocates ends as well
        begin = now
        assert sample() == pytest.approx(102e-3) and now == begin + timing.MOST_TAKES * 102.0

    def test_rounds_are_interleaved_in_changing_order(self):
        order = []
        samples = {name: lambda name=name: order.append(name) or 1.0 for name in "abcd"}
        result = timing.interleave(samples, rounds=20, seconds=60)
        rounds = [order[i : i + 4] for i in range(0, 80, 4)]
        assert all(sorted(names) == list("abcd") for names in rounds)
        assert len({tuple(names) for names in rounds}) > 5
        assert all(len(times.samples) == 20 for times in result.values())

    def test_the_budget_ends_the_rounds_but_never_before_three(self):
        times = timing.interleave({"a": lambda: 1.0}, rounds=50, seconds=0)["a"]
        assert len(times.samples) == timing.MIN_ROUNDS

    def test_a_scattered_time_is_unsteady(self):
        assert timing.Times((1.0, 1.1, 1.2, 1.3)).is_steady
        assert not timing.Times((1.0, 1.0, 1.0, 2.0, 2.0)).is_steady
        assert timing.Times((1.0, 2.0)).record()["steady"] is False

"""TeacherQueue: what it holds after a sequence of enqueues, against a list; checkpoints; a training step."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import labels, logits

from mcld_kernels import TeacherQueue, mcld_loss, reference


def fill(queue, sizes, classes=4, seed=0):
    """Enqueue rows of these sizes; returns all rows, normalised, and labels in order."""
    generator = torch.Generator().manual_seed(seed)
    rows, targets = [], []
    for n in sizes:
        rows.append(torch.randn(n, classes, generator=generator))
        targets.append(torch.randint(classes, (n,), generator=generator))
        queue.enqueue(rows[-1], targets[-1])
    return F.normalize(torch.cat(rows)), torch.cat(targets)


def held(queue):
    """Rows and labels as a sorted list of tuples: in no order."""
    return sorted((*row, label) for row, label in zip(queue.candidates.tolist(), queue.target.tolist(), strict=True))


@pytest.mark.parametrize("sizes", [(2,), (3, 3), (7,), (3, 3, 3), (5, 5, 5, 1), (20,), (3, 16, 2), (0, 4)], ids=str)
def test_it_holds_the_last_rows(sizes):
    queue = TeacherQueue(7, 4)
    rows, targets = fill(queue, sizes)
    assert len(queue) == min(sum(sizes), 7) and queue.is_full == (sum(sizes) >= 7)
    want = sorted((*row, label) for row, label in zip(rows[-7:].tolist(), targets[-7:].tolist(), strict=True))
    for got, expected in zip(held(queue), want, strict=True):
        assert got == pytest.approx(expected, rel=1e-6)


def test_a_checkpoint_goes_on_where_it_was():
    queue = TeacherQueue(7, 4)
    fill(queue, (3, 3, 3))
    stream = io.BytesIO()
    torch.save(queue.state_dict(), stream)
    stream.seek(0)
    other = TeacherQueue(7, 4)
    other.load_state_dict(torch.load(stream))
    early = TeacherQueue(7, 4)
    fill(early, (2,))
    early_state = copy.deepcopy(early.state_dict())
    assert held(other) == held(queue) and len(other) == 7
    for each in (queue, other):
        fill(each, (2, 3), seed=5)
    assert held(other) == held(queue)
    other.load_state_dict(early_state)
    assert len(other) == 2 and held(other) == held(early)
    assert held(copy.deepcopy(queue)) == held(queue)
    queue.reset()
    assert len(queue) == 0 and queue.candidates.shape == (0, 4) and not queue.rows.any()


def test_dtype_and_labels():
    queue = TeacherQueue(4, 3, dtype=torch.bfloat16, ignore_index=-1)
    queue.enqueue(torch.tensor([[3.0, 0, 4], [0, 0, 0]], dtype=torch.float64))
    assert queue.candidates.dtype == torch.bfloat16 and queue.target.tolist() == [-1, -1]
    torch.testing.assert_close(queue.candidates.float(), torch.tensor([[0.6, 0, 0.8], [0, 0, 0]]), rtol=1e-2, atol=0)
    queue.enqueue(torch.ones(2, 3), torch.tensor([[0.2, 0.8, 0], [0, 0, 0]]))
    assert queue.target.tolist() == [-1, -1, 1, -1]
    assert "size=4, classes=3, dtype=bfloat16, filled=4" in repr(queue)


def test_rows_are_normalised_in_the_wider_dtype():
    rows = torch.randn(3, 5)
    queue = TeacherQueue(3, 5, dtype=torch.float64)
    queue.enqueue(rows)
    torch.testing.assert_close(queue.candidates, F.normalize(rows.double()), rtol=1e-14, atol=0)


def test_inputs_stay_and_get_no_graph():
    queue, rows = TeacherQueue(4, 3), torch.randn(2, 3, requires_grad=True)
    before = rows.detach().clone()
    queue.enqueue(rows)
    assert torch.equal(rows, before) and not queue.rows.requires_grad and not list(queue.parameters())


def test_in_a_training_step():
    """The loss with the queue is that with its rows, and a step before it is full has fewer candidates."""
    queue = TeacherQueue(16, 5)
    losses = []
    for step in range(4):
        student, teacher = logits("random", 6, 5, torch.float32, seed=step)
        target = labels(6, 5, seed=step)
        loss = mcld_loss(
            student.requires_grad_(), teacher, target, candidates=queue.candidates, candidate_target=queue.target
        )
        loss.backward()
        queue.enqueue(teacher, target)
        losses.append(loss)
        assert len(queue) == min(6 * (step + 1), 16)
    assert all(loss.isfinite() for loss in losses)


def test_written_without_reading_a_value():
    """Nothing that synchronizes with a device: no item, no nonzero."""
    from test_low_latency import _Operations

    queue = TeacherQueue(8, 3)
    for _ in range(4):
        with _Operations() as seen:
            queue.enqueue(torch.randn(3, 3), torch.zeros(3, dtype=torch.int64))
            assert queue.candidates.shape[0] == len(queue)
        assert not [name for name in seen.names if "local_scalar" in name or "nonzero" in name]


def fitting(size, classes=4):
    """A queue with two rows more than it keeps."""
    queue = TeacherQueue(size, classes)
    fill(queue, (size, 2), classes)
    return queue


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("made", ["on meta", "on the CPU", "moved to meta"])
def test_uninitialized_buffers_become_an_empty_queue(made):
    """As FSDP2 makes a module: on "meta", then to_empty, then reset_parameters of every module that has it."""
    queue = TeacherQueue(6, 4, device="meta" if made == "on meta" else None)
    if made == "moved to meta":
        fill(queue, (3,))
        queue = queue.to("meta")
        assert len(queue) == 3
    queue = torch.nn.Sequential(queue).to_empty(device="cpu")[0]
    if made == "on the CPU":  # where nothing tells it from a move with values
        with torch.no_grad():
            queue.rows.fill_(7), queue.labels.fill_(7), queue.pointer.fill_(4)
        queue.reset_parameters()
    assert len(queue) == 0 and not queue.rows.any() and queue.labels.tolist() == [-100] * 6
    rows, targets = fill(queue, (2,))
    assert torch.equal(queue.target, targets) and len(queue) == 2
    torch.testing.assert_close(queue.candidates, rows)


def copied_by_an_average(queue, other):
    """AveragedModel copies buffers without an average."""
    average = torch.optim.swa_utils.AveragedModel(torch.nn.Sequential(other, torch.nn.Linear(2, 2)))
    average.update_parameters(torch.nn.Sequential(queue, torch.nn.Linear(2, 2)))
    return average.module[0]


def copied_in_place(queue, other):
    """As torch.distributed.checkpoint loads: into the tensors of a state_dict."""
    for name, tensor in other.state_dict().items():
        tensor.copy_(queue.state_dict()[name])
    return other


def assigned(queue, other):
    for name, tensor in queue.named_buffers():
        other.register_buffer(name, tensor.clone())
    return other


@pytest.mark.parametrize("copy_of", [copied_by_an_average, copied_in_place, assigned])
def test_copied_buffers_are_a_copied_queue(copy_of):
    for sizes in ((6,), (6, 6), (6, 6, 6)):
        queue = TeacherQueue(12, 4)
        fill(queue, sizes)
        other = copy_of(queue, TeacherQueue(12, 4))
        assert len(other) == min(sum(sizes), 12) == len(queue) and other.is_full == queue.is_full
        for each in (queue, other):
            fill(each, (2,), seed=5)
        assert held(other) == held(queue) and f"filled={len(queue)}" in repr(other)
    with torch.no_grad():  # an emptier one
        other.pointer.fill_(1)
    assert len(other) == 1 and not other.is_full
    assert len(pickle.loads(pickle.dumps(other))) == len(copy.deepcopy(other)) == 1


def test_where_pointer_cannot_be_read_the_number_is_read_once_when_a_state_is_loaded():
    """The way that the documentation gives users of a GPU whose buffers were copied."""
    from test_low_latency import _Operations

    queue = copied_in_place(fitting(5), TeacherQueue(5, 4))
    with _Operations():
        assert len(queue) == 0
    queue.load_state_dict(queue.state_dict())
    with _Operations():
        assert len(queue) == 5 and held(queue) == held(fitting(5))


BROKEN = {
    "another size": (lambda state: TeacherQueue(6, 4).state_dict() | {"pointer": torch.tensor(6)}, "size mismatch"),
    "no rows": (lambda state: {k: v for k, v in state.items() if k != "rows"}, "Missing key.*rows"),
    "no pointer": (lambda state: {k: v for k, v in state.items() if k != "pointer"}, "Missing key.*pointer"),
    "a pointer of two": (lambda state: state | {"pointer": torch.tensor([1, 2])}, "size mismatch for pointer"),
    "an array": (lambda state: state | {"rows": state["rows"].numpy()}, "expected torch.Tensor"),
    "no values": (lambda state: {k: v.to("meta") for k, v in state.items()}, "meta"),
}


@pytest.mark.parametrize(
    ("case", "assign"),
    [(case, assign) for case in BROKEN for assign in (False, True) if not (case == "no values" and assign)],  # it fits
)
@pytest.mark.parametrize("filled", [0, 5])
def test_a_checkpoint_that_does_not_fit_changes_nothing(case, filled, assign):
    change, words = BROKEN[case]
    queue = TeacherQueue(12, 4)
    fill(queue, (filled,), seed=3)
    before = copy.deepcopy(queue)
    with pytest.raises(RuntimeError, match=words):
        queue.load_state_dict(change(fitting(12).state_dict()), assign=assign)
    for each in (queue, before):
        assert len(each) == filled and held(each) == held(before)
        fill(each, (3,), seed=5)
    assert held(queue) == held(before)


def test_a_checkpoint_without_labels_has_rows_without_a_label():
    state = fitting(7).state_dict()
    del state["labels"]
    queue = TeacherQueue(7, 4, ignore_index=-1)
    fill(queue, (5,), seed=3)
    assert queue.load_state_dict(state, strict=False).missing_keys == ["labels"]
    assert queue.target.tolist() == [-1] * 7 and torch.equal(queue.candidates, fitting(7).candidates)


def test_a_checkpoint_of_a_model_without_the_queue_leaves_it():
    queue = TeacherQueue(7, 4)
    fill(queue, (5,))
    before = held(queue)
    assert sorted(queue.load_state_dict({}, strict=False).missing_keys) == ["labels", "pointer", "rows"]
    assert len(queue) == 5 and held(queue) == before


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_checkpoint_can_be_assigned(device):
    queue = TeacherQueue(7, 4, device=device)
    queue.load_state_dict(fitting(7).state_dict(), assign=True)
    assert len(queue) == 7 and held(queue) == held(fitting(7))


def test_enqueue_can_be_compiled():
    queue, compiled_queue = TeacherQueue(7, 4), TeacherQueue(7, 4)

    @torch.compile(fullgraph=True, backend="eager")
    def step(rows, target):
        compiled_queue.enqueue(rows, target)
        return compiled_queue.candidates.sum()

    for seed in range(4):
        rows, target = logits("random", 3, 4, torch.float32, seed=seed)[0], labels(3, 4, seed=seed)
        queue.enqueue(rows, target)
        torch.testing.assert_close(step(rows, target), queue.candidates.sum())
        assert len(compiled_queue) == len(queue) and held(compiled_queue) == held(queue)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rows_whose_norm_overflows_are_nan_as_in_the_losses(dtype):
    large = torch.finfo(dtype).max / 2
    rows = torch.tensor([[large, large, 0.0], [float("inf"), 1, 2], [float("nan"), 1, 2], [3, 0, 4]], dtype=dtype)
    queue = TeacherQueue(4, 3, dtype=dtype)
    queue.enqueue(rows)
    assert queue.candidates[:3].isnan().all() and not queue.candidates[3].isnan().any()
    own = torch.eye(3, dtype=dtype)
    for function in (reference.mcld_loss, mcld_loss):
        assert function(own, own, weight=(1, 0, 0), candidates=queue.candidates).isnan()
        assert function(own, own, weight=(1, 0, 0), candidates=rows[:1]).isnan()
    queue.reset()
    queue.enqueue(torch.zeros(1, 3, dtype=dtype))
    assert not queue.candidates.any()


SOFT = {
    "negative": ([-5.0, -1, -2], "row 1 has a sum of -8 and a minimum of -5"),
    "negative with a sum of 1": ([1.5, -0.5, 0], "row 1 has a sum of 1 and a minimum of -0.5"),
    "NaN": ([float("nan"), 0, 1], "row 1 has a sum of nan"),
    "sum 9": ([3.0, 3, 3], "row 1 has a sum of 9 and a minimum of 3"),
}


@pytest.mark.parametrize("ignore_index", [-100, -1])
@pytest.mark.parametrize("case", SOFT)
def test_soft_labels_are_checked_as_by_the_losses(case, ignore_index):
    row, words = SOFT[case]
    queue, target = TeacherQueue(4, 3, ignore_index=ignore_index), torch.tensor([[0.2, 0.8, 0], row])
    rows = logits("random", 2, 3, torch.float32)[0]
    with pytest.raises(ValueError, match=f"target as soft labels must have rows >= 0.*{words}") as ours:
        queue.enqueue(rows, target)
    with pytest.raises(ValueError) as theirs:
        mcld_loss(rows, rows, target)
    assert str(ours.value) == str(theirs.value) and len(queue) == 0 and not queue.pointer


@pytest.mark.parametrize("ignore_index", [-100, -1])
@pytest.mark.parametrize("row", [*(row for row, _ in SOFT.values()), -7, 3], ids=str)
def test_bad_labels_that_cannot_be_read_make_the_loss_nan(row, ignore_index):
    """On a GPU, where reading them would synchronize: the label that is kept is no class and not ignored."""
    from test_low_latency import _Operations

    queue = TeacherQueue(4, 3, ignore_index=ignore_index)
    rows, hard = logits("random", 2, 3, torch.float32)[0], labels(2, 3)
    target = torch.tensor([[0.2, 0.8, 0], row]) if isinstance(row, list) else torch.tensor([1, row])
    with _Operations() as seen:
        queue.enqueue(rows, target)
    assert not [name for name in seen.names if "local_scalar" in name or "nonzero" in name]
    further = {"candidates": queue.candidates, "candidate_target": queue.target, "ignore_index": ignore_index}
    with _Operations():
        assert mcld_loss(rows, rows, hard, **further).isnan()
    assert queue.target[0] == 1


def test_labels_that_the_queue_wrote_need_its_ignore_index():
    queue, rows = TeacherQueue(4, 3, ignore_index=-1), logits("random", 2, 3, torch.float32)[0]
    queue.enqueue(rows)
    further = {"candidates": queue.candidates, "candidate_target": queue.target}
    with pytest.raises(ValueError, match="candidate_target holds -1; .* ignore_index=-100"):
        mcld_loss(rows, rows, labels(2, 3), **further)
    assert mcld_loss(rows, rows, labels(2, 3), ignore_index=-1, **further).isfinite()
    with pytest.raises(ValueError, match=r"target holds -100; .* ignore_index=-1"):
        queue.enqueue(rows, torch.tensor([0, -100]))
    queue.enqueue(rows[:1], torch.tensor([2]))
    with pytest.raises(ValueError, match="ignore_index must fit int64"):
        queue.ignore_index = 1 << 63
    queue.ignore_index = -100
    assert queue.labels.tolist() == [-100, -100, 2, -100]
    assert mcld_loss(rows, rows, labels(2, 3), candidates=queue.candidates, candidate_target=queue.target).isfinite()


@pytest.mark.gpu
def test_in_a_cuda_graph():
    queue = TeacherQueue(8, 3, device="cuda")
    rows = torch.randn(4, 3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="fill it before a CUDA graph"), torch.cuda.graph(graph):
        queue.enqueue(rows)
    for _ in range(2):
        queue.enqueue(rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        queue.enqueue(rows)
    rows.copy_(torch.eye(4, 3))
    graph.replay()
    graph.replay()
    torch.testing.assert_close(queue.candidates[:4].cpu(), torch.eye(4, 3))
    assert int(queue.pointer) == 16


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"size": 0}, ValueError, "size must be a whole number >= 1; got 0"),
        ({"classes": 2.5}, ValueError, "classes must be a whole number >= 1; got 2.5"),
        ({"dtype": torch.int64}, TypeError, "dtype must be floating"),
        ({"eps": -1.0}, ValueError, "eps must be a finite number >= 0"),
    ],
)
def test_bad_options_say_what_came(change, error, words):
    with pytest.raises(error, match=words):
        TeacherQueue(**{"size": 4, "classes": 3, **change})


@pytest.mark.parametrize(
    ("rows", "target", "error", "words"),
    [
        (torch.zeros(2, 4), None, ValueError, r"rows must have shape \(n, 3\); got \(2, 4\)"),
        (torch.zeros(2), None, ValueError, r"rows must have shape \(n, classes\)"),
        (torch.zeros(2, 3).long(), None, TypeError, "rows must be of a floating dtype"),
        (torch.zeros(2, 3, device="meta"), None, ValueError, "device cpu; got meta: move the queue"),
        (torch.zeros(2, 3), torch.zeros(3).long(), ValueError, r"target must have shape \(2,\)"),
        (torch.zeros(2, 3), torch.zeros(2), TypeError, r"dtype int64.*: pass target.long\(\)"),
        (torch.zeros(2, 3), torch.zeros(2).long().to_sparse(), TypeError, r"sparse_coo: pass target.to_dense\(\)"),
        (torch.zeros(2, 3), torch.eye(2, 3).to_sparse(), TypeError, r"sparse_coo: pass target.to_dense\(\)"),
        (torch.zeros(2, 3), torch.eye(3), ValueError, r"soft labels must have shape \(2, classes\); got \(3, 3\)"),
        (torch.zeros(2, 3), torch.eye(2, 3).requires_grad_(), ValueError, r"pass target.detach\(\)"),
        (torch.zeros(2, 3), torch.tensor([0, -7]), ValueError, "target holds -7; labels must be in .* or equal"),
        (torch.zeros(2, 3), [0, 1], TypeError, r"must be a tensor of labels .* torch.as_tensor\(target\)"),
    ],
)
def test_bad_rows_say_what_came(rows, target, error, words):
    queue = TeacherQueue(4, 3)
    with pytest.raises(error, match=words):
        queue.enqueue(rows, target)
    assert len(queue) == 0

"""TeacherQueue: what it holds after a sequence of enqueues, against a list; checkpoints; a training step."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from cases import labels, logits

from mcld_kernels import TeacherQueue, mcld_loss


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
        (torch.zeros(2, 3), [0, 1], TypeError, r"must be a tensor of labels .* torch.as_tensor\(target\)"),
    ],
)
def test_bad_rows_say_what_came(rows, target, error, words):
    queue = TeacherQueue(4, 3)
    with pytest.raises(error, match=words):
        queue.enqueue(rows, target)
    assert len(queue) == 0

"""info_nce against public implementations, to 1e-6 in fp64: loss and gradients, for what each of them computes."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision_shim
from test_info_nce import problem

from mcld_kernels import TeacherQueue, info_nce

PUBLIC = {"rtol": 1e-6, "atol": 1e-9}
BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch"])


def same(ours, theirs, *tensors):
    """Both functions give one loss and one gradient by each tensor."""
    results = []
    for function in (ours, theirs):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        loss = function(*leaves)
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in leaves)])
    torch.testing.assert_close(*results, **PUBLIC)


@BACKENDS
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_info_nce_pytorch(reduction, backend):
    """Positives by pairs; its explicit negatives are further candidates, of which an anchor has no other positive."""
    module = pytest.importorskip("info_nce")
    rows, keys, *_ = problem(8, 8, 5)
    options = {"temperature": 0.2, "reduction": reduction}

    def ours(x, y):
        return info_nce(x, y, backend=backend, **options).sum()

    same(ours, lambda x, y: module.info_nce(x, y, **options).sum(), rows, keys)
    negatives = torch.randn(6, 5, dtype=torch.float64)
    one_class = torch.zeros(8, dtype=torch.int64)
    theirs_class = torch.cat((one_class, one_class[:6] + 1))

    def masked(x, y, z):
        return info_nce(
            x, torch.cat((y, z)), anchor_target=one_class, candidate_target=theirs_class, mask_same_class=True,
            backend=backend, **options,
        ).sum()  # fmt: skip

    same(masked, lambda x, y, z: module.info_nce(x, y, z, **options).sum(), rows, keys, negatives)


@BACKENDS
def test_lightly_with_its_memory_bank(backend):
    """The keys of the batch are no negatives of one another there: one class, which the mask drops."""
    pytest.importorskip("lightly", reason="lightly is not installed")
    torchvision_shim.install()
    from lightly.loss import NTXentLoss

    torch.manual_seed(0)
    theirs = NTXentLoss(temperature=0.2, memory_bank_size=(12, 5)).double()
    theirs.memory_bank.bank = F.normalize(theirs.memory_bank.bank)  # it begins with rows that are unit in fp32
    queue = TeacherQueue(12, 5, dtype=torch.float64)
    queue.enqueue(theirs.memory_bank.bank)
    for seed in range(4):  # its bank is filled by steps of the batch, and so is the queue
        rows, keys, *_ = problem(6, 6, 5, seed)
        bank = theirs.memory_bank.bank.clone()
        torch.testing.assert_close(queue.candidates.sum(0), bank.sum(0), rtol=1e-6, atol=1e-9)
        one_class = torch.zeros(6, dtype=torch.int64)
        other = torch.cat((one_class, torch.ones(12, dtype=torch.int64)))

        def ours(x, y, one_class=one_class, other=other):
            candidates = torch.cat((y, queue.candidates))
            return info_nce(
                x, candidates, temperature=0.2, anchor_target=one_class, candidate_target=other, mask_same_class=True,
                backend=backend,
            )  # fmt: skip

        same(ours, theirs, rows, keys)
        queue.enqueue(keys)


@BACKENDS
def test_open_clip(backend):
    """Both directions, dot products of rows that are unit already, and the gradient by the learned scale."""
    pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    torchvision_shim.install()
    from open_clip.loss import ClipLoss

    images, texts, *_ = problem(8, 8, 5)
    log_scale = torch.tensor(math.log(1 / 0.07), dtype=torch.float64)

    def ours(x, y, s):
        options = {"temperature": (-s).exp(), "normalize": False, "backend": backend}
        return (info_nce(x, y, **options) + info_nce(y, x, **options)) / 2

    same(ours, lambda x, y, s: ClipLoss()(x, y, s.exp()), F.normalize(images), F.normalize(texts), log_scale)


@BACKENDS
def test_pytorch_metric_learning(backend):
    """Its NT-Xent with reference embeddings, where every label has one row on either side."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    rows, keys, *_ = problem(8, 11, 5)
    target, theirs = torch.arange(8), torch.arange(11)
    loss = losses.NTXentLoss(temperature=0.2)

    def ours(x, y):
        return info_nce(x, y, temperature=0.2, backend=backend)

    same(ours, lambda x, y: loss(x, target, ref_emb=y, ref_labels=theirs), rows, keys)
    # With several positives it is SupCon's mean over them, the log-sum-exp over all candidates.
    hard = torch.randint(3, (8,)), torch.randint(3, (11,))
    supcon = losses.SupConLoss(temperature=0.2)

    def by_label(x, y):
        return info_nce(
            x, y, temperature=0.2, positives="label", anchor_target=hard[0], candidate_target=hard[1], backend=backend
        )

    same(by_label, lambda x, y: supcon(x, hard[0], ref_emb=y, ref_labels=hard[1]), rows, keys)

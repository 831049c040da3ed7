"""The loss over ranks with the rest of PyTorch: DDP, FSDP2, checkpointing, compile, derivatives, pickling."""

import copy
import json
import pickle
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import labels, logits
from test_distributed import OPTIONS, arguments, mean_over_ranks, one_process, part, problem
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mcld_kernels
from mcld_kernels import MCLDLoss, distributed


def model(classes, seed=0, width=5):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, classes)).double()


def batch(rows, classes, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return images, logits("random", rows, classes, seed=seed)[1], labels(rows, classes, seed)


def gradients(network):
    return [parameter.grad for parameter in network.parameters()]


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def data_parallel(group):
    sizes, classes = (6, 3), 7
    single, ranked = model(classes), DistributedDataParallel(model(classes), process_group=group)
    criterion, alone = MCLDLoss(direction="symmetric", process_group=group), MCLDLoss(direction="symmetric")
    steps = [batch(sum(sizes), classes, seed=seed) for seed in range(2)]
    for whole in steps:
        images, teacher, target = whole
        alone(single(images), teacher, target).backward()
    with ranked.no_sync():
        images, teacher, target = (part(x, sizes, group) for x in steps[0])
        criterion(ranked(images), teacher, target).backward()
    images, teacher, target = (part(x, sizes, group) for x in steps[1])
    criterion(ranked(images), teacher, target).backward()
    close(gradients(ranked), gradients(single))


def test_distributed_data_parallel_with_accumulation_under_no_sync(pool):
    pool.run(data_parallel, ranks=2)


def sharded(group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Two meshes of data-parallel ranks: a sub-group of the four for each.
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "dp"))
    sizes, classes, member = (6, 2), 7, mesh.get_local_rank("dp")
    single, ranked = model(classes), model(classes)
    fully_shard(ranked, mesh=mesh["dp"])
    criterion = MCLDLoss(process_group=mesh.get_group("dp"), gather="ring")
    whole = batch(sum(sizes), classes, seed=mesh.get_local_rank("copies"))
    images, teacher, target = whole
    MCLDLoss()(single(images), teacher, target).backward()
    images, teacher, target = (x.split(sizes)[member] for x in whole)
    criterion(ranked(images), teacher, target).backward()
    close([gradient.full_tensor() for gradient in gradients(ranked)], gradients(single))
    with pytest.raises(TypeError, match=re.escape("mesh.get_group('dp')")):
        MCLDLoss(process_group=mesh["dp"])


def test_fsdp2_and_the_sub_group_of_a_mesh(pool):
    pool.run(sharded)


def checkpointed(group):
    from torch.utils.checkpoint import checkpoint

    sizes, classes = (6, 3, 4), 7
    single, ranked = model(classes), model(classes)
    criterion = MCLDLoss(process_group=group, direction="symmetric")
    whole = batch(sum(sizes), classes)
    images, teacher, target = whole
    MCLDLoss(direction="symmetric")(single(images), teacher, target).backward()
    images, teacher, target = (part(x, sizes, group) for x in whole)
    loss = checkpoint(lambda x: criterion(ranked(x), teacher, target), images, use_reentrant=False)
    loss.backward()
    close([mean_over_ranks(gradient, group) for gradient in gradients(ranked)], gradients(single))


def test_activation_checkpointing(pool):
    pool.run(checkpointed, ranks=3)


def compiled(group):
    sizes = (4, 4)
    student, teacher, target, options = problem(sizes, 6, OPTIONS["masked-symmetric"])
    truth = one_process(group, sizes, student, teacher, target, backend="reference", **options)
    module = MCLDLoss(process_group=group, **options)

    def function(student, teacher, target):
        return mcld_kernels.mcld_loss(student, teacher, target, process_group=group, gather="ring", **options)

    for call in (function, module):
        torch._dynamo.reset()
        program = torch.compile(call, backend="aot_eager", fullgraph=True)
        own = [part(x, sizes, group).clone() for x in (student, teacher, target)]
        own[0].requires_grad_()
        loss = program(*own)
        loss.backward()
        close(mean_over_ranks(loss, group), truth["values"][0])
        close(own[0].grad / 2, truth["student"])
    options = [0.1] * 3, [1.0, 0.5, 0.25], "student", False, False, -100, 1e-12
    torch.library.opcheck(
        torch.ops.mcld_kernels.mcld_ranks.default,
        (
            own[0].detach(), *own[1:], None, *options, "torch", True, False, group.group_name, "all", False,
        ),
    )  # fmt: skip


def test_compile_without_graph_breaks(pool):
    pool.run(compiled, ranks=2)


def derivatives(group):
    sizes = (3, 4)
    student, teacher = logits("random", 7, 5)
    target = labels(7, 5)
    rows = [part(x, sizes, group) for x in (student, teacher, target)]
    rows[0].requires_grad_()
    (gradient,) = torch.autograd.grad(mcld_kernels.mcld_loss(*rows, process_group=group), rows[0], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.sum().backward()

    # The reference over ranks is exact to the second order: the gradient of the summed squares of all gradients.
    def penalty(loss, x):
        return torch.autograd.grad(loss, x, create_graph=True)[0].square().sum()

    whole = student.clone().requires_grad_()
    penalty(mcld_kernels.reference.mcld_loss(whole, teacher, target), whole).backward()
    own = rows[0].detach().clone().requires_grad_()
    loss = mcld_kernels.reference.mcld_loss(own, *rows[1:], process_group=group)
    penalty(loss, own).backward()
    # Rank r has the gradient of (number of ranks)^2 x the sum over ranks by its own rows.
    close(own.grad / 4, part(whole.grad, sizes, group))
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        tangent = torch.ones_like(own)
        dual = forward_ad.make_dual(own.detach(), tangent)
        loss = mcld_kernels.mcld_loss(dual, *rows[1:], process_group=group)
        slope = forward_ad.unpack_dual(loss).tangent
    close(slope, (gradient.detach() * tangent).sum())


def test_derivatives_beyond_the_first(pool):
    pool.run(derivatives, ranks=2)


def pickled(group):
    module = MCLDLoss(process_group=group, direction="symmetric", weight=torch.ones(3))
    inputs = arguments(group)
    want = module(*inputs)
    assert module.process_group == group.group_name
    assert f"process_group={group.group_name!r}, gather='all', even=False" in repr(module)
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(other(*inputs), want)
    assert not any("group" in name for name in module.state_dict())
    alone = MCLDLoss(direction="symmetric", weight=torch.ones(3))
    alone.process_group = group
    assert torch.equal(alone(*inputs), want)
    alone.process_group = None
    assert not torch.equal(alone(*inputs), want)
    return pickle.dumps(module)


def test_a_module_keeps_the_groups_name_alone(pool):
    payload, _ = pool.run(pickled, ranks=2)
    module = pickle.loads(payload)
    student, teacher = logits("random", 4, 3)
    with pytest.raises(ValueError, match="assign module.process_group"):
        module(student, teacher, labels(4, 3))
    module.process_group = None
    assert module(student, teacher, labels(4, 3)).isfinite()
    assert MCLDLoss().process_group is None


def one_rank(tmp):
    student, teacher = logits("random", 5, 4)
    student.requires_grad_()
    target = labels(5, 4)
    want = mcld_kernels.mcld_loss(student, teacher, target)
    got = mcld_kernels.mcld_loss(student, teacher, target, process_group=dist.group.WORLD)
    assert torch.equal(got, want)


def test_one_rank_is_one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with distributed.count_collectives() as counted:
            one_rank(tmp_path)
        assert counted == []
    finally:
        dist.destroy_process_group()


def benchmarked(group, folder):
    import types

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from rich.console import Console

    from bench.harness import cases as bench_cases
    from bench.harness import global_batch

    options = types.SimpleNamespace(
        batch=[64], classes=[9], dtype=["float32"], terms=None, temperature=None, repeats=1, seed=0, smoke=True
    )
    screen = Console(quiet=True)
    own = Path(folder) if dist.get_rank(group) == 0 else None
    assert global_batch.run(options, torch.device("cpu"), screen, own, {"schema": 0}) == 0
    options.terms, options.dtype = bench_cases.TERMS[:1], ["bfloat16"]
    assert global_batch.run(options, torch.device("cpu"), screen, None, {}) == 0


def test_the_benchmark_over_ranks(pool, tmp_path):
    """Every provider passes its gate, and what was received is what docs/communication.py computes."""
    pool.run(benchmarked, str(tmp_path))
    record = json.loads((tmp_path / "results.json").read_text())
    rows = {(row["terms"], row["direction"], row["provider"]): row for row in record["rows"]}
    assert len(rows) == 10 and {row["status"] for row in record["rows"]} == {"ok"}
    row = rows["instance", "symmetric", "all"]
    formula = runpy.run_path(str(Path(__file__).resolve().parents[1] / "docs" / "communication.py"))["received"]
    options = {"weight": (1.0, 0.0, 0.0), "direction": "symmetric", "operand": 4}
    assert row["received_bytes"] == formula(4, 16, 9, **options) and row["peak_bytes"] > 0
    assert row["milliseconds"] > 0 and rows["instance", "symmetric", "open_clip"]["exposed_milliseconds"] is None


def test_the_benchmark_over_ranks_wants_torchrun():
    done = subprocess.run(
        [sys.executable, "bench/run.py", "--global"],
        cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "torchrun --nproc-per-node 2 bench/run.py --global" in " ".join(done.stderr.split())


# Accumulated batches.


def large_batch(network, images, teacher, target, criterion):
    network(images)  # the first pass of `accumulate` draws random numbers as well
    loss = criterion(network(images), teacher, target)
    loss.backward()
    return loss.detach()


def test_an_accumulated_batch_has_the_gradient_of_the_large_one():
    images, teacher, target = batch(11, 7)
    criterion = MCLDLoss(direction="symmetric", weight=nn.Parameter(torch.tensor([1.0, 0.5, 2.0]).double()))
    whole, parts = model(7), model(7)
    want = large_batch(whole, images, teacher, target, criterion)
    weight_grad, criterion.weight.grad = criterion.weight.grad, None
    for chunks in (images.split(4), [(x,) for x in images.split(11)], [{"input": x} for x in images.split(3)]):
        parts.zero_grad()
        criterion.weight.grad = None
        got = mcld_kernels.accumulate(parts, chunks, lambda student: criterion(student, teacher, target))
        close(got, want)
        close(gradients(parts), gradients(whole))
        close(criterion.weight.grad, weight_grad)
        assert not got.requires_grad


def test_an_accumulated_batch_replays_dropout_and_keeps_buffers():
    images, teacher, target = batch(8, 7)
    network = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 7)).double()
    alone = copy.deepcopy(network)
    chunks, seen = images.split(4), []

    def loss(student):
        seen.append(student)
        return MCLDLoss()(student, teacher, target)

    torch.manual_seed(3)
    mcld_kernels.accumulate(network, chunks, loss)
    state = torch.get_rng_state()
    # The same by hand, with the masks of the first pass for both and statistics of each chunk.
    torch.manual_seed(3)
    logits = torch.cat([alone(chunk) for chunk in chunks])
    assert torch.equal(torch.get_rng_state(), state)
    close(seen[0].detach(), logits.detach())
    loss(logits).backward()
    close(gradients(network), gradients(alone))
    close(list(network.buffers()), list(alone.buffers()))  # advanced once


def test_an_accumulated_batch_under_autocast():
    """The weights that the first pass casts, without gradients, are not those of the second."""
    images, teacher, target = (x.float() if x.is_floating_point() else x for x in batch(8, 7))
    network = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 7))
    whole, cached = copy.deepcopy(network), []
    network.register_forward_pre_hook(lambda *_: cached.append(torch.is_autocast_cache_enabled()))
    with torch.autocast("cpu", torch.bfloat16):
        MCLDLoss()(whole(images), teacher.bfloat16(), target).backward()
        mcld_kernels.accumulate(
            network, images.split(4), lambda student: MCLDLoss()(student, teacher.bfloat16(), target)
        )
        assert torch.is_autocast_cache_enabled()
    torch.testing.assert_close(gradients(network), gradients(whole), rtol=0.03, atol=0.05)  # bf16 sums
    assert cached == [False, False, True, True]  # with torch 2.6 a cached weight would get no gradient


def test_what_accumulate_refuses():
    with pytest.raises(ValueError, match="at least one chunk"):
        mcld_kernels.accumulate(model(7), [], lambda student: student.sum())
    with pytest.raises(ValueError, match=r"shape \(\); got \(2, 7\)"):
        mcld_kernels.accumulate(model(7), [torch.zeros(2, 5).double()], lambda student: student)
    with pytest.raises(TypeError, match="tensor of logits; got tuple"):
        mcld_kernels.accumulate(lambda x: (x,), [torch.zeros(2, 5)], lambda student: student.sum())


def accumulated(group):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    sizes, classes = (6, 3), 7
    single, ranked, split = model(classes), model(classes), model(classes)
    whole = batch(sum(sizes), classes)
    images, teacher, target = whole
    want = MCLDLoss()(single(images), teacher, target)
    want.backward()
    fully_shard(split, mesh=DeviceMesh.from_group(group, "cpu"))
    images, teacher, target = (part(x, sizes, group) for x in whole)
    criterion = MCLDLoss(process_group=group)
    for network in (DistributedDataParallel(ranked, process_group=group), split):
        chunks = images.split(2)  # three chunks on one rank, two on the other
        if network is split:  # a forward pass of FSDP is a collective
            chunks = images.split((2, 4) if len(images) == 6 else (1, 2))
        got = mcld_kernels.accumulate(network, chunks, lambda student: criterion(student, teacher, target))
        close(mean_over_ranks(got, group), want.detach())
    close(gradients(ranked), gradients(single))
    close([gradient.full_tensor() for gradient in gradients(split)], gradients(single))


def test_an_accumulated_batch_over_ranks(pool):
    """Through DistributedDataParallel and FSDP2, which reduce gradients once."""
    pool.run(accumulated, ranks=2)

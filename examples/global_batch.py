"""The loss of the global batch, by torchrun --nproc-per-node 2 examples/global_batch.py; alone it is one rank."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from mcld_kernels import MCLDLoss

alone = {} if dist.is_torchelastic_launched() else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
dist.init_process_group("gloo", **alone)  # "nccl" on GPUs
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(16, 10))
teacher_model = torch.nn.Linear(16, 10).requires_grad_(False)
criterion = MCLDLoss(temperature=0.5, process_group=dist.group.WORLD)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

torch.manual_seed(dist.get_rank())  # each rank has rows of its own
images, target = torch.randn(64, 16), torch.randint(10, (64,))
for _ in range(5):
    student = model(images)
    terms = criterion.terms(student, teacher_model(images), target)
    optimizer.zero_grad()
    (F.cross_entropy(student, target) + terms.loss).backward()
    optimizer.step()
    loss = terms.loss.detach().clone()
    dist.all_reduce(loss)  # the mean over ranks is the loss of the global batch
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks: {loss.item() / dist.get_world_size():.4f}")
dist.destroy_process_group()

"""Train one encoder towards the embeddings of a locked one, with a temperature that is learned."""

import torch

from mcld_kernels import InfoNCELoss

torch.manual_seed(0)
locked, encoder = torch.nn.Linear(20, 16).eval(), torch.nn.Linear(20, 16)
criterion = InfoNCELoss(temperature=0.1, learnable=True)
optimizer = torch.optim.Adam([*encoder.parameters(), *criterion.parameters()], lr=0.02)
for _ in range(20):
    inputs = torch.randn(64, 20)
    with torch.no_grad():
        candidates = locked(inputs)
    loss = criterion(encoder(inputs), candidates)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.3f} at temperature {criterion.log_temperature.exp().item():.3f}")

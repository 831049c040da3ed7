"""Bring the category-wise term in over the first epochs. Epochs count from 0; fractions make the ramp smooth."""

import torch
import torch.nn.functional as F

from mcld_kernels import MCLDLoss

torch.manual_seed(0)
epochs, steps = 4, 5
teacher_model, student_model = torch.nn.Linear(20, 10).eval(), torch.nn.Linear(20, 10)
criterion = MCLDLoss(temperature=0.5, weight=3.0, warmup=2)  # full weight from epoch 2 on
optimizer = torch.optim.SGD(student_model.parameters(), lr=0.5)
for epoch in range(epochs):
    for step in range(steps):
        criterion.set_epoch(epoch + step / steps)
        inputs, target = torch.randn(64, 20), torch.randint(10, (64,))
        with torch.no_grad():
            teacher = teacher_model(inputs)
        student = student_model(inputs)
        loss = F.cross_entropy(student, target) + criterion(student, teacher, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weight = criterion.effective_weight[2].item()
    print(f"epoch {epoch}: loss {loss.item():.3f}, the category-wise term at weight {weight:.1f}")

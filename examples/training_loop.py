"""Distil a teacher into a student: the task's own loss plus MCLD."""

import torch
import torch.nn.functional as F

from mcld_kernels import mcld_loss

torch.manual_seed(0)
teacher_model, student_model = torch.nn.Linear(20, 10).eval(), torch.nn.Linear(20, 10)
optimizer = torch.optim.SGD(student_model.parameters(), lr=0.5)
for _ in range(5):
    inputs, target = torch.randn(64, 20), torch.randint(10, (64,))
    with torch.no_grad():
        teacher = teacher_model(inputs)
    student = student_model(inputs)
    loss = F.cross_entropy(student, target) + mcld_loss(student, teacher, target, temperature=0.5, weight=3.0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"loss {loss.item():.3f}")

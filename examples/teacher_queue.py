"""A small batch against many teacher rows: a queue keeps those of earlier steps. The loss grows with their number."""

import torch
import torch.nn.functional as F

from mcld_kernels import MCLDLoss, TeacherQueue

torch.manual_seed(0)
teacher_model, student_model = torch.nn.Linear(20, 10).eval(), torch.nn.Linear(20, 10)
criterion, queue = MCLDLoss(temperature=0.5), TeacherQueue(256, 10)
optimizer = torch.optim.SGD(student_model.parameters(), lr=0.5)
for step in range(12):
    inputs, target = torch.randn(32, 20), torch.randint(10, (32,))
    with torch.no_grad():
        teacher = teacher_model(inputs)
    student = student_model(inputs)
    loss = F.cross_entropy(student, target) + criterion(student, teacher, target, queue.candidates, queue.target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    queue.enqueue(teacher, target)
    print(f"step {step}: {len(queue)} rows in the queue, loss {loss.item():.3f}")

"""Measurements of mcld_kernels. The programs stand here, their modules in harness/; NOTES.md explains the numbers."""

"""Measurements of mcld_kernels. ``python bench/run.py`` is the door; NOTES.md says how to read the numbers."""

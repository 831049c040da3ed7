"""Run the "triton" backend with the PTX that Triton compiles, through the interpreter of tests/ptx. A program of its own:
an interpreted kernel does not compile, so it must run without TRITON_INTERPRET.

    python triton_ptx.py ARCHITECTURE CASE...     (80 or 90; the names of CASES)

A launch is compiled with the types, constants and alignment that it has, and its code runs on the CPU tensors of the
call. Prints one JSON object for each case: errors of loss and gradient, and what eager PyTorch's errors allow.
"""

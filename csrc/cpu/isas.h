// The instruction sets that each file of kernels is compiled for, as namespaces.
#pragma once

#define MCLD_IN_EACH_ISA(...)          \
  namespace baseline { __VA_ARGS__ }   \
  namespace avx2 { __VA_ARGS__ }       \
  namespace avx512 { __VA_ARGS__ }

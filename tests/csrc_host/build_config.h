// Stands in for csrc/build_config.h.in in the host emulation.
#pragma once
#define MCLD_MODULE mcld_emulated
#define MCLD_VERSION "emulated"
#define MCLD_CUDA_VERSION "emulated"
#define MCLD_CUDA_ARCHS "host"
#define MCLD_HAS_HOPPER 1

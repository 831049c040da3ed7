// Stands in for the CUDA runtime's header in the host emulation: the names that the launchers' declarations use.
#pragma once

using cudaStream_t = void*;

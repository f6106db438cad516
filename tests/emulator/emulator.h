// The emulator of the CUDA execution model, as kernels and launchers see it: see emulator.py for how to use
// it.
//
//   types.h         qualifiers, vector types and half precision of CUDA C++
//   machine.h .cpp  threads as fibers, the scheduler, barriers and shuffles, vector clocks
//   memory.h .cpp   shared and global memory, with every access checked
//   instructions.h  the functions of ptx.cuh
//   sm90.h          those of ptx_sm90.cuh: mbarrier.cpp (and clusters), tma.cpp, wgmma.cpp
//   runtime.h .cpp  the CUDA runtime and driver, as far as launchers call them
//   calls.h .cpp    calling a launcher from Python
#pragma once
#include "instructions.h"
#include "runtime.h"
#include "status.h"

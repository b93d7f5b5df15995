// Force-included in front of a kernel file: what the device compiler predefines, for g++.
//
// The twin header is included and the guard of the device's `ptx.cuh` is set here, so that however
// a kernel spells its #include, it finds an empty file.

#pragma once

#include "emu.h"

#define CUSPARGE_EMULATED 1
#define CS_DEV [[gnu::always_inline]] inline
#define CS_HOST_DEV [[gnu::always_inline]] inline
#define CS_KERNEL __global__
#define CS_SMEM(name) unsigned char* const name = ::emu::shared_memory()

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ [[gnu::always_inline]] inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __constant__ const
#define __shared__ _Pragma("GCC error \"use CS_SMEM: static shared memory is not emulated\"")

#define threadIdx (::emu::thread_idx())
#define blockIdx (::emu::block_idx())
#define blockDim (::emu::block_dim())
#define gridDim (::emu::grid_dim())

#define __syncthreads() ::emu::bar_sync(0, 0)
#define __syncwarp() ::emu::sync_warp(0xffffffffu)

[[gnu::always_inline]] inline int __popc(unsigned v) { return __builtin_popcount(v); }
[[gnu::always_inline]] inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
[[gnu::always_inline]] inline int __clz(int v) {
  return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v));
}
[[gnu::always_inline]] inline int __ffs(int v) { return __builtin_ffs(v); }

#include "ptx.cuh"
#define CUSPARGE_PTX_CUH

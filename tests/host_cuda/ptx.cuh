// Twin of the device's ptx.cuh: the same functions, each a call of the emulation's runtime.

#ifndef CUSPARGE_HOST_PTX_CUH
#define CUSPARGE_HOST_PTX_CUH

#include "cusparge/types.cuh"
#include "emu.h"

namespace cusparge::ptx {

inline constexpr u32 kFullWarp = 0xffffffffu;

CS_DEV u32 thread_x() { return threadIdx.x; }
CS_DEV u32 thread_y() { return threadIdx.y; }
CS_DEV u32 thread_z() { return threadIdx.z; }
CS_DEV u32 block_x() { return blockIdx.x; }
CS_DEV u32 block_y() { return blockIdx.y; }
CS_DEV u32 block_z() { return blockIdx.z; }
CS_DEV u32 block_dim_x() { return blockDim.x; }
CS_DEV u32 block_dim_y() { return blockDim.y; }
CS_DEV u32 block_dim_z() { return blockDim.z; }
CS_DEV u32 grid_dim_x() { return gridDim.x; }
CS_DEV u32 grid_dim_y() { return gridDim.y; }
CS_DEV u32 grid_dim_z() { return gridDim.z; }
CS_DEV u32 lane_id() {
  const emu::Dim3 t = threadIdx, n = blockDim;
  return ((t.z * n.y + t.y) * n.x + t.x) % 32;
}

// ---- exchange between the lanes of a warp
#define CS_SHFL(name, form)                                        \
  CS_DEV u32 name(u32 v, u32 arg, u32 mask = kFullWarp) {          \
    return emu::shuffle(emu::form, v, arg, mask);                  \
  }                                                                \
  CS_DEV s32 name(s32 v, u32 arg, u32 mask = kFullWarp) {          \
    return static_cast<s32>(name(static_cast<u32>(v), arg, mask)); \
  }                                                                \
  CS_DEV float name(float v, u32 arg, u32 mask = kFullWarp) {      \
    return float_from_bits(name(bits_of_float(v), arg, mask));     \
  }
CS_SHFL(shfl_xor, kXor)
CS_SHFL(shfl_idx, kIdx)
CS_SHFL(shfl_down, kDown)
CS_SHFL(shfl_up, kUp)
#undef CS_SHFL
CS_DEV u32 ballot(bool p, u32 mask = kFullWarp) { return emu::vote(emu::kBallot, p, mask); }
CS_DEV bool any(bool p, u32 mask = kFullWarp) { return emu::vote(emu::kAny, p, mask) != 0; }
CS_DEV bool all(bool p, u32 mask = kFullWarp) { return emu::vote(emu::kAll, p, mask) != 0; }
CS_DEV u32 redux_add(u32 v, u32 mask = kFullWarp) { return emu::redux(emu::kAdd, v, mask); }
CS_DEV u32 redux_min(u32 v, u32 mask = kFullWarp) { return emu::redux(emu::kMin, v, mask); }
CS_DEV u32 redux_max(u32 v, u32 mask = kFullWarp) { return emu::redux(emu::kMax, v, mask); }
CS_DEV s32 redux_max(s32 v, u32 mask = kFullWarp) {
  return static_cast<s32>(emu::redux(emu::kMaxSigned, static_cast<u32>(v), mask));
}
CS_DEV u32 redux_or(u32 v, u32 mask = kFullWarp) { return emu::redux(emu::kOr, v, mask); }
CS_DEV void sync_warp(u32 mask = kFullWarp) { emu::sync_warp(mask); }

// ---- barriers of the block
CS_DEV void sync_block() { emu::bar_sync(0, 0); }
template <int ID, int N>
CS_DEV void bar_sync() {
  static_assert(ID >= 0 && ID < 16 && N > 0 && N % 32 == 0);
  emu::bar_sync(ID, N);
}
template <int ID, int N>
CS_DEV void bar_arrive() {
  static_assert(ID >= 0 && ID < 16 && N > 0 && N % 32 == 0);
  emu::bar_arrive(ID, N);
}
template <int ID, int N>
CS_DEV bool bar_red_or(bool p) {
  static_assert(ID >= 0 && ID < 16 && N > 0 && N % 32 == 0);
  return emu::bar_red_or(ID, N, p);
}

// ---- arithmetic
CS_DEV float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
// The C functions would pass a signalling NaN on.
CS_DEV float max(float a, float b) {
  return __builtin_isnan(a) ? b : __builtin_isnan(b) ? a : __builtin_fmaxf(a, b);
}
CS_DEV float min(float a, float b) {
  return __builtin_isnan(a) ? b : __builtin_isnan(b) ? a : __builtin_fminf(a, b);
}
CS_DEV float div_rn(float a, float b) { return a / b; }
CS_DEV float sqrt_rn(float x) { return __builtin_sqrtf(x); }
CS_DEV float rcp_approx(float x) { return emu::approx(0, x); }
CS_DEV float rsqrt_approx(float x) { return emu::approx(1, x); }
CS_DEV float ex2_approx(float x) { return emu::approx(2, x); }
CS_DEV float lg2_approx(float x) { return emu::approx(3, x); }

// ---- conversions
CS_DEV float float_from_f16(u16 bits) { return emu::float_from_f16(bits); }
CS_DEV u16 f16_from_float(float x) { return emu::f16_from_float(x); }
CS_DEV u16 bf16_from_float(float x) { return emu::bf16_from_float(x); }
CS_DEV u32 f16x2_from_float(float high, float low) {
  return static_cast<u32>(emu::f16_from_float(high)) << 16 | emu::f16_from_float(low);
}
CS_DEV u32 bf16x2_from_float(float high, float low) {
  return static_cast<u32>(emu::bf16_from_float(high)) << 16 | emu::bf16_from_float(low);
}
CS_DEV u16 e4m3x2_from_float(float high, float low) {
  return static_cast<u16>(emu::e4m3_from_float(high) << 8 | emu::e4m3_from_float(low));
}
CS_DEV u32 f16x2_from_e4m3x2(u16 pair) {
  return static_cast<u32>(emu::f16_from_float(float_from_e4m3(static_cast<u8>(pair >> 8)))) << 16 |
         emu::f16_from_float(float_from_e4m3(static_cast<u8>(pair & 255)));
}
CS_DEV s32 s32_from_float(float x) { return emu::s32_from_float(x); }
CS_DEV u32 pack_s8x2(s32 high, s32 low, u32 above) {
  const s32 h = high < -128 ? -128 : high > 127 ? 127 : high;
  const s32 l = low < -128 ? -128 : low > 127 ? 127 : low;
  return (above & 0xffffu) << 16 | (static_cast<u32>(h) & 255u) << 8 | (static_cast<u32>(l) & 255u);
}
CS_DEV u32 prmt(u32 a, u32 b, u32 selector) {
  const u64 bytes = static_cast<u64>(b) << 32 | a;
  u32 r = 0;
  for (u32 i = 0; i < 4; ++i) {
    const u32 nibble = selector >> (4 * i) & 15u;
    const u32 byte = static_cast<u32>(bytes >> (8 * (nibble & 7u))) & 255u;
    r |= ((nibble & 8u) == 0 ? byte : (byte & 128u) != 0 ? 255u : 0u) << (8 * i);
  }
  return r;
}

// ---- memory
CS_DEV V4 ld_global_16(const void* p) {
  V4 r;
  emu::load_global(&r, p, 16);
  return r;
}
CS_DEV V2 ld_global_8(const void* p) {
  V2 r;
  emu::load_global(&r, p, 8);
  return r;
}
CS_DEV u32 ld_global_4(const void* p) {
  u32 r;
  emu::load_global(&r, p, 4);
  return r;
}
CS_DEV u16 ld_global_2(const void* p) {
  u16 r;
  emu::load_global(&r, p, 2);
  return r;
}
CS_DEV void st_global_16(void* p, V4 v) { emu::store_global(p, &v, 16); }
CS_DEV u32 smem_address(const void* p) { return emu::shared_address(p); }
CS_DEV V4 ld_shared_16(u32 address) {
  V4 r;
  emu::load_shared(&r, address, 16);
  return r;
}
CS_DEV u32 atomic_add_global(u32* p, u32 v) { return emu::atomic_add_global(p, v); }
CS_DEV u32 atomic_add_shared(u32 address, u32 v) { return emu::atomic_add_shared(address, v); }

// ---- asynchronous copies and their barriers
CS_DEV void cp_async_16(u32 dst, const void* src, u32 src_bytes = 16) {
  emu::cp_async(dst, src, src_bytes);
}
CS_DEV void cp_async_commit() { emu::cp_async_commit(); }
template <int N>
CS_DEV void cp_async_wait() {
  emu::cp_async_wait(N);
}
CS_DEV void mbar_init(u32 bar, u32 count) { emu::mbar_init(bar, count); }
CS_DEV void mbar_arrive(u32 bar) { emu::mbar_arrive(bar, 1, 0); }
CS_DEV void mbar_expect_tx(u32 bar, u32 bytes) { emu::mbar_arrive(bar, 0, bytes); }
CS_DEV void mbar_arrive_expect_tx(u32 bar, u32 bytes) { emu::mbar_arrive(bar, 1, bytes); }
CS_DEV bool mbar_try_wait(u32 bar, u32 parity) { return emu::mbar_try_wait(bar, parity); }
CS_DEV void mbar_wait(u32 bar, u32 parity) {
  while (!emu::mbar_try_wait(bar, parity)) {
  }
}
CS_DEV void cp_async_bulk(u32 dst, const void* src, u32 bytes, u32 bar) {
  emu::cp_async_bulk(dst, src, bytes, bar);
}
CS_DEV void fence_mbarrier_init() { emu::fence_mbarrier_init(); }
CS_DEV void fence_proxy_async() { emu::fence_proxy_async(); }
// A launch starts when the one before it has ended: nothing to wait for.
CS_DEV void grid_dependency_wait() {}
CS_DEV void grid_dependency_launch() {}

// ---- tensor cores
#define CS_LDMATRIX(suffix, transposed)                      \
  CS_DEV void ldmatrix_x1##suffix(u32(&r)[1], u32 address) { \
    emu::ldmatrix(r, 1, transposed, address);                \
  }                                                          \
  CS_DEV void ldmatrix_x2##suffix(u32(&r)[2], u32 address) { \
    emu::ldmatrix(r, 2, transposed, address);                \
  }                                                          \
  CS_DEV void ldmatrix_x4##suffix(u32(&r)[4], u32 address) { \
    emu::ldmatrix(r, 4, transposed, address);                \
  }
CS_LDMATRIX(, false)
CS_LDMATRIX(_trans, true)
#undef CS_LDMATRIX
#define CS_MMA(name, T, form)                                                      \
  CS_DEV void name(T(&d)[4], const u32(&a)[4], const u32(&b)[2], const T(&c)[4]) { \
    emu::mma(emu::form, d, a, b, c);                                               \
  }
CS_MMA(mma_m16n8k16_f16, float, kF16)
CS_MMA(mma_m16n8k16_bf16, float, kBf16)
CS_MMA(mma_m16n8k32_s8, s32, kS8)
CS_MMA(mma_m16n8k32_e4m3, float, kE4m3)
#undef CS_MMA
CS_DEV void wgmma_fence() { emu::wgmma_fence(); }
CS_DEV void wgmma_commit() { emu::wgmma_commit(); }
template <int N>
CS_DEV void wgmma_wait() {
  emu::wgmma_wait(N);
}
#define CS_WGMMA(name, T, R, form)                                        \
  CS_DEV void name(T(&d)[R], u64 desc_a, u64 desc_b, u32 scale_d) {       \
    emu::wgmma(emu::form, d, R, nullptr, desc_a, desc_b, scale_d);        \
  }                                                                       \
  CS_DEV void name(T(&d)[R], const u32(&a)[4], u64 desc_b, u32 scale_d) { \
    emu::wgmma(emu::form, d, R, a, 0, desc_b, scale_d);                   \
  }
CS_WGMMA(wgmma_s8, s32, 32, kS8)
CS_WGMMA(wgmma_s8, s32, 64, kS8)
CS_WGMMA(wgmma_e4m3, float, 32, kE4m3)
CS_WGMMA(wgmma_e4m3, float, 36, kE4m3)
CS_WGMMA(wgmma_e4m3, float, 64, kE4m3)
CS_WGMMA(wgmma_e4m3, float, 68, kE4m3)
#undef CS_WGMMA
template <int N>
CS_DEV void setmaxnreg_inc() {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0);
  emu::setmaxnreg(true, N);
}
template <int N>
CS_DEV void setmaxnreg_dec() {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0);
  emu::setmaxnreg(false, N);
}

CS_DEV double mul_rn(double a, double b) { return a * b; }

}  // namespace cusparge::ptx

#endif  // CUSPARGE_HOST_PTX_CUH

// wgmma: kernels that are right for kBug == 0, and break one rule for the others.

#include "cusparge/ptx.cuh"

namespace faults {

using namespace cusparge;

constexpr u64 kSwizzle64 = 2ull << 62 | (512ull >> 4) << 32 | 1ull << 16;

// 128 threads: D = A * B^T with A (64 x 64) and B (64 x 64) of s8, copied to shared memory as they
// are (laid out by the caller), twice: the second product adds to the first.
template <int kBug>
CS_KERNEL void __launch_bounds__(128, 1) product(const u32* tiles, s32* out) {
  CS_SMEM(smem);
  const u32 t = ptx::thread_x(), base = ptx::smem_address(smem);
  for (u32 i = t; i < 2048; i += 128) reinterpret_cast<u32*>(smem)[i] = tiles[i];
  if (kBug != 1 && kBug != 2) ptx::fence_proxy_async();  // else the async proxy may not see it
  if (kBug != 3) ptx::sync_block();                      // else other threads' rows are missing
  if (kBug == 2 && t == 0) ptx::fence_proxy_async();     // counts for this thread alone
  u64 a = kSwizzle64 | base >> 4, b = kSwizzle64 | (base + 4096) >> 4;
  if (kBug == 11) a |= 1ull << 49;
  if (kBug == 12) b += 128 >> 4;  // tile not aligned
  if (kBug == 13 && t == 33) b += 2;
  if (kBug == 14 && t < 32) b += 2;
  if (kBug == 22) b += (8192 - 512) >> 4;  // reaches behind shared memory
  s32 d[32];
#pragma unroll
  for (int i = 0; i < 32; ++i) d[i] = 0;
  if (kBug != 4) ptx::wgmma_fence();
  if (kBug == 5) d[3] = 1;  // written behind the fence
  ptx::wgmma_s8(d, a, b, 1);
  ptx::wgmma_s8(d, a + 2, b + 2, 1);
  ptx::wgmma_commit();
  if (kBug == 7) d[0] += 1;                         // before the wait
  if (kBug == 8) smem[t / 32 * 1024 + t % 32] = 1;  // overwrites what is being read
  ptx::wgmma_wait<0>();
  if (kBug == 15 && t >= 96) {
  } else {
    if (kBug != 16) ptx::wgmma_fence();  // one a batch
    ptx::wgmma_s8(d, a, b, 1);
    ptx::wgmma_s8(d, a + 2, b + 2, 1);
    if (kBug != 6) ptx::wgmma_commit();  // else no group to wait for
    if (kBug != 9) kBug == 10 ? ptx::wgmma_wait<1>() : ptx::wgmma_wait<0>();
  }
  if (kBug == 17) ptx::wgmma_s8(d, a, b, 1);  // left behind, and without a fence
  if (kBug == 18) {
    ptx::wgmma_fence();
    ptx::wgmma_s8(d, a, b, 1);
    ptx::wgmma_commit();  // never waited for
    return;
  }
  if (kBug == 19 && t < 64) smem[4096 + t] = 1;  // another warp may still read it
#pragma unroll
  for (int i = 0; i < 32; ++i) out[t * 32 + i] = d[i];
}

// 128 threads: D = A * B^T with A in registers, all e4m3.
template <int kBug>
CS_KERNEL void __launch_bounds__(128, 1) weighted(const u32* areg, const u32* tile, float* out) {
  CS_SMEM(smem);
  const u32 t = ptx::thread_x(), base = ptx::smem_address(smem);
  for (u32 i = t; i < 1024; i += 128) reinterpret_cast<u32*>(smem)[i] = tile[i];
  ptx::fence_proxy_async();
  ptx::sync_block();
  const u64 b = kSwizzle64 | base >> 4;
  float d[32];
  u32 a[2][4];
  for (int i = 0; i < 8; ++i) a[i / 4][i % 4] = areg[t * 8 + i];
  ptx::wgmma_fence();
  if (kBug == 1) a[1][2] ^= 0x80;  // packed behind the fence
  if (kBug == 4) ptx::ldmatrix_x4(a[0], base);
  if (kBug == 5) {  // as if an accumulator of mma.sync were the operand
    s32 c[4] = {};
    const u32 half[2] = {};
    ptx::mma_m16n8k32_s8(reinterpret_cast<s32(&)[4]>(a[0]), a[1], half, c);
  }
  ptx::wgmma_e4m3(d, a[0], b, 0);
  ptx::wgmma_e4m3(d, a[1], b + 2, 1);
  ptx::wgmma_commit();
  if (kBug == 2) a[0][0] = 0;         // still being read
  if (kBug == 3) out[t * 32] = d[0];  // still being written
  ptx::wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < 32; ++i) out[t * 32 + i] = d[i];
}

// 128 threads: the product of one A (64 x 64) with three B (64 x 64), which bulk copies bring into
// one buffer, one after the other. s8; the results are added up.
template <int kBug>
CS_KERNEL void __launch_bounds__(128, 1) loaded(const u8* tiles, s32* out) {
  CS_SMEM(smem);
  const u32 t = ptx::thread_x(), base = ptx::smem_address(smem);
  const u32 full = base + 8192, empty = base + 8200;
  if (t == 0) {
    ptx::mbar_init(full, 1);
    ptx::mbar_init(empty, 4);
    ptx::fence_mbarrier_init();
  }
  ptx::sync_block();
  const u64 a = kSwizzle64 | base >> 4, b = kSwizzle64 | (base + 4096) >> 4;
  s32 d[32];
  for (u32 tile = 0; tile < 3; ++tile) {
    if (t == 0) {
      if (tile != 0 && kBug != 1) ptx::mbar_wait(empty, tile - 1 & 1);  // else while it is read
      ptx::mbar_arrive_expect_tx(full, tile == 0 ? 8192 : 4096);
      if (tile == 0) ptx::cp_async_bulk(base, tiles, 4096, full);
      ptx::cp_async_bulk(base + 4096, tiles + 4096 * (tile + 1), 4096, full);
    }
    if (kBug != 2 || t % 32 == 0) ptx::mbar_wait(full, tile & 1);  // else one lane a warp
    ptx::wgmma_fence();
    ptx::wgmma_s8(d, a, b, tile != 0);
    ptx::wgmma_s8(d, a + 2, b + 2, 1);
    ptx::wgmma_commit();
    if (kBug == 3 && t % 32 == 0) ptx::mbar_arrive(empty);  // before its reads are done
    ptx::wgmma_wait<0>();
    if (kBug != 3 && t % 32 == 0) ptx::mbar_arrive(empty);
  }
#pragma unroll
  for (int i = 0; i < 32; ++i) out[t * 32 + i] = d[i];
}

// 256 threads, launched with 96 registers each: one warpgroup gives registers to the other.
template <int kBug>
CS_KERNEL void __launch_bounds__(256, 1) shift(u32* out) {
  const u32 t = ptx::thread_x();
  if (t < 128) {
    if (kBug == 1 && t >= 96) {
      ptx::setmaxnreg_dec<40>();  // one warp asks for something else
    } else {
      kBug == 2 ? ptx::setmaxnreg_dec<104>() : ptx::setmaxnreg_dec<24>();
    }
  } else {
    if (kBug == 4 && t >= 224) {  // one warp asks for nothing
    } else {
      kBug == 3 ? ptx::setmaxnreg_inc<176>() : ptx::setmaxnreg_inc<168>();
    }
  }
  out[t] = t;
}

}  // namespace faults

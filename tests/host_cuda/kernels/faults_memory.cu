// Small kernels that are right for kBug == 0, and break one rule each for the other numbers.
//
// tests/test_host_cuda_faults.py names the report that each must give.

#include "cusparge/ptx.cuh"

namespace faults {

using namespace cusparge;

// 64 threads: out[i] = in[i ^ 32], through shared memory.
template <int kBug>
CS_KERNEL void exchange(const u32* in, u32* out) {
  CS_SMEM(smem);
  u32* words = reinterpret_cast<u32*>(smem);
  const u32 t = ptx::thread_x();
  if (kBug == 5 && t == 9) return;  // a word that nobody writes
  if (kBug != 12 || t != 9) words[kBug == 6 && t == 63 ? 64 : t] = in[t];  // behind the end
  if (kBug == 2) ptx::sync_warp();      // orders the wrong threads
  if (kBug == 8) ptx::shfl_xor(t, 1u);  // orders nothing
  if (kBug == 13) {                     // ldmatrix orders nothing either
    u32 r[2];
    ptx::ldmatrix_x2(r, ptx::smem_address(smem) + t % 16 * 16);
    out[t] = r[0];
    return;
  }
  if (kBug != 1 && kBug != 2 && kBug != 4 && kBug != 5 && kBug != 8) ptx::sync_block();
  if (kBug == 3 && t < 32) ptx::sync_block();  // a warp stays away
  if (kBug == 4) t < 32 ? ptx::bar_sync<1, 64>() : ptx::bar_sync<1, 32>();
  if (kBug == 5) ptx::bar_sync<0, 64>();  // one thread has returned
  const u32 v = words[t ^ 32];
  if (kBug == 7) words[t] = v + 1;  // while the other warp may still read
  if (kBug == 14) {
    u32 sum = words[0];
    if (t == 5) words[0] = sum + 1;  // while lanes of its own warp may still read
  }
  out[t] = v;
  if (kBug == 9) out[t] = *reinterpret_cast<u32*>(smem + 2 + 4 * (t & 31));  // misaligned
  if (kBug == 10) out[t] = ptx::ld_shared_16(16 * (t & 3)).x;                // not an address
  if (kBug == 11 && t == 3) out[t] = ptx::smem_address(in);                  // not shared memory
}

struct OffsetParams {
  const float* in;
  float* out;
  s64 n;
};

// 2 blocks of 64 threads: out[i] = in[i] for n = 100 elements.
template <int kBug>
CS_KERNEL void move(const OffsetParams p) {
  const int i = static_cast<int>(ptx::block_x() * 64 + ptx::thread_x());
  if (kBug == 1 && i == 100) p.out[0] = p.in[i];                          // reads behind the end
  if (kBug == 2 && i == 100) p.out[i] = 0.f;                              // writes behind the end
  if (kBug == 3 && i == 99) return;                                       // leaves one out
  if (kBug == 4 && i == 5) const_cast<float*>(p.in)[i] = 0.f;             // writes an input
  if (kBug == 5 && i == 5) p.out[i] += 1.f;                               // reads what nobody wrote
  if (kBug == 6 && ptx::thread_x() == 0) p.out[0] = 1.f;                  // two blocks write it
  if (kBug == 7 && ptx::block_x() == 1 && i == 64) p.out[99] = p.out[0];  // of another block
  if (kBug == 8 && i == 3) p.out[i] = p.in[(i + 1) << 29 >> 2];  // wraps to a negative index
  if (kBug == 9 && i == 3) p.out[i] = p.in[static_cast<int>(p.n) * 21474837];  // overflows
  if (kBug == 10 && i == 3) ptx::ld_global_16(p.in + 1);                       // misaligned
  if (kBug == 11 && i == 3) {
    p.out[i] = 1.f;
    p.out[i] += float_from_bits(ptx::ld_global_4(p.out + i));  // .nc of what was written
  }
  if (kBug == 12 && i == 3) p.out[i] = *static_cast<const float*>(nullptr);
  if (kBug == 13 && i == 3) p.out[i] = static_cast<float>(1 << (i + 30));
  if (kBug == 14 && i == 3) p.out[i] = static_cast<float>(7 / (p.n - 100));
  if (kBug == 15 && i < 8) {
    float r[4] = {p.in[0], p.in[1], p.in[2], p.in[3]};
#pragma GCC unroll 1
    for (int k = 0; k <= i; ++k) r[k] += 1.f;  // beyond the array
    p.out[i] = r[i & 3];
  }
  if (kBug == 16 && i == 3)
    p.out[i] = *reinterpret_cast<const float*>(reinterpret_cast<const u8*>(p.in) +
                                               2);     // misaligned, plain load
  if (kBug == 17 && i < 2) p.out[98 + (i & 0)] = 1.f;  // two threads, no barrier
  if (kBug == 18 && i == 0)
    for (u32 n = 0; n < 10000000; ++n) p.out[0] = p.in[0] + p.in[1];  // a spin without barriers
  if (i < p.n) p.out[i] = p.in[i];
}

// 2 blocks of 64 threads: x[i] += 1.
template <int kBug>
CS_KERNEL void increment(u32* x) {
  const u32 i = ptx::block_x() * 64 + ptx::thread_x();
  x[i] += kBug == 1 && i == 5 ? x[100] : 1;  // of the other block
}

// One warp (40 threads for kBug == 7): every lane's number summed over the warp.
template <int kBug>
CS_KERNEL void collect(const u32* in, u32* out) {
  const u32 t = ptx::thread_x();
  u32 v = in[t];
  if (kBug == 1) v += ptx::redux_add(v, 0xfffffffeu);                          // lane 0 is missing
  if (kBug == 2) v += ptx::shfl_xor(v, 1, t < 16 ? 0xffffu : 0xffffff00u);     // they overlap
  if (kBug == 3) v += (t & 1) != 0 ? ptx::shfl_xor(v, 1) : ptx::redux_add(v);  // different ones
  if (kBug == 4) {
    if (t < 16)
      v += ptx::shfl_xor(v, 1);  // on two lines
    else
      v += ptx::shfl_xor(v, 1);
  }
  if (t == 0 || t == 31) ptx::sync_warp(0x80000001u);  // two lanes first; the others go ahead
  if (kBug == 5 && t < 16) v += ptx::shfl_idx(v, 20, 0xffffu);  // outside the mask
  if (kBug == 6 && t < 31) v += ptx::shfl_xor(v, 1);            // one lane never comes
  if (kBug == 7) v += ptx::redux_add(v);                        // a warp of 8 lanes
  out[t] = ptx::redux_add(v, t < 32 ? ptx::kFullWarp : 0xffu);
}

// 96 threads: two warps fill, one empties, with named barriers.
template <int kBug>
CS_KERNEL void handover(const u32* in, u32* out) {
  CS_SMEM(smem);
  u32* words = reinterpret_cast<u32*>(smem);
  const u32 t = ptx::thread_x();
  for (u32 round = 0; round < 3; ++round) {
    if (t < 64) {
      words[t] = in[round * 64 + t];
      if (kBug != 1) ptx::bar_arrive<1, 96>();  // else nobody says that it is full
      if (kBug != 2) ptx::bar_sync<2, 96>();    // else it is overwritten too early
    } else {
      if (kBug == 3) ptx::bar_sync<1, 64>();               // counts differ
      if (kBug != 4 && kBug != 3) ptx::bar_sync<1, 96>();  // else read too early
      out[round * 32 + t - 64] = words[t - 64] + words[t - 32];
      ptx::bar_arrive<2, 96>();
    }
  }
}

// 64 threads count in shared and in global memory.
template <int kBug>
CS_KERNEL void count(const u32* in, u32* out) {
  CS_SMEM(smem);
  u32* words = reinterpret_cast<u32*>(smem);
  const u32 t = ptx::thread_x(), address = ptx::smem_address(smem);
  if (kBug != 1 && t == 0) words[0] = 0;  // else never initialised
  if (kBug != 2) ptx::sync_block();       // else not ordered behind that
  ptx::atomic_add_shared(address, in[t]);
  if (kBug != 3) ptx::sync_block();  // else read while others add
  ptx::atomic_add_global(out, words[0]);
  if (kBug == 4 && t == 40) out[0] = 0;  // an ordinary store among atomics
}

}  // namespace faults

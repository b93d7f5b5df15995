// Asynchronous copies: kernels that are right for kBug == 0, and break one rule for the others.

#include "cusparge/ptx.cuh"

namespace faults {

using namespace cusparge;

// 64 threads, two buffers of 1,024 bytes filled by cp.async, kTiles tiles: the sum over the tiles
// of every thread's 16 bytes, as its neighbour copied them. The last tile holds 40 rows of 64.
constexpr u32 kTiles = 5;
template <int kBug>
CS_KERNEL void stream(const V4* in, u32* out) {
  CS_SMEM(smem);
  const u32 t = ptx::thread_x(), base = ptx::smem_address(smem);
  const auto load = [&](u32 tile) {
    const u32 bytes = tile * 64 + t < kTiles * 64 - 24 ? 16 : 0;  // the rest is zero
    const u32 to = base + tile % 2 * 1024 + t * 16 + (kBug == 6 && t == 7 ? 8 : 0);
    ptx::cp_async_16(to, in + (bytes != 0 || kBug == 7 ? tile * 64 + t : 0),
                     kBug == 7 ? 16 : bytes);
    if (kBug != 3) ptx::cp_async_commit();  // else no group to wait for
  };
  load(0);
  u32 sum = 0;
  for (u32 tile = 0; tile < kTiles; ++tile) {
    if (tile + 1 < kTiles) {
      load(tile + 1);
      if (kBug != 1) kBug == 4 ? ptx::cp_async_wait<2>() : ptx::cp_async_wait<1>();
    } else {
      if (kBug != 1 && kBug != 9) ptx::cp_async_wait<0>();  // else the last never ends
    }
    if (kBug != 2) ptx::sync_block();  // else only my own copies
    sum += ptx::ld_shared_16(base + tile % 2 * 1024 + (t ^ 33) * 16).y;
    if (kBug != 5) ptx::sync_block();  // else refilled too early
  }
  if (kBug == 8) ptx::cp_async_16(base + t * 16, in);  // left behind
  out[t] = sum;
}

// 160 threads: a producer warp sends kTiles tiles of 512 bytes by bulk copies through two stages;
// each of 4 consumer warps adds up one word a lane of every tile.
template <int kBug>
CS_KERNEL void ring(const u8* in, u32* out) {
  CS_SMEM(smem);
  const u32 t = ptx::thread_x(), base = ptx::smem_address(smem);
  const u32 full = base + 1024, empty = full + 16;
  if (t == 0) {
    for (u32 s = 0; s < 2; ++s) {
      ptx::mbar_init(full + 8 * s, 1);
      ptx::mbar_init(empty + 8 * s, kBug == 16 ? 1 : 4);  // too few arrivals
    }
    if (kBug == 18) ptx::mbar_init(full, 1);  // twice
    if (kBug != 1) ptx::fence_mbarrier_init();
  }
  if (kBug == 14) reinterpret_cast<u32*>(smem)[t % 256] = 0;  // ordinary stores, no fence
  if (kBug == 19) {
    reinterpret_cast<u32*>(smem)[t % 256] = 0;
    if (t == 0) ptx::fence_proxy_async();  // before the barrier: too early
  }
  if (kBug != 11) ptx::sync_block();  // else not yet initialised
  if (kBug == 15 && t == 40) out[0] = reinterpret_cast<u32*>(smem)[256];  // part of an mbarrier
  if (t >= 128) {
    if (t != 128) return;
    for (u32 tile = 0; tile < kTiles; ++tile) {
      const u32 s = tile % 2, round = tile / 2;
      if (kBug != 10) ptx::mbar_wait(empty + 8 * s, kBug == 3 ? round & 1 : (round & 1) ^ 1);
      if (kBug == 20) ptx::mbar_expect_tx(full + 8 * s, 512), ptx::mbar_arrive(full + 8 * s);
      if (kBug != 6 && kBug != 20)
        ptx::mbar_arrive_expect_tx(full + 8 * s, kBug == 4 ? 256 : kBug == 5 ? 1024 : 512);
      if (kBug == 6) ptx::mbar_arrive(full + 8 * s);   // expects no bytes
      if (kBug == 23) ptx::mbar_arrive(full + 8 * s);  // the phase had its one arrival
      const u32 bytes = kBug == 13 ? 504 : 512;
      ptx::cp_async_bulk(base + s * 512, in + tile * 512, bytes, full + 8 * s);
    }
    if (kBug == 24) ptx::mbar_expect_tx(full, 64);  // which never come
    return;
  }
  u32 sum = 0;
  const u32 tiles = kBug == 17 ? kTiles - 1 : kTiles;  // the last is not waited for
  for (u32 tile = 0; tile < tiles; ++tile) {
    const u32 s = tile % 2, round = tile / 2;
    const u32 parity = kBug == 2 ? (round & 1) ^ 1 : kBug == 21 ? round : round & 1;
    if (kBug != 9 && (kBug != 12 || ptx::lane_id() == 0)) ptx::mbar_wait(full + 8 * s, parity);
    sum += *reinterpret_cast<const u32*>(smem + s * 512 + t * 4);
    if (kBug != 22) ptx::sync_warp();  // else lanes are still reading
    if (kBug != 7 && ptx::lane_id() == 0) ptx::mbar_arrive(empty + 8 * s);
    if (kBug == 8 && t == 0) ptx::mbar_arrive(empty + 8 * s);  // once too often
  }
  out[t] = sum;
}

}  // namespace faults

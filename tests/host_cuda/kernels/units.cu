// One instruction a kernel, for the layout tests: what goes in and what comes out, lane by lane.

#include "cusparge/ptx.cuh"

namespace units {

using namespace cusparge;

CS_DEV void fill(u8* smem, const u32* image, u32 words) {
  for (u32 i = ptx::thread_x(); i < words; i += ptx::block_dim_x())
    reinterpret_cast<u32*>(smem)[i] = image[i];
  ptx::fence_proxy_async();
  ptx::sync_block();
}

// out[lane][0 .. matrices)
template <int kMatrices, bool kTransposed>
CS_KERNEL void load_matrices(const u32* rows, u32* out) {
  CS_SMEM(smem);
  fill(smem, rows, 128);
  const u32 lane = ptx::lane_id(), address = ptx::smem_address(smem) + lane * 16;
  u32 r[kMatrices];
  if constexpr (kMatrices == 1)
    kTransposed ? ptx::ldmatrix_x1_trans(r, address) : ptx::ldmatrix_x1(r, address);
  if constexpr (kMatrices == 2)
    kTransposed ? ptx::ldmatrix_x2_trans(r, address) : ptx::ldmatrix_x2(r, address);
  if constexpr (kMatrices == 4)
    kTransposed ? ptx::ldmatrix_x4_trans(r, address) : ptx::ldmatrix_x4(r, address);
  for (int i = 0; i < kMatrices; ++i) out[lane * kMatrices + i] = r[i];
}

enum Form { kF16, kBf16, kS8, kE4m3 };

template <Form kForm, class T>
CS_KERNEL void multiply(const u32* a, const u32* b, const T* c, T* d) {
  const u32 lane = ptx::lane_id();
  u32 ra[4], rb[2];
  T rc[4], rd[4];
  for (int i = 0; i < 4; ++i) ra[i] = a[lane * 4 + i], rc[i] = c[lane * 4 + i];
  for (int i = 0; i < 2; ++i) rb[i] = b[lane * 2 + i];
  if constexpr (kForm == kF16) ptx::mma_m16n8k16_f16(rd, ra, rb, rc);
  if constexpr (kForm == kBf16) ptx::mma_m16n8k16_bf16(rd, ra, rb, rc);
  if constexpr (kForm == kS8) ptx::mma_m16n8k32_s8(rd, ra, rb, rc);
  if constexpr (kForm == kE4m3) ptx::mma_m16n8k32_e4m3(rd, ra, rb, rc);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = rd[i];
}

CS_DEV void step(s32 (&d)[32], u64 a, u64 b, u32 keep) { ptx::wgmma_s8(d, a, b, keep); }
CS_DEV void step(s32 (&d)[64], u64 a, u64 b, u32 keep) { ptx::wgmma_s8(d, a, b, keep); }
CS_DEV void step(s32 (&d)[32], const u32 (&a)[4], u64 b, u32 keep) { ptx::wgmma_s8(d, a, b, keep); }
CS_DEV void step(s32 (&d)[64], const u32 (&a)[4], u64 b, u32 keep) { ptx::wgmma_s8(d, a, b, keep); }
template <int R>
CS_DEV void step(float (&d)[R], u64 a, u64 b, u32 keep) {
  ptx::wgmma_e4m3(d, a, b, keep);
}
template <int R>
CS_DEV void step(float (&d)[R], const u32 (&a)[4], u64 b, u32 keep) {
  ptx::wgmma_e4m3(d, a, b, keep);
}

// The tiles of A and B arrive laid out; `high_a` and `high_b` are their descriptors without the
// address. areg[thread][step][4]: A as registers.
template <class T, int R, int kSteps, bool kRegisters>
CS_KERNEL void __launch_bounds__(128, 1)
    warpgroup(const u32* image, const u32* areg, T* out, u64 high_a, u64 high_b, u32 words,
              u32 offset_b, u32 step_a, u32 step_b) {
  CS_SMEM(smem);
  fill(smem, image, words);
  const u32 base = ptx::smem_address(smem), thread = ptx::thread_x();
  T d[R];
  u32 a[kSteps][4];
#pragma unroll
  for (int i = 0; i < R; ++i) d[i] = static_cast<T>(77);  // must not show: the first step drops it
#pragma unroll
  for (int k = 0; k < kSteps; ++k)
    for (int i = 0; i < 4; ++i) a[k][i] = areg[(thread * kSteps + k) * 4 + i];
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const u64 desc_b = high_b | (base + offset_b + k * step_b) >> 4;
    if constexpr (kRegisters) {
      step(d, a[k], desc_b, k > 0);
    } else {
      step(d, high_a | (base + k * step_a) >> 4, desc_b, k > 0);
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < R; ++i) out[thread * R + i] = d[i];
}

struct Converted {
  u32 f16x2, bf16x2, f16x2_of_e4m3x2, s8x2;
  float from_f16, from_bf16, from_e4m3;
  s32 s32_of;
  u16 f16, bf16, e4m3x2, unused;
};
static_assert(sizeof(Converted) == 40);

// in: pairs (high, low).
CS_KERNEL void convert(const float* in, Converted* out, u32 n) {
  const u32 i = ptx::block_x() * ptx::block_dim_x() + ptx::thread_x();
  if (i >= n) return;
  const float high = in[2 * i], low = in[2 * i + 1];
  Converted& o = out[i];
  o.f16x2 = ptx::f16x2_from_float(high, low);
  o.bf16x2 = ptx::bf16x2_from_float(high, low);
  o.e4m3x2 = ptx::e4m3x2_from_float(high, low);
  o.f16x2_of_e4m3x2 = ptx::f16x2_from_e4m3x2(ptx::e4m3x2_from_float(high, low));
  o.f16 = ptx::f16_from_float(low);
  o.bf16 = ptx::bf16_from_float(low);
  o.from_f16 = ptx::float_from_f16(ptx::f16_from_float(low));
  o.from_bf16 = float_from_bf16(ptx::bf16_from_float(low));
  o.from_e4m3 = float_from_e4m3(static_cast<u8>(ptx::e4m3x2_from_float(high, low)));
  o.s32_of = ptx::s32_from_float(low);
  o.s8x2 = ptx::pack_s8x2(ptx::s32_from_float(high), ptx::s32_from_float(low), 0xabcd1234u);
  o.unused = 0;
}

// out[i] = {rcp, rsqrt, ex2, lg2, sqrt, x / y, max, min} of x = in[2i], y = in[2i + 1]
CS_KERNEL void arithmetic(const float* in, float* out, u32 n) {
  const u32 i = ptx::block_x() * ptx::block_dim_x() + ptx::thread_x();
  if (i >= n) return;
  const float x = in[2 * i], y = in[2 * i + 1];
  float* o = out + 8 * i;
  o[0] = ptx::rcp_approx(x);
  o[1] = ptx::rsqrt_approx(x);
  o[2] = ptx::ex2_approx(x);
  o[3] = ptx::lg2_approx(x);
  o[4] = ptx::sqrt_rn(x);
  o[5] = ptx::div_rn(x, y);
  o[6] = ptx::max(x, y);
  o[7] = ptx::min(x, y);
}

// Exchange inside warps; out[thread][10].
CS_KERNEL void exchange(const u32* in, u32* out) {
  const u32 t = ptx::thread_x(), v = in[t];
  u32* o = out + 10 * t;
  o[0] = ptx::shfl_xor(v, 5);
  o[1] = ptx::shfl_idx(v, (t + 3) % 32);
  o[2] = ptx::shfl_down(v, 7);
  o[3] = ptx::shfl_up(v, 7);
  o[4] = ptx::ballot((v & 1) != 0);
  o[5] = ptx::any((v & 0xff) == 0) ? 2u : ptx::all((v & 0xff) != 1) ? 1u : 0u;
  o[6] = ptx::redux_add(v);
  o[7] = ptx::redux_min(v) ^ ptx::redux_max(v);
  o[8] = static_cast<u32>(ptx::redux_max(static_cast<s32>(v)));
  o[9] = ptx::prmt(v, ~v, 0x3c51u) ^ ptx::redux_or(v);
}

// Counts odd numbers of every 64-thread half by bar.red, and sums by atomics.
CS_KERNEL void reduce(const u32* in, u32* out, u32* total) {
  CS_SMEM(smem);
  u32* sum = reinterpret_cast<u32*>(smem);
  const u32 t = ptx::thread_x();
  if (t == 0) *sum = 0;
  ptx::sync_block();
  const u32 v = in[ptx::block_x() * 128 + t];
  const bool is_odd = (v & 1) != 0;
  const bool any = t < 64 ? ptx::bar_red_or<1, 64>(is_odd) : ptx::bar_red_or<2, 64>(is_odd);
  ptx::atomic_add_shared(ptx::smem_address(smem), v);
  ptx::atomic_add_global(total, v);
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  ptx::sync_block();
  out[ptx::block_x() * 128 + t] = *sum * 2 + any;
}

// In which order threads run: each draws a number.
CS_KERNEL void draw(u32* counter, u32* order) {
  const u32 i = ptx::block_x() * ptx::block_dim_x() + ptx::thread_x();
  order[i] = ptx::atomic_add_global(counter, 1);
}

// When copies move their data: the source changes between issue and wait, which no kernel may do
// and the emulation does not see. One thread; by cp.async and by a bulk copy.
CS_KERNEL void late(u32* from, u32* out) {
  CS_SMEM(smem);
  const u32 base = ptx::smem_address(smem), bar = base + 32;
  ptx::mbar_init(bar, 1);
  ptx::fence_mbarrier_init();
  ptx::cp_async_16(base, from);
  ptx::cp_async_commit();
  ptx::mbar_arrive_expect_tx(bar, 16);
  ptx::cp_async_bulk(base + 16, from + 4, 16, bar);
  from[0] += 1;
  from[4] += 1;
  ptx::cp_async_wait<0>();
  ptx::mbar_wait(bar, 0);
  out[0] = ptx::ld_shared_16(base).x;
  out[1] = ptx::ld_shared_16(base + 16).x;
}

// c is never set: what comes out must not look like zero.
CS_KERNEL void unset(float* out) {
  const u32 a[4] = {}, b[2] = {};
  float c[4], d[4];
  ptx::mma_m16n8k16_f16(d, a, b, c);
  for (int i = 0; i < 4; ++i) out[ptx::thread_x() * 4 + i] = d[i];
}

// All widths of loads, from any alignment that they allow.
struct CopyParams {
  const u8* from;
  u8* to;
  s64 bytes;
};
CS_KERNEL void copy(const CopyParams p) {
  s64 i = 0;
  for (; i + 16 <= p.bytes; i += 16) ptx::st_global_16(p.to + i, ptx::ld_global_16(p.from + i));
  if (i + 8 <= p.bytes) {
    *reinterpret_cast<V2*>(p.to + i) = ptx::ld_global_8(p.from + i);
    i += 8;
  }
  if (i + 4 <= p.bytes) {
    *reinterpret_cast<u32*>(p.to + i) = ptx::ld_global_4(p.from + i);
    i += 4;
  }
  if (i + 2 <= p.bytes) {
    *reinterpret_cast<u16*>(p.to + i) = ptx::ld_global_2(p.from + i);
    i += 2;
  }
  if (i < p.bytes) p.to[i] = p.from[i];
}

// out[i][j] = in[i][j] + 1 with strides in elements, one thread a row.
struct RowsParams {
  const float* in;
  float* out;
  s64 stride_in, stride_out, columns;
};
CS_KERNEL void add_one(const RowsParams p) {
  const s64 row = ptx::thread_x();
  for (s64 j = 0; j < p.columns; ++j)
    p.out[row * p.stride_out + j] = p.in[row * p.stride_in + j] + 1.f;
}

}  // namespace units

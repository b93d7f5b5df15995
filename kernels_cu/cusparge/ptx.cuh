// Inline PTX: one instruction per function, and the only file of the kernels that holds any.
//
// Section names are those of the PTX ISA manual, version 8.7. A function whose instruction an
// architecture lacks may be called there in discarded code only: ptxas refuses it otherwise, and
// names the instruction. "sm_90a" below means that target alone, "sm_90" that one and later.
//
// The host emulation of the tests has a twin of this file with the same functions; a test compares
// the two sets of signatures. Everything that orders memory carries a "memory" clobber, so that the
// compiler moves no access across it. Collectives name the lanes that take part in `mask`; those
// lanes must call together, and the instructions without a mask need the whole warp.

#ifndef CUSPARGE_PTX_CUH
#define CUSPARGE_PTX_CUH

#include "types.cuh"

namespace cusparge::ptx {

inline constexpr u32 kFullWarp = 0xffffffffu;

// ---- Special Registers: %tid, %ctaid, %ntid, %nctaid, %laneid -----------------------------------
// The compiler's own names are used where it has them: it knows their ranges.
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
  u32 r;
  asm("mov.u32 %0, %%laneid;" : "=r"(r));
  return r;
}

// ---- Data Movement: shfl.sync -------------------------------------------------------------------
// They exchange registers and order no memory. Clamp 0x1f: segments of the whole warp.
// shfl_down takes from lane + arg, shfl_up from lane - arg; a lane without such a source keeps its
// own value.
#define CS_SHFL(name, text, clamp)                                   \
  CS_DEV u32 name(u32 v, u32 arg, u32 mask = kFullWarp) {            \
    u32 r;                                                           \
    asm volatile("shfl.sync." text ".b32 %0, %1, %2, " clamp ", %3;" \
                 : "=r"(r)                                           \
                 : "r"(v), "r"(arg), "r"(mask));                     \
    return r;                                                        \
  }                                                                  \
  CS_DEV s32 name(s32 v, u32 arg, u32 mask = kFullWarp) {            \
    return static_cast<s32>(name(static_cast<u32>(v), arg, mask));   \
  }                                                                  \
  CS_DEV float name(float v, u32 arg, u32 mask = kFullWarp) {        \
    return float_from_bits(name(bits_of_float(v), arg, mask));       \
  }
CS_SHFL(shfl_xor, "bfly", "0x1f")
CS_SHFL(shfl_idx, "idx", "0x1f")
CS_SHFL(shfl_down, "down", "0x1f")
CS_SHFL(shfl_up, "up", "0x0")
#undef CS_SHFL

// ---- Parallel Synchronization: vote.sync, redux.sync, bar.warp.sync -----------------------------
CS_DEV u32 ballot(bool p, u32 mask = kFullWarp) {
  u32 r;
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; vote.sync.ballot.b32 %0, p, %2; }"
               : "=r"(r)
               : "r"(static_cast<u32>(p)), "r"(mask));
  return r;
}
CS_DEV bool any(bool p, u32 mask = kFullWarp) {
  u32 r;
  asm volatile(
      "{ .reg .pred p, q; setp.ne.u32 p, %1, 0; vote.sync.any.pred q, p, %2; selp.u32 %0, 1, 0, q; "
      "}"
      : "=r"(r)
      : "r"(static_cast<u32>(p)), "r"(mask));
  return r != 0;
}
CS_DEV bool all(bool p, u32 mask = kFullWarp) {
  u32 r;
  asm volatile(
      "{ .reg .pred p, q; setp.ne.u32 p, %1, 0; vote.sync.all.pred q, p, %2; selp.u32 %0, 1, 0, q; "
      "}"
      : "=r"(r)
      : "r"(static_cast<u32>(p)), "r"(mask));
  return r != 0;
}
#define CS_REDUX(name, T, text)                                                    \
  CS_DEV T name(T v, u32 mask = kFullWarp) {                                       \
    T r;                                                                           \
    asm volatile("redux.sync." text " %0, %1, %2;" : "=r"(r) : "r"(v), "r"(mask)); \
    return r;                                                                      \
  }
CS_REDUX(redux_add, u32, "add.u32")
CS_REDUX(redux_min, u32, "min.u32")
CS_REDUX(redux_max, u32, "max.u32")
CS_REDUX(redux_max, s32, "max.s32")
CS_REDUX(redux_or, u32, "or.b32")
#undef CS_REDUX
// Orders the memory accesses of the lanes in `mask`.
CS_DEV void sync_warp(u32 mask = kFullWarp) {
  asm volatile("bar.warp.sync %0;" ::"r"(mask) : "memory");
}

// ---- Parallel Synchronization: bar --------------------------------------------------------------
// Barrier ids and thread counts are immediates: with an id in a register ptxas reserves all 16.
CS_DEV void sync_block() { asm volatile("bar.sync 0;" ::: "memory"); }
template <int ID, int N>
CS_DEV void bar_sync() {
  static_assert(ID >= 0 && ID < 16 && N > 0 && N % 32 == 0);
  asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(N) : "memory");
}
template <int ID, int N>
CS_DEV void bar_arrive() {
  static_assert(ID >= 0 && ID < 16 && N > 0 && N % 32 == 0);
  asm volatile("bar.arrive %0, %1;" ::"n"(ID), "n"(N) : "memory");
}
// bar.sync, and whether the predicate holds in any of the N threads.
template <int ID, int N>
CS_DEV bool bar_red_or(bool p) {
  static_assert(ID >= 0 && ID < 16 && N > 0 && N % 32 == 0);
  u32 r;
  asm volatile(
      "{ .reg .pred p, q; setp.ne.u32 p, %1, 0; bar.red.or.pred q, %2, %3, p; selp.u32 %0, 1, 0, "
      "q; }"
      : "=r"(r)
      : "r"(static_cast<u32>(p)), "n"(ID), "n"(N)
      : "memory");
  return r != 0;
}

// ---- Floating Point: fma, max, min, sqrt, div, rcp, rsqrt, ex2, lg2 -----------------------------
// `max` and `min` return the other operand where one is NaN. ".ftz" flushes subnormal operands and
// results to zero.
CS_DEV float fma(float a, float b, float c) {
  float r;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(r) : "f"(a), "f"(b), "f"(c));
  return r;
}
#define CS_BINARY(name, text)                            \
  CS_DEV float name(float a, float b) {                  \
    float r;                                             \
    asm(text " %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); \
    return r;                                            \
  }
CS_BINARY(max, "max.f32")
CS_BINARY(min, "min.f32")
CS_BINARY(div_rn, "div.rn.f32")  // correctly rounded
#undef CS_BINARY
#define CS_UNARY(name, text)                 \
  CS_DEV float name(float x) {               \
    float r;                                 \
    asm(text " %0, %1;" : "=f"(r) : "f"(x)); \
    return r;                                \
  }
CS_UNARY(sqrt_rn, "sqrt.rn.f32")                // correctly rounded
CS_UNARY(rcp_approx, "rcp.approx.ftz.f32")      // within 1 ulp
CS_UNARY(rsqrt_approx, "rsqrt.approx.ftz.f32")  // relative error at most 2^-22.9
CS_UNARY(ex2_approx, "ex2.approx.ftz.f32")      // within 2 ulp; 0 for -inf
CS_UNARY(lg2_approx, "lg2.approx.ftz.f32")      // -inf for 0
#undef CS_UNARY

// ---- Data Movement and Conversion: cvt, cvt.pack, prmt ------------------------------------------
// All round to nearest, ties to even. In the pairs, `high` goes to the upper half of the result.
CS_DEV float float_from_f16(u16 bits) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(bits));
  return r;
}
CS_DEV u16 f16_from_float(float x) {
  u16 r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return r;
}
CS_DEV u16 bf16_from_float(float x) {
  u16 r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return r;
}
CS_DEV u32 f16x2_from_float(float high, float low) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
CS_DEV u32 bf16x2_from_float(float high, float low) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
// sm_89. Saturates to +-448; NaN becomes 0x7f.
CS_DEV u16 e4m3x2_from_float(float high, float low) {
  u16 r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
}
// sm_89. Exact.
CS_DEV u32 f16x2_from_e4m3x2(u16 pair) {
  u32 r;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(pair));
  return r;
}
// Nearest integer, saturated to 32 bits; NaN becomes 0.
CS_DEV s32 s32_from_float(float x) {
  s32 r;
  asm("cvt.rni.s32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}
// Bytes, lowest first: sat(low), sat(high), then the lower two bytes of `above`.
CS_DEV u32 pack_s8x2(s32 high, s32 low, u32 above) {
  u32 r;
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(high), "r"(low), "r"(above));
  return r;
}
// Four of the eight bytes {b, a}, chosen by the nibbles of `selector` (bit 3: spread the sign).
CS_DEV u32 prmt(u32 a, u32 b, u32 selector) {
  u32 r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}

// ---- Data Movement: ld.global.nc, st.global, ld.shared, cvta ------------------------------------
// For memory that this launch does not write. Addresses are multiples of the size.
CS_DEV V4 ld_global_16(const void* p) {
  V4 r;
  asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(p));
  return r;
}
CS_DEV V2 ld_global_8(const void* p) {
  V2 r;
  asm volatile("ld.global.nc.v2.u32 {%0,%1}, [%2];" : "=r"(r.x), "=r"(r.y) : "l"(p));
  return r;
}
CS_DEV u32 ld_global_4(const void* p) {
  u32 r;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(r) : "l"(p));
  return r;
}
CS_DEV u16 ld_global_2(const void* p) {
  u16 r;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(r) : "l"(p));
  return r;
}
CS_DEV void st_global_16(void* p, V4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}
// The 32-bit address in the shared window that the functions below take.
CS_DEV u32 smem_address(const void* p) {
  u64 r;
  asm("cvta.to.shared.u64 %0, %1;" : "=l"(r) : "l"(p));
  return static_cast<u32>(r);
}
CS_DEV V4 ld_shared_16(u32 address) {
  V4 r;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "r"(address)
               : "memory");
  return r;
}

// ---- Parallel Synchronization: atom -------------------------------------------------------------
// Relaxed: they order nothing else. The old value is returned.
CS_DEV u32 atomic_add_global(u32* p, u32 v) {
  u32 r;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(r)
               : "l"(p), "r"(v)
               : "memory");
  return r;
}
CS_DEV u32 atomic_add_shared(u32 address, u32 v) {
  u32 r;
  asm volatile("atom.relaxed.cta.shared.add.u32 %0, [%1], %2;"
               : "=r"(r)
               : "r"(address), "r"(v)
               : "memory");
  return r;
}

// ---- Asynchronous Copy: cp.async (non-bulk) -----------------------------------------------------
// 16 bytes to shared memory, of which the first `src_bytes` are read and the others are zero. The
// issuing thread sees them after its wait; other threads need a barrier behind that.
CS_DEV void cp_async_16(u32 dst, const void* src, u32 src_bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(src_bytes)
               : "memory");
}
CS_DEV void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's groups are in flight.
template <int N>
CS_DEV void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- Parallel Synchronization: mbarrier ---------------------------------------------------------
CS_DEV void mbar_init(u32 bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
CS_DEV void mbar_arrive(u32 bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
// sm_90, like the three below.
CS_DEV void mbar_expect_tx(u32 bar, u32 bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
}
CS_DEV void mbar_arrive_expect_tx(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
}
// Whether the phase of this parity is complete; may wait a while and then say no.
CS_DEV bool mbar_try_wait(u32 bar, u32 parity) {
  u32 r;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; "
      "}"
      : "=r"(r)
      : "r"(bar), "r"(parity)
      : "memory");
  return r != 0;
}
CS_DEV void mbar_wait(u32 bar, u32 parity) {
  while (!mbar_try_wait(bar, parity)) {
  }
}

// ---- Asynchronous Copy: cp.async.bulk; Parallel Synchronization: membar / fence -----------------
// sm_90. Sizes and both addresses are multiples of 16; the bytes count on `bar` when they arrive.
CS_DEV void cp_async_bulk(u32 dst, const void* src, u32 bytes, u32 bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(dst),
      "l"(src), "r"(bytes), "r"(bar)
      : "memory");
}
// Makes this thread's mbarrier.init visible to asynchronous copies.
CS_DEV void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Between ordinary writes of shared memory and reads of it by wgmma or by bulk copies.
CS_DEV void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- Parallel Synchronization: griddepcontrol ---------------------------------------------------
// sm_90, for programmatic dependent launch: wait for the kernel before, let the one behind start.
CS_DEV void grid_dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
CS_DEV void grid_dependency_launch() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// ---- Warp Level Matrix: ldmatrix ----------------------------------------------------------------
// 8x8 matrices of 16-bit elements; lane 8m + r gives the address of row r of matrix m.
#define CS_LDMATRIX(suffix, text)                                                        \
  CS_DEV void ldmatrix_x1##suffix(u32(&r)[1], u32 address) {                             \
    asm volatile("ldmatrix.sync.aligned.m8n8.x1" text ".shared.b16 {%0}, [%1];"          \
                 : "=r"(r[0])                                                            \
                 : "r"(address)                                                          \
                 : "memory");                                                            \
  }                                                                                      \
  CS_DEV void ldmatrix_x2##suffix(u32(&r)[2], u32 address) {                             \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" text ".shared.b16 {%0,%1}, [%2];"       \
                 : "=r"(r[0]), "=r"(r[1])                                                \
                 : "r"(address)                                                          \
                 : "memory");                                                            \
  }                                                                                      \
  CS_DEV void ldmatrix_x4##suffix(u32(&r)[4], u32 address) {                             \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" text ".shared.b16 {%0,%1,%2,%3}, [%4];" \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                        \
                 : "r"(address)                                                          \
                 : "memory");                                                            \
  }
CS_LDMATRIX(, "")
CS_LDMATRIX(_trans, ".trans")
#undef CS_LDMATRIX

// ---- Warp Level Matrix: mma.sync ----------------------------------------------------------------
// d = a * b + c, row.col; `d` and `c` may be the same array. The lane maps: "Matrix Fragments for
// mma.m16n8k16 / mma.m16n8k32".
#define CS_MMA(name, text, T, k)                                                              \
  CS_DEV void name(T(&d)[4], const u32(&a)[4], const u32(&b)[2], const T(&c)[4]) {            \
    asm volatile("mma.sync.aligned." text                                                     \
                 " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "                                   \
                 "{%10,%11,%12,%13};"                                                         \
                 : "=" k(d[0]), "=" k(d[1]), "=" k(d[2]), "=" k(d[3])                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), k(c[0]), \
                   k(c[1]), k(c[2]), k(c[3]));                                                \
  }
CS_MMA(mma_m16n8k16_f16, "m16n8k16.row.col.f32.f16.f16.f32", float, "f")
CS_MMA(mma_m16n8k16_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32", float, "f")
CS_MMA(mma_m16n8k32_s8, "m16n8k32.row.col.s32.s8.s8.s32", s32, "r")
// sm_89; emulated in software on sm_90 and sm_100, where it must not be used.
CS_MMA(mma_m16n8k32_e4m3, "m16n8k32.row.col.f32.e4m3.e4m3.f32", float, "f")
#undef CS_MMA

// ---- Asynchronous Warpgroup Level Matrix: wgmma -------------------------------------------------
// sm_90a. d (64 x 2R, R registers a thread) = a * b + (scale_d ? d : 0), for 32 steps of k. `b`,
// and `a` in the forms without registers, are descriptors of K-major tiles in shared memory
// ("Matrix Descriptor Format"). Registers of a batch must not be touched between its fence and its
// wait.
CS_DEV void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
CS_DEV void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most N of this warp's groups are in flight.
template <int N>
CS_DEV void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Operand lists: names %0, %1, ... as text, and the registers themselves.
#define CS_NAMES_32                                                                            \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24," \
  "%25,%26,%27,%28,%29,%30,%31"
#define CS_NAMES_36 CS_NAMES_32 ",%32,%33,%34,%35"
#define CS_NAMES_64                                                                              \
  CS_NAMES_36                                                                                    \
  ",%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58" \
  ",%59,%60,%61,%62,%63"
#define CS_NAMES_68 CS_NAMES_64 ",%64,%65,%66,%67"
#define CS_REGS_4(k, i) "+" k(d[i]), "+" k(d[i + 1]), "+" k(d[i + 2]), "+" k(d[i + 3])
#define CS_REGS_16(k, i) \
  CS_REGS_4(k, i), CS_REGS_4(k, i + 4), CS_REGS_4(k, i + 8), CS_REGS_4(k, i + 12)
#define CS_REGS_32(k) CS_REGS_16(k, 0), CS_REGS_16(k, 16)
#define CS_REGS_36(k) CS_REGS_32(k), CS_REGS_4(k, 32)
#define CS_REGS_64(k) CS_REGS_32(k), CS_REGS_16(k, 32), CS_REGS_16(k, 48)
#define CS_REGS_68(k) CS_REGS_64(k), CS_REGS_4(k, 64)

// n = 2R columns. pA, pB, pS name the operands behind the R accumulators: descriptors and scale_d;
// tail: the immediates that scale a and b by 1, which integers do not have.
#define CS_WGMMA_SS(name, T, k, R, n, text, tail, pA, pB, pS)                             \
  CS_DEV void name(T(&d)[R], u64 desc_a, u64 desc_b, u32 scale_d) {                       \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, " pS                                     \
                 ", 0; wgmma.mma_async.sync.aligned."                                     \
                 "m64n" n "k32." text " {" CS_NAMES_##R "}, " pA ", " pB ", p" tail "; }" \
                 : CS_REGS_##R(k)                                                         \
                 : "l"(desc_a), "l"(desc_b), "r"(scale_d));                               \
  }
#define CS_WGMMA_RS(name, T, k, R, n, text, tail, p0, p1, p2, p3, pB, pS)                       \
  CS_DEV void name(T(&d)[R], const u32(&a)[4], u64 desc_b, u32 scale_d) {                       \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, " pS                                           \
                 ", 0; wgmma.mma_async.sync.aligned."                                           \
                 "m64n" n "k32." text " {" CS_NAMES_##R "}, {" p0 "," p1 "," p2 "," p3 "}, " pB \
                                                        ", p" tail "; }"                        \
                 : CS_REGS_##R(k)                                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc_b), "r"(scale_d));      \
  }
CS_WGMMA_SS(wgmma_s8, s32, "r", 32, "64", "s32.s8.s8", "", "%32", "%33", "%34")
CS_WGMMA_SS(wgmma_s8, s32, "r", 64, "128", "s32.s8.s8", "", "%64", "%65", "%66")
CS_WGMMA_RS(wgmma_s8, s32, "r", 32, "64", "s32.s8.s8", "", "%32", "%33", "%34", "%35", "%36", "%37")
CS_WGMMA_RS(wgmma_s8, s32, "r", 64, "128", "s32.s8.s8", "", "%64", "%65", "%66", "%67", "%68",
            "%69")
#define CS_E4M3 "f32.e4m3.e4m3"
CS_WGMMA_SS(wgmma_e4m3, float, "f", 32, "64", CS_E4M3, ", 1, 1", "%32", "%33", "%34")
CS_WGMMA_SS(wgmma_e4m3, float, "f", 36, "72", CS_E4M3, ", 1, 1", "%36", "%37", "%38")
CS_WGMMA_SS(wgmma_e4m3, float, "f", 64, "128", CS_E4M3, ", 1, 1", "%64", "%65", "%66")
CS_WGMMA_SS(wgmma_e4m3, float, "f", 68, "136", CS_E4M3, ", 1, 1", "%68", "%69", "%70")
CS_WGMMA_RS(wgmma_e4m3, float, "f", 32, "64", CS_E4M3, ", 1, 1", "%32", "%33", "%34", "%35", "%36",
            "%37")
CS_WGMMA_RS(wgmma_e4m3, float, "f", 36, "72", CS_E4M3, ", 1, 1", "%36", "%37", "%38", "%39", "%40",
            "%41")
CS_WGMMA_RS(wgmma_e4m3, float, "f", 64, "128", CS_E4M3, ", 1, 1", "%64", "%65", "%66", "%67", "%68",
            "%69")
CS_WGMMA_RS(wgmma_e4m3, float, "f", 68, "136", CS_E4M3, ", 1, 1", "%68", "%69", "%70", "%71", "%72",
            "%73")
#undef CS_E4M3
#undef CS_WGMMA_SS
#undef CS_WGMMA_RS

// ---- Miscellaneous: setmaxnreg ------------------------------------------------------------------
// sm_90a, sm_100a, sm_120a. Without launch bounds on the kernel ptxas ignores it (C7508).
template <int N>
CS_DEV void setmaxnreg_inc() {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
CS_DEV void setmaxnreg_dec() {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- Floating Point: mul (float64) --------------------------------------------------------------
// Rounded by itself: what the compiler could fuse with an addition, it may not.
CS_DEV double mul_rn(double a, double b) {
  double r;
  asm("mul.rn.f64 %0, %1, %2;" : "=d"(r) : "d"(a), "d"(b));
  return r;
}

}  // namespace cusparge::ptx

#endif  // CUSPARGE_PTX_CUH

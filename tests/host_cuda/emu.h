// What compiled kernels call: the border between a kernel's code and the emulation's runtime.
//
// The functions here are called from the twin `ptx.cuh` and from `prelude.h`, which are always
// inlined: the return address is a place in the kernel, and reports name its line.

#pragma once

namespace emu {

struct Dim3 {
  unsigned x, y, z;
};

// Constant during a kernel, as far as one thread can tell: the compiler may keep the values.
[[gnu::const]] Dim3 thread_idx();
[[gnu::const]] Dim3 block_idx();
[[gnu::const]] Dim3 block_dim();
[[gnu::const]] Dim3 grid_dim();
[[gnu::const]] unsigned char* shared_memory();

// ---- collectives.h
enum Shuffle { kXor, kIdx, kDown, kUp };
enum Vote { kBallot, kAny, kAll };
enum Redux { kAdd, kMin, kMax, kMaxSigned, kOr };
unsigned shuffle(Shuffle form, unsigned value, unsigned arg, unsigned mask);
unsigned vote(Vote form, bool predicate, unsigned mask);
unsigned redux(Redux form, unsigned value, unsigned mask);
void sync_warp(unsigned mask);
void bar_sync(unsigned id, unsigned threads);  // threads 0: the whole block
void bar_arrive(unsigned id, unsigned threads);
bool bar_red_or(unsigned id, unsigned threads, bool predicate);

// ---- memory.h
unsigned shared_address(const void* p);
void load_global(void* to, const void* from, unsigned bytes);  // read-only for this launch
void store_global(void* to, const void* from, unsigned bytes);
void load_shared(void* to, unsigned address, unsigned bytes);
unsigned atomic_add_global(unsigned* p, unsigned value);
unsigned atomic_add_shared(unsigned address, unsigned value);

// ---- formats.h
float float_from_f16(unsigned short bits);
unsigned short f16_from_float(float x);
unsigned short bf16_from_float(float x);
unsigned char e4m3_from_float(float x);
int s32_from_float(float x);
float approx(int function, float x);  // 0 rcp, 1 rsqrt, 2 ex2, 3 lg2

// ---- async.h
void cp_async(unsigned dst, const void* src, unsigned src_bytes);
void cp_async_commit();
void cp_async_wait(unsigned groups);
void cp_async_bulk(unsigned dst, const void* src, unsigned bytes, unsigned bar);
void mbar_init(unsigned bar, unsigned count);
void mbar_arrive(unsigned bar, unsigned arrivals, unsigned expected_bytes);
bool mbar_try_wait(unsigned bar, unsigned parity);
void fence_mbarrier_init();
void fence_proxy_async();

// ---- tensor.h
enum Mma { kF16, kBf16, kS8, kE4m3 };
void ldmatrix(unsigned* r, int matrices, bool transposed, unsigned address);
void mma(Mma form, void* d, const unsigned* a, const unsigned* b, const void* c);

// ---- wgmma.h
void wgmma(Mma form, void* d, int registers, const unsigned* a, unsigned long long desc_a,
           unsigned long long desc_b, unsigned scale_d);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(unsigned groups);
void setmaxnreg(bool increase, unsigned registers);

// Calls a kernel with the parameters that `args` points to.
template <unsigned... I>
struct Indices {};
template <unsigned N, unsigned... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <unsigned... I>
struct MakeIndices<0, I...> {
  using Type = Indices<I...>;
};
template <class... P, unsigned... I>
[[gnu::no_sanitize("thread")]] inline void call(void (*kernel)(P...), void** args, Indices<I...>) {
  kernel(*static_cast<P*>(args[I])...);
}
template <class... P>
[[gnu::no_sanitize("thread")]] inline void call(void (*kernel)(P...), void** args) {
  call(kernel, args, typename MakeIndices<sizeof...(P)>::Type{});
}

}  // namespace emu

// Fixed-width types, number formats and the three macros that every kernel uses.
//
// No header is included: NVRTC has none at hand, and the tests compile the same text with a host
// C++20 compiler. Conversions that are bit moves are plain code here; those with an instruction of
// their own are in ptx.cuh.

#ifndef CUSPARGE_TYPES_CUH
#define CUSPARGE_TYPES_CUH

// A host emulation of the device defines the macros itself, before this file.
#if !defined(CS_DEV)
#if defined(__CUDACC__)
// A function of the device. Always inlined: register arrays are passed by reference, and a call
// would move them to local memory.
#define CS_DEV __device__ __forceinline__
// The same, callable on the host and in constant expressions.
#define CS_HOST_DEV __host__ __device__ __forceinline__
// A kernel; launch bounds follow it: CS_KERNEL void __launch_bounds__(256) name(const Params p).
#define CS_KERNEL __global__
// Declares `u8 name[]`, the dynamic shared memory. 1,024 bytes is what the widest swizzle of the
// tensor cores asks for.
#define CS_SMEM(name) extern __shared__ __align__(1024) unsigned char name[]
#else
#define CS_DEV inline
#define CS_HOST_DEV inline
#endif
#endif

namespace cusparge {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using s8 = signed char;
using s16 = short;
using s32 = int;
using s64 = long long;
static_assert(sizeof(u8) == 1 && sizeof(u16) == 2 && sizeof(u32) == 4 && sizeof(u64) == 8);

// What one 16-byte or 8-byte memory instruction moves; x is at the lowest address.
struct alignas(16) V4 {
  u32 x, y, z, w;
};
struct alignas(8) V2 {
  u32 x, y;
};
static_assert(sizeof(V4) == 16 && sizeof(V2) == 8);

// Elements of the callers' arrays: the bits alone, so that no framework's header is needed.
struct F16 {
  u16 bits;  // IEEE binary16
};
struct Bf16 {
  u16 bits;  // upper half of an IEEE binary32
};
struct E4m3 {
  u8 bits;  // 4 exponent bits of bias 7, 3 mantissa bits, no infinities, NaN is S.1111.111
};

CS_HOST_DEV constexpr float float_from_bits(u32 bits) { return __builtin_bit_cast(float, bits); }
CS_HOST_DEV constexpr u32 bits_of_float(float value) { return __builtin_bit_cast(u32, value); }

// Exact: a bf16 number is a float whose lower half is zero.
CS_HOST_DEV constexpr float float_from_bf16(u16 bits) {
  return float_from_bits(static_cast<u32>(bits) << 16);
}

// The two bf16 numbers of one word, lower address first.
CS_HOST_DEV constexpr float float_from_bf16x2_low(u32 pair) { return float_from_bits(pair << 16); }
CS_HOST_DEV constexpr float float_from_bf16x2_high(u32 pair) {
  return float_from_bits(pair & 0xffff0000u);
}

// Exact: every e4m3 number is a float. Codes with all exponent and mantissa bits set are NaN.
CS_HOST_DEV constexpr float float_from_e4m3(u8 bits) {
  const u32 sign = static_cast<u32>(bits & 0x80u) << 24;
  const u32 exponent = (bits >> 3) & 15u;
  const u32 mantissa = bits & 7u;
  if ((bits & 0x7fu) == 0x7fu) return float_from_bits(0x7fffffffu);
  if (exponent == 0) {  // a multiple of 2^-9
    const float magnitude = static_cast<float>(mantissa) * 0.001953125f;
    return sign != 0 ? -magnitude : magnitude;
  }
  return float_from_bits(sign | (exponent + 120u) << 23 | mantissa << 20);
}

// Not a NaN and not an infinity.
CS_HOST_DEV constexpr bool is_finite(float value) {
  return (bits_of_float(value) & 0x7f800000u) != 0x7f800000u;
}

}  // namespace cusparge

#endif  // CUSPARGE_TYPES_CUH

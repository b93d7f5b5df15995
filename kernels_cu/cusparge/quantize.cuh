// Rounding to the 8-bit and 16-bit formats of tiles.
//
// int8: code = nearest(127 x / largest), of the largest magnitude of the group; ties go to even.
// Adding 1.5 * 2^23 leaves the nearest integer in the low byte of the sum's bits, which is cheaper
// than a conversion: those share a slow unit.
// e4m3 and float16: nearest(x / scale), scale the least power of two that brings the channel's
// largest magnitude into range (448 or 65504), so that another scale changes no code above the
// subnormals.

#pragma once

#include "cusparge/ptx.cuh"
#include "cusparge/rows.cuh"
#include "cusparge/tiles.cuh"
#include "cusparge/types.cuh"

namespace cusparge {

inline constexpr float kInt8Max = 127.0f;
inline constexpr float kNearest = 12582912.0f;  // 1.5 * 2^23: neighbours are 1 apart

// How values become codes: nearest(x * up * factor). `up` is a power of two that keeps the factor
// of tiny groups finite; x * up is exact.
struct Int8Factor {
  float up;
  float factor;
};

CS_DEV Int8Factor int8_factor(float largest) {
  const float up = largest < 0x1p-100f ? 0x1p100f : 1.0f;
  // Within 2^-22 of exact: the largest value comes to less than 127.5.
  return {up, largest > 0.0f ? kInt8Max * ptx::rcp_approx(largest * up) : 0.0f};
}

// The codes of four values times `factor`, lowest byte first.
CS_DEV u32 int8_codes(const float (&x)[4], float factor) {
  u32 bits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) bits[i] = bits_of_float(ptx::fma(x[i], factor, kNearest));
  return ptx::prmt(ptx::prmt(bits[0], bits[1], 0x0040), ptx::prmt(bits[2], bits[3], 0x0040),
                   0x5410);
}

// 1 / scale of a channel of V: a power of two. Scales end at 2^-127, the least one whose inverse is
// a float; a channel of zeros has 1.
template <ValueFormat kFormat>
CS_DEV float inverse_value_scale(float largest) {
  // Mantissa and exponent of the largest number, 1.75 * 2^8 or (2 - 2^-10) * 2^15. What is above
  // its mantissa carries into the exponent.
  constexpr u32 kCarry = kFormat == ValueFormat::kE4m3 ? 0x1FFFFFu : 0x1FFFu;
  constexpr int kTop = kFormat == ValueFormat::kE4m3 ? 8 : 15;
  // Subnormal numbers are far below the least scale's range.
  int exponent = static_cast<int>((bits_of_float(largest) + kCarry) >> 23) - 127 - kTop;
  if (exponent < -127) exponent = -127;
  if (largest == 0.0f) exponent = 0;
  return float_from_bits(static_cast<u32>(127 - exponent) << 23);
}

// The inverse of such a power of two, which may be subnormal.
CS_DEV float inverse_power(float power) {
  const int field = 254 - static_cast<int>(bits_of_float(power) >> 23);
  return float_from_bits(field > 0 ? static_cast<u32>(field) << 23 : 1u << 22);
}

// Whether any number of a piece is a NaN or infinite: its exponent's bits are all ones, and one
// more makes them carry into the sign.
template <Dtype kDtype>
CS_DEV bool has_non_finite(const V4& piece) {
  constexpr u32 kRest = kDtype == Dtype::kFloat32 ? 0x7FFFFFFFu : 0x7FFF7FFFu;
  constexpr u32 kOne = kDtype == Dtype::kFloat32    ? 0x00800000u
                       : kDtype == Dtype::kBFloat16 ? 0x00800080u
                                                    : 0x04000400u;
  const u32 carries = ((piece.x & kRest) + kOne) | ((piece.y & kRest) + kOne) |
                      ((piece.z & kRest) + kOne) | ((piece.w & kRest) + kOne);
  return (carries & ~kRest) != 0;
}

// Words k = 0..3 of the result hold byte k of the four words, in their order.
CS_DEV void transpose_bytes(const u32 (&word)[4], u32 (&out)[4]) {
  const u32 low01 = ptx::prmt(word[0], word[1], 0x5140);
  const u32 low23 = ptx::prmt(word[2], word[3], 0x5140);
  const u32 high01 = ptx::prmt(word[0], word[1], 0x7362);
  const u32 high23 = ptx::prmt(word[2], word[3], 0x7362);
  out[0] = ptx::prmt(low01, low23, 0x5410);
  out[1] = ptx::prmt(low01, low23, 0x7632);
  out[2] = ptx::prmt(high01, high23, 0x5410);
  out[3] = ptx::prmt(high01, high23, 0x7632);
}

}  // namespace cusparge

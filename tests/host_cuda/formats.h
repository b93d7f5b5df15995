// Number formats: conversions and approximations as the instructions define them.

#pragma once

#include "state.h"

namespace emu {

inline u32 bits_of(float x) {
  u32 r;
  std::memcpy(&r, &x, 4);
  return r;
}
inline float float_of(u32 bits) {
  float r;
  std::memcpy(&r, &bits, 4);
  return r;
}

float float_from_f16(unsigned short bits) {
  const u32 sign = u32{bits} >> 15 << 31, exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline float float_from_bf16_bits(u32 bits) { return float_of(bits << 16); }

inline float float_from_e4m3_bits(u32 bits) {
  const u32 exponent = bits >> 3 & 15, mantissa = bits & 7;
  float magnitude = std::ldexp(static_cast<float>(exponent == 0 ? mantissa : mantissa + 8),
                               static_cast<int>(exponent == 0 ? 1 : exponent) - 10);
  if ((bits & 127) == 127) magnitude = float_of(0x7fffffffu);
  return (bits & 128) != 0 ? -magnitude : magnitude;
}

// |x| as a code with `mantissa_bits` and the smallest normal exponent: nearest, ties to even. The
// carry out of the mantissa runs into the exponent, as it should.
inline u32 rounded_code(float magnitude, int mantissa_bits, int min_exponent) {
  if (magnitude == 0) return 0;
  int exponent = 0;
  std::frexp(magnitude, &exponent);  // magnitude = [0.5, 1) * 2^exponent
  exponent = std::max(exponent - 1, min_exponent);
  const double steps = std::nearbyint(std::ldexp(double{magnitude}, mantissa_bits - exponent));
  return (static_cast<u32>(exponent - min_exponent) << mantissa_bits) + static_cast<u32>(steps);
}

unsigned short f16_from_float(float x) {
  if (std::isnan(x)) return 0x7fff;
  const u32 sign = bits_of(x) >> 31 << 15;
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.f) return static_cast<u16>(sign | 0x7c00);  // half way to 2^16: even is up
  return static_cast<u16>(sign | rounded_code(magnitude, 10, -14));
}

unsigned short bf16_from_float(float x) {
  if (std::isnan(x)) return 0x7fff;
  const u32 bits = bits_of(x);
  return static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

unsigned char e4m3_from_float(float x) {
  if (std::isnan(x)) return 0x7f;
  const u32 sign = bits_of(x) >> 31 << 7;
  const float magnitude = std::fabs(x);
  if (magnitude >= 448.f) return static_cast<u8>(sign | 0x7e);
  return static_cast<u8>(sign | rounded_code(magnitude, 3, -6));
}

int s32_from_float(float x) {
  if (std::isnan(x)) return 0;
  const double r = std::nearbyint(double{x});
  return r >= 2147483647.0    ? 2147483647
         : r <= -2147483648.0 ? -2147483647 - 1
                              : static_cast<int>(r);
}

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }

// Rounded once from double: the device's approximations lie within 2 ulp of that.
float approx(int function, float x) {
  const double v = flushed(x);
  const double r = function == 0   ? 1.0 / v
                   : function == 1 ? 1.0 / std::sqrt(v)
                   : function == 2 ? std::exp2(v)
                                   : std::log2(v);
  return flushed(static_cast<float>(r));
}

}  // namespace emu

// Matrix instructions of one warp: ldmatrix and mma.sync.
//
// Fragment maps, with l the lane, g = l / 4 and t = l % 4. They are written a second time, in
// NumPy, by the tests. 16-bit A register r of m16n8k16: row g + 8 (r % 2), k = 2t + 8 (r / 2) and
// the next; 8-bit A register r of m16n8k32: the same rows, k = 4t + 16 (r / 2) and the next three.
// B register r: column g, k as in A with 2r. C register r: row g + 8 (r / 2), column 2t + r % 2.

#pragma once

#include "async.h"
#include "formats.h"

namespace emu {

void registers_written(Thread& t, const void* p, u32 bytes, Place place);  // wgmma.h

// A lane of this warp, and where its share of the operands lies.
inline Thread& lane_thread(u32 lane) { return rt.threads[rt.current->warp * 32 + lane]; }

void ldmatrix(unsigned* r, int matrices, bool transposed, unsigned address) {
  struct Operands {
    u32* r;
    u32 address;
  } mine{r, address};
  const Place place = EMU_PLACE;
  const char* kinds[2][3] = {{"ldmatrix.x1", "ldmatrix.x2", "ldmatrix.x4"},
                             {"ldmatrix.x1.trans", "ldmatrix.x2.trans", "ldmatrix.x4.trans"}};
  collective(kinds[transposed][matrices / 2], ~0u, &mine, place, [&](void** all) {
    for (u32 m = 0; m < static_cast<u32>(matrices); ++m) {
      u16 elements[8][8];
      for (u32 row = 0; row < 8; ++row) {  // lane 8m + row supplies the address, and reads
        const u32 lane = 8 * m + row;
        const u32 from = static_cast<Operands*>(all[lane])->address;
        const u32 offset = shared_offset(from, 16, 16, "reads (ldmatrix)", place);
        shared_read(accessor(lane_thread(lane).id), offset, 16, "reads (ldmatrix)", place);
        std::memcpy(elements[row], shared_bytes + offset, 16);
      }
      for (u32 lane = 0; lane < 32; ++lane) {
        const u32 g = lane / 4, k = lane % 4 * 2;
        const u32 low = transposed ? elements[k][g] : elements[g][k];
        const u32 high = transposed ? elements[k + 1][g] : elements[g][k + 1];
        u32* to = static_cast<Operands*>(all[lane])->r + m;
        registers_written(lane_thread(lane), to, 4, place);
        *to = high << 16 | low;
      }
    }
  });
}

// The value of each byte as s8 or e4m3.
inline const double* values_of_bytes(Mma form) {
  static const std::vector<double> tables = [] {
    std::vector<double> values;
    for (u32 code = 0; code < 256; ++code) values.push_back(static_cast<signed char>(code));
    for (u32 code = 0; code < 256; ++code) values.push_back(float_from_e4m3_bits(code));
    return values;
  }();
  return &tables[form == kS8 ? 0 : 256];
}

// One element of a register that packs several: element 0 is the lowest.
inline double element(Mma form, u32 word, u32 index) {
  if (form == kF16) return float_from_f16(static_cast<u16>(word >> 16 * index));
  if (form == kBf16) return float_from_bf16_bits(word >> 16 * index & 0xffff);
  return values_of_bytes(form)[word >> 8 * index & 255];
}

// Sums are rounded once, which hardware does not promise; integers wrap around.
inline u32 accumulated(Mma form, u32 c, double products) {
  if (form == kS8) return c + static_cast<u32>(static_cast<s64>(products));
  return bits_of(static_cast<float>(float_of(c) + products));
}

void mma(Mma form, void* d, const unsigned* a, const unsigned* b, const void* c) {
  struct Operands {
    u32* d;
    const u32 *a, *b, *c;
  } mine{static_cast<u32*>(d), a, b, static_cast<const u32*>(c)};
  const Place place = EMU_PLACE;
  const char* kinds[] = {"mma.f16", "mma.bf16", "mma.s8", "mma.e4m3"};
  collective(kinds[form], ~0u, &mine, place, [&](void** all) {
    const u32 packed = form == kF16 || form == kBf16 ? 2 : 4, depth = 8 * packed;
    double a_rows[16][32], b_columns[8][32];
    u32 result[32][4];
    for (u32 lane = 0; lane < 32; ++lane) {
      const auto& o = *static_cast<const Operands*>(all[lane]);
      const u32 g = lane / 4, t = lane % 4;
      for (u32 r = 0; r < 4; ++r)
        for (u32 i = 0; i < packed; ++i) {
          const u32 k = packed * t + r / 2 * (depth / 2) + i;
          a_rows[g + 8 * (r % 2)][k] = element(form, o.a[r], i);
          if (r % 2 == 0) b_columns[g][k] = element(form, o.b[r / 2], i);
        }
    }
    for (u32 lane = 0; lane < 32; ++lane) {
      const auto& o = *static_cast<const Operands*>(all[lane]);
      for (u32 r = 0; r < 4; ++r) {
        const double* row = a_rows[lane / 4 + 8 * (r / 2)];
        const double* column = b_columns[lane % 4 * 2 + r % 2];
        double sum = 0;
        for (u32 k = 0; k < depth; ++k) sum += row[k] * column[k];
        result[lane][r] = accumulated(form, o.c[r], sum);
      }
    }
    for (u32 lane = 0; lane < 32; ++lane) {
      u32* to = static_cast<Operands*>(all[lane])->d;
      registers_written(lane_thread(lane), to, 16, place);
      std::memcpy(to, result[lane], 16);
    }
  });
}

}  // namespace emu

// Half types on the host: to float and, rounded to the nearest, back.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../../csrc/lstm.h"

namespace lstmfused {

inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat16 x) { return float_of(uint32_t(x.bits) << 16); }
inline float widen(float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = uint32_t(x.bits & 0x7fff) << 13;
  if (magnitude >= 0x1fu << 23) return float_of(sign | 0xffu << 23 | magnitude);  // infinity, NaN
  return float_of(sign | bits_of(float_of(magnitude) * 0x1p112f));
}

inline void narrow(float x, float& to) { to = x; }
inline void narrow(double x, double& to) { to = x; }
inline void narrow(float x, bfloat16& to) {
  const uint32_t bits = bits_of(x);
  to.bits = x != x ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void narrow(float x, float16& to) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000, magnitude = bits_of(x) & 0x7fffffff;
  uint32_t bits;
  if (magnitude > 0xffu << 23) {
    bits = 0x7fff;
  } else if (magnitude < (127u - 14) << 23) {  // the last bit of the sum is worth 2^-24
    bits = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  } else {
    const uint32_t rounded = (magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13;
    bits = std::min(rounded - ((127u - 15) << 10), 0x1fu << 10);
  }
  to.bits = uint16_t(sign | bits);
}

}  // namespace lstmfused

// The bfloat16 of CUDA for the emulator.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t wide = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}
// Rounds to nearest, ties to even.
inline __nv_bfloat16 __float2bfloat16(float x) {
  if (std::isnan(x)) return {0x7fff};
  uint32_t wide;
  std::memcpy(&wide, &x, sizeof wide);
  return {uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16)};
}

// Hashes that tell files and texts apart; none of them withstands someone who wants them to collide.
#pragma once
#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>

namespace heed {

/// FNV-1a, 64 bits (Fowler, Noll, Vo).
inline uint64_t fnv1a(std::string_view bytes) {
  uint64_t hash = 0xcbf29ce484222325ull;
  for (char c : bytes) hash = (hash ^ uint8_t(c)) * 0x100000001b3ull;
  return hash;
}

/// 16 hexadecimal digits, as calibrations and samples name a model.
inline std::string hexadecimal(uint64_t number) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(number));
  return text;
}

}  // namespace heed

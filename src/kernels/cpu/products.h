#pragma once

namespace heed {

/// What prompts' products multiply: f32, or what the machine multiplies fastest, rounded to it: bf16, or integers of 13 bits with
/// scales (product_tile.h).
enum class Products { Exact, Rounded };

/// Whether vdpbf16ps multiplies more a second than f32 FMA: AMD's does twice as much; Intel's half, while vpdpwssd does 1.7 times as
/// much (GFLOP/s of two cores of a Xeon without AMX: 165, 345 and 587).
bool bf16_dots_pay();

}  // namespace heed

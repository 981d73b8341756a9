#pragma once

namespace heed {

/// What prompts' products multiply: f32, or what the machine multiplies fastest, rounded to it: bf16, or integers of 13 bits with
/// scales (product_tile.h).
enum class Products { Exact, Rounded };

/// Whether vdpbf16ps multiplies more a second than f32 FMA: AMD's does twice as much; Intel's half, and a quarter of what vpdpwssd
/// does (GFLOP/s on one Xeon without AMX: 176, 357 and about 700).
bool bf16_dots_pay();

}  // namespace heed

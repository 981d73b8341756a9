// Arithmetic on the numbers that lie beside the data (counts, bounds, flags, weights) as a small program that one kernel
// runs for every number wanted. Written by attention/numbers.h, which makes it read like a formula.
#pragma once
#include <array>

#include "base/tensor.h"

namespace heed {

/// Postfix, in f64 (integers are exact up to 2^53). The stack holds at most `depth` numbers; what is left is the result.
struct Numbers {
  enum class Op : uint8_t {
    Constant,  // step.number
    Index,     // of the number wanted in its tensor, row-major: row · width + channel
    Segment,   // the segment that the row lies in; 0 without segments
    Place,     // the row's number inside its segment; the row itself without segments
    Length,    // rows of the segment
    Channel,   // inside the row
    Load,      // i → step.data[i]; an i outside is taken to the nearest end, and nothing lies in an empty tensor: 0
    Find,      // begin, end, x → the first i of begin … end − 1 with data[i] ≥ x, else end: data ascends there
    Has,       // begin, end, x → 1 when x is among data[begin] … data[end − 1], else 0: data ascends there
    Matches,   // a, b, n → how many i < n have data[a + i] == data[b + i], elements outside as Load has them
    Add,
    Sub,
    Mul,
    Div,
    FloorDiv,
    Mod,
    Min,
    Max,  // a, b →; FloorDiv and Mod round towards −∞; x/0 as f64 has it, FloorDiv 0
    Less,
    LessEqual,
    Equal,  // a, b → 1 or 0
    Pick,   // c, a, b → a unless c is 0, else b
    Floor,
    Round,  // Round: halves to even
    Exp,
    Log,
    Log1p,
    Sqrt,
    Tanh,
    Acos,
  };
  struct Step {
    Op op = Op::Constant;
    Dtype type = Dtype::F64;  // of data: F32, BF16, F16, F64, I32, I64, U8
    double number = 0;
    const void* data = nullptr;
    int64_t size = 0;  // elements of data
  };
  static constexpr int most = 56, depth = 12;
  int count = 0;
  std::array<Step, most> steps;
};

}  // namespace heed

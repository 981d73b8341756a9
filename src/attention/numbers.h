// Formulas over the numbers beside the data: counts, bounds, flags, weights. A Num is an expression that kernels evaluate
// for every segment, row or entry, where the data lies; nothing is looked at on the host.
//
//   Tensor count = compute(queue, Dtype::I32, {segments}, min(budget, load(lengths, index())));
//   compute(queue, scores, pick(place() < sinks, infinity, load(scores.values, index())), scores.values);
#pragma once
#include <concepts>
#include <initializer_list>
#include <limits>

#include "base/queue.h"
#include "kernels/kernels.h"

namespace heed {

class Num {
 public:
  template <class T>
    requires std::is_arithmetic_v<T>
  Num(T x) : Num(Numbers::Op::Constant, {}) {
    program_.steps[0].number = double(x);
  }
  /// `inputs`, in order, then one step more.
  Num(Numbers::Op op, std::initializer_list<const Num*> inputs, const Tensor& data = {});
  const Numbers& program() const { return program_; }

 private:
  Numbers program_;
};

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Where a number is wanted (Numbers::Op says what each means).
inline Num index() { return {Numbers::Op::Index, {}}; }
inline Num segment() { return {Numbers::Op::Segment, {}}; }
inline Num place() { return {Numbers::Op::Place, {}}; }
inline Num length() { return {Numbers::Op::Length, {}}; }
inline Num channel() { return {Numbers::Op::Channel, {}}; }

/// Element i of a contiguous tensor, whatever its rank; outside it, the nearest one.
inline Num load(const Tensor& x, const Num& i) { return {Numbers::Op::Load, {&i}, x}; }
/// The first i of begin … end − 1 with x[i] ≥ value, else end: x ascends there.
inline Num find(const Tensor& x, const Num& begin, const Num& end, const Num& value) {
  return {Numbers::Op::Find, {&begin, &end, &value}, x};
}
/// 1 when value is among x[begin] … x[end − 1], ascending; else 0.
inline Num holds(const Tensor& x, const Num& begin, const Num& end, const Num& value) {
  return {Numbers::Op::Has, {&begin, &end, &value}, x};
}
/// How many of x[a] … x[a + n − 1] equal x[b] … x[b + n − 1], each its own; outside x as load() has it.
inline Num matches(const Tensor& x, const Num& a, const Num& b, const Num& n) {
  return {Numbers::Op::Matches, {&a, &b, &n}, x};
}

inline Num operator+(const Num& a, const Num& b) { return {Numbers::Op::Add, {&a, &b}}; }
inline Num operator-(const Num& a, const Num& b) { return {Numbers::Op::Sub, {&a, &b}}; }
inline Num operator*(const Num& a, const Num& b) { return {Numbers::Op::Mul, {&a, &b}}; }
inline Num operator/(const Num& a, const Num& b) { return {Numbers::Op::Div, {&a, &b}}; }
inline Num operator<(const Num& a, const Num& b) { return {Numbers::Op::Less, {&a, &b}}; }
inline Num operator>(const Num& a, const Num& b) { return {Numbers::Op::Less, {&b, &a}}; }
inline Num operator<=(const Num& a, const Num& b) { return {Numbers::Op::LessEqual, {&a, &b}}; }
inline Num operator>=(const Num& a, const Num& b) { return {Numbers::Op::LessEqual, {&b, &a}}; }
inline Num operator==(const Num& a, const Num& b) { return {Numbers::Op::Equal, {&a, &b}}; }
/// Of conditions (1 or 0).
inline Num operator&&(const Num& a, const Num& b) { return {Numbers::Op::Min, {&a, &b}}; }
inline Num operator||(const Num& a, const Num& b) { return {Numbers::Op::Max, {&a, &b}}; }
inline Num min(const Num& a, const Num& b) { return {Numbers::Op::Min, {&a, &b}}; }
inline Num max(const Num& a, const Num& b) { return {Numbers::Op::Max, {&a, &b}}; }
inline Num abs(const Num& x) { return max(x, 0 - x); }
inline Num clamp(const Num& x, const Num& low, const Num& high) { return max(low, min(x, high)); }
inline Num floor_div(const Num& a, const Num& b) { return {Numbers::Op::FloorDiv, {&a, &b}}; }
inline Num ceil_div(const Num& a, const Num& b) { return floor_div(a + b - 1, b); }
inline Num mod(const Num& a, const Num& b) { return {Numbers::Op::Mod, {&a, &b}}; }
inline Num pick(const Num& condition, const Num& a, const Num& b) { return {Numbers::Op::Pick, {&condition, &a, &b}}; }
inline Num floor(const Num& x) { return {Numbers::Op::Floor, {&x}}; }
inline Num round(const Num& x) { return {Numbers::Op::Round, {&x}}; }
inline Num exp(const Num& x) { return {Numbers::Op::Exp, {&x}}; }
inline Num log(const Num& x) { return {Numbers::Op::Log, {&x}}; }
inline Num log1p(const Num& x) { return {Numbers::Op::Log1p, {&x}}; }
inline Num sqrt(const Num& x) { return {Numbers::Op::Sqrt, {&x}}; }
inline Num tanh(const Num& x) { return {Numbers::Op::Tanh, {&x}}; }
inline Num acos(const Num& x) { return {Numbers::Op::Acos, {&x}}; }

/// Of segment s of a ragged.
inline Num begin_of(const Ragged& r, const Num& s) { return load(r.offsets, s); }
inline Num end_of(const Ragged& r, const Num& s) { return r.ends ? load(r.ends, s) : load(r.offsets, s + 1); }
inline Num length_of(const Ragged& r, const Num& s) { return end_of(r, s) - begin_of(r, s); }

/// Into scratch.
Tensor compute(Queue&, Dtype type, std::initializer_list<int64_t> sizes, const Num& what);
/// Into out, [rows] or [rows, width].
void compute(Queue&, const Num& what, const Tensor& out);
/// Into the rows of out that lie in segments of `over`.
void compute(Queue&, const Ragged& over, const Num& what, const Tensor& out);
/// Offsets I64 [count + 1] of segments whose lengths a formula of index() says: scratch.
Tensor offsets_of(Queue&, int64_t count, const Num& length);

}  // namespace heed

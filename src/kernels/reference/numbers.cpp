#include <algorithm>
#include <cmath>

#include "base/threads.h"
#include "kernels/reference/reference.h"

namespace heed::reference {
namespace {

using Step = Numbers::Step;
using Op = Numbers::Op;

constexpr int kRun = 128;  // numbers made side by side, so that a step's dispatch is paid once for them

/// Where a run of numbers lies: rows of one segment, or channels of one row.
struct Run {
  double index, segment, place, length, channel;
  bool by_row;  // the run goes along rows (width 1), else along channels
};

template <class T>
double element(const Step& s, double i) {
  if (s.size == 0) return 0;
  const int64_t at = i > 0 ? (i < double(s.size) ? int64_t(i) : s.size - 1) : 0;
  return double(static_cast<const T*>(s.data)[at]);
}

template <class T>
int64_t matches(const Step& s, double a, double b, double n) {
  int64_t count = 0;
  const int64_t length = int64_t(n);
  if (a >= 0 && b >= 0 && std::max(a, b) + n <= double(s.size)) {
    const T *x = static_cast<const T*>(s.data) + int64_t(a), *y = static_cast<const T*>(s.data) + int64_t(b);
    for (int64_t i = 0; i < length; ++i) count += float(x[i]) == float(y[i]);
    return count;
  }
  for (int64_t i = 0; i < length; ++i) count += element<T>(s, a + double(i)) == element<T>(s, b + double(i));
  return count;
}

template <class F>
void with_type(Dtype type, F f) {
  switch (type) {
    case Dtype::F32: return f(float{});
    case Dtype::F64: return f(double{});
    case Dtype::BF16: return f(bf16{});
    case Dtype::F16: return f(f16{});
    case Dtype::I32: return f(int32_t{});
    case Dtype::I64: return f(int64_t{});
    case Dtype::U8: return f(uint8_t{});
    default: throw Error(Code::Invalid, "compute", std::string("numbers of type ") + info(type).name);
  }
}

double floor_div(double a, double b) { return b == 0 ? 0 : std::floor(a / b); }

void evaluate(const Numbers& what, const Run& run, int n, double (*stack)[kRun]) {
  int top = 0;
  auto fill = [&](double first, double step) {
    for (int i = 0; i < n; ++i) stack[top][i] = first + step * i;
    ++top;
  };
  auto unary = [&](auto f) {
    double* a = stack[top - 1];
    for (int i = 0; i < n; ++i) a[i] = f(a[i]);
  };
  auto binary = [&](auto f) {
    --top;
    double *a = stack[top - 1], *b = stack[top];
    for (int i = 0; i < n; ++i) a[i] = f(a[i], b[i]);
  };
  for (int at = 0; at < what.count; ++at) {
    const Step& s = what.steps[size_t(at)];
    switch (s.op) {
      case Op::Constant: fill(s.number, 0); break;
      case Op::Index: fill(run.index, 1); break;
      case Op::Segment: fill(run.segment, 0); break;
      case Op::Place: fill(run.place, run.by_row); break;
      case Op::Length: fill(run.length, 0); break;
      case Op::Channel: fill(run.channel, !run.by_row); break;
      case Op::Load: with_type(s.type, [&]<class T>(T) { unary([&](double i) { return element<T>(s, i); }); }); break;
      case Op::Find:
      case Op::Has:
        top -= 2;
        with_type(s.type, [&]<class T>(T) {
          for (int i = 0; i < n; ++i) {
            int64_t low = int64_t(stack[top - 1][i]), high = int64_t(stack[top][i]);
            const int64_t end = high;
            const double x = stack[top + 1][i];
            while (low < high) {
              const int64_t middle = low + (high - low) / 2;
              if (element<T>(s, double(middle)) < x) low = middle + 1;
              else high = middle;
            }
            stack[top - 1][i] = s.op == Op::Find ? double(low) : double(low < end && element<T>(s, double(low)) == x);
          }
        });
        break;
      case Op::Matches:
        top -= 2;
        with_type(s.type, [&]<class T>(T) {
          for (int i = 0; i < n; ++i)
            stack[top - 1][i] = double(matches<T>(s, stack[top - 1][i], stack[top][i], stack[top + 1][i]));
        });
        break;
      case Op::Add: binary([](double a, double b) { return a + b; }); break;
      case Op::Sub: binary([](double a, double b) { return a - b; }); break;
      case Op::Mul: binary([](double a, double b) { return a * b; }); break;
      case Op::Div: binary([](double a, double b) { return a / b; }); break;
      case Op::FloorDiv: binary(floor_div); break;
      case Op::Mod: binary([](double a, double b) { return a - b * floor_div(a, b); }); break;
      case Op::Min: binary([](double a, double b) { return b < a ? b : a; }); break;
      case Op::Max: binary([](double a, double b) { return b > a ? b : a; }); break;
      case Op::Less: binary([](double a, double b) { return double(a < b); }); break;
      case Op::LessEqual: binary([](double a, double b) { return double(a <= b); }); break;
      case Op::Equal: binary([](double a, double b) { return double(a == b); }); break;
      case Op::Pick:
        top -= 2;
        for (int i = 0; i < n; ++i) stack[top - 1][i] = stack[top - 1][i] != 0 ? stack[top][i] : stack[top + 1][i];
        break;
      case Op::Floor: unary([](double a) { return std::floor(a); }); break;
      case Op::Round: unary([](double a) { return std::nearbyint(a); }); break;
      case Op::Exp: unary([](double a) { return std::exp(a); }); break;
      case Op::Log: unary([](double a) { return std::log(a); }); break;
      case Op::Log1p: unary([](double a) { return std::log1p(a); }); break;
      case Op::Sqrt: unary([](double a) { return std::sqrt(a); }); break;
      case Op::Tanh: unary([](double a) { return std::tanh(a); }); break;
      case Op::Acos: unary([](double a) { return std::acos(a); }); break;
    }
  }
}

/// Rows first … last − 1 of the output, all of one segment.
void rows(const Numbers& what, Tensor out, int64_t segment, int64_t begin, int64_t length, int64_t first, int64_t last) {
  double stack[Numbers::depth][kRun];
  const int64_t wide = width(out), step = out.rank > 1 ? out.stride[1] : out.stride[0];
  with_type(out.type, [&]<class T>(T) {
    auto write = [&](int64_t offset_of_first, int n) {
      for (int i = 0; i < n; ++i) out.as<T>()[offset_of_first + i * step] = T(stack[0][i]);
    };
    if (wide == 1) {
      for (int64_t row = first; row < last; row += kRun) {
        const int n = int(std::min<int64_t>(kRun, last - row));
        evaluate(what, {double(row), double(segment), double(row - begin), double(length), 0, true}, n, stack);
        for (int i = 0; i < n; ++i) out.as<T>()[offset(out, row + i)] = T(stack[0][i]);
      }
      return;
    }
    for (int64_t row = first; row < last; ++row)
      for (int64_t c = 0; c < wide; c += kRun) {
        const int n = int(std::min<int64_t>(kRun, wide - c));
        evaluate(what, {double(row * wide + c), double(segment), double(row - begin), double(length), double(c), false},
                 n, stack);
        write(offset(out, row, c), n);
      }
  });
}

}  // namespace

void compute(Queue&, const Numbers& what, const Ragged* over, Tensor out) {
  require(what.count >= 1 && what.count <= Numbers::most && (out.rank == 1 || out.rank == 2), "compute",
          "a program of 1…" + std::to_string(Numbers::most) + " steps into numbers or rows of them");
  const int64_t wide = width(out), enough = 8192;  // numbers that pay for waking the other threads
  if (!over) {
    const int64_t all = out.size[0], part = std::max<int64_t>(1, enough / std::max<int64_t>(1, wide));
    auto piece = [&](int64_t p) { rows(what, out, 0, 0, all, p * part, std::min(all, (p + 1) * part)); };
    const int64_t pieces = (all + part - 1) / part;
    if (pieces <= 1 || inside_parallel())
      for (int64_t p = 0; p < pieces; ++p) piece(p);
    else parallel_for(pieces, piece);
    return;
  }
  auto segment = [&](int64_t s) { rows(what, out, s, over->begin(s), over->length(s), over->begin(s), over->end(s)); };
  if (over->bound * wide < enough || inside_parallel())
    for (int64_t s = 0; s < over->segments(); ++s) segment(s);
  else parallel_for(over->segments(), segment);
}

void offsets(Queue&, Tensor lengths, Tensor out) {
  const int64_t count = lengths.size[0];
  require(lengths.rank == 1 && (lengths.type == Dtype::I32 || lengths.type == Dtype::I64) && out.type == Dtype::I64 &&
              out.size[0] == count + 1,
          "offsets", "I32 or I64 [n] lengths give I64 [n + 1] offsets");
  int64_t at = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t length = lengths.type == Dtype::I32 ? lengths.at<int32_t>(i) : lengths.at<int64_t>(i);
    out.at<int64_t>(i) = at;
    at += length;
  }
  out.at<int64_t>(count) = at;
}

}  // namespace heed::reference

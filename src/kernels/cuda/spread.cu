#include "kernels/cuda/device.cuh"

namespace heed::cuda {
namespace {

constexpr int kSpreadThreads = 128, kWideThreads = 1024;  // of a group: of whole segments the latter

/// The rows of a group: a range of a segment, or all of a sequence.
struct Group {
  Segments x;
  Spread::Over over;
  int first;         // segment
  int64_t from, to;  // Block: rows

  __device__ int ranges() const { return over == Spread::Over::Block ? 1 : x.heads; }
  __device__ void range(int k, int64_t& begin, int64_t& end) const {
    begin = from, end = to;
    if (over == Spread::Over::Block) return;
    begin = x.begin(first + k), end = x.end(first + k);
  }
  template <class Visit>
  __device__ void each(Visit visit) const {
    for (int k = 0; k < ranges(); ++k) {
      int64_t begin, end;
      range(k, begin, end);
      for (int64_t row = begin + threadIdx.x; row < end; row += blockDim.x) visit(row);
    }
  }
};

/// The same number for every thread, added up in one order.
template <class Join>
__device__ double joined(double mine, Join join) {
  __shared__ double shared[kWideThreads];
  __syncthreads();
  shared[threadIdx.x] = mine;
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) shared[threadIdx.x] = join(shared[threadIdx.x], shared[threadIdx.x + half]);
  }
  __syncthreads();
  return shared[0];
}
__device__ double plus(double a, double b) { return a + b; }

/// The statistic of the rows `of` at channel c; NaN of none. Not Rank.
__device__ double statistic(const Matrix& x, const Group& of, int c, Spread::Of what) {
  double sum = 0, low = kInfinity, high = -kInfinity, rows = 0;
  of.each([&](int64_t row) {
    const double value = x.get(row, c);
    sum += value, rows += 1;
    low = fmin(low, value), high = fmax(high, value);
  });
  rows = joined(rows, plus);
  if (rows == 0) return nan("");
  if (what == Spread::Of::Min) return joined(low, [](double a, double b) { return fmin(a, b); });
  if (what == Spread::Of::Max) return joined(high, [](double a, double b) { return fmax(a, b); });
  sum = joined(sum, plus);
  if (what == Spread::Of::Sum) return sum;
  const double mean = sum / rows;
  if (what == Spread::Of::Mean) return mean;
  double squares = 0;
  of.each([&](int64_t row) {
    const double away = x.get(row, c) - mean;
    squares += away * away;
  });
  squares = joined(squares, plus);
  return rows > 1 ? sqrt(squares / (rows - 1)) : 0;
}

__device__ void write(const Matrix& x, const Group& of, const Group& to, int c, Spread::Of what, const Matrix& out) {
  if (what != Spread::Of::Rank) {
    const float value = float(statistic(x, of, c, what));
    to.each([&](int64_t row) { out.set(row, c, value); });
    return;
  }
  to.each([&](int64_t row) {
    const int64_t self = min(of.from + (row - to.from), of.to - 1);
    int64_t after = 0;
    for (int64_t other = of.from; other < of.to; ++other) {
      const float mine = x.get(self, c), its = x.get(other, c);
      after += mine > its || (mine == its && other > self);
    }
    out.set(row, c, of.to > of.from ? float(after) : nanf(""));
  });
}

__global__ void blocks_kernel(Matrix x, Segments xs, Spread how, Matrix out) {
  const int s = blockIdx.y, c = blockIdx.z;
  const int64_t end = xs.end(s), begin = min(end, xs.begin(s) + how.first);
  const int64_t block = how.block > 0 ? how.block : max(int64_t(1), end - begin);
  const Group none{xs, how.over, s, 0, 0}, skipped{xs, how.over, s, xs.begin(s), begin};
  if (blockIdx.x == 0) write(x, none, skipped, c, Spread::Of::Mean, out);
  for (int64_t b = begin + int64_t(blockIdx.x) * block; b < end; b += int64_t(gridDim.x) * block) {
    const Group to{xs, how.over, s, b, min(end, b + block)};
    const int64_t from = b + how.ahead * block;
    Group of = to;
    if (how.ahead != 0) of = from + block <= end ? Group{xs, how.over, s, from, from + block} : none;
    write(x, of, to, c, how.of, out);
  }
}

/// Over::Heads, a number of each head: thread by place and channel. Grid: those (strided), sequences.
__global__ void heads_kernel(Matrix x, Segments xs, Spread::Of of, Matrix out) {
  const int first = int(blockIdx.y) * xs.heads;
  int64_t longest = 0;
  for (int k = 0; k < xs.heads; ++k) longest = max(longest, int64_t(xs.length(first + k)));
  for (int64_t e = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; e < longest * x.width;
       e += int64_t(gridDim.x) * blockDim.x) {
    const int64_t i = e / x.width;
    const int c = int(e % x.width);
    auto each = [&](auto visit) {
      for (int k = 0; k < xs.heads; ++k)
        if (i < xs.length(first + k)) visit(xs.begin(first + k) + i);
    };
    double sum = 0, low = kInfinity, high = -kInfinity;
    int rows = 0;
    each([&](int64_t row) {
      const double value = x.get(row, c);
      sum += value, ++rows;
      low = fmin(low, value), high = fmax(high, value);
    });
    double result = of == Spread::Of::Min   ? low
                    : of == Spread::Of::Max ? high
                    : of == Spread::Of::Sum ? sum
                                            : sum / rows;
    if (of == Spread::Of::Deviation) {
      double squares = 0;
      each([&](int64_t row) {
        const double away = x.get(row, c) - result;
        squares += away * away;
      });
      result = rows > 1 ? sqrt(squares / (rows - 1)) : 0;
    }
    each([&](int64_t row) { out.set(row, c, float(result)); });
  }
}

__global__ void layer_kernel(Matrix x, Segments xs, Spread how, Matrix out) {
  const Group rows{xs, how.over, int(blockIdx.y) * xs.heads, 0, 1};
  write(x, rows, rows, blockIdx.z, how.of, out);
}

}  // namespace

void spread(Queue& queue, const Ragged& x, const Spread& how, Tensor out) {
  check_spread("spread", x, how, out);
  const unsigned width = x.values.rank > 1 ? unsigned(x.values.size[1]) : 1, count = unsigned(x.segments());
  const int64_t rows = x.values.size[0];
  if (rows == 0) return;
  const int threads = how.over == Spread::Over::Block && how.block > 0 && how.block < 4096 ? kSpreadThreads : kWideThreads;
  if (how.over == Spread::Over::Block)
    launch(queue, "spread", blocks_kernel,
           dim3(blocks_for(how.block > 0 ? ceil_div(rows, how.block) : 1, int64_t(count) * width), count, width),
           threads, 0, matrix(x.values), segments(x), how, matrix(out));
  else if (how.over == Spread::Over::Heads)
    launch(queue, "spread", heads_kernel,
           dim3(blocks_for(ceil_div(rows * int64_t(width), 256 * int64_t(x.heads)), count / unsigned(x.heads)),
                count / unsigned(x.heads)),
           256, 0, matrix(x.values), segments(x), how.of, matrix(out));
  else
    launch(queue, "spread", layer_kernel, dim3(1, count / unsigned(x.heads), width), threads, 0, matrix(x.values),
           segments(x), how, matrix(out));
}

}  // namespace heed::cuda

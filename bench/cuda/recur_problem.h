// Random inputs for the checks and benches of the recurrence's Hopper forms; rows outside segments are NaN.
#pragma once
#include <cmath>
#include <string>
#include <vector>

#include "base/random.h"
#include "kernels/cuda/recur.cuh"
#include "measure.h"

using namespace heed;
using namespace heed::cuda;
using Decay = Recur::Decay;
using Correction = Recur::Correction;

struct Case {
  std::string name;
  Decay decay = Decay::None;
  Correction correction = Correction::None;
  Dtype type = Dtype::BF16;
  std::vector<int> lengths;
  int d = 128, d_v = 128;
  bool from_state = true, normalise = false;
  double strongest = 1;  // the log decay of one number in twenty
  int gap = 0;
  std::string text() const {
    static const char* decays[] = {"", "scalar decay ", "vector decay "};
    static const char* corrections[] = {"linear ", "delta ", "low rank "};
    return std::string(decays[int(decay)]) + corrections[int(correction)] +
           (type == Dtype::BF16  ? "bf16 "
            : type == Dtype::F16 ? "f16 "
                                 : "f32 ") +
           std::to_string(d) + "/" + std::to_string(d_v) + " " + name + (normalise ? " normalised" : "") +
           (strongest > 1 ? " strong" : "");
  }
};

struct Problem {
  RecurView in{};
  RecurOut to{};
  bool repeat = false, direct = false;
  int64_t rows = 0, bound = 0, out_count = 0, state_count = 0;
  std::vector<int64_t> begin, end;
  void* scratch = nullptr;
  std::vector<void*> owned;
  ~Problem() {
    for (void* p : owned) cudaFree(p);
  }
  template <class T> T* own(T* x) {
    owned.push_back(const_cast<void*>(static_cast<const void*>(x)));
    return x;
  }
};

static uint64_t seed = 1;

/// [rows, width] of numbers for rows inside segments, NaN elsewhere. To time, the first rows are repeated.
template <class Make> void* numbers(Problem& p, Dtype type, int width, Make&& make) {
  const size_t size = type == Dtype::F32 ? 4 : 2, all = size_t(std::max<int64_t>(1, p.rows)) * size_t(width) * size;
  const int64_t made = p.repeat ? std::min<int64_t>(p.rows, 4096) : p.rows;
  std::vector<uint8_t> host(size_t(std::max<int64_t>(1, made)) * size_t(width) * size, 0xff);
  std::vector<float> row(static_cast<size_t>(width));
  for (size_t s = 0; s < p.begin.size(); ++s)
    for (int64_t r = p.begin[s]; r < std::min(p.end[s], made); ++r) {
      make(row);
      for (int c = 0; c < width; ++c) {
        const size_t at = size_t(r) * size_t(width) + size_t(c);
        const float x = row[size_t(c)];
        if (type == Dtype::F32) reinterpret_cast<float*>(host.data())[at] = x;
        else if (type == Dtype::BF16) reinterpret_cast<__nv_bfloat16*>(host.data())[at] = __float2bfloat16(x);
        else reinterpret_cast<__half*>(host.data())[at] = __float2half(x);
      }
    }
  uint8_t* out;
  OK(cudaMalloc(&out, all)), p.own(out);
  for (size_t at = 0; at < all; at += host.size())
    OK(cudaMemcpy(out + at, host.data(), std::min(host.size(), all - at), cudaMemcpyHostToDevice));
  return out;
}

static void make_inputs(Problem& p, const Case& c, bool repeat = false) {
  p.repeat = repeat;
  Random random(seed++);
  int64_t at = c.gap;
  for (int n : c.lengths) {
    p.begin.push_back(at), p.end.push_back(at + n), at += n + c.gap;
    p.bound = std::max<int64_t>(p.bound, n);
  }
  p.rows = at;
  p.begin.push_back(at);
  const int64_t* offsets = p.own(on_device(p.begin));
  p.begin.pop_back();
  const Segments segments{offsets, p.own(on_device(p.end)), int(c.lengths.size()), 1};
  auto normal = [&] { return float(random.normal()); };
  auto normals = [&](double by) {
    return [&, by](std::vector<float>& row) {
      for (float& x : row) x = float(by) * normal();
    };
  };
  auto positive = [&](double by) {
    return [&, by](std::vector<float>& row) {
      for (float& x : row) x = float(by) * (std::abs(normal()) + 0.05f);
    };
  };
  auto log_decay = [&](std::vector<float>& row) {
    for (float& x : row) x = random.uniform() < 0.05 ? -float(c.strongest) : -0.2f * std::abs(normal());
  };
  auto matrix_of = [&](void* data, Dtype type, int width) { return Matrix{data, width, width, type}; };
  RecurView& a = p.in;
  const double key = 1 / std::sqrt(double(c.d));
  a.q = matrix_of(c.normalise ? numbers(p, c.type, c.d, positive(1)) : numbers(p, c.type, c.d, normals(1)), c.type, c.d);
  a.k = matrix_of(c.normalise ? numbers(p, c.type, c.d, positive(key)) : numbers(p, c.type, c.d, normals(key)), c.type, c.d);
  a.v = matrix_of(numbers(p, c.type, c.d_v, normals(1)), c.type, c.d_v);
  if (c.decay != Decay::None) {
    const int width = c.decay == Decay::Vector ? c.d : 1;
    a.g = matrix_of(numbers(p, Dtype::F32, width, log_decay), Dtype::F32, width);
  }
  if (c.correction == Correction::Delta)
    a.beta = static_cast<const float*>(
        numbers(p, Dtype::F32, 1, [&](std::vector<float>& row) { row[0] = float(random.uniform()); }));
  if (c.correction == Correction::LowRank) {
    a.a = matrix_of(numbers(p, Dtype::F32, c.d, normals(0.7 * key)), Dtype::F32, c.d);
    a.b = matrix_of(numbers(p, Dtype::F32, c.d, normals(0.7 * key)), Dtype::F32, c.d);
  }
  a.qs = a.ks = a.vs = segments;
  a.d = c.d, a.d_v = c.d_v, a.decay = c.decay, a.correction = c.correction, a.normalise = c.normalise;
  a.scale = 1 / std::sqrt(float(c.d));
  p.state_count = int64_t(c.lengths.size()) * c.d * c.d_v;
  auto strides = [&](int64_t(&stride)[3]) { stride[0] = int64_t(c.d) * c.d_v, stride[1] = c.d_v, stride[2] = 1; };
  strides(a.state_stride), strides(p.to.state_stride);
  if (c.from_state) {
    std::vector<float> state(static_cast<size_t>(p.state_count));
    for (float& x : state) x = normal();
    a.state = p.own(on_device(state));
  }
}

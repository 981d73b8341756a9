// Chunks of 64 rows: their matrices are made for several chunks at a time by all threads, then each block of value columns
// walks through them. Segments of a few rows (decode) step row by row instead, and read and write the state once a row.
#include "kernels/check.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/recur_chunk.h"

namespace heed::HEED_ISA {
namespace {

constexpr int64_t kFewRows = 4;         // at most so many rows step
constexpr int64_t kStrip = 4 * kLanes;  // value columns of a step
constexpr int64_t kNarrowest = 32;      // value columns of a block of the chunked form

/// Row r of matrix s of [segments, rows, width].
float* matrix_row(const Tensor& t, int64_t s, int64_t r) { return t.as<float>() + s * t.stride[0] + r * t.stride[1]; }

float dot(const float* x, const float* y, int64_t wide) {
  F sum = zero();
  for (int64_t c = 0; c < wide; c += kLanes) sum = fma(load(x + c), load(y + c), sum);
  return hsum(sum);
}

float over(float scale, float divisor) { return divisor == 0 ? 0 : scale / divisor; }

/// z ← e^g z + k.
void step_z(float* z, const float* decay, const float* k, int64_t wide) {
  for (int64_t c = 0; c < wide; c += kLanes) store(z + c, fma(load(z + c), load(decay + c), load(k + c)));
}

struct Recurrence {
  const RecurInputs& in;
  RecurShape shape;
  Tensor out, state, z;
  float* first_z = nullptr;  // [segments, wide], a copy: z may be where in.z is

  void read_z(int64_t s, float* to) const { std::copy_n(first_z + s * shape.wide(), shape.wide(), to); }
  void write_z(int64_t s, const float* from) const {
    if (z) std::copy_n(from, shape.d, z.as<float>() + s * z.stride[0]);
  }

  int64_t step_floats() const { return 6 * shape.wide() + shape.d * kStrip; }
  void step(int64_t s, int64_t first, float* scratch) const;

  void walk(const RecurSource& from, const RecurChunk& chunk, int64_t row, int64_t first, int64_t columns, float* held,
            float* norm, float* scratch) const;
};

/// Rows of one segment, one after another, for value columns first … first + kStrip.
void Recurrence::step(int64_t s, int64_t first, float* scratch) const {
  const RecurSource from(in, shape.how, s);
  const int64_t wide = shape.wide(), columns = std::min(kStrip, shape.d_v - first), rows = in.q.length(s);
  const bool delta = shape.how.correction == Recur::Correction::Delta, low_rank = shape.low_rank();
  float *q = scratch, *k = q + wide, *a = k + wide, *b = a + wide, *e = b + wide, *norm = e + wide, *own = norm + wide;
  constexpr int V = int(kStrip / kLanes);
  const auto lanes = [&](int v) { return int(std::clamp<int64_t>(columns - v * kLanes, 0, kLanes)); };
  const auto get = [&](const float* at, int v) {
    return lanes(v) == kLanes ? load(at + v * kLanes) : load_part(at + v * kLanes, lanes(v));
  };
  const auto put = [&](float* at, int v, F x) {
    if (lanes(v) == kLanes) store(at + v * kLanes, x);
    else if (lanes(v) > 0) store_part(at + v * kLanes, x, lanes(v));
  };
  // The state goes where it is wanted at the end; without an output it lives in scratch.
  float* const held = state ? matrix_row(state, s, 0) + first : own;
  const int64_t step = state ? state.stride[1] : kStrip;
  const float* before = in.state ? matrix_row(in.state, s, 0) + first : nullptr;
  int64_t before_step = in.state ? in.state.stride[1] : 0;
  read_z(s, norm);
  for (int64_t t = 0; t < rows; ++t) {
    from.q.read(from.q_begin + t, q, shape.scale);
    from.k.read(from.k_begin + t, k);
    from.decay(shape.how, t, shape.d, e);
    if (low_rank) {
      from.a.read(from.a_begin + t, a);
      from.b.read(from.a_begin + t, b);
    }
    float value[kStrip];
    from.v.read_part(from.v_begin + t, first, columns, value);
    std::fill(value + padded(columns), value + kStrip, 0.0f);
    F y[V], known[V], sum[V];
    for (int v = 0; v < V; ++v) {
      y[v] = load(value + v * kLanes);
      known[v] = sum[v] = zero();
    }
    if (before && (delta || low_rank))
      for (int64_t c = 0; c < shape.d; ++c) {
        const F by = set(delta ? k[c] * e[c] : a[c]);
        for (int v = 0; v < V; ++v) known[v] = fma(by, get(before + c * before_step, v), known[v]);
      }
    if (delta) {
      const F beta = set(from.beta[t]);
      for (int v = 0; v < V; ++v) y[v] = beta * (y[v] - known[v]);
    }
    for (int64_t c = 0; c < shape.d; ++c) {
      const F key = set(k[c]), query = set(q[c]), by = set(e[c]), low = set(low_rank ? b[c] : 0.0f);
      for (int v = 0; v < V; ++v) {
        F x = key * y[v];
        if (before) x = fma(by, get(before + c * before_step, v), x);
        if (low_rank) x = fma(low, known[v], x);
        put(held + c * step, v, x);
        sum[v] = fma(query, x, sum[v]);
      }
    }
    before = held;
    before_step = step;
    float by = 1;
    if (shape.how.normalise) {
      step_z(norm, e, k, wide);
      by = over(shape.scale, dot(norm, q, wide));
    }
    float* to = out.as<float>() + (from.q_begin + t) * out.stride[0] + first;
    for (int v = 0; v < V; ++v) put(to, v, sum[v] * set(by));
  }
  if (first == 0) write_z(s, norm);
}

/// to (+)= the lower triangular [rows, rows] matrix · x.
template <Into into>
void triangle(const float* matrix, const float* x, int64_t columns, int64_t rows, float* to) {
  for (int64_t top = 0; top < rows; top += kSubRows)
    product<into>({matrix + top * kChunkRows, kChunkRows}, x, columns, kSubRows, columns, top + kSubRows,
                  to + top * columns, columns);
}

/// One chunk, whose rows begin at `row` of the segment, for value columns first … first + columns; held [wide, padded].
void Recurrence::walk(const RecurSource& from, const RecurChunk& chunk, int64_t row, int64_t first, int64_t columns,
                      float* held, float* norm, float* scratch) const {
  const int64_t wide = shape.wide(), width = padded(columns), rows = chunk.padded_rows, d = shape.d;
  float *v = scratch, *y = v + kChunkRows * width, *o = y + kChunkRows * width, *divisor = o + kChunkRows * width;
  const bool delta = shape.how.correction == Recur::Correction::Delta;
  for (int64_t i = 0; i < rows; ++i) {
    if (i < chunk.rows) from.v.read_part(from.v_begin + row + i, first, columns, v + i * width);
    else std::fill_n(v + i * width, width, 0.0f);
  }
  if (shape.corrects()) {
    triangle<Into::Set>(chunk.m, v, width, rows, y);
    if (delta) product<Into::Subtract>({chunk.w, wide}, held, width, rows, width, d, y, width);
    else product<Into::Add>({chunk.w, wide}, held, width, rows, width, d, y, width);
  }
  const float* values = delta ? y : v;
  triangle<Into::Set>(chunk.qk, values, width, rows, o);
  if (shape.low_rank()) triangle<Into::Add>(chunk.qb, y, width, rows, o);
  product<Into::Add>({chunk.q, wide}, held, width, rows, width, d, o, width);
  for (int64_t c = 0; c < d; ++c) {
    const F by = set(chunk.decay[c]);
    for (int64_t j = 0; j < width; j += kLanes) store(held + c * width + j, load(held + c * width + j) * by);
  }
  product<Into::Add>({chunk.k, kChunkRows}, values, width, d, width, rows, held, width);
  if (shape.low_rank()) product<Into::Add>({chunk.b, kChunkRows}, y, width, d, width, rows, held, width);

  if (shape.how.normalise) {
    for (int64_t i = 0; i < chunk.rows; ++i) divisor[i] = chunk.weights[i] + dot(chunk.q + i * wide, norm, wide);
    for (int64_t c = 0; c < wide; ++c) {
      float sum = 0;
      for (int64_t j = 0; j < rows; ++j) sum += chunk.k[c * kChunkRows + j];
      norm[c] = norm[c] * chunk.decay[c] + sum;
    }
  }
  for (int64_t i = 0; i < chunk.rows; ++i) {
    const float by = shape.how.normalise ? over(shape.scale, divisor[i]) : 1;
    float* to = out.as<float>() + (from.q_begin + row + i) * out.stride[0] + first;
    for (int64_t j = 0; j < columns; ++j) to[j] = o[i * width + j] * by;
  }
}

}  // namespace

void recur(Queue& queue, const RecurInputs& in, const Recur& how, Tensor out, Tensor state, Tensor z) {
  constexpr const char* where = "recur";
  check_recur(where, in, how);
  const int64_t rows = in.q.values.size[0];
  check_tensor(where, "out", out, {rows, width_of(in.v.values)});
  check_tensor(where, "final state", state, {in.q.segments(), width_of(in.q.values), width_of(in.v.values)}, true);
  check_tensor(where, "final z", z, {in.q.segments(), width_of(in.q.values)}, true);
  Recurrence run{in, {how, width_of(in.q.values), width_of(in.v.values), how.scale}, out, state, z, nullptr};
  if (how.scale == 0) run.shape.scale = 1 / std::sqrt(float(run.shape.d));
  const int64_t segments = in.q.segments(), wide = run.shape.wide(), d = run.shape.d, d_v = run.shape.d_v;
  const Scratch scope(queue.scratch);
  run.first_z = queue.scratch.take(Dtype::F32, {segments, wide}).as<float>();
  std::fill_n(run.first_z, segments * wide, 0.0f);
  for (int64_t s = 0; s < segments && how.normalise && in.z; ++s) Rows(in.z).read(s, run.first_z + s * wide);
  std::vector<int64_t> few, many;
  int64_t longest = 0;
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t rows = in.q.length(s);
    (rows <= kFewRows ? few : many).push_back(s);
    longest = std::max(longest, rows);
  }

  const int64_t strips = std::max<int64_t>(1, (d_v + kStrip - 1) / kStrip);
  for_each(queue, int64_t(few.size()) * strips, run.step_floats(), [&](int64_t i, float* scratch) {
    const int64_t s = few[size_t(i / strips)], first = i % strips * kStrip;
    if (in.q.length(s) > 0) return run.step(s, first, scratch);
    if (first > 0) return;  // an empty segment hands its state on
    for (int64_t r = 0; r < d && state; ++r)
      for (int64_t c = 0; c < d_v; ++c) matrix_row(state, s, r)[c] = in.state ? matrix_row(in.state, s, r)[c] : 0;
    run.read_z(s, scratch);
    run.write_z(s, scratch);
  });
  if (many.empty()) return;

  // With few segments each is split into blocks of value columns: the columns of S do not know each other.
  const int64_t crew = threads(), active = int64_t(many.size());
  const int64_t blocks = std::clamp<int64_t>((2 * crew + active - 1) / active, 1, std::max<int64_t>(1, d_v / kNarrowest));
  const int64_t width = padded((d_v + blocks - 1) / blocks), count = std::max<int64_t>(1, (d_v + width - 1) / width);
  const int64_t group = std::clamp<int64_t>((4 * crew + active - 1) / active, 1, 16);
  const int64_t held_floats = wide * width + wide, chunk_floats = RecurChunk::floats(run.shape);
  float* held = queue.scratch.take(Dtype::F32, {active * count * held_floats}).as<float>();
  float* memory = queue.scratch.take(Dtype::F32, {active * group * chunk_floats}).as<float>();
  const int64_t walk_floats = 3 * kChunkRows * width + kChunkRows;
  for (int64_t start = 0; start < longest; start += group * kChunkRows) {
    const auto rows_of = [&](int64_t s, int64_t c) {
      return std::clamp<int64_t>(in.q.length(s) - start - c * kChunkRows, 0, kChunkRows);
    };
    std::vector<RecurChunk> chunks;
    for (int64_t i = 0; i < active * group; ++i) chunks.emplace_back(run.shape, memory + i * chunk_floats);
    for_each(queue, active * group, RecurChunk::scratch_floats(run.shape), [&](int64_t i, float* scratch) {
      const int64_t s = many[size_t(i / group)], rows = rows_of(s, i % group);
      if (rows > 0)
        chunks[size_t(i)].make(run.shape, RecurSource(in, how, s), start + i % group * kChunkRows, rows, scratch);
    });
    for_each(queue, active * count, walk_floats, [&](int64_t i, float* scratch) {
      const int64_t s = many[size_t(i / count)], first = i % count * width, columns = std::min(width, d_v - first),
                    step = padded(columns);
      float *mine = held + i * held_floats, *norm = mine + wide * width;
      const RecurSource from(in, how, s);
      if (start == 0) {
        std::fill_n(mine, wide * width, 0.0f);
        for (int64_t r = 0; r < d && in.state; ++r)
          std::copy_n(matrix_row(in.state, s, r) + first, columns, mine + r * step);
        run.read_z(s, norm);
      }
      for (int64_t c = 0; c < group && rows_of(s, c) > 0; ++c)
        run.walk(from, chunks[size_t(i / count * group + c)], start + c * kChunkRows, first, columns, mine, norm, scratch);
      if (start + group * kChunkRows < in.q.length(s) || rows_of(s, 0) == 0) return;
      for (int64_t r = 0; r < d && state; ++r) std::copy_n(mine + r * step, columns, matrix_row(state, s, r) + first);
      if (first == 0) run.write_z(s, norm);
    });
  }
}

}  // namespace heed::HEED_ISA

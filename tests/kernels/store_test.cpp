#include <memory>

#include "kernels/attention_case.h"
#include "kernels/bounds.h"
#include "kernels/checks.h"
#include "kernels/store_case.h"

namespace heed::test {
namespace {

/// A store with its panels: keys, values and positions as they were before they were written.
struct FilledStore {
  std::unique_ptr<StoreCase> store;
  RaggedData k, v;
  Poisoned positions, first;

  FilledStore(Random& random, const Kernels& writer, Kinds kinds, bool v_transposed, bool wide = true) {
    const int64_t g = 1 + random.below(3), sequences = 1 + random.below(2);
    const int64_t d = pick<int64_t>(random, {64, 80, 96, 128, wide ? 192 : 64, wide ? 256 : 64}),
                  d_v = chance(random, 0.6) ? d : pick<int64_t>(random, {64, 80, 128});
    std::vector<int64_t> lengths;
    for (int64_t s = 0; s < g * sequences; ++s)
      lengths.push_back(pick<int64_t>(random, {0, 1, 7, 63, 64, 65, 130, 200}));
    store = std::make_unique<StoreCase>(random, lengths, g, d, d_v, kinds, v_transposed);
    const Dtype type = pick(random, {Dtype::F32, Dtype::BF16, Dtype::F16});
    k = normal_ragged(random, type, lengths, g, d, Layout::any(random));
    v = normal_ragged(random, type, lengths, g, d_v, Layout::any(random));
    positions = Poisoned(Dtype::I32, {k.values->size[0]});
    for (int64_t s = 0; s < k.view.segments(); ++s) {
      int32_t at = int32_t(random.below(3));
      for (int64_t r = k.view.begin(s); r < k.view.end(s); ++r, at += int32_t(1 + random.below(3)))
        positions->at<int32_t>(r) = at;
    }
    first = filled(Dtype::I32, {g * sequences}, [] { return 0.0; });
    write(writer, *store);
  }

  void write(const Kernels& writer, StoreCase& to) const {
    Queue queue;
    writer.page_write(queue, to.pages, k, v, positions, first);
    to.set_lengths(to.lengths);
  }
};

/// One step of the coarsest code among these page types, for numbers up to `most`: where rounding falls the other way.
double code_step(const StoreCase& store, double most) {
  double step = 0;
  for (const PageLayout& l : store.pages.layouts)
    for (const PageType& t : {l.k, l.v})
      if (t.codes == PageType::Codes::Table) {
        for (size_t i = 1; i < size_t(1) << t.bits(); ++i)
          step = std::max(step, most * double(t.points[i] - t.points[i - 1]));
      } else if (t.sparse()) {
        for (size_t i = 1; i < size_t(1) << t.bits(); ++i)
          step = std::max(step, most * double(t.points[i] - t.points[i - 1]));
      } else if (t.sketched()) {
        step = std::max(step, 100 * most);  // sketches of sketches have projections of 0; tests of their own are closer
      } else if (t.codes == PageType::Codes::Sphere) {
        step = std::max(step, 4 * most);  // a sixteenth of a turn, of the length of 16
      } else if (t.quantised() && t.codes == PageType::Codes::Polar) {
        step = std::max(step, 10 * most / (1 << t.bits()));  // a step round the circle, or along a pair's length
      } else if (t.quantised()) {
        step = std::max(step, 2.01 * most / ((1 << t.bits()) - 1));
      }
  return step;
}

void expect_same_contents(const StoreCase& want_store, const StoreCase& got_store, double step) {
  const Contents want(want_store), got(got_store);
  EXPECT_EQ(got_store.strays(), 0) << "bytes outside the pages were written";
  expect_close("keys", want.k.values, got.k.values, step);
  expect_close("values", want.v.values, got.v.values, step);
  expect_close("positions", want.positions, got.positions, 0);
  expect_close("bias", want.bias, got.bias, 0);
  for (size_t i = 0; i < want.columns.size(); ++i) {
    const Column::Keeps keeps = want_store.columns[i].keeps;
    expect_close(want_store.columns[i].name.c_str(), want.columns[i], got.columns[i],
                 keeps == Column::Keeps::User ? 0 : step + (keeps == Column::Keeps::KeyMean ? 1e-5 : 0));
  }
}

void page_write_equals_reference(const Kernels& run, Random random) {
  for (int i = 0; i < cases(30) && !testing::Test::HasFailure(); ++i) {
    const Kinds kinds = i % 4 == 3 ? Kinds::Sketches : Kinds::Any;
    const FilledStore want(random, oracle(), kinds, run.v_transposed);
    SCOPED_TRACE("case " + std::to_string(i) + ": " + want.store->text());
    const double most = std::max(largest(want.k.values), largest(want.v.values)),
                 step = kinds == Kinds::Any ? code_step(*want.store, most) : 1e-4 * most;
    const FilledStore& from = want;
    // In one piece over the old contents, and in two pieces from nothing.
    std::unique_ptr<StoreCase> again = want.store->copy();
    from.write(run, *again);
    expect_same_contents(*want.store, *again, step);

    Random same = random;
    StoreCase fresh(same, want.store->lengths, want.store->g, want.store->d, want.store->d_v, Kinds::Plain, run.v_transposed);
    std::unique_ptr<StoreCase> whole = fresh.copy();
    from.write(oracle(), *whole);
    const int64_t segments = from.k.view.segments();
    Buffer middle(Dtype::I64, {segments}), begin(Dtype::I64, {segments + 1}), end(Dtype::I64, {segments});
    Poisoned start(Dtype::I32, {segments});
    std::vector<int64_t> cuts;
    for (int64_t s = 0; s < segments; ++s) cuts.push_back(random.below(from.k.view.length(s) + 1));
    Queue queue;
    for (int piece = 0; piece < 2; ++piece) {
      Ragged k = from.k.view, v = from.v.view;
      Buffer v_begin(Dtype::I64, {segments + 1}), v_end(Dtype::I64, {segments});
      for (int64_t s = 0; s < segments; ++s) {
        const int64_t a = piece ? cuts[size_t(s)] : 0, b = piece ? from.k.view.length(s) : cuts[size_t(s)];
        start->at<int32_t>(s) = int32_t(a);
        begin->at<int64_t>(s) = from.k.view.begin(s) + a;
        end->at<int64_t>(s) = from.k.view.begin(s) + b;
        v_begin->at<int64_t>(s) = from.v.view.begin(s) + a;
        v_end->at<int64_t>(s) = from.v.view.begin(s) + b;
      }
      begin->at<int64_t>(segments) = from.k.values->size[0];
      v_begin->at<int64_t>(segments) = from.v.values->size[0];
      k.offsets = begin;
      k.ends = end;
      v.offsets = v_begin;
      v.ends = v_end;
      run.page_write(queue, fresh.pages, k, v, from.positions, start);
      fresh.set_lengths(piece ? fresh.lengths : cuts);
    }
    expect_same_contents(*whole, fresh, 0);
  }
}

/// What is read is what was written: exactly in f32, else rounded once; quantised within half a step of its group.
void pages_keep_what_is_written(const Kernels& run, Random random) {
  for (int i = 0; i < cases(30) && !testing::Test::HasFailure(); ++i) {
    const FilledStore from(random, run, Kinds::Any, run.v_transposed);
    SCOPED_TRACE("case " + std::to_string(i) + ": " + from.store->text());
    const StoreCase& store = *from.store;
    RaggedData k = ragged(random, Dtype::F32, store.lengths, store.g, store.d, Layout::any(random));
    RaggedData v = ragged(random, Dtype::F32, store.lengths, store.g, store.d_v, Layout::any(random));
    Poisoned positions(Dtype::I32, {k.values->size[0]});
    Queue queue;
    run.page_read(queue, store.pages, nullptr, k, v, positions);
    auto check_side = [&](const Ragged& in, const Ragged& out, bool keys) {
      for (int64_t s = 0; s < in.segments(); ++s)
        for (int64_t first = 0; first < in.length(s); first += kPage) {
          const PageLayout& layout = store.pages.layout_of(s, first / kPage);
          const PageType& t = keys ? layout.k : layout.v;
          const int64_t rows = std::min<int64_t>(kPage, in.length(s) - first), width = in.values.size[1];
          const bool by_entry = t.axis == PageType::Axis::Channel;
          const int64_t group_rows = by_entry ? t.group : 1, group_cols = by_entry ? 1 : t.group;
          auto x = [&](const Ragged& of, int64_t e, int64_t c) {
            const int64_t index[] = {first + e, c};
            return number(of.segment(s), index);
          };
          if (t.codes == PageType::Codes::Sphere) {  // its error is told by a test of its own
            for (int64_t e = 0; e < rows; ++e)
              for (int64_t c0 = 0; c0 < width; c0 += 16) {
                double before = 0, after = 0, away = 0;
                for (int64_t c = c0; c < c0 + 16; ++c) {
                  before += x(in, e, c) * x(in, e, c), after += x(out, e, c) * x(out, e, c);
                  away += std::pow(x(in, e, c) - x(out, e, c), 2);
                }
                ASSERT_NEAR(std::sqrt(after), std::sqrt(before), 2e-3 * std::sqrt(before)) << "angles keep the length";
                // At worst π/16 and three halves of a range of codes off.
                ASSERT_LE(std::sqrt(away), 1.5 * std::sqrt(before));
              }
            continue;
          }
          if (t.sketched()) {
            // Of each part of an entry, the product with what stands for it is about its square: √(π/2) times the mean size of
            // projections on vectors of length √n. The mean of n sizes strays by √(π/2 − 1) / √n of itself; six times that.
            // Of a page's entries together less; a tenth for the projections, which they share. (Of one channel alone, as outliers
            // may be, all entries have one and the same error.)
            double square_of = 0, product_of = 0;
            for (int64_t e0 = 0; e0 < rows; e0 += t.group) {
              const int64_t e1 = std::min(rows, e0 + t.group);
              std::vector<std::pair<double, int64_t>> squares;
              for (int64_t c = 0; c < width; ++c) {
                squares.emplace_back(0.0, c);
                for (int64_t e = e0; e < e1; ++e) squares.back().first -= x(in, e, c) * x(in, e, c);
              }
              std::sort(squares.begin(), squares.end());
              for (int64_t e = e0; e < e1; ++e)
                for (const bool outliers : {false, true}) {
                  double square = 0, product = 0;
                  for (size_t i = outliers ? 0 : t.outliers; i < (outliers ? t.outliers : squares.size()); ++i) {
                    const int64_t c = squares[i].second;
                    square += x(in, e, c) * x(in, e, c), product += x(in, e, c) * x(out, e, c);
                  }
                  const double count = outliers ? t.outlier_sketch : t.sketch;
                  ASSERT_NEAR(product, square, (6 * 0.7555 / std::sqrt(count + 1e-9) + 0.01) * square)
                      << "entry " << first + e;
                  if (!outliers) square_of += square, product_of += product;
                }
            }
            ASSERT_NEAR(product_of, square_of, (6 * 0.7555 / std::sqrt(double(t.sketch * rows) + 1e-9) + 0.1) * square_of);
            continue;
          }
          if (t.sparse()) {
            for (int64_t e0 = 0; e0 < rows; e0 += group_rows)
              for (int64_t c0 = 0; c0 < width; c0 += group_cols) {
                std::vector<std::pair<double, double>> numbers;
                for (int64_t e = e0; e < std::min(rows, e0 + group_rows); ++e)
                  for (int64_t c = c0; c < std::min(width, c0 + group_cols); ++c)
                    numbers.emplace_back(x(in, e, c), x(out, e, c));
                double mean = 0;
                for (const auto& [a, b] : numbers) mean += a / double(numbers.size());
                std::stable_sort(numbers.begin(), numbers.end(), [&](const auto& a, const auto& b) {
                  return std::abs(a.first - mean) > std::abs(b.first - mean);
                });
                double low = 1e30, high = -1e30;
                for (size_t i = t.outliers; i < numbers.size(); ++i)
                  low = std::min(low, numbers[i].first), high = std::max(high, numbers[i].first);
                for (size_t i = 0; i < numbers.size(); ++i) {
                  const auto [a, b] = numbers[i];
                  const double middle = (low + high) / 2, half = (high - low) / 2;
                  double bound = INFINITY;
                  for (size_t p = 0; p < size_t(1) << t.bits(); ++p)
                    bound = std::min(bound, std::abs(a - middle - half * double(t.points[p])));
                  bound += (std::abs(middle) + 2 * half) * 0x1p-9;
                  if (i < t.outliers) bound = 0x1p-11 * std::abs(a) + 0x1p-24;
                  ASSERT_LE(std::abs(a - b), bound)
                      << "entry " << first + e0 << ", channel " << c0 << ": " << a << " became " << b;
                }
              }
            continue;
          }
          if (t.quantised() && t.codes == PageType::Codes::Polar) {
            for (int64_t e0 = 0; e0 < rows; e0 += group_rows)
              for (int64_t c = 0; c < width; ++c) {
                // Pairs as pages.h names them: c and half of `turned` further on, then every two.
                const int64_t half = t.turned / 2, mate = c < half                      ? c + half
                                                          : c >= t.turned && c % 2 == 0 ? c + 1
                                                                                        : -1;
                if (mate < 0) continue;
                const int64_t e1 = std::min(rows, e0 + group_rows);
                double low[2] = {1e30, 1e30}, high[2] = {-1e30, -1e30};
                const auto polar = [&](int64_t e) {
                  const double a = std::atan2(x(in, e, mate), x(in, e, c));
                  return std::pair(a < 0 ? a + 2 * M_PI : a, std::hypot(x(in, e, c), x(in, e, mate)));
                };
                for (int64_t e = e0; e < e1; ++e) {
                  const auto [angle, length] = polar(e);
                  low[0] = std::min(low[0], angle), high[0] = std::max(high[0], angle);
                  low[1] = std::min(low[1], length), high[1] = std::max(high[1], length);
                }
                const auto room = [&](int i) {
                  return (high[i] - low[i]) / (2 << t.bits()) + (std::abs(low[i]) + high[i] - low[i]) * 0x1p-9 + 1e-6;
                };
                for (int64_t e = e0; e < e1; ++e) {
                  const double away = std::hypot(x(in, e, c) - x(out, e, c), x(in, e, mate) - x(out, e, mate));
                  ASSERT_LE(away, room(1) + polar(e).second * room(0))
                      << "pair " << c << ", " << mate << " of entry " << first + e;
                }
              }
            continue;
          }
          for (int64_t e0 = 0; e0 < rows; e0 += group_rows)
            for (int64_t c0 = 0; c0 < width; c0 += group_cols) {
              const int64_t e1 = std::min(rows, e0 + group_rows), c1 = std::min(width, c0 + group_cols);
              double low = 1e30, high = -1e30, largest = 0, squares = 0;
              for (int64_t e = e0; e < e1; ++e)
                for (int64_t c = c0; c < c1; ++c) {
                  low = std::min(low, x(in, e, c));
                  high = std::max(high, x(in, e, c));
                  if (std::abs(x(in, e, c)) > std::abs(largest)) largest = x(in, e, c);
                  squares += x(in, e, c) * x(in, e, c) / double((e1 - e0) * (c1 - c0));
                }
              const bool is_signed = t.codes == PageType::Codes::Signed, table = t.codes == PageType::Codes::Table;
              // Signed codes of few bits reach from −half to half − 1: the far end on one side is a step short.
              const double half = 1 << (t.bits() - 1),
                           step = t.kind == PageType::Kind::Q8 ? std::abs(largest) / 127 : -largest / half;
              auto nearest = [&](double a) {
                double best = INFINITY;
                for (size_t i = 0; i < size_t(1) << t.bits(); ++i)
                  best = std::min(best, std::abs(a - double(t.points[i]) * std::sqrt(squares)));
                return best;
              };
              // zero and scale are rounded to f16 before the codes are made.
              const double half_step = t.quantised() ? (high - low) / ((1 << t.bits()) - 1) / 2 : 0,
                           rounding = (std::abs(low) + high - low) * 0x1p-10;
              for (int64_t e = e0; e < e1; ++e)
                for (int64_t c = c0; c < c1; ++c) {
                  const double a = x(in, e, c), b = x(out, e, c);
                  double bound = half_step + rounding;
                  if (is_signed)
                    bound = (t.bits() < 8 && a / step > half - 1 ? 1 : 0.5) * std::abs(step) + std::abs(largest) * 0x1p-10;
                  if (table) bound = nearest(a) + (std::abs(a) + 4 * std::sqrt(squares)) * 0x1p-10;
                  if (t.kind == PageType::Kind::F32) bound = 0;
                  if (t.kind == PageType::Kind::BF16) bound = 0x1p-8 * std::abs(a);
                  if (t.kind == PageType::Kind::F16) bound = 0x1p-11 * std::abs(a) + 0x1p-24;
                  ASSERT_LE(std::abs(a - b), bound) << (keys ? "key" : "value") << " of segment " << s << ", entry "
                                                    << first + e << ", channel " << c << ": " << a << " became " << b;
                }
            }
        }
    };
    check_side(from.k, k, true);
    check_side(from.v, v, false);
    for (int64_t s = 0; s < k.view.segments(); ++s)
      for (int64_t e = 0; e < k.view.length(s); ++e)
        EXPECT_EQ(positions->at<int32_t>(k.view.begin(s) + e), from.positions->at<int32_t>(from.k.view.begin(s) + e));
    EXPECT_EQ(k.values.strays() + v.values.strays() + positions.strays(), 0);
  }
}

struct Turning {
  Poisoned inv_freq;
  Rope rope;
  Read read;
  RaggedData places;
  Turning(Random& random, const StoreCase& store) {
    const int64_t d = store.d;
    rope.dims = int(chance(random, 0.7) ? d : d / 4 * 2);
    rope.neox = chance(random, 0.5);
    double power = 0;
    inv_freq = filled(Dtype::F32, {rope.dims / 2}, [&] { return std::pow(1e4, -2 * power++ / rope.dims); });
    rope.inv_freq = inv_freq;
    read.positions = pick(random, {Read::Positions::True, Read::Positions::Cache});
    if (!chance(random, 0.4)) return;
    places = ragged(random, Dtype::I32, store.lengths, store.g, 0, Layout::any(random));
    for (int64_t s = 0; s < places.view.segments(); ++s)
      for (int64_t r = places.view.begin(s); r < places.view.end(s); ++r)
        places.values->at<int32_t>(r) = int32_t(random.below(600));
    read.places = places;
  }
};

void page_read_equals_reference(const Kernels& run, Random random) {
  for (int i = 0; i < cases(30) && !testing::Test::HasFailure(); ++i) {
    const FilledStore from(random, oracle(), Kinds::Any, run.v_transposed);
    StoreCase& store = *from.store;
    Turning turning(random, store);
    turning.read.rope = &turning.rope;
    store.pages.plain_keys = chance(random, 0.5);
    const Read* read = chance(random, 0.7) ? &turning.read : nullptr;
    const Dtype type = pick(random, {Dtype::F32, Dtype::BF16, Dtype::F16});
    const RaggedData k = ragged(random, type, store.lengths, store.g, store.d, Layout::any(random)),
                     v = ragged(random, type, store.lengths, store.g, store.d_v, Layout::any(random));
    Poisoned positions(Dtype::I32, {k.values->size[0]}), got_positions = positions.twin(), got_k = k.values.twin(),
                                                         got_v = v.values.twin();
    Ragged to_k = k.view, to_v = v.view;
    to_k.values = got_k;
    to_v.values = got_v;
    SCOPED_TRACE("case " + std::to_string(i) + ": " + store.text() + " to " + info(type).name +
                 (store.pages.plain_keys && read ? ", turned" : "") + (read && read->places.values ? " to places" : ""));
    Queue queue;
    oracle().page_read(queue, store.pages, read, k, v, positions);
    run.page_read(queue, store.pages, read, to_k, to_v, got_positions);
    const double u = low_precision(type, type) + 0x1p-19 + (read && store.pages.plain_keys ? 0x1p-14 : 0);  // angles up to 600 in f32
    expect_close("keys", k.values, got_k, u * largest(k.values));
    expect_close("values", v.values, got_v, u * largest(v.values));
    expect_close("positions", positions, got_positions, 0);
    Poisoned only_v = v.values.twin();
    to_v.values = only_v;
    run.page_read(queue, store.pages, read, {}, to_v, {});
    expect_close("values alone", got_v, only_v, 0);
  }
}

void page_move_equals_reference(const Kernels& run, Random random) {
  for (int i = 0; i < cases(30) && !testing::Test::HasFailure(); ++i) {
    const FilledStore from(random, oracle(), Kinds::Any, run.v_transposed);
    from.store->randomise_bias(random);
    const int64_t segments = from.k.view.segments(), capacity = std::max<int64_t>(1, from.store->pages.length_bound);
    Poisoned index(Dtype::I32, {segments * capacity}), count(Dtype::I32, {segments});
    std::vector<int64_t> kept;
    const double share = pick(random, {0.0, 0.3, 0.9, 1.0});
    for (int64_t s = 0; s < segments; ++s) {
      int32_t n = 0;
      for (int64_t e = 0; e < from.store->lengths[size_t(s)]; ++e)
        if (chance(random, share)) index->at<int32_t>(s * capacity + n++) = int32_t(e);
      count->at<int32_t>(s) = n;
      kept.push_back(n);
    }
    SCOPED_TRACE("case " + std::to_string(i) + ": " + from.store->text() + ", share " + std::to_string(share));
    Queue queue;
    const double step = code_step(*from.store, std::max(largest(from.k.values), largest(from.v.values)));
    std::unique_ptr<StoreCase> want = from.store->copy(), got = from.store->copy();
    oracle().page_move(queue, want->pages, want->pages, index, count, capacity);
    run.page_move(queue, got->pages, got->pages, index, count, capacity);
    want->set_lengths(kept);
    got->set_lengths(kept);
    expect_same_contents(*want, *got, step);

    // To a store of other layouts, with the same columns.
    Random same = random;
    std::unique_ptr<StoreCase> other;
    do
      other = std::make_unique<StoreCase>(same, from.store->lengths, from.store->g, from.store->d, from.store->d_v,
                                          Kinds::Any, run.v_transposed);
    while (other->columns.size() != from.store->columns.size());
    SCOPED_TRACE("to " + other->text());
    std::unique_ptr<StoreCase> other_got = other->copy();
    oracle().page_move(queue, from.store->pages, other->pages, index, count, capacity);
    run.page_move(queue, from.store->pages, other_got->pages, index, count, capacity);
    other->set_lengths(kept);
    other_got->set_lengths(kept);
    expect_same_contents(*other, *other_got,
                         step + code_step(*other, std::max(largest(from.k.values), largest(from.v.values))));
  }
}

/// Keeping entries by page_move equals writing only those entries (of types that round each number alone).
void page_move_equals_writing_the_kept(const Kernels& run, Random random) {
  for (int i = 0; i < cases(20) && !testing::Test::HasFailure(); ++i) {
    const FilledStore from(random, run, Kinds::Alike, run.v_transposed);  // an entry keeps its rounding wherever it goes
    const int64_t segments = from.k.view.segments(), capacity = std::max<int64_t>(1, from.store->pages.length_bound);
    Poisoned index(Dtype::I32, {segments * capacity}), count(Dtype::I32, {segments});
    std::vector<int64_t> kept;
    for (int64_t s = 0; s < segments; ++s) {
      int32_t n = 0;
      for (int64_t e = 0; e < from.store->lengths[size_t(s)]; ++e)
        if (chance(random, 0.5)) index->at<int32_t>(s * capacity + n++) = int32_t(e);
      count->at<int32_t>(s) = n;
      kept.push_back(n);
    }
    SCOPED_TRACE("case " + std::to_string(i) + ": " + from.store->text());
    const RaggedData k = ragged(random, from.k.values->type, kept, from.store->g, from.store->d, {}),
                     v = ragged(random, from.v.values->type, kept, from.store->g, from.store->d_v, {});
    Poisoned positions(Dtype::I32, {k.values->size[0]});
    for (int64_t s = 0; s < segments; ++s)
      for (int64_t e = 0; e < kept[size_t(s)]; ++e) {
        const int64_t source = index->at<int32_t>(s * capacity + e);
        copy(from.k.view.segment(s).slice(0, source, source + 1), k.view.segment(s).slice(0, e, e + 1));
        copy(from.v.view.segment(s).slice(0, source, source + 1), v.view.segment(s).slice(0, e, e + 1));
        positions->at<int32_t>(k.view.begin(s) + e) = from.positions->at<int32_t>(from.k.view.begin(s) + source);
      }
    Queue queue;
    std::unique_ptr<StoreCase> written = from.store->copy();
    written->set_lengths(std::vector<int64_t>(size_t(segments), 0));
    run.page_write(queue, written->pages, k, v, positions, from.first);
    written->set_lengths(kept);
    run.page_move(queue, from.store->pages, from.store->pages, index, count, capacity);
    from.store->set_lengths(kept);
    expect_same_contents(*written, *from.store, 0);
  }
}

void columns_are_read_and_written(const Kernels& run, Random random) {
  for (int i = 0; i < cases(20); ++i) {
    const FilledStore from(random, oracle(), Kinds::Any, run.v_transposed, false);
    const StoreCase& store = *from.store;
    if (store.columns.empty()) continue;
    SCOPED_TRACE("case " + std::to_string(i) + ": " + store.text());
    Queue queue;
    const bool biased = std::all_of(store.pages.layouts.begin(), store.pages.layouts.end(),
                                    [](const PageLayout& l) { return l.bias_at >= 0; });
    for (int column : {0, 4, kBiasColumn}) {
      if (column == kBiasColumn && !biased) continue;
      const int64_t width = column == kBiasColumn ? 1 : store.columns[size_t(column)].width;
      RaggedData values = ragged(random, Dtype::F32, store.lengths, store.g, width == 1 ? 0 : width, Layout::any(random));
      Poisoned fill = values.values.twin(), back = values.values.twin();
      Ragged to = values.view;
      to.values = fill;
      run.column_read(queue, store.pages, column, to);
      const float at_first = column == kBiasColumn ? 0 : store.columns[size_t(column)].fill;
      for (int64_t s = 0; s < to.segments(); ++s)
        each(to.segment(s), [&](auto index) { EXPECT_EQ(number(to.segment(s), index), at_first); });
      for (int64_t s = 0; s < to.segments(); ++s)
        each(values.view.segment(s), [&](auto index) { set(values.view.segment(s), index, random.normal()); });
      run.column_write(queue, store.pages, column, values);
      to.values = back;
      run.column_read(queue, store.pages, column, to);
      expect_close("column", values.values, back, 0);
    }
    EXPECT_EQ(store.strays(), 0);
    EXPECT_THROW(run.column_read(queue, store.pages, 1, from.k), Error);
  }
}

void page_score_equals_reference(const Kernels& run, Random random) {
  for (int i = 0; i < cases(20); ++i) {
    const FilledStore from(random, oracle(), Kinds::Any, run.v_transposed);
    const StoreCase& store = *from.store;
    if (store.columns.empty()) continue;
    const int64_t group = pick<int64_t>(random, {1, 3, 8}), h = store.g * group;
    const RaggedData q = normal_ragged(random, pick(random, {Dtype::F32, Dtype::BF16}),
                                       std::vector<int64_t>(size_t(h * store.sequences), 1), h, store.d,
                                       Layout::any(random));
    const bool bounds = chance(random, 0.6);
    const int low = bounds ? 1 : 3, high = bounds ? 2 : 3;
    const int64_t block = store.columns[size_t(low)].block;
    std::vector<int64_t> blocks;
    for (int64_t s = 0; s < q.view.segments(); ++s)
      blocks.push_back((store.lengths[size_t(s / h * store.g + s % h / group)] + block - 1) / block);
    const RaggedData want = ragged(random, Dtype::F32, blocks, h, 0, Layout::any(random));
    const Poisoned got = want.values.twin();
    Ragged to = want.view;
    to.values = got;
    SCOPED_TRACE("case " + std::to_string(i) + ": " + store.text());
    Queue queue;
    oracle().page_score(queue, q, store.pages, low, high, want);
    run.page_score(queue, q, store.pages, low, high, to);
    expect_close("scores", want.values, got, plain(double(store.d), longest_row(q.values) * longest_row(from.k.values)));
    if (!bounds) continue;
    const Contents kept(store);
    for (int64_t s = 0; s < q.view.segments(); ++s) {
      const int64_t kv = s / h * store.g + s % h / group;
      for (int64_t e = 0; e < store.lengths[size_t(kv)]; ++e) {
        double dot = 0;
        for (int64_t c = 0; c < store.d; ++c) {
          const int64_t a[] = {0, c}, b[] = {e, c};
          dot += number(q.view.segment(s), a) * number(kept.k.view.segment(kv), b);
        }
        EXPECT_GE(double(to.segment(s).at<float>(e / block)), dot - 1e-3) << "a bound that does not hold, entry " << e;
      }
    }
  }
}

/// Keys and queries of small whole numbers: bounds and scores are exact, and many are equal.
void page_choose_equals_reference(const Kernels& run, Random random) {
  const auto whole = [&] { return double(random.below(7) - 3); };
  for (int i = 0; i < cases(60) && !testing::Test::HasFailure(); ++i) {
    FilledStore from(random, oracle(), chance(random, 0.5) ? Kinds::Bf16 : Kinds::Plain, run.v_transposed);
    const StoreCase& store = *from.store;
    if (store.columns.empty()) continue;
    for (int64_t s = 0; s < from.k.view.segments(); ++s)
      each(from.k.view.segment(s), [&](auto index) { set(from.k.view.segment(s), index, whole()); });
    from.write(oracle(), *from.store);
    const int64_t group = pick<int64_t>(random, {1, 2, 3, 4, 8, 9}), h = store.g * group;
    std::vector<int64_t> rows, asking;
    for (int64_t s = 0; s < store.sequences; ++s) {
      rows.insert(rows.end(), size_t(h), chance(random, 0.8));
      if (rows.back() > 0) asking.push_back(s);
    }
    const RaggedData q = ragged(random, pick(random, {Dtype::F32, Dtype::BF16}), rows, h, store.d, Layout::any(random));
    for (int64_t s = 0; s < q.view.segments(); ++s)
      each(q.view.segment(s), [&](auto index) { set(q.view.segment(s), index, whole()); });
    PageChoice how;
    how.low = 1, how.high = 2;
    how.of = pick(random, {PageChoice::Of::Each, PageChoice::Of::Mean, PageChoice::Of::Max, PageChoice::Of::Sum});
    how.split = pick(random, {1, 1, 2, 4});
    how.sinks = pick(random, {0, 1, 20}), how.recent = pick(random, {0, 1, 70});
    how.share = pick(random, {0.0, 0.3, 1.0}), how.number = pick(random, {0, 1, 40, 1000}),
    how.least = pick(random, {0, 3});
    const bool each_head = how.of == PageChoice::Of::Each;
    const int64_t heads = each_head ? h : store.g, lists = int64_t(asking.size()) * heads,
                  capacity = pick<int64_t>(random, {2, 5, 14}), block = 16 * how.split;
    SCOPED_TRACE("case " + std::to_string(i) + ": of " + std::to_string(int(how.of)) + ", split " + std::to_string(how.split) +
                 ", group " + std::to_string(group) + ", capacity " + std::to_string(capacity) + ", " + store.text());
    const Poisoned want(Dtype::I32, {lists * capacity}), want_count(Dtype::I32, {lists}),
        want_begin(Dtype::I64, {lists + 1}), got = want.twin(), count = want_count.twin(), begin = want_begin.twin();
    Queue queue;
    oracle().page_choose(queue, q, store.pages, how, capacity, want, want_count, want_begin);
    run.page_choose(queue, q, store.pages, how, capacity, got, count, begin);
    const Contents kept(store);
    for (int64_t list = 0; list <= lists; ++list) EXPECT_EQ(begin->at<int64_t>(list), list * capacity);
    for (int64_t list = 0; list < lists; ++list) {
      const int32_t chosen = count->at<int32_t>(list);
      ASSERT_EQ(chosen, want_count->at<int32_t>(list)) << "list " << list;
      for (int64_t e = 0; e < capacity; ++e)
        EXPECT_EQ(got->at<int32_t>(list * capacity + e), want->at<int32_t>(list * capacity + e)) << "list " << list;
      // By the formula: what is chosen scores no less than what is not.
      const int64_t sequence = asking[size_t(list / heads)], kv = sequence * store.g + list % heads * store.g / heads,
                    held = store.lengths[size_t(kv)], members = each_head ? 1 : group,
                    first = sequence * h + list % heads * (h / heads);
      const auto in_any_case = [&](int64_t b) {
        return b * block < how.sinks || (how.recent > 0 && (b + 1) * block > held - how.recent);
      };
      const auto worth = [&](int64_t b) {
        double best = -INFINITY;
        for (int64_t part = b * how.split; part < (b + 1) * how.split && part * 16 < held; ++part) {
          double all = how.of == PageChoice::Of::Max ? -INFINITY : 0;
          for (int64_t member = 0; member < members; ++member) {
            double bound = 0;
            for (int64_t c = 0; c < store.d; ++c) {
              const int64_t at[] = {0, c};
              const double x = number(q.view.segment(first + member), at);
              bound += std::max(x * kept.columns[1]->at<float>(kv, part, c), x * kept.columns[2]->at<float>(kv, part, c));
            }
            all = how.of == PageChoice::Of::Max ? std::max(all, bound) : all + bound;
          }
          best = std::max(best, all);
        }
        return best;
      };
      double least = INFINITY, most = -INFINITY;
      int64_t forced = 0, left_out = 0;
      std::vector<bool> in(size_t((held + block - 1) / block), false);
      for (int32_t e = 0; e < chosen; ++e) in[size_t(got->at<int32_t>(list * capacity + e))] = true;
      for (int64_t b = 0; b < int64_t(in.size()); ++b) {
        forced += in_any_case(b), left_out += in_any_case(b) && !in[size_t(b)];
        if (in_any_case(b)) continue;
        if (in[size_t(b)]) least = std::min(least, worth(b));
        else most = std::max(most, worth(b));
      }
      EXPECT_GE(least, most);
      EXPECT_TRUE(left_out == 0 || chosen == capacity);
      const int64_t granted = std::min(held, std::max(how.number, int64_t(std::floor(how.share * double(held) + 1e-9))));
      EXPECT_EQ(chosen,
                std::min({std::max({how.least, forced, (granted + block - 1) / block}), capacity, int64_t(in.size())}));
    }
  }
}

/// What the last row pays, over pages, in runs.
void observe_runs_equals_observe(const Kernels& run, Random random) {
  if (!run.observe_runs) return;
  int done = 0;
  for (int i = 0; i < cases(60) && !testing::Test::HasFailure(); ++i) {
    const FilledStore from(random, oracle(), chance(random, 0.8) ? Kinds::Bf16 : Kinds::Any, run.v_transposed);
    StoreCase& store = *from.store;
    store.randomise_bias(random);
    const int64_t group = pick<int64_t>(random, {1, 2, 3, 4, 8, 9}), h = store.g * group;
    std::vector<int64_t> rows, keys;
    for (int64_t s = 0; s < store.sequences; ++s)
      rows.insert(rows.end(), size_t(h), pick<int64_t>(random, {0, 1, 1, 1, 3}));
    for (int64_t s = 0; s < store.sequences * h; ++s) keys.push_back(store.lengths[size_t(s / group)]);
    const RaggedData q = normal_ragged(random, pick(random, {Dtype::F32, Dtype::BF16}), rows, h, store.d,
                                       Layout::any(random)),
                     want = ragged(random, Dtype::F32, keys, h, 0, {.gaps = chance(random, 0.5)}),
                     columns = ragged(random, Dtype::F32, store.lengths, store.g, group, {});
    const Poisoned got = want.values.twin(), q_pos = row_numbers(q, Dtype::I32, 0, [&] { return 400.0; });
    Turning turning(random, store);
    store.pages.plain_keys = chance(random, 0.3);
    turning.read.rope = &turning.rope;
    Mods mods;
    if (chance(random, 0.2)) mods.softcap = 5;
    if (chance(random, 0.2)) mods.scale = 0.3f;
    if (chance(random, 0.3)) mods.q_pos = q_pos;
    if (chance(random, 0.3)) mods.window = 1 + random.below(600);
    const bool logits = chance(random, 0.5);
    SCOPED_TRACE("case " + std::to_string(i) + ": heads " + std::to_string(h) + (logits ? ", logits" : ", weights") +
                 (store.pages.plain_keys ? ", plain keys" : "") + ", window " + std::to_string(mods.window) + ", " +
                 store.text());
    const Keys of{.panel = nullptr, .pages = &store.pages, .read = &turning.read};
    Ragged to = want.view;
    to.values = got;
    Queue queue;
    if (!run.observe_runs(queue, q, of, mods, logits, to)) continue;
    ++done;
    Observe how;
    how.rows = Observe::Rows::Last, how.heads = Observe::Heads::Each, how.logits = logits;
    oracle().observe(queue, q, of, nullptr, mods, how, columns);
    for (int64_t s = 0; s < want.view.segments(); ++s)
      for (int64_t e = 0; e < keys[size_t(s)]; ++e)
        want.view.values.at<float>(want.view.begin(s) + e) = columns.view.values.at<float>(
            columns.view.begin(s / group) + e, s % group);
    const double scale = mods.scale != 0 ? double(mods.scale) : 1 / std::sqrt(double(store.d));
    const double logit = longest_row(q.values) * longest_row(from.k.values) * scale + 4,
                 turned = store.pages.plain_keys ? 0x1p-14 * logit : 0;
    expect_close("runs", want.values, got, plain(double(store.d), logit) + turned + (logits ? 0 : logit_error(logit)));
    EXPECT_EQ(store.strays(), 0);
  }
  EXPECT_GT(done, cases(60) / 4);
}

double store_unit(const StoreCase& store, Dtype q, double terms) {
  double out = unit(q, terms);
  for (const PageLayout& l : store.pages.layouts)
    for (const PageType& t : {l.k, l.v})
      out = std::max(out, t.kind == PageType::Kind::F32   ? unit(Dtype::F32, terms)
                          : t.kind == PageType::Kind::F16 ? unit(Dtype::F16, terms)
                                                          : unit(Dtype::BF16, terms));
  return out;
}

void attend_store_equals_reference(const Kernels& run, Random random) {
  for (int i = 0; i < cases(60) && !testing::Test::HasFailure(); ++i) {
    const FilledStore from(random, oracle(), i % 3 == 0 ? Kinds::Bf16 : Kinds::Any, run.v_transposed);
    StoreCase& store = *from.store;
    store.randomise_bias(random);
    const int64_t group = pick<int64_t>(random, {1, 3, 8}), h = store.g * group;
    std::vector<int64_t> q_lengths;
    double terms = 1;
    for (int64_t s = 0; s < store.sequences; ++s)
      q_lengths.insert(q_lengths.end(), size_t(h), pick<int64_t>(random, {1, 1, 1, 2, 5, 0}));
    for (int64_t n : store.lengths) terms = std::max(terms, double(n));
    const RaggedData q = normal_ragged(random, pick(random, {Dtype::F32, Dtype::BF16, Dtype::F16}), q_lengths, h,
                                       store.d, Layout::any(random));
    std::vector<int64_t> k_head;
    for (int64_t head = 0; head < h; ++head) k_head.push_back(head / group);
    const PlanData plan = random_plan(
        random, pick(random, {Plan::Form::Dense, Plan::Form::Dense, Plan::Form::Blocks, Plan::Form::Tokens}),
        pick(random, {Plan::Scope::QueryHead, Plan::Scope::KvHead, Plan::Scope::Layer}), 8,
        pick(random, {1, 4, 16, 32, 64}), chance(random, 0.3) ? 3 : 1, q, from.k, k_head);
    Turning turning(random, store);
    store.pages.plain_keys = chance(random, 0.4);
    turning.read.plan = plan.plan;
    turning.read.rope = &turning.rope;

    Mods mods;
    if (chance(random, 0.2)) mods.softcap = 5;
    if (chance(random, 0.2)) mods.scale = 0.3f;
    const Poisoned gain = row_numbers(q, Dtype::F32, 0,
                                      [&] { return chance(random, 0.3) ? 0.0 : 0.2 + random.uniform(); });
    const Poisoned temperature = row_numbers(q, Dtype::F32, 0, [&] { return 0.5 + random.uniform(); });
    const Poisoned sinks = filled(Dtype::F32, {h}, [&] { return random.normal(); });
    const Poisoned q_pos = row_numbers(q, Dtype::I32, 0, [&] { return double(2 * terms); });
    if (chance(random, 0.2)) mods.gain = gain;
    if (chance(random, 0.2)) mods.temperature = temperature;
    if (chance(random, 0.2)) mods.sink_logits = sinks;
    else if (chance(random, 0.15)) mods.weight = WeightFunction::Sigmoid;
    if (chance(random, 0.6)) mods.q_pos = q_pos;
    if (chance(random, 0.3)) mods.window = 1 + random.below(int64_t(3 * terms));
    const double scale = mods.scale != 0 ? double(mods.scale) : 1 / std::sqrt(double(store.d));
    double logit = longest_row(q.values) * longest_row(from.k.values) * scale * (mods.temperature ? 1.5 : 1);
    if (mods.softcap > 0) logit = std::min(logit, 5.0);
    logit += 4;

    const int64_t rows = q.values->size[0], parts = plan.plan.parts;
    Poisoned out = parts > 1 ? Poisoned(Dtype::F32, {parts, rows, store.d_v}) : Poisoned(Dtype::F32, {rows, store.d_v});
    Poisoned lse = parts > 1 ? Poisoned(Dtype::F32, {parts, rows}) : Poisoned(Dtype::F32, {rows}), got = out.twin(),
             got_lse = lse.twin(), alone = out.twin();
    std::string mods_text;
    for (const auto& [is, name] : std::initializer_list<std::pair<bool, const char*>>{
             {mods.softcap > 0, ", softcap"},
             {mods.scale != 0, ", scale"},
             {bool(mods.gain), ", gain"},
             {bool(mods.temperature), ", temperature"},
             {bool(mods.sink_logits), ", sinks"},
             {mods.weight == WeightFunction::Sigmoid, ", sigmoid"},
             {bool(mods.q_pos), ", positions"},
             {mods.window > 0, ", window"},
             {store.pages.plain_keys, ", plain keys"},
             {turning.read.positions == Read::Positions::Cache, ", cache positions"},
             {bool(turning.read.places.values), ", places"}})
      if (is) mods_text += name;
    SCOPED_TRACE("case " + std::to_string(i) + ": heads " + std::to_string(h) + ", q " + info(q.values->type).name +
                 ", form " + std::to_string(int(plan.plan.form)) + ", scope " + std::to_string(int(plan.plan.scope)) +
                 ", blocks of " + std::to_string(plan.plan.k_tile) + ", parts " + std::to_string(parts) + mods_text +
                 ", " + store.text());
    Queue queue;
    oracle().attend_store(queue, q, store.pages, turning.read, mods, out, lse);
    run.attend_store(queue, q, store.pages, turning.read, mods, got, got_lse);
    run.attend_store(queue, q, store.pages, turning.read, mods, alone, {});
    const bool bf16_keys = store.pages.layouts.size() == 1 && store.pages.layouts[0].k.kind == PageType::Kind::BF16;
    const double u = store_unit(store, q.values->type, terms) + (store.pages.plain_keys ? 0x1p-14 * logit : 0) +
                     rounded_query(q.values->type, bf16_keys ? Dtype::BF16 : Dtype::F32, logit, double(store.d));
    const double weights = mods.weight == WeightFunction::Sigmoid ? terms : 1;
    expect_close("out", out, got, attend_out(u, logit, weights * std::max(1.0, largest(from.v.values))));
    expect_close("lse", lse, got_lse, attend_lse(u, logit));
    expect_close("out without lse", got, alone, 0);
    EXPECT_EQ(store.strays(), 0);
  }
}

/// Codes may be multiplied as they are, with queries and weights of 16 bits: closer than bf16.
void attend_store_of_codes_equals_reference(const Kernels& run, Random random) {
  for (int i = 0; i < cases(60) && !testing::Test::HasFailure(); ++i) {
    const FilledStore from(random, oracle(), Kinds::Codes, run.v_transposed);
    const StoreCase& store = *from.store;
    store.randomise_bias(random);
    const int64_t h = store.g * pick<int64_t>(random, {1, 2, 3, 4, 5, 8});
    const RaggedData q = normal_ragged(random, Dtype::F32, std::vector<int64_t>(size_t(h * store.sequences), 1), h,
                                       store.d, Layout::any(random));
    std::vector<int64_t> k_head;
    for (int64_t head = 0; head < h; ++head) k_head.push_back(head * store.g / h);
    const PlanData plan = random_plan(random, pick(random, {Plan::Form::Dense, Plan::Form::Blocks, Plan::Form::Tokens}),
                                      Plan::Scope::KvHead, 8, pick(random, {1, 16, 64}), 1, q, from.k, k_head);
    Read read;
    read.plan = plan.plan;
    Mods mods;
    const Poisoned q_pos = row_numbers(q, Dtype::I32, 0, [] { return 300.0; });
    mods.q_pos = q_pos;
    if (chance(random, 0.3)) mods.window = 1 + random.below(400);
    SCOPED_TRACE("case " + std::to_string(i) + ": heads " + std::to_string(h) + ", form " +
                 std::to_string(int(plan.plan.form)) + ", window " + std::to_string(mods.window) + ", " + store.text());
    Queue queue;
    const Poisoned out(Dtype::F32, {q.values->size[0], store.d_v}), lse(Dtype::F32, {q.values->size[0]}),
        got = out.twin(), got_lse = lse.twin();
    oracle().attend_store(queue, q, store.pages, read, mods, out, lse);
    run.attend_store(queue, q, store.pages, read, mods, got, got_lse);
    const double logit = longest_row(q.values) * longest_row(from.k.values) / std::sqrt(double(store.d)),
                 rounded = 0x1p-16 * largest(q.values) * longest_row(from.k.values) * 2;
    expect_close("out", out, got, attend_out(0x1p-12, logit, std::max(1.0, largest(from.v.values)), rounded));
    expect_close("lse", lse, got_lse, attend_lse(0x1p-14, logit, rounded));
  }
}

/// Attention over a store equals attention over the panels that were written to it, but for the rounding of its pages.
void attend_store_equals_panel(const Kernels& run, Random random) {
  for (int i = 0; i < cases(20) && !testing::Test::HasFailure(); ++i) {
    FilledStore from(random, run, Kinds::Plain, run.v_transposed);
    StoreCase& store = *from.store;
    const int64_t h = store.g * pick<int64_t>(random, {1, 3});
    const RaggedData q = normal_ragged(random, Dtype::F32, std::vector<int64_t>(size_t(h * store.sequences), 1), h,
                                       store.d, {});
    SCOPED_TRACE("case " + std::to_string(i) + ": " + store.text());
    Queue queue;
    Poisoned panel(Dtype::F32, {q.values->size[0], store.d_v}), panel_lse(Dtype::F32, {q.values->size[0]}),
        paged = panel.twin(), paged_lse = panel_lse.twin();
    run.attend(queue, q, from.k, from.v, {}, {}, panel, panel_lse);
    run.attend_store(queue, q, store.pages, {}, {}, paged, paged_lse);
    double terms = 1;
    for (int64_t n : store.lengths) terms = std::max(terms, double(n));
    const double u = std::max(store_unit(store, Dtype::F32, terms), unit(from.k.values->type, terms)),
                 logit = longest_row(q.values) * longest_row(from.k.values) / std::sqrt(double(store.d));
    // Keys rounded to the page's type move a logit by that type's half unit.
    const double rounding = u > 0x1p-12 ? u * logit : 0;
    expect_close("out", panel, paged, attend_out(u + rounding, logit, std::max(1.0, largest(from.v.values))));
    expect_close("lse", panel_lse, paged_lse, attend_lse(u + rounding, logit));
  }
}

}  // namespace

std::vector<Check> store_checks() {
  using enum Check::Against;
  return {{Reference, "page_write", page_write_equals_reference},
          {Property, "pages_keep_what_is_written", pages_keep_what_is_written},
          {Reference, "page_read", page_read_equals_reference},
          {Reference, "page_move", page_move_equals_reference},
          {Property, "page_move_is_writing_the_kept", page_move_equals_writing_the_kept},
          {Property, "columns", columns_are_read_and_written},
          {Reference, "page_score", page_score_equals_reference},
          {Reference, "page_choose", page_choose_equals_reference},
          {Reference, "observe_runs", observe_runs_equals_observe},
          {Reference, "attend_store", attend_store_equals_reference},
          {Reference, "attend_store_of_codes", attend_store_of_codes_equals_reference},
          {Property, "attend_store_is_attend", attend_store_equals_panel}};
}

}  // namespace heed::test

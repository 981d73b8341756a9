#include "kernels/store_case.h"

#include <algorithm>
#include <cstring>

namespace heed::test {
namespace {

constexpr int64_t guard = 128;

PageType random_type(Random& random, Kinds kinds) {
  using Kind = PageType::Kind;
  PageType out;
  if (kinds == Kinds::Codes) {
    out.kind = pick(random, {Kind::Q8, Kind::Q4, Kind::Q2});
    out.axis = pick(random, {PageType::Axis::Token, PageType::Axis::Token, PageType::Axis::Channel});
    const bool by_entry = out.axis == PageType::Axis::Token;
    out.group = by_entry ? pick(random, {32, 64, 256}) : pick(random, {8, 16, 32, 64});
    if (by_entry) out.codes = pick(random, {PageType::Codes::Range, PageType::Codes::Signed});
    return out;
  }
  out.kind = kinds == Kinds::Sketches ? Kind::Q1
             : kinds == Kinds::Bf16   ? Kind::BF16
             : kinds != Kinds::Any
                 ? pick(random, {Kind::F32, Kind::BF16, Kind::F16})
                 : pick(random, {Kind::F32, Kind::BF16, Kind::F16, Kind::Q8, Kind::Q4, Kind::Q2, Kind::Q3, Kind::Q1});
  out.axis = pick(random, {PageType::Axis::Token, PageType::Axis::Channel});
  out.group = out.axis == PageType::Axis::Token ? pick(random, {32, 64, 16, 256}) : pick(random, {32, 64});
  if (out.quantised() && out.axis == PageType::Axis::Token)
    out.codes = pick(random, {PageType::Codes::Range, PageType::Codes::Signed, PageType::Codes::Table});
  if (out.quantised() && out.axis == PageType::Axis::Channel && chance(random, 0.3))
    out.codes = PageType::Codes::Polar, out.turned = pick(random, {0, 64, 32});
  if (out.kind == Kind::Q1) {
    out.axis = PageType::Axis::Channel, out.group = pick(random, {32, 64}), out.codes = PageType::Codes::Sketch;
    out.sketch = pick(random, {64, 128, 160, 512}), out.outliers = uint8_t(pick(random, {0, 1, 8}));
    out.outlier_sketch = out.outliers ? pick(random, {32, 96, 256}) : 0, out.seed = uint32_t(random.below(2));
  } else if (out.quantised() && out.kind != Kind::Q8 && chance(random, 0.3)) {
    out.codes = PageType::Codes::Sparse, out.outliers = uint8_t(random.below(4));
    for (int i = 0; i < 1 << out.bits(); ++i) out.points[size_t(i)] = 2 * float(random.uniform()) - 1;
    std::sort(out.points.begin(), out.points.begin() + (1 << out.bits()));
  } else if (out.kind == Kind::Q3) {
    out.axis = PageType::Axis::Token, out.group = 16, out.codes = PageType::Codes::Sphere;
    for (size_t i = 0; i < 12; ++i) out.points[i] = 0.3f + 0.3f * float(i % 4) + 0.02f * float(i / 4);
  }
  if (out.kind == Kind::Q8 && out.codes == PageType::Codes::Table) out.codes = PageType::Codes::Signed;
  if (out.codes == PageType::Codes::Table) {
    for (int i = 0; i < 1 << out.bits(); ++i) out.points[size_t(i)] = float(random.normal());
    std::sort(out.points.begin(), out.points.begin() + (1 << out.bits()));
  }
  return out;
}

}  // namespace

StoreCase::StoreCase(Random& random, std::vector<int64_t> wanted, int64_t g, int64_t d, int64_t d_v, Kinds kinds,
                     bool v_transposed)
    : sequences(int64_t(wanted.size()) / g), g(g), d(d), d_v(d_v), lengths(std::move(wanted)) {
  if (chance(random, 0.6)) {
    columns.push_back({"score", Column::Keeps::User, 1, 1, 0.5f});
    columns.push_back({"low", Column::Keeps::KeyMin, 1, 16});
    columns.push_back({"high", Column::Keeps::KeyMax, 1, 16});
    columns.push_back({"mean", Column::Keeps::KeyMean, 1, 64});
    columns.push_back({"label", Column::Keeps::User, 3, 1, -1});
  }
  const bool bias = chance(random, 0.5);
  for (int64_t count = kinds == Kinds::Alike || kinds == Kinds::Bf16 ? 1 : 1 + random.below(3); count > 0; --count)
    pages.layouts.push_back(page_layout(int(d), int(d_v), random_type(random, kinds), random_type(random, kinds),
                                        v_transposed, bias && chance(random, 0.7), columns));
  const int64_t segments = int64_t(lengths.size()), longest = *std::max_element(lengths.begin(), lengths.end());
  const int64_t capacity = (longest + kPage - 1) / kPage + random.below(2);
  layout_ = Buffer(Dtype::U8, {segments, capacity});
  table_ = Buffer(Dtype::U64, {segments, capacity});
  length_ = Buffer(Dtype::I32, {segments});
  at_.assign(size_t(segments * capacity), -1);
  std::vector<int64_t> order;
  for (int64_t s = 0; s < segments; ++s)
    for (int64_t p = 0; p < capacity; ++p) {
      layout_->at<uint8_t>(s, p) = uint8_t(random.below(int64_t(pages.layouts.size())));
      if (p * kPage < lengths[size_t(s)]) order.push_back(s * capacity + p);
    }
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[size_t(random.below(int64_t(i)))]);
  int64_t bytes = guard;
  for (int64_t page : order) {
    at_[size_t(page)] = bytes;
    bytes += pages.layouts[layout_->as<uint8_t>()[page]].bytes + guard;
  }
  memory_ = Buffer(Dtype::U8, {bytes});
  std::memset(memory_->data, 0xff, size_t(bytes));
  hand_out();
  set_lengths(std::vector<int64_t>(size_t(segments), 0));
}

void StoreCase::hand_out() {
  for (size_t i = 0; i < at_.size(); ++i)
    table_->as<uint64_t>()[i] = at_[i] < 0 ? 0 : uint64_t(reinterpret_cast<uintptr_t>(memory_->as<char>() + at_[i]));
  pages.table = table_;
  pages.layout = layout_;
  pages.length = length_;
  pages.kv_heads = g;
  pages.columns = &columns;
  pages.length_bound = *std::max_element(lengths.begin(), lengths.end());
}

std::unique_ptr<StoreCase> StoreCase::copy() const {
  std::unique_ptr<StoreCase> out(new StoreCase);
  out->sequences = sequences;
  out->g = g;
  out->d = d;
  out->d_v = d_v;
  out->columns = columns;
  out->lengths = lengths;
  out->at_ = at_;
  out->pages = pages;
  auto clone = [](const Buffer& from) {
    Buffer to(from->type, std::span<const int64_t>(from->size.data(), size_t(from->rank)));
    std::memcpy(to->data, from->data, size_t(from->bytes()));
    return to;
  };
  out->memory_ = clone(memory_);
  out->table_ = clone(table_);
  out->layout_ = clone(layout_);
  out->length_ = clone(length_);
  out->hand_out();
  return out;
}

void StoreCase::set_lengths(const std::vector<int64_t>& to) const {
  for (size_t s = 0; s < to.size(); ++s) length_->at<int32_t>(s) = int32_t(to[s]);
}

int64_t StoreCase::strays() const {
  std::vector<bool> inside(size_t(memory_->numel()), false);
  for (size_t i = 0; i < at_.size(); ++i)
    if (at_[i] >= 0) std::fill_n(inside.begin() + at_[i], pages.layouts[layout_->as<uint8_t>()[i]].bytes, true);
  int64_t count = 0;
  for (size_t i = 0; i < inside.size(); ++i) count += !inside[i] && memory_->as<uint8_t>()[i] != 0xff;
  return count;
}

void StoreCase::randomise_bias(Random& random) const {
  for (int64_t s = 0; s < pages.segments(); ++s)
    for (int64_t e = 0; e < pages.length.at<int32_t>(s); ++e) {
      const PageLayout& layout = pages.layout_of(s, e / kPage);
      if (layout.bias_at >= 0)
        reinterpret_cast<float*>(pages.page(s, e / kPage) + layout.bias_at)[e % kPage] = float(random.normal());
    }
}

std::string StoreCase::text() const {
  const char* kinds[] = {"f32", "bf16", "f16", "q8", "q4", "q2", "q3", "q1"};
  std::string out = "KV heads " + std::to_string(g) + ", d " + std::to_string(d) + ", d_v " + std::to_string(d_v) +
                    ", layouts";
  auto side = [&](const PageType& t) {
    out.append(kinds[int(t.kind)]);
    if (t.quantised())
      out.append(t.axis == PageType::Axis::Token ? "/token" : "/channel")
          .append(std::to_string(t.group))
          .append(t.codes == PageType::Codes::Range    ? std::string()
                  : t.codes == PageType::Codes::Signed ? "s"
                  : t.codes == PageType::Codes::Polar  ? "p"
                  : t.codes == PageType::Codes::Sphere ? "o"
                  : t.codes == PageType::Codes::Sparse ? "x" + std::to_string(t.outliers)
                  : t.codes == PageType::Codes::Sketch ? "k" + std::to_string(t.sketch) + "/" + std::to_string(t.outliers) +
                                                             ":" + std::to_string(t.outlier_sketch)
                                                       : "t");
  };
  for (const PageLayout& l : pages.layouts) {
    out.append(" ");
    side(l.k);
    out.append("+");
    side(l.v);
    if (l.bias_at >= 0) out.append("+bias");
  }
  out.append("; entries");
  for (int64_t n : lengths) out.append(" ").append(std::to_string(n));
  return out;
}

Contents::Contents(const StoreCase& store) {
  Random unused(0);
  const Pages& pages = store.pages;
  std::vector<int64_t> held;
  for (int64_t s = 0; s < pages.segments(); ++s) held.push_back(pages.length.at<int32_t>(s));
  k = ragged(unused, Dtype::F32, held, store.g, store.d, {});
  v = ragged(unused, Dtype::F32, held, store.g, store.d_v, {});
  positions = Poisoned(Dtype::I32, {k.values->size[0]});
  bias = Poisoned(Dtype::F32, {k.values->size[0]});
  Queue queue;
  reference_kernels().page_read(queue, pages, nullptr, k, v, positions);
  const int64_t longest = held.empty() ? 0 : *std::max_element(held.begin(), held.end());
  for (const Column& c : store.columns)
    columns.emplace_back(Dtype::F32, std::vector<int64_t>{pages.segments(), (longest + c.block - 1) / c.block,
                                                          c.keeps == Column::Keeps::User ? int64_t(c.width) : store.d});
  for (int64_t s = 0; s < pages.segments(); ++s)
    for (int64_t e = 0; e < held[size_t(s)]; ++e) {
      const PageLayout& layout = pages.layout_of(s, e / kPage);
      const char* page = pages.page(s, e / kPage);
      bias->at<float>(k.view.begin(s) + e) = layout.bias_at < 0
                                                 ? 0
                                                 : reinterpret_cast<const float*>(page + layout.bias_at)[e % kPage];
      for (size_t i = 0; i < columns.size(); ++i) {
        const int block = store.columns[i].block;
        const int64_t width = columns[i]->size[2];
        const Tensor at(const_cast<char*>(page) + layout.column_at[i], column_type(layout.k, store.columns[i].keeps),
                        {kPage / block, width});
        for (int64_t c = 0; c < width; ++c) {
          const int64_t place[] = {e % kPage / block, c};
          columns[i]->at<float>(s, e / block, c) = float(number(at, place));
        }
      }
    }
}

}  // namespace heed::test

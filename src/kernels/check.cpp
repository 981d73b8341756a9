#include "kernels/check.h"

namespace heed {
namespace {

void check_ragged(const char* where, const char* name, const Ragged& r) {
  require(r.values.rank == 2 && is_float(r.values.type) && (r.values.size[1] <= 1 || r.values.stride[1] == 1), where, [&] {
    return std::string(name) + " is F32, BF16 or F16 [rows, width] with contiguous rows, got " + r.values.shape();
  });
  require(r.offsets && r.offsets.type == Dtype::I64 && r.offsets.rank == 1 && r.offsets.size[0] >= 1, where,
          [&] { return std::string(name) + " needs offsets, I64 [segments + 1]"; });
  require(!r.ends || (r.ends.type == Dtype::I64 && r.ends.size[0] == r.segments()), where,
          [&] { return std::string(name) + ": ends are I64 [segments]"; });
  require(r.heads >= 1 && r.segments() % r.heads == 0, where,
          [&] { return std::string(name) + ": its heads do not divide its segments"; });
}

}  // namespace

void check_tensor(const char* where, const char* name, const Tensor& t, std::initializer_list<int64_t> sizes,
                  bool optional, Dtype type) {
  if (optional && !t) return;
  const Tensor wanted(nullptr, type, sizes);
  bool fits = t.type == type && t.rank == wanted.rank;
  for (int axis = 0; fits && axis < t.rank; ++axis) fits = t.size[size_t(axis)] == wanted.size[size_t(axis)];
  if (fits && t.rank > 0) fits = t.size[size_t(t.rank - 1)] <= 1 || t.stride[size_t(t.rank - 1)] == 1;
  require(fits, where, [&] {
    return std::string(name) + " is " + info(type).name + " " + wanted.shape() + ", got " + info(t.type).name + " " +
           t.shape();
  });
}

void check_attention(const char* where, const Ragged& q, const Ragged& k, const Ragged& v, const Plan* plan,
                     const Mods& mods) {
  check_ragged(where, "q", q);
  check_ragged(where, "k", k);
  const int64_t h = q.heads, g = k.heads;
  require(
      mods.k_map || h % g == 0, where,
      [&] { return std::to_string(g) + " KV heads do not divide " + std::to_string(h) + " query heads"; },
      "give k_map and v_map");
  require(q.sequences() == k.sequences(), where, "q and k hold different numbers of sequences");
  require(q.values.size[1] == k.values.size[1], where, "q and k differ in width");
  if (v.values) {
    check_ragged(where, "v", v);
    require(v.sequences() == q.sequences(), where, "q and v hold different numbers of sequences");
    require(mods.v_map || h % v.heads == 0, where, "v's heads do not divide the query heads", "give v_map");
  }
  if (plan) check_plan(*plan, where);

  const int64_t rows = q.values.size[0], keys = k.values.size[0];
  check_tensor(where, "q_pos", mods.q_pos, {rows}, true, Dtype::I32);
  check_tensor(where, "k_pos", mods.k_pos, {keys}, true, Dtype::I32);
  check_tensor(where, "until", mods.until, {keys}, true, Dtype::I32);
  check_tensor(where, "key_bias", mods.key_bias, {keys}, true);
  check_tensor(where, "temperature", mods.temperature, {rows}, true);
  check_tensor(where, "gain", mods.gain, {rows}, true);
  check_tensor(where, "sink_logits", mods.sink_logits, {h}, true);
  check_tensor(where, "k_map", mods.k_map, {h}, true, Dtype::I32);
  check_tensor(where, "v_map", mods.v_map, {h}, true, Dtype::I32);
  require(bool(mods.row_factor) == bool(mods.key_factor), where, "row_factor and key_factor come together");
  if (mods.row_factor) {
    check_tensor(where, "row_factor", mods.row_factor, {rows, mods.row_factor.size[1]});
    check_tensor(where, "key_factor", mods.key_factor, {keys, mods.row_factor.size[1]});
  }
  require(!mods.sink_logits || mods.weight == WeightFunction::Softmax, where, "sink_logits need softmax weights");
}

void check_read(const char* where, const Pages& pages, const Read* read) {
  if (!read) return;
  require(!pages.plain_keys || read->rope, where, "the store keeps plain keys, and the read has no rope to turn them");
  const Ragged& places = read->places;
  if (!places.values) return;
  check_tensor(where, "places", places.values, {places.values.size[0]}, false, Dtype::I32);
  require(places.segments() == pages.segments(), where, "places are numbers for the store's segments");
}

int check_column(const char* where, const Pages& pages, int column, const Ragged& values) {
  require(values.segments() == pages.segments(), where, "values have the store's segments");
  int width = 1;
  if (column != kBiasColumn) {
    require(pages.columns && column >= 0 && column < int(pages.columns->size()), where,
            [&] { return "the store has no column " + std::to_string(column); });
    const Column& c = (*pages.columns)[size_t(column)];
    require(c.keeps == Column::Keeps::User, where, [&] { return "column '" + c.name + "' is kept by the store"; });
    width = c.width;
  }
  require(values.values.type == Dtype::F32 && (values.values.rank > 1 ? values.values.size[1] : 1) == width, where,
          [&] { return "values are F32 [keys, " + std::to_string(width) + "]"; });
  return width;
}

int check_blocks(const char* where, const Ragged& q, const Pages& pages, int low, int high) {
  const auto is_block = [&](int i) {
    return pages.columns && i >= 0 && i < int(pages.columns->size()) &&
           (*pages.columns)[size_t(i)].keeps != Column::Keeps::User;
  };
  require(is_block(low) && is_block(high), where, "low and high name columns that the store keeps for blocks");
  const int block = (*pages.columns)[size_t(low)].block;
  require((*pages.columns)[size_t(high)].block == block, where, "the two columns have blocks of one size");
  require(q.heads % pages.kv_heads == 0 && q.segments() == pages.segments() * (q.heads / pages.kv_heads), where,
          "q has a segment for each sequence and query head");
  require(is_float(q.values.type), where, "q is of a plain type");
  for (const PageLayout& layout : pages.layouts)
    require(q.values.rank == 2 && q.values.size[1] == layout.d, where, "q and the store's keys differ in width");
  return block;
}

int check_choice(const char* where, const Ragged& q, const Pages& pages, const PageChoice& how, int64_t capacity,
                 const Tensor& index, const Tensor& count, const Tensor& rowptr) {
  const int block = check_blocks(where, q, pages, how.low, how.high) * how.split;
  require(how.split > 0 && kPage % block == 0, where, "blocks do not divide a page");
  require(capacity >= 0 && how.sinks >= 0 && how.recent >= 0, where, "counts are not negative");
  const int64_t rows = count.size[0], heads = how.of == PageChoice::Of::Each ? q.heads : pages.kv_heads;
  require(count.rank == 1 && rows % heads == 0 && rows <= q.sequences() * heads, where,
          "a list for each head of the sequences that have a row");
  check_tensor(where, "count", count, {rows}, false, Dtype::I32);
  check_tensor(where, "index", index, {rows * capacity}, false, Dtype::I32);
  check_tensor(where, "rowptr", rowptr, {rows + 1}, false, Dtype::I64);
  return block;
}

void check_pair(const char* where, const Pages& one, const Pages& two, int layout) {
  require(one.segments() == two.segments() && one.layouts.size() == two.layouts.size() && layout > 0 &&
              size_t(layout) + 1 < one.layouts.size() && one.layouts[size_t(layout)].k.pair == 1 &&
              two.layouts[size_t(layout) + 1].k.pair == 2,
          where, "two layers of one shape, with a layout for the first and one for the second");
  require(!one.layouts[0].k.quantised() && !one.layouts[0].v.quantised() && !one.layouts[0].k.pair, where,
          "pages of layout 0 keep plain numbers");
}

void check_combine(const char* where, const Tensor& x, const Tensor& y, const Tensor& out) {
  require(x.type == Dtype::F32 && (x.rank == 1 || x.rank == 2), where,
          [&] { return "x is F32 [rows] or [rows, width], got " + x.shape(); });
  const bool wide = x.rank == 2;
  require(x.stride[size_t(x.rank - 1)] == 1 || x.size[size_t(x.rank - 1)] <= 1, where, "x's rows are contiguous");
  if (wide) check_tensor(where, "out", out, {x.size[0], x.size[1]});
  else check_tensor(where, "out", out, {x.size[0]});
  if (y && wide && y.rank == 2) check_tensor(where, "y", y, {x.size[0], x.size[1]});
  else check_tensor(where, "y", y, {x.size[0]}, true);
}

void check_spread(const char* where, const Ragged& x, const Spread& how, const Tensor& out) {
  check_combine(where, x.values, {}, out);
  require(how.block >= 0 && how.first >= 0 && how.ahead >= 0, where, "block, first and ahead are not negative");
  require(how.ahead == 0 || (how.block > 0 && how.over == Spread::Over::Block), where,
          "a group ahead is a block of known size");
  require(how.of != Spread::Of::Rank || (how.over == Spread::Over::Block && how.ahead == 0), where,
          "ranks are those of a row's own block");
  require(out.data != x.values.data, where, "out is not x");
}

void check_union(const char* where, const Ragged& q, const Ragged& k, const KeySets& sets, const Plan& out) {
  const int64_t segments = q.segments();
  require(q.sequences() == k.sequences() && q.heads % k.heads == 0, where, "q's heads are a multiple of k's");
  require(sets.tile >= 1 && sets.block >= 1, where, "tiles and blocks have at least one row and key");
  check_plan(out, where);
  require(out.form == Plan::Form::Interval && out.scope == Plan::Scope::QueryHead && out.q_tile == sets.tile && out.count,
          where, "the plan is one of intervals for each query head, with counts");
  check_tensor(where, "sinks", sets.sinks, {segments}, true, Dtype::I32);
  check_tensor(where, "local", sets.local, {segments}, true, Dtype::I32);
  const auto check_lists = [&](const char* name, const KeyLists& lists, int64_t count) {
    check_tensor(where, name, lists.count, {count}, !lists.index, Dtype::I32);
    check_tensor(where, name, lists.index, {count * lists.capacity}, true, Dtype::I32);
  };
  check_lists("keys", sets.keys, segments);
  check_lists("distances", sets.distances, segments);
  check_lists("blocks", sets.blocks, out.rows());
}

}  // namespace heed

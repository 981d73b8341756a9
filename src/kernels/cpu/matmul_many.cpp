// Products with many tokens (prefill): all workers pack the tokens and unpack panels of weights, then multiply tiles of them.
#include <algorithm>

#include "base/threads.h"
#include "kernels/cpu/product_tile.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/weights.h"

namespace heed::HEED_ISA {
namespace {

/// Numbers of k that are packed at once (longer rows go in pieces, which are added up in y), and tokens.
constexpr int64_t kPieceNumbers = 4096, kPackedTokens = 2048;
/// Bytes of a worker's panels and of the tokens that it multiplies them with: both stay in its second cache.
constexpr int64_t kPanelBytes = 512 << 10, kTokenBytes = 1 << 20;

/// The groups of sixteen rows of all products, one behind the other; of gate and up, in turn.
class ProductColumns {
 public:
  ProductColumns(std::span<const Product> products, bool in_turn) : products_(products), in_turn_(in_turn) {
    for (const Product& p : products) count_ += ceil_div(p.w.rows, kGroup);
  }
  struct Group {
    const Product& product;
    int64_t row;
  };
  /// g < count().
  Group operator[](int64_t g) const {
    if (in_turn_) return {products_[size_t(g % 2)], g / 2 * kGroup};
    for (size_t i = 0;; ++i) {
      const int64_t groups = ceil_div(products_[i].w.rows, kGroup);
      if (g < groups) return {products_[i], g * kGroup};
      g -= groups;
    }
  }
  int64_t count() const { return count_; }

 private:
  std::span<const Product> products_;
  bool in_turn_;
  int64_t count_ = 0;
};

/// What a product's pieces lie in, one after the other.
struct Rooms {
  Tensor x, panels, apart, apart_counts;
};

/// begin … begin + numbers of k of tokens first … first + tokens, and of the weights of a round of groups.
template <class Tile>
struct Piece {
  using Number = typename Tile::Number;
  int64_t begin, numbers, depth;  // depth: words of k, padded
  int64_t first, tokens, padded;
  Number *x, *panels;
  Apart* apart;
  int32_t* apart_counts;  // of a token

  Piece(int64_t begin, int64_t numbers, int64_t first, int64_t tokens, const Rooms& rooms)
      : begin(begin), numbers(numbers), depth(words_of<Tile>(numbers)), first(first), tokens(tokens),
        padded(ceil_div(tokens, Tile::granule) * Tile::granule), x(static_cast<Number*>(rooms.x.data)),
        panels(static_cast<Number*>(rooms.panels.data)), apart(static_cast<Apart*>(rooms.apart.data)),
        apart_counts(rooms.apart_counts.as<int32_t>()) {}
  auto* x_at(int64_t token, int64_t word) const { return x + Tile::row_at(token, word, depth) * Tile::pair; }
  auto* panel(int64_t group) const { return panels + group * depth * kGroup * Tile::pair; }
  /// Room for what stands apart of a token.
  static int64_t most_apart(int64_t depth) { return ceil_div(depth, Tile::unit_words) * Tile::apart; }
  Apart* apart_of(int64_t token) const { return apart + token * most_apart(depth); }

  /// Token `token` of x, or zeros where there is none.
  void pack(const Product& p, int64_t token) const {
    const float* from = p.x_row(std::min(first + token, p.tokens() - 1)) + begin;
    const int64_t there = token < tokens ? numbers : 0;
    const int64_t all = padded_numbers<Tile>(numbers);
    Apart* more = apart_of(token);
    for (int64_t word = 0, at = 0; word < depth; word += Tile::unit_words, at += Tile::unit)
      for (int i = Tile::pack(from + std::min(at, there), std::clamp<int64_t>(there - at, 0, Tile::unit),
                              std::min<int64_t>(Tile::unit, all - at), x_at(token, word), more);
           i > 0; --i)
        more++->at += int32_t(at);
    apart_counts[token] = int32_t(more - apart_of(token));
  }

  /// The products of what stands apart of a token with `groups` groups, onto its sums.
  void add_apart(int64_t token, int64_t group, int64_t groups, float* sums) const {
    if constexpr (Tile::apart > 0)
      for (const Apart& number : std::span(apart_of(token), size_t(apart_counts[token])))
        for (int64_t g = 0; g < groups; ++g) Tile::add_apart(panel(group + g), number, sums + g * kGroup);
  }
};

/// Sums of sixteen rows → y, which has `rows` of them. Nothing but y is written in this loop: stores wait in order for lines of y
/// to come, and whatever else stands among them leaves room for fewer (docs/performance.md).
template <bool Add>
HEED_INLINE void put_sums(const float* sums, int64_t stride, int64_t rows, int64_t tokens, const float* bias, float* y,
                          int64_t y_stride) {
  alignas(64) float more[kGroup] = {};
  if (bias) std::memcpy(more, bias, size_t(rows) * 4);
  const auto column = [&](auto part, int c) {
    const F added = load(more + c);
    const float* in = sums + c;
    float* out = y + c;
    for (int64_t t = 0; t < tokens; ++t, in += stride, out += y_stride)
      part.put(out, Add ? part.get(out) + (load(in) + added) : load(in) + added);
  };
  for (int c = 0; c < rows; c += kLanes) {
    if (rows - c >= kLanes) column(Whole{}, c);
    else column(Part{int(rows - c)}, c);
  }
}

/// How y takes the sums of a tile: as they are, or as act(gate) · up of each two groups.
struct Finish {
  const ProductColumns& columns;
  const Activation* glu;
  bool first;  // piece of k: others are added to it

  void operator()(int64_t group, int64_t groups, int64_t first_token, int64_t tokens, const float* sums, int64_t stride) const {
    for (int64_t g = 0; g < groups; g += glu ? 2 : 1, sums += (glu ? 2 : 1) * kGroup) {
      const auto [p, row] = columns[group + g];
      const int64_t rows = std::min<int64_t>(kGroup, p.w.rows - row), y_stride = p.y.stride[0];
      float* y = p.y_row(first_token) + row;
      const float* bias = p.bias && first ? p.bias.as<float>() + row : nullptr;
      if (glu)
        for (int64_t t = 0; t < tokens; ++t)
          glu_row(sums + t * stride, sums + t * stride + kGroup, rows, *glu, y + t * y_stride);
      else if (p.accumulate || !first) put_sums<true>(sums, stride, rows, tokens, bias, y, y_stride);
      else put_sums<false>(sums, stride, rows, tokens, bias, y, y_stride);
    }
  }
};

/// `tokens` tokens × `groups` groups, from token and group of a piece on. Sums are finished strip by strip, so that y's lines
/// come while the next strip is multiplied. sums: the worker's own room.
template <class Tile>
void multiply_tile(const Piece<Tile>& piece, int64_t token, int64_t tokens, int64_t group, int64_t groups,
                   int64_t first_column, const Finish& finish, float* sums) {
  const int64_t stride = groups * kGroup, units = ceil_div(piece.depth, Tile::unit_words),
                step = ceil_div(units, ceil_div(units * Tile::unit, Tile::part)) * Tile::unit_words;
  for (int64_t word = 0; word < piece.depth; word += step) {
    const int64_t words = std::min(step, piece.depth - word);
    for (int64_t t = 0; t < tokens; t += Tile::tokens) {
      const auto* x = piece.x_at(token + t, word);
      const int there = int(std::min<int64_t>(Tile::tokens, tokens - t));
      for (int64_t g = 0; g < groups; g += Tile::groups) {
        const int width = int(std::min<int64_t>(Tile::groups, groups - g));
        const auto* w = piece.panel(group + g) + word * kGroup * Tile::pair;
        float* c = sums + t * stride + g * kGroup;
        const auto multiply = [&]<int n>() {
          Tile::template multiply<n>(w, piece.depth * kGroup, x, piece.depth, there, words, c, stride, word == 0);
        };
        if (width == 1) multiply.template operator()<1>();
        if constexpr (Tile::groups > 1)
          if (width == 2) multiply.template operator()<2>();
        if constexpr (Tile::groups > 2)
          if (width == 3) multiply.template operator()<3>();
        if constexpr (Tile::groups > 3)
          if (width == 4) multiply.template operator()<4>();
      }
      if (word + words < piece.depth) continue;
      for (int i = 0; i < there; ++i) piece.add_apart(token + t + i, group, groups, sums + (t + i) * stride);
      finish(first_column, groups, piece.first + token + t, std::min<int64_t>(there, piece.tokens - token - t),
             sums + t * stride, stride);
    }
  }
}

template <class Tile>
void multiply(Arena& arena, std::span<const Product> products, const Activation* glu) {
  constexpr int64_t step = std::max(2, Tile::groups);  // groups of a tile of work
  const Scratch give_back(arena);
  const ProductColumns columns(products, glu != nullptr);
  if (columns.count() == 0) return;
  const Product& any = products[0];
  const int64_t width = any.w.width, workers = threads();
  // Pieces end where blocks do.
  const int64_t pieces = std::max<int64_t>(1, ceil_div(width, kPieceNumbers)),
                piece_numbers = ceil_div(ceil_div(width, pieces), 256) * 256,
                depth = words_of<Tile>(std::min(width, piece_numbers));

  // Rounds: as many groups as the workers' second caches hold. The worker that unpacks a panel mostly multiplies it.
  const int64_t most = std::max<int64_t>(step, kPanelBytes / (depth * kGroup * 4) / step * step) * workers,
                rounds = ceil_div(columns.count(), most),
                round_groups = std::min(ceil_div(ceil_div(columns.count(), rounds), step) * step, columns.count());
  const int64_t most_tokens = std::min(ceil_div(any.tokens(), Tile::tokens) * Tile::tokens,
                                       kPackedTokens / Tile::tokens * Tile::tokens),
                strips = std::clamp<int64_t>(kTokenBytes / (depth * 4), 64, 256) / Tile::tokens;
  const Rooms rooms{
      arena.take(Dtype::F32, {most_tokens * depth}), arena.take(Dtype::F32, {round_groups * kGroup * depth}),
      arena.take(Dtype::F32, {most_tokens * Piece<Tile>::most_apart(depth) * 2}), arena.take(Dtype::I32, {most_tokens})};
  const int64_t sums = strips * Tile::tokens * step * kGroup;
  const Tensor sums_room = arena.take(Dtype::F32, {workers, sums});

  for (int64_t first = 0; first < any.tokens(); first += most_tokens)
    for (int64_t begin = 0; begin == 0 || begin < width; begin += piece_numbers) {
      const Piece<Tile> piece(begin, std::min(width - begin, piece_numbers), first,
                              std::min(most_tokens, any.tokens() - first), rooms);
      const Finish finish{columns, glu, begin == 0};
      for (int64_t round = 0; round < columns.count(); round += round_groups) {
        const int64_t groups = std::min(round_groups, columns.count() - round);
        const int64_t packed = round == 0 ? ceil_div(piece.padded, Tile::granule) : 0;
        parallel_for(
            packed + groups, int(workers),
            [&](int, int64_t i) {
              if (i < packed) {
                for (int64_t t = 0; t < Tile::granule; ++t) piece.pack(any, i * Tile::granule + t);
                return;
              }
              const auto [p, row] = columns[round + i - packed];
              unpack_sixteen(p.w, row, begin, piece.numbers, padded_numbers<Tile>(piece.numbers), piece.panel(i - packed));
            },
            Deal::Stretches);

        // A worker's stretch: tiles that share its panels, under one block of tokens after the other. Blocks are small enough
        // for four tiles of work a worker.
        const int64_t tiles = ceil_div(groups, step), share = ceil_div(tiles, workers), shares = ceil_div(tiles, share);
        const int64_t all_strips = ceil_div(piece.padded, Tile::tokens),
                      wanted = std::max(ceil_div(all_strips, strips), std::min(all_strips, ceil_div(4 * workers, tiles))),
                      block = ceil_div(all_strips, wanted) * Tile::tokens, blocks = ceil_div(piece.padded, block);
        parallel_for(
            shares * blocks * share, int(workers),
            [&](int worker, int64_t i) {
              const int64_t tile = i / (share * blocks) * share + i % share, token = i / share % blocks * block;
              if (tile >= tiles) return;
              const typename Tile::Registers registers;
              const int64_t group = tile * step, here = std::min(step, groups - group);
              const int64_t tokens = std::min(block, piece.padded - token);
              float* own = sums_room.as<float>() + worker * sums;
              multiply_tile(piece, token, tokens, group, here, round + group, finish, own);
            },
            Deal::Stretches);
      }
    }
}

}  // namespace

bool multiply_many(Products kind, Arena& arena, std::span<const Product> products, const Activation* glu) {
  // Weights of 16 bits and fewer lose less to bf16 than they already have; f32 ones keep their precision.
  const auto whole = [](const Product& p) { return p.w.type == Dtype::F32; };
  const bool precise = whole(products[0]);
  for (const Product& p : products)
    if (whole(p) != precise) return false;
  if (glu && products[0].w.width > kPieceNumbers) return false;
  if (precise || kind == Products::Exact) multiply<NumberTile<float>>(arena, products, glu);
#if defined(HEED_PAIR_DOT) && defined(HEED_BF16_DOT)
  else if (bf16_dots_pay()) multiply<NumberTile<bf16>>(arena, products, glu);
#endif
  else multiply<RoundedTile>(arena, products, glu);
  return true;
}

}  // namespace heed::HEED_ISA

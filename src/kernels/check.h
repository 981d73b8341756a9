// What every backend asks of its arguments. Only shapes and types are looked at: contents may live on a device.
#pragma once
#include "kernels/kernels.h"

namespace heed {

/// Queries, keys, values (v.values may be empty where none are read), plan (may be null) and mods fit one another.
/// Throws Error(Invalid) in the name of `where`.
void check_attention(const char* where, const Ragged& q, const Ragged& k, const Ragged& v, const Plan* plan, const Mods& mods);

/// `t` is F32 (or `type`) with these sizes and contiguous rows; an empty one passes when `optional`.
void check_tensor(const char* where, const char* name, const Tensor& t, std::initializer_list<int64_t> sizes,
                  bool optional = false, Dtype type = Dtype::F32);

/// The type that rows between two products must have: BF16 when they do, else F32.
inline Dtype row_type(const Tensor& t) { return t.type == Dtype::BF16 ? Dtype::BF16 : Dtype::F32; }

/// A read that turns plain keys has a rope, and its places are numbers for the pages' segments; a null read turns nothing.
void check_read(const char* where, const Pages& pages, const Read* read);

/// Numbers an entry of a column that column_read and column_write take; values fit it.
int check_column(const char* where, const Pages& pages, int column, const Ragged& values);

/// What combine and spread ask.
void check_combine(const char* where, const Tensor& x, const Tensor& y, const Tensor& out);
void check_spread(const char* where, const Ragged& x, const Spread& how, const Tensor& out);

/// Columns that the store keeps for blocks of one size, and q with a segment for each query head of the pages. Returns the
/// size.
int check_blocks(const char* where, const Ragged& q, const Pages& pages, int low, int high);

/// What page_choose asks besides. Returns the entries of a block.
int check_choice(const char* where, const Ragged& q, const Pages& pages, const PageChoice& how, int64_t capacity,
                 const Tensor& index, const Tensor& count, const Tensor& rowptr);

/// What unite asks.
void check_union(const char* where, const Ragged& q, const Ragged& k, const KeySets& sets, const Plan& out);

/// Numbers that q, k and v may be made of.
inline bool is_float(Dtype type) { return type == Dtype::F32 || type == Dtype::BF16 || type == Dtype::F16; }

/// Two layers of one shape whose layouts `layout` and the next are pages that both hold.
void check_pair(const char* where, const Pages& one, const Pages& two, int layout);

}  // namespace heed

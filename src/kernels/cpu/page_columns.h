// The columns beside the entries of a page.
#pragma once
#include "kernels/pages.h"

namespace heed::HEED_ISA {

/// The numbers of entry `i` of a User column.
inline float* column_at(const Pages& pages, const PageLayout& layout, char* page, int column, int64_t i) {
  return reinterpret_cast<float*>(page + layout.column_at[size_t(column)]) + i * (*pages.columns)[size_t(column)].width;
}

/// The d numbers of block `i` of a column that the store keeps, of column_type().
inline char* block_at(const PageLayout& layout, char* page, int column, Dtype type, int64_t i) {
  return page + layout.column_at[size_t(column)] + i * layout.d * info(type).bytes;
}

inline int column_count(const Pages& pages) { return pages.columns ? int(pages.columns->size()) : 0; }

/// Gives the User columns of entries begin … end their fill.
void fill_columns(const Pages& pages, const PageLayout& layout, char* page, int begin, int end);

/// Makes the block columns over entries begin … end anew, from the first `held` entries of the page. row: d numbers.
void refresh_columns(const Pages& pages, const PageLayout& layout, char* page, int begin, int end, int held, float* row);

}  // namespace heed::HEED_ISA

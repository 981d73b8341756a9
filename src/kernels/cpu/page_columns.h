// The columns beside the entries of a page.
#pragma once
#include "kernels/pages.h"

namespace heed::HEED_ISA {

/// The numbers of entry (User) or block `i` of a column.
inline float* column_at(const Pages& pages, const PageLayout& layout, char* page, int column, int64_t i) {
  const Column& c = (*pages.columns)[size_t(column)];
  const int width = c.keeps == Column::Keeps::User ? c.width : layout.d;
  return reinterpret_cast<float*>(page + layout.column_at[size_t(column)]) + i * width;
}

inline int column_count(const Pages& pages) { return pages.columns ? int(pages.columns->size()) : 0; }

/// Gives the User columns of entries begin … end their fill.
void fill_columns(const Pages& pages, const PageLayout& layout, char* page, int begin, int end);

/// Makes the block columns over entries begin … end anew, from the first `held` entries of the page. row: d numbers.
void refresh_columns(const Pages& pages, const PageLayout& layout, char* page, int begin, int end, int held, float* row);

}  // namespace heed::HEED_ISA

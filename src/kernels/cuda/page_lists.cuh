// Page lists as kernels change them: tables, layouts, lengths, and the pages that lie free.
#pragma once
#include "kernels/cuda/page.cuh"

namespace heed::cuda {

struct SupplyView {
  uint64_t* free;
  int32_t* top;
  int64_t bytes;
  const uint64_t* base;  // of each segment, where its pages lie end to end
};

struct Supplies {
  SupplyView of[kMostLayouts];
};

struct Lists {
  PagesView pages;
  Supplies supplies;
  uint64_t* table;
  uint8_t* layout;
  int32_t* length;
  __device__ uint64_t& page(int s, int p) const { return table[s * pages.table_stride + p]; }
  __device__ uint8_t& layout_at(int s, int p) const { return layout[s * pages.layout_stride + p]; }
};

__device__ inline int pages_for(int entries) { return (entries + kPage - 1) / kPage; }
__device__ inline unsigned long long* holders(uint64_t page) {
  return reinterpret_cast<unsigned long long*>(page - kPageHeader);
}

/// For page p of segment s.
__device__ inline uint64_t take(const SupplyView& supply, int s, int p) {
  if (supply.base) {
    const uint64_t page = supply.base[s] + p * (kPageHeader + supply.bytes) + kPageHeader;
    *holders(page) = 1;
    return page;
  }
  const int top = atomicSub(supply.top, 1);
  if (top <= 0) __trap();  // the store promised more than it has: going on would write to pages of others
  const uint64_t page = supply.free[top - 1];
  *holders(page) = 1;
  return page;
}

inline SupplyView supply_view(const PageSupply& supply) {
  return {supply.free.as<uint64_t>(), supply.top.as<int32_t>(), supply.page_bytes, supply.base.as<uint64_t>()};
}

inline Lists lists(const char* where, const Pages& pages) {
  Lists out{};
  out.pages = pages_view(where, pages);
  require(pages.supply.empty() || pages.supply.size() == pages.layouts.size(), where,
          "a store has a supply for each layout");
  for (size_t i = 0; i < pages.supply.size(); ++i) out.supplies.of[i] = supply_view(pages.supply[i]);
  out.table = pages.table.as<uint64_t>();
  out.layout = pages.layout.as<uint8_t>();
  out.length = pages.length.as<int32_t>();
  return out;
}

}  // namespace heed::cuda

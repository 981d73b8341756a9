#include "attention/store.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

namespace heed {
namespace {

// Each page follows a cache line that counts its holders.
constexpr int64_t kHeader = 64;
constexpr size_t kIdlePages = 64;

std::atomic<int64_t>& holders(char* page) { return *reinterpret_cast<std::atomic<int64_t>*>(page - kHeader); }
const std::atomic<int64_t>& holders(const char* page) {
  return *reinterpret_cast<const std::atomic<int64_t>*>(page - kHeader);
}

int64_t pages_for(int64_t entries) { return (entries + kPage - 1) / kPage; }

}  // namespace

PagePool::~PagePool() {
  for (char* page : idle_) std::free(page - kHeader);
}

char* PagePool::take() {
  char* page = nullptr;
  if (!idle_.empty()) {
    page = idle_.back();
    idle_.pop_back();
  } else {
    const size_t bytes = size_t(page_bytes_ + kHeader + 63) / 64 * 64;
    void* block = std::aligned_alloc(64, bytes);
    if (!block) throw Error(Code::Memory, "store", "no memory for one more page of " + std::to_string(bytes) + " bytes");
    page = static_cast<char*>(block) + kHeader;
    new (page - kHeader) std::atomic<int64_t>(0);
  }
  holders(page).store(1, std::memory_order_relaxed);
  return page;
}

void PagePool::hold(char* page) { holders(page).fetch_add(1, std::memory_order_relaxed); }

void PagePool::drop(char* page) {
  if (holders(page).fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  if (idle_.size() < kIdlePages) idle_.push_back(page);
  else std::free(page - kHeader);
}

bool PagePool::shared(const char* page) { return holders(page).load(std::memory_order_acquire) > 1; }

LayerStore::LayerStore(Store& store, int group, StoreShape shape, int64_t segments)
    : store_(&store), group_(group), shape_(shape), segments_(size_t(segments)) {}

LayerStore::LayerStore(Store& store, const LayerStore& other)
    : store_(&store), group_(other.group_), shape_(other.shape_), segments_(other.segments_) {
  Store::Group& group = store.groups_[size_t(group_)];
  for (Segment& segment : segments_)
    for (size_t p = 0; p < segment.pages.size(); ++p) group.pools[segment.layouts[p]]->hold(segment.pages[p]);
}

LayerStore::~LayerStore() {
  for (Segment& segment : segments_) shrink(segment, 0);
}

const PageLayout& LayerStore::layout_of(const Segment& segment, size_t page) const {
  return store_->groups_[size_t(group_)].layouts[segment.layouts[page]];
}

int64_t LayerStore::longest() const {
  int64_t most = 0;
  for (const Segment& segment : segments_) most = std::max(most, segment.length);
  return most;
}

int64_t LayerStore::entries() const {
  int64_t total = 0;
  for (const Segment& segment : segments_) total += segment.length;
  return total;
}

int64_t LayerStore::bytes() const {
  int64_t total = 0;
  for (const Segment& segment : segments_)
    for (size_t p = 0; p < segment.pages.size(); ++p) total += layout_of(segment, p).bytes;
  return total;
}

const Pages& LayerStore::pages() {
  if (!stale_) return view_;
  int64_t capacity = 1;
  for (const Segment& segment : segments_) capacity = std::max(capacity, int64_t(segment.pages.size()));
  const int64_t count = segments();
  table_.assign(size_t(count * capacity), 0);
  layout_table_.assign(size_t(count * capacity), 0);
  lengths_.resize(size_t(count));
  offsets_.assign(size_t(count + 1), 0);
  for (int64_t s = 0; s < count; ++s) {
    const Segment& segment = segments_[size_t(s)];
    for (size_t p = 0; p < segment.pages.size(); ++p) {
      table_[size_t(s * capacity) + p] = reinterpret_cast<uint64_t>(segment.pages[p]);
      layout_table_[size_t(s * capacity) + p] = segment.layouts[p];
    }
    lengths_[size_t(s)] = int32_t(segment.length);
    offsets_[size_t(s + 1)] = offsets_[size_t(s)] + segment.length;
  }
  view_.table = Tensor(table_.data(), Dtype::U64, {count, capacity});
  view_.layout = Tensor(layout_table_.data(), Dtype::U8, {count, capacity});
  view_.length = Tensor(lengths_.data(), Dtype::I32, {count});
  view_.kv_heads = shape_.kv_heads;
  view_.length_bound = longest();
  view_.plain_keys = store_->options_.plain_keys;
  view_.layouts = store_->groups_[size_t(group_)].layouts;
  view_.columns = &store_->options_.columns;
  stale_ = false;
  return view_;
}

Tensor LayerStore::offsets() {
  pages();
  return Tensor(offsets_.data(), Dtype::I64, {segments() + 1});
}

void LayerStore::own(Segment& segment, size_t page) {
  char*& at = segment.pages[page];
  if (!PagePool::shared(at)) return;
  PagePool& pool = *store_->groups_[size_t(group_)].pools[segment.layouts[page]];
  char* copy = pool.take();
  std::memcpy(copy, at, size_t(pool.page_bytes()));
  pool.drop(at);
  at = copy;
}

void LayerStore::shrink(Segment& segment, int64_t length) {
  Store::Group& group = store_->groups_[size_t(group_)];
  while (int64_t(segment.pages.size()) > pages_for(length)) {
    group.pools[segment.layouts.back()]->drop(segment.pages.back());
    segment.pages.pop_back();
    segment.layouts.pop_back();
  }
  segment.length = length;
  stale_ = true;
}

void LayerStore::append(Queue& queue, const Ragged& k, const Ragged& v, Tensor positions) {
  require(k.segments() == segments() && v.segments() == segments(), "LayerStore::append",
          std::to_string(k.segments()) + " segments for a layer of " + std::to_string(segments()));
  PagePool& pool = *store_->groups_[size_t(group_)].pools[0];
  std::vector<int32_t> first(segments_.size());
  for (int64_t s = 0; s < segments(); ++s) {
    Segment& segment = segments_[size_t(s)];
    first[size_t(s)] = int32_t(segment.length);
    const int64_t rows = k.length(s);
    if (rows == 0) continue;
    if (segment.length % kPage != 0) {
      const int64_t last = int64_t(segment.pages.size()) - 1;
      if (segment.layouts[size_t(last)] != 0) convert(queue, s, last, last + 1, 0);
      own(segment, size_t(last));
    }
    segment.length += rows;
    while (int64_t(segment.pages.size()) < pages_for(segment.length)) {
      segment.pages.push_back(pool.take());
      segment.layouts.push_back(0);
    }
  }
  stale_ = true;
  queue.run->page_write(queue, pages(), k, v, positions, Tensor(first.data(), Dtype::I32, {segments()}));
}

void LayerStore::compact(Queue& queue, Tensor index, Tensor count, int64_t capacity) {
  for (int64_t s = 0; s < segments(); ++s) {
    Segment& segment = segments_[size_t(s)];
    for (int64_t p = 0; p < pages_for(count.at<int32_t>(s)); ++p) own(segment, size_t(p));
  }
  stale_ = true;
  queue.run->page_move(queue, pages(), pages(), index, count, capacity);
  for (int64_t s = 0; s < segments(); ++s) shrink(segments_[size_t(s)], count.at<int32_t>(s));
}

void LayerStore::convert(Queue& queue, int64_t segment, int64_t first, int64_t last, int layout) {
  if (first >= last) return;
  Segment& s = segments_[size_t(segment)];
  PagePool& pool = *store_->groups_[size_t(group_)].pools[size_t(layout)];
  const int64_t count = last - first, entries = std::min(last * kPage, s.length) - first * kPage;
  std::vector<uint64_t> old_table, new_table;
  std::vector<uint8_t> old_layouts(s.layouts.begin() + first, s.layouts.begin() + last);
  std::vector<uint8_t> new_layouts(static_cast<size_t>(count), static_cast<uint8_t>(layout));
  std::vector<char*> fresh;
  for (int64_t p = first; p < last; ++p) {
    old_table.push_back(reinterpret_cast<uint64_t>(s.pages[size_t(p)]));
    fresh.push_back(pool.take());
    new_table.push_back(reinterpret_cast<uint64_t>(fresh.back()));
  }
  std::vector<int32_t> index(static_cast<size_t>(entries));
  for (int64_t i = 0; i < entries; ++i) index[size_t(i)] = int32_t(i);
  int32_t length = int32_t(entries);
  // One segment of its own, so that the kernel sees only the pages that move.
  Pages from = pages();
  from.kv_heads = 1;
  from.length = Tensor(&length, Dtype::I32, {1});
  from.length_bound = entries;
  Pages to = from;
  from.table = Tensor(old_table.data(), Dtype::U64, {1, count});
  from.layout = Tensor(old_layouts.data(), Dtype::U8, {1, count});
  to.table = Tensor(new_table.data(), Dtype::U64, {1, count});
  to.layout = Tensor(new_layouts.data(), Dtype::U8, {1, count});
  queue.run->page_move(queue, from, to, Tensor(index.data(), Dtype::I32, {entries}), Tensor(&length, Dtype::I32, {1}), entries);
  Store::Group& group = store_->groups_[size_t(group_)];
  for (int64_t p = first; p < last; ++p) {
    group.pools[s.layouts[size_t(p)]]->drop(s.pages[size_t(p)]);
    s.pages[size_t(p)] = fresh[size_t(p - first)];
    s.layouts[size_t(p)] = uint8_t(layout);
  }
  stale_ = true;
}

void LayerStore::truncate(Queue& queue, int sequence, int64_t position) {
  bool block_columns = false;
  for (const Column& column : store_->options_.columns) block_columns |= column.keeps != Column::Keeps::User;
  for (int64_t head = 0; head < shape_.kv_heads; ++head) {
    const int64_t number = sequence * shape_.kv_heads + head;
    Segment& segment = segments_[size_t(number)];
    const std::vector<int32_t> held = positions(number);
    const int64_t length = std::lower_bound(held.begin(), held.end(), position) - held.begin();
    if (length == segment.length) continue;
    shrink(segment, length);
    const int64_t last = length / kPage;
    if (length % kPage == 0) continue;
    // The last page takes new entries again: it must be in the layout that append writes, and its blocks' columns
    // must forget what left.
    if (segment.layouts[size_t(last)] != 0 || block_columns) convert(queue, number, last, last + 1, 0);
  }
}

std::vector<int32_t> LayerStore::positions(int64_t segment) const {
  const Segment& s = segments_[size_t(segment)];
  std::vector<int32_t> out(static_cast<size_t>(s.length));
  for (size_t p = 0; p < s.pages.size(); ++p) {
    const int64_t first = int64_t(p) * kPage, count = std::min<int64_t>(kPage, s.length - first);
    std::memcpy(out.data() + first, s.pages[p] + layout_of(s, p).position_at, size_t(count) * sizeof(int32_t));
  }
  return out;
}

Store::Store(std::span<const StoreShape> layers, StoreOptions options, bool v_transposed, int sequences)
    : options_(std::move(options)), v_transposed_(v_transposed), sequences_(sequences) {
  for (const StoreShape& shape : layers) {
    size_t group = 0;
    while (group < groups_.size() && !(groups_[group].shape == shape)) ++group;
    if (group == groups_.size()) groups_.push_back({shape, {}, {}});
    layers_.emplace_back(new LayerStore(*this, int(group), shape, int64_t(sequences) * shape.kv_heads));
  }
  add_layout(options_.k, options_.v);
}

Store::Store(const Store& other)
    : options_(other.options_), v_transposed_(other.v_transposed_), sequences_(other.sequences_), groups_(other.groups_) {
  for (const auto& layer : other.layers_) layers_.emplace_back(new LayerStore(*this, *layer));
}

int Store::add_layout(PageType k, PageType v) {
  for (Group& group : groups_) {
    require(group.layouts.size() < 4, "Store::add_layout", "a store has at most four ways of keeping pages");
    group.layouts.push_back(page_layout(group.shape.d, group.shape.d_v, k, v, v_transposed_, options_.bias, options_.columns));
    group.pools.push_back(std::make_shared<PagePool>(group.layouts.back().bytes));
  }
  for (auto& layer : layers_) layer->stale_ = true;
  return groups_.empty() ? 0 : int(groups_[0].layouts.size()) - 1;
}

void Store::truncate(Queue& queue, int sequence, int64_t position) {
  for (auto& layer : layers_) layer->truncate(queue, sequence, position);
}

int64_t Store::bytes() const {
  int64_t total = 0;
  for (const auto& layer : layers_) total += layer->bytes();
  return total;
}

int64_t Store::entries() const {
  int64_t total = 0;
  for (const auto& layer : layers_) total += layer->entries();
  return total;
}

int Store::column(const std::string& name) const {
  for (size_t i = 0; i < options_.columns.size(); ++i)
    if (options_.columns[i].name == name) return int(i);
  return -1;
}

}  // namespace heed

#include "attention/store.h"

#include <algorithm>
#include <numeric>

#include "attention/numbers.h"

namespace heed {
namespace {

int64_t pages_for(int64_t entries) { return (entries + kPage - 1) / kPage; }

/// Counts that lie in ordinary memory may be looked at: nothing waits.
bool visible(const Queue& queue) { return queue.memory->device == Device::Cpu; }

}  // namespace

PagePool::PagePool(const Memory& memory, int64_t page_bytes) : memory_(&memory) { supply_.page_bytes = page_bytes; }

void PagePool::promise(Queue& queue, int64_t count) {
  queue.varies();
  if (!top_) {
    top_ = Buffer(Dtype::I32, {1}, *memory_);
    queue.fill(top_, 0);
    supply_.top = top_;
  }
  if (visible(queue)) set_free(supply_.top.at<int32_t>(0));
  if (const int64_t missing = count - (total_ - out_); missing > 0) {
    const int64_t more = std::max({missing, total_ / 8, int64_t(16)});
    if (const int64_t room = total_ + more; !free_ || room > free_->numel()) {
      Buffer wider(Dtype::U64, {std::max(room, 2 * total_)}, *memory_);
      if (free_) queue.move(free_, wider->slice(0, 0, free_->numel()));
      free_ = std::move(wider);
      supply_.free = free_;
    }
    blocks_.emplace_back(Dtype::U8, std::initializer_list<int64_t>{more * (kPageHeader + supply_.page_bytes)}, *memory_);
    queue.run->page_supply(queue, supply_, blocks_.back());
    total_ += more;
  }
  out_ += count;
}

LayerStore::LayerStore(Store& store, int group, StoreShape shape, int64_t segments, Tensor lengths, int64_t wide)
    : store_(&store), group_(group), shape_(shape), segments_(segments), length_(size_t(segments), 0) {
  view_.length = lengths;
  view_.kv_heads = shape.kv_heads;
  view_.plain_keys = store.options_.plain_keys;
  view_.columns = &store.options_.columns;
  widen(store.queue_, wide);
}

LayerStore::LayerStore(Store& store, const LayerStore& other, Tensor lengths)
    : LayerStore(store, other.group_, other.shape_, other.segments_, lengths, other.table_->size[1]) {
  Queue& queue = store.queue_;
  points_ = other.points_;
  length_ = other.length_, together_ = other.together_, loose_ = other.loose_, converted_ = other.converted_;
  queue.move(other.table_, table_), queue.move(other.layout_, layout_);
  shared_ = page_bound(), tails_shared_ = shared_ > 0;
  changed(queue);
  open_slots(queue);
}

LayerStore::~LayerStore() {
  if (ahead_.valid()) ahead_.wait();
  for (int slot : slots_) slot_pool_->give(slot);
}

void LayerStore::open_slots(Queue& queue) {
  slot_pool_ = store_->groups_[size_t(group_)].slots;
  if (!slot_pool_) return;
  std::vector<uint64_t> bases;
  for (int64_t length : length_) {
    slots_.push_back(slot_pool_->take(pages_for(length)));
    bases.push_back(reinterpret_cast<uint64_t>(slot_pool_->base(slots_.back())));
  }
  bases_ = Buffer(Dtype::U64, {segments_}, *queue.memory);
  queue.upload(Tensor(bases.data(), Dtype::U64, {segments_}), bases_);
  changed_bounds();
}

void LayerStore::map_slots(int64_t more) {
  if (ahead_.valid()) ahead_.get();
  for (int64_t s = 0; s < segments_; ++s) slot_pool_->map(slots_[size_t(s)], pages_for(length_[size_t(s)] + more));
  bytes_stale_ = true;
}

// Page groups of the next step are mapped in any case, those of later ones until there are two.
void LayerStore::map_ahead() {
  if (!slot_pool_ || store_->queue_.recording()) return;
  if (ahead_.valid()) ahead_.get();
  const int steps = store_->options_.slots.ahead;
  bool enough = true;
  for (int64_t s = 0; s < segments_; ++s)
    enough &= slot_pool_->holds(slots_[size_t(s)], pages_for(length_[size_t(s)] + steps));
  if (enough) return;
  ahead_ = std::async(std::launch::async, [pool = slot_pool_, slots = slots_, length = length_, steps] {
    int64_t mapped = 0;
    try {
      for (int step = 1; step <= steps && (step == 1 || mapped < 2); ++step)
        for (size_t s = 0; s < slots.size() && (step == 1 || mapped < 2); ++s) {
          const int64_t more = pool->map(slots[s], pages_for(length[s] + step));
          if (step > 1) mapped += more;
        }
    } catch (const Error&) {  // the step that needs them says so
    }
  });
}

/// Gives back what a cut leaves unused.
void LayerStore::trim_slots() {
  if (ahead_.valid()) ahead_.get();
  const int steps = store_->options_.slots.ahead;
  for (size_t s = 0; s < slots_.size(); ++s) slot_pool_->trim(slots_[s], pages_for(length_[s] + steps));
  bytes_stale_ = true;
}

/// Sees to it that a kernel finds `pages` more pages, or those that bounds allow.
void LayerStore::promise(Queue& queue, int layout, int64_t pages) {
  if (slot_pool_) return map_slots();
  pool(layout).promise(queue, pages);
}

PagePool& LayerStore::pool(int layout) const { return *store_->groups_[size_t(group_)].pools[size_t(layout)]; }

int64_t LayerStore::longest() const { return *std::max_element(length_.begin(), length_.end()); }

int64_t LayerStore::entries() const {
  const int64_t sum = std::accumulate(length_.begin(), length_.end(), int64_t(0));
  return together_ >= 0 ? std::min(sum, together_) : sum;
}

int64_t LayerStore::page_bound() const {
  int64_t sum = 0;
  for (int64_t length : length_) sum += pages_for(length);
  return together_ >= 0 ? std::min(sum, together_ / kPage + segments_) : sum;
}

void LayerStore::changed_bounds() {
  const Store::Group& group = store_->groups_[size_t(group_)];
  if (view_.layouts.size() != group.layouts.size()) {
    view_.layouts = group.layouts;
    for (const auto& [layout, points] : points_) use_points(layout, points);
  }
  view_.supply.resize(group.pools.size());
  for (size_t l = 0; l < group.pools.size(); ++l) view_.supply[l] = group.pools[l]->supply();
  if (slot_pool_) view_.supply[0].base = bases_;
  view_.length_bound = longest();
}

void LayerStore::set_points(int layout, const PagePoints& points) {
  points_.emplace_back(layout, points);
  use_points(layout, points);
}

void LayerStore::use_points(int layout, const PagePoints& points) {
  view_.layouts[size_t(layout)].k.points = points.k, view_.layouts[size_t(layout)].v.points = points.v;
}

void LayerStore::changed(Queue& queue) {
  if (visible(queue)) {
    std::copy_n(view_.length.as<int32_t>(), segments_, length_.begin());
    together_ = -1, loose_ = false;
  }
  changed_bounds();
  offsets_stale_ = bytes_stale_ = true;
  if (visible(queue)) map_ahead();
}

Tensor LayerStore::offsets(Queue& queue) {
  if (!offsets_) offsets_ = Buffer(Dtype::I64, {segments_ + 1}, *queue.memory);
  if (offsets_stale_) queue.run->offsets(queue, view_.length, offsets_);
  offsets_stale_ = false;
  return offsets_;
}

int64_t LayerStore::bytes() {
  if (!bytes_stale_) return bytes_;
  Queue& queue = store_->queue_;
  bytes_ = 0;
  bytes_stale_ = false;
  if (slot_pool_) {
    if (ahead_.valid()) ahead_.wait();
    for (int slot : slots_) bytes_ += slot_pool_->mapped(slot);
    return bytes_;
  }
  std::vector<int32_t> lengths(static_cast<size_t>(segments_));
  queue.read_back(view_.length, lengths.data());
  const int64_t wide = table_->size[1];
  std::vector<uint8_t> layouts(converted_ ? size_t(segments_ * wide) : 0);
  if (converted_) queue.read_back(layout_, layouts.data());
  for (int64_t s = 0; s < segments_; ++s)
    for (int64_t p = 0; p < pages_for(lengths[size_t(s)]); ++p) {
      const PageLayout& held = view_.layouts[converted_ ? layouts[size_t(s * wide + p)] : 0];
      bytes_ += held.bytes / held.lists;
    }
  return bytes_;
}

/// Makes room for `pages` pages of every segment in the table.
void LayerStore::widen(Queue& queue, int64_t pages) {
  const int64_t wide = table_ ? table_->size[1] : 0;
  if (pages <= wide) return;
  queue.varies();
  const int64_t wider = std::max(pages, wide * 2);
  Buffer table(Dtype::U64, {segments_, wider}, *queue.memory), layout(Dtype::U8, {segments_, wider}, *queue.memory);
  queue.fill(layout, 0);
  for (int64_t s = 0; wide > 0 && s < segments_; ++s) {
    queue.move(table_->select(0, s), table->select(0, s).slice(0, 0, wide));
    queue.move(layout_->select(0, s), layout->select(0, s).slice(0, 0, wide));
  }
  table_ = std::move(table), layout_ = std::move(layout);
  view_.table = table_, view_.layout = layout_;
}

/// Every segment s is to have rows[s] more entries.
void LayerStore::grow(Queue& queue, std::span<const int64_t> rows) {
  const int64_t before = page_bound();
  int64_t total = 0;
  for (int64_t s = 0; s < segments_; ++s) length_[size_t(s)] += rows[size_t(s)], total += rows[size_t(s)];
  if (together_ >= 0) together_ += total;
  if (promised_ < 0) promise(queue, 0, page_bound() - before + (tails_shared_ ? segments_ : 0));
  promised_ = -1;
  widen(queue, pages_for(longest()));
  changed_bounds();
}

bool LayerStore::append_heads(Queue& queue, float eps, const Heads& q, const Heads& k, const Heads& v, Tensor positions) {
  if (!queue.run->append_heads || tails_shared_) return false;
  grow(queue, std::vector<int64_t>(size_t(segments_), 1));
  view_.shared = false;
  queue.run->append_heads(queue, eps, q, k, v, view_, positions);
  changed(queue);
  return true;
}

void LayerStore::append(Queue& queue, const Ragged& k, const Ragged& v, Tensor positions, std::span<const int64_t> rows) {
  require(k.segments() == segments() && v.segments() == segments(), "LayerStore::append",
          std::to_string(k.segments()) + " segments for a layer of " + std::to_string(segments()));
  std::vector<int64_t> more;
  for (int64_t s = 0; s < segments_; ++s)
    more.push_back(rows.empty() ? k.length(s) : rows[size_t(s / shape_.kv_heads)]);
  if (*std::max_element(more.begin(), more.end()) == 0) return;
  const bool all = *std::min_element(more.begin(), more.end()) > 0;  // every segment grows
  grow(queue, more);
  Scratch scope(queue.scratch);
  const Tensor first = queue.scratch.take(Dtype::I32, {segments_});
  view_.shared = tails_shared_;
  queue.run->page_grow(queue, view_, k, first);
  loose_ |= tails_shared_;  // how many were copied, the device knows
  tails_shared_ &= !all;
  changed(queue);
  queue.run->page_write(queue, view_, k, v, positions, first);
}

void LayerStore::own(Queue& queue, Tensor until) {
  if (shared_ == 0) return;
  const int64_t most = std::min(shared_, page_bound());
  for (size_t l = 0; l < (converted_ ? view_.layouts.size() : 1); ++l) promise(queue, int(l), most);
  changed_bounds();
  queue.run->page_own(queue, view_, until);
}

void LayerStore::rewrite(Queue& queue, Tensor first, const Ragged& k, const Ragged& v, Tensor positions) {
  own(queue, view_.length);
  shared_ = 0, tails_shared_ = false;
  Scratch scope(queue.scratch);
  std::vector<std::pair<int, Ragged>> beside;
  auto keep = [&](int column, int64_t width) {
    Ragged values{.values = queue.scratch.take(Dtype::F32, {entries(), width}),
                  .offsets = offsets(queue),
                  .ends = {},
                  .heads = shape_.kv_heads,
                  .bound = entries()};
    queue.run->column_read(queue, view_, column, values);
    beside.emplace_back(column, values);
  };
  if (store_->options_.bias) keep(kBiasColumn, 1);
  for (size_t c = 0; c < store_->options_.columns.size(); ++c)
    if (const Column& column = store_->options_.columns[c]; column.keeps == Column::Keeps::User)
      keep(int(c), column.width);
  queue.run->page_write(queue, view_, k, v, positions, first);
  for (const auto& [column, values] : beside) queue.run->column_write(queue, view_, column, values);
}

void LayerStore::write_column(Queue& queue, int column, const Ragged& values) {
  own(queue, view_.length);
  shared_ = 0, tails_shared_ = false;
  queue.run->column_write(queue, view_, column, values);
}

void LayerStore::compact(Queue& queue, Tensor index, Tensor count, int64_t capacity, std::span<const int64_t> most,
                         int64_t together) {
  own(queue, count);
  queue.run->page_move(queue, view_, view_, index, count, capacity);
  let_go(queue, count, most, together);
  shared_ = 0, tails_shared_ = false;  // what is left has been made its own
}

void LayerStore::let_go(Queue& queue, Tensor lengths, std::span<const int64_t> most, int64_t together) {
  const int64_t before = page_bound();
  changed_bounds();  // another layer or fork may have moved the supply
  queue.run->page_shrink(queue, view_, lengths);
  loose_ = true;  // a CPU looks at once: changed()
  if (!most.empty()) {
    for (int64_t s = 0; s < segments_; ++s) length_[size_t(s)] = std::min(length_[size_t(s)], most[size_t(s)]);
    together_ = together;
  }
  changed(queue);
  const int64_t after = page_bound();
  if (!converted_ && !slot_pool_ && !queue.recording())
    pool(0).returned(std::max<int64_t>(0, before - after - shared_));
  shared_ = std::min(shared_, after);
  tails_shared_ = shared_ > 0;  // what was full may be a last page now
  if (visible(queue)) trim_slots();
}

void LayerStore::convert(Queue& queue, Tensor first, Tensor last, int layout, int64_t pages, bool again) {
  if (pages <= 0) return;
  require(!slot_pool_ || layout == 0, "LayerStore::convert", "pages in slots keep their layout");
  promise(queue, layout, pages);
  converted_ |= layout != 0;
  changed_bounds();
  queue.run->page_convert(queue, view_, first, last, layout, again);
  changed(queue);
  loose_ = !visible(queue);
}

void LayerStore::pair(Queue& queue, LayerStore& below, Tensor first, Tensor last, int layout, const Ragged& k_apart,
                      const Ragged& v_apart, float t, int64_t pages) {
  if (pages <= 0) return;
  require(group_ == below.group_, "LayerStore::pair", "layers of different shapes");
  pool(layout).promise(queue, pages);
  converted_ = below.converted_ = true;
  changed_bounds(), below.changed_bounds();
  queue.run->page_pair(queue, below.view_, view_, first, last, layout, k_apart, v_apart, t);
  for (LayerStore* layer : {this, &below}) {
    layer->changed(queue);
    layer->loose_ = !visible(queue);
  }
}

void LayerStore::truncate(Queue& queue, int sequence, int64_t position) {
  if (entries() == 0) return;
  Scratch scope(queue.scratch);
  bool block_columns = false;
  for (const Column& column : store_->options_.columns) block_columns |= column.keeps != Column::Keeps::User;
  Ragged held{.values = {}, .offsets = offsets(queue), .ends = {}, .heads = shape_.kv_heads, .bound = entries()};
  const Tensor positions = queue.scratch.take(Dtype::I32, {held.bound});
  queue.run->page_read(queue, view_, nullptr, held, {}, positions);
  const Num mine = floor_div(index(), shape_.kv_heads) == sequence, begin = begin_of(held, index()),
            length = length_of(held, index());
  const Num left = find(positions, begin, begin + length, position) - begin;
  const Tensor lengths = compute(queue, Dtype::I32, {segments_}, pick(mine, left, length));
  let_go(queue, lengths, {}, -1);
  // The last page takes new entries again: it must be in the layout that append writes, and its blocks' columns must
  // forget what left.
  if (!converted_ && !block_columns) return;
  const Num end = load(lengths, index());
  const Tensor first = compute(queue, Dtype::I32, {segments_}, floor_div(end, kPage));
  const Tensor last = compute(queue, Dtype::I32, {segments_}, pick(mine, ceil_div(end, kPage), floor_div(end, kPage)));
  convert(queue, first, last, 0, shape_.kv_heads, true);
}

std::vector<int32_t> LayerStore::positions(int64_t segment) {
  Queue& queue = store_->queue_;
  Scratch scope(queue.scratch);
  Pages one = view_;
  one.table = view_.table.slice(0, segment, segment + 1), one.layout = view_.layout.slice(0, segment, segment + 1);
  one.length = view_.length.slice(0, segment, segment + 1);
  one.kv_heads = 1;
  int32_t count = 0;
  queue.read_back(one.length, &count);
  std::vector<int32_t> out(static_cast<size_t>(count));
  if (count == 0) return out;
  const Tensor positions = queue.scratch.take(Dtype::I32, {count});
  const std::vector<int64_t> offsets{0, count};
  Ragged held{.values = {}, .offsets = queue.upload(offsets), .ends = {}, .heads = 1, .bound = count};
  queue.run->page_read(queue, one, nullptr, held, {}, positions);
  queue.read_back(positions, out.data());
  return out;
}

Store::Store(Queue& queue, std::span<const StoreShape> layers, StoreOptions options, int sequences)
    : queue_(queue), options_(std::move(options)), sequences_(sequences) {
  int64_t all = 0;
  for (const StoreShape& shape : layers) all += int64_t(sequences) * shape.kv_heads;
  lengths_ = Buffer(Dtype::I32, {all}, *queue.memory);
  queue.fill(lengths_, 0);
  int64_t at = 0;
  for (const StoreShape& shape : layers) {
    size_t group = 0;
    while (group < groups_.size() && !(groups_[group].shape == shape)) ++group;
    if (group == groups_.size()) groups_.push_back({shape, {}, {}});
    const int64_t segments = int64_t(sequences) * shape.kv_heads;
    layers_.emplace_back(new LayerStore(*this, int(group), shape, segments, lengths_->slice(0, at, at + segments), 4));
    at += segments;
  }
  add_layout(options_.k, options_.v);
  for (Group& group : groups_)
    if (group.shape.slots)
      group.slots = std::make_shared<SlotPool>(*queue.memory, options_.slots, pages_for(options_.slots.entries),
                                               kPageHeader + group.layouts[0].bytes);
  for (auto& layer : layers_) layer->open_slots(queue);
}

Store::Store(Queue& queue, Store& other)
    : queue_(queue), options_(other.options_), sequences_(other.sequences_), groups_(other.groups_),
      lengths_(Dtype::I32, {other.lengths_->numel()}, *queue.memory) {
  queue.move(other.lengths_, lengths_);
  int64_t at = 0;
  for (const auto& layer : other.layers_) {
    layers_.emplace_back(new LayerStore(*this, *layer, lengths_->slice(0, at, at + layer->segments())));
    at += layer->segments();
    if (layer->page_bound() == 0) continue;
    queue.run->page_hold(queue, layers_.back()->view_);
    layer->shared_ = layer->page_bound(), layer->tails_shared_ = true;
    if (!layers_.back()->slot_pool_) continue;
    layers_.back()->own(queue, layers_.back()->view_.length);
    for (LayerStore* one : {layers_.back().get(), layer.get()}) one->shared_ = 0, one->tails_shared_ = false;
  }
}

Store::~Store() {
  try {
    for (auto& layer : layers_) {
      if (groups_[size_t(layer->group_)].pools[0].use_count() == 1) continue;
      Scratch scope(queue_.scratch);
      const Tensor none = queue_.scratch.take(Dtype::I32, {layer->segments()});
      queue_.fill(none, 0);
      layer->changed_bounds();
      queue_.run->page_shrink(queue_, layer->view_, none);
    }
  } catch (const Error&) {  // a device that failed has said so before; forks then hold pages that nobody uses
  }
}

int Store::add_layout(PageType k, PageType v) {
  for (Group& group : groups_) {
    require(group.layouts.size() < 4, "Store::add_layout", "a store has at most four ways of keeping pages");
    const bool transposed = queue_.run && queue_.run->v_transposed;
    group.layouts.push_back(page_layout(group.shape.d, group.shape.d_v, k, v, transposed, options_.bias, options_.columns));
    if (k.pair == 2) group.pools.push_back(std::shared_ptr<PagePool>(group.pools.back()));
    else group.pools.push_back(std::make_shared<PagePool>(*queue_.memory, group.layouts.back().bytes));
  }
  for (auto& layer : layers_) layer->changed(queue_);
  return groups_.empty() ? 0 : int(groups_[0].layouts.size()) - 1;
}

void Store::truncate(Queue& queue, int sequence, int64_t position) {
  for (auto& layer : layers_) layer->truncate(queue, sequence, position);
  sync();  // how many entries that left only the positions tell
}

void Store::sync() {
  bool shared = false, loose = false;
  for (const Group& group : groups_) shared |= group.pools[0].use_count() > 1;
  for (auto& layer : layers_) {
    if (!shared) layer->shared_ = 0, layer->tails_shared_ = false;
    loose |= layer->loose_;
  }
  if (visible(queue_)) return;
  if (loose) read_bounds();
  for (auto& layer : layers_) layer->map_ahead();
}

void Store::read_bounds() {
  std::vector<int32_t> lengths(static_cast<size_t>(lengths_->numel()));
  queue_.read_back(lengths_, lengths.data());
  auto at = lengths.begin();
  for (auto& layer : layers_) {
    std::copy_n(at, layer->segments(), layer->length_.begin());
    at += layer->segments();
    layer->together_ = -1, layer->loose_ = false;
    layer->view_.length_bound = layer->longest();
    layer->trim_slots();
  }
  for (const Group& group : groups_)
    for (const auto& pool : group.pools) {
      if (!pool->supply().top) continue;
      int32_t top = 0;
      queue_.read_back(pool->supply().top, &top);
      pool->set_free(top);
    }
}

bool Store::shared() const {
  return std::any_of(layers_.begin(), layers_.end(), [](const auto& layer) { return layer->tails_shared_; });
}

bool Store::prepare() {
  bool holds = true;
  for (auto& layer : layers_) {
    bool covered = !layer->ceiling_.empty();
    int64_t more = 0;
    for (size_t s = 0; s < layer->length_.size(); ++s) {
      const int64_t after = layer->length_[s] + 1;
      more += pages_for(after) - pages_for(after - 1);
      covered = covered && after <= layer->ceiling_[s];
    }
    if (layer->promised_ < 0 && !layer->slot_pool_) layer->pool(0).promise(queue_, more);
    if (layer->slot_pool_) layer->map_slots(1);
    layer->promised_ = std::max(layer->promised_, more);
    holds &= covered;
  }
  std::vector<const void*> supplies;  // a supply that grew may have moved its list
  for (const Group& group : groups_)
    for (const auto& pool : group.pools) supplies.push_back(pool->supply().free.data);
  holds &= supplies == recorded_supplies_;
  recorded_supplies_ = std::move(supplies);
  if (!holds)
    for (auto& layer : layers_) layer->ceiling_.clear();
  return holds;
}

void Store::withdraw() {
  for (auto& layer : layers_) {
    if (!layer->slot_pool_) layer->pool(0).returned(std::max<int64_t>(0, layer->promised_));
    layer->promised_ = -1;
  }
}

void Store::begin_step() {
  for (auto& layer : layers_) {
    if (layer->ceiling_.empty()) {
      const int64_t room = std::max<int64_t>(256, layer->longest() / 8);
      for (int64_t length : layer->length_) layer->ceiling_.push_back(length + room);
    }
    layer->true_ = {layer->length_, layer->promised_, layer->together_, layer->loose_};
    for (size_t s = 0; s < layer->length_.size(); ++s) layer->length_[s] = layer->ceiling_[s] - 1;
    layer->together_ = -1, layer->loose_ = false;
    layer->widen(queue_, pages_for(layer->longest() + 1));
    layer->changed_bounds();
    layer->offsets_stale_ = true;
  }
}

bool Store::end_step() {
  bool evicts = false;
  for (auto& layer : layers_) {
    evicts |= layer->loose_;
    layer->length_ = std::move(layer->true_.length), layer->together_ = layer->true_.together;
    layer->loose_ = layer->true_.loose, layer->promised_ = layer->true_.promised;
    layer->changed_bounds();
    layer->offsets_stale_ = true;
  }
  return evicts;
}

void Store::replayed(bool evicts) {
  for (auto& layer : layers_) {
    for (int64_t& length : layer->length_) ++length;
    if (layer->together_ >= 0) layer->together_ += layer->segments();
    layer->loose_ |= evicts, layer->promised_ = -1;
    layer->changed_bounds();
    layer->offsets_stale_ = layer->bytes_stale_ = true;
    layer->map_ahead();
  }
}

int64_t Store::bytes() {
  int64_t total = 0;
  for (auto& layer : layers_) total += layer->bytes();
  for (const Group& group : groups_) total += group.slots ? group.slots->idle() : 0;
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

// The key-value store: ragged per layer and KV head, paged, every entry with its true position.
//
// A segment is one (sequence, KV head) of one layer and has a page list of its own, so a head that keeps 200 entries
// holds the pages of 200. Pages are shared between forks and copied when one of them writes. Nobody above the store
// computes a position: an entry's true position never changes, whatever is evicted around it.
//
// Page lists, lengths and free pages lie where kernels run, and kernels change them. The host knows bounds, which size
// launches and decide when more pages are needed; sync() makes them exact. On a CPU they always are.
#pragma once
#include <cstdint>
#include <future>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "attention/slots.h"
#include "base/queue.h"
#include "kernels/kernels.h"

namespace heed {

/// What one layer of a store holds: g KV heads of keys [d] and values [d_v].
struct StoreShape {
  int kv_heads = 1;
  int d = 0, d_v = 0;
  bool slots = false;  // every segment's pages lie end to end (StoreOptions::slots)
  bool operator==(const StoreShape&) const = default;
};

struct StoreOptions {
  PageType k, v;            // how entries are kept
  bool plain_keys = false;  // keys before rotary embedding, rotated where they are read
  bool bias = false;        // a logit bias for each entry (synthetic entries)
  std::vector<Column> columns;
  SlotOptions slots;
};

/// Pages of equal size in blocks of memory, and the stack of those that lie free. Blocks grow as the host's bounds ask for
/// it and are given back with the pool.
class PagePool {
 public:
  PagePool(const Memory& memory, int64_t page_bytes);
  /// Sees to it that `count` pages lie free, whatever bounds hide: throws Error(Memory).
  void promise(Queue&, int64_t count);
  /// `count` pages less are out, for certain.
  void returned(int64_t count) { out_ -= count; }
  /// How many are out, as counted on the device.
  void set_free(int64_t top) { out_ = total_ - top; }
  const PageSupply& supply() const { return supply_; }
  int64_t page_bytes() const { return supply_.page_bytes; }

 private:
  const Memory* memory_;
  PageSupply supply_;
  std::vector<Buffer> blocks_;
  Buffer free_, top_;
  int64_t total_ = 0, out_ = 0;  // pages there are; at most so many are in lists
};

class Store;

/// One layer of a store.
class LayerStore {
 public:
  LayerStore(const LayerStore&) = delete;
  LayerStore& operator=(const LayerStore&) = delete;
  ~LayerStore();

  int64_t segments() const { return segments_; }
  const StoreShape& shape() const { return shape_; }
  /// The most entries that a segment holds; exact on a CPU, and behind Store::sync.
  int64_t length(int64_t segment) const { return length_[size_t(segment)]; }
  int64_t longest() const;
  /// Σ lengths, likewise.
  int64_t entries() const;
  /// Bytes of the pages this layer holds; a page shared by forks counts in each of them. In slots, of the memory that is
  /// mapped. Waits, unless nothing changed.
  int64_t bytes();

  /// What kernels read; valid until the layer next changes.
  const Pages& pages() { return view_; }
  /// Offsets (I64 [segments + 1]) of the Ragged of all entries that page_read fills; valid like pages().
  Tensor offsets(Queue&);

  /// Rows of k and v (head-major, one segment for each of this layer's, any plain type; keys plain or rotated as the
  /// store's options say) go behind each segment's last entry. positions: I32, indexed as k's rows. rows: of each
  /// sequence; left out, k's offsets are looked at, which must then be of the host.
  void append(Queue&, const Ragged& k, const Ragged& v, Tensor positions, std::span<const int64_t> rows = {});

  /// One token of every sequence: Kernels::append_heads. False, having done nothing, where there is no such, or a fork may
  /// hold the last pages too.
  bool append_heads(Queue&, float eps, const Heads& q, const Heads& k, const Heads& v, Tensor positions);

  /// Keeps entries index[s · capacity + i], i < count[s] (ascending), of each segment; pages left over are given back.
  /// most: no segment keeps more than most[s], and all of the layer together no more than `together`; left out, bounds
  /// stay as they are.
  void compact(Queue&, Tensor index, Tensor count, int64_t capacity, std::span<const int64_t> most = {},
               int64_t together = -1);

  /// Pages first[s] … last[s] − 1 (I32 [segments]) of every segment are kept in layout `layout` from now on
  /// (Store::add_layout); at most `pages` are not yet.
  void convert(Queue&, Tensor first, Tensor last, int layout, int64_t pages, bool again = false);

  /// Points (PageType) of a layout's pages in this layer, in place of the layout's own: before any page has that layout.
  void set_points(int layout, const PagePoints& points);

  /// Full pages first[s] … last[s] − 1 of every segment, of this layer and of one below it with the same entries, become
  /// pages that both hold, in `layout` and `layout` + 1 (Kernels::page_pair); at most `pages` are not yet.
  void pair(Queue&, LayerStore& below, Tensor first, Tensor last, int layout, const Ragged& k_apart,
            const Ragged& v_apart, float t, int64_t pages);

  /// Forgets entries whose position is ≥ `position` in every segment of `sequence`.
  void truncate(Queue&, int sequence, int64_t position);

  /// Entries first[s] … of each segment (I32 [segments]) become that segment's rows of k and v, laid out as append
  /// takes them, in the place of what they were; biases and User columns stay.
  void rewrite(Queue&, Tensor first, const Ragged& k, const Ragged& v, Tensor positions);

  /// Writes a User column (or kBiasColumn) of all entries (values [entries()(, width)]); a fork keeps its own.
  void write_column(Queue&, int column, const Ragged& values);

  /// True positions of a segment's entries, ascending. Waits.
  std::vector<int32_t> positions(int64_t segment);

 private:
  friend class Store;
  LayerStore(Store& store, int group, StoreShape shape, int64_t segments, Tensor lengths, int64_t wide);
  LayerStore(Store& store, const LayerStore& other, Tensor lengths);  // shares the pages
  PagePool& pool(int layout) const;
  int64_t page_bound() const;  // pages in all lists
  void promise(Queue&, int layout, int64_t pages);
  void open_slots(Queue&);
  void map_slots(int64_t more = 0);  // memory for what bounds allow, and so many more entries
  void map_ahead();                  // for the steps to come, beside the computation
  void trim_slots();
  void widen(Queue&, int64_t pages);
  void own(Queue&, Tensor until);  // pages of entries before until[s] are no fork's
  void let_go(Queue&, Tensor lengths, std::span<const int64_t> most, int64_t together);
  void changed_bounds();  // behind bounds, supplies or layouts that changed on the host
  void use_points(int layout, const PagePoints& points);
  void changed(Queue&);                              // behind a kernel that changed lengths
  void grow(Queue&, std::span<const int64_t> rows);  // bounds, pages and tables for so many more entries of each segment

  Store* store_;
  int group_;
  StoreShape shape_;
  int64_t segments_;
  std::vector<int64_t> length_;  // bounds
  int64_t together_ = -1;        // bound of Σ lengths; −1: no better than the sum
  bool loose_ = false;           // bounds are more than bounds
  int64_t shared_ = 0;           // pages that a fork may hold too
  bool tails_shared_ = false;    // and part-filled last ones among them, which an append copies
  int64_t promised_ = -1;        // pages that lie free for the next append; −1: not seen to
  // While a step is recorded, bounds are `ceiling_` − 1 and the true ones wait here.
  std::vector<int64_t> ceiling_;
  struct Bounds {
    std::vector<int64_t> length;
    int64_t promised = -1, together = -1;
    bool loose = false;
  } true_;
  std::vector<std::pair<int, PagePoints>> points_;  // of layouts
  bool converted_ = false;                          // some pages have another layout than the first
  std::shared_ptr<SlotPool> slot_pool_;             // null: pages lie wherever one is free
  std::vector<int> slots_;
  Buffer bases_;
  std::future<void> ahead_;  // of what is mapped beside the computation
  Buffer table_, layout_;
  Pages view_;
  Buffer offsets_;
  bool offsets_stale_ = true;
  int64_t bytes_ = 0;
  bool bytes_stale_ = true;
};

class Store {
 public:
  /// One StoreShape for each layer, pages laid out as the queue's kernels want them. The queue must outlive the store.
  Store(Queue&, std::span<const StoreShape> layers, StoreOptions options, int sequences = 1);
  /// A fork: shares every page. Its queue goes on in the stream of the other's.
  Store(Queue&, Store& other);
  ~Store();
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;

  int layers() const { return int(layers_.size()); }
  int sequences() const { return sequences_; }
  LayerStore& layer(int l) { return *layers_[size_t(l)]; }
  const LayerStore& layer(int l) const { return *layers_[size_t(l)]; }
  const StoreOptions& options() const { return options_; }
  /// Another way of keeping pages (at most three besides the first): its number for LayerStore::convert. What the second
  /// of two layers sees of a page (PageType::pair) is added behind what the first sees, and lies in the same pool.
  int add_layout(PageType k, PageType v);
  /// In all layers. Waits.
  void truncate(Queue&, int sequence, int64_t position);
  /// Recorded steps (Queue::record), each of which appends one entry to every segment. Replays happen behind the host's
  /// back, so what they need is there before: prepare() sees to pages and tables for one step, and tells whether
  /// recordings made before still hold. begin_step() gives every bound room for many steps and end_step() takes it
  /// back, telling whether the step evicts; both around the recording. replayed() says that a step happened, withdraw()
  /// that none will.
  bool prepare();
  void withdraw();
  void begin_step();
  bool end_step();
  void replayed(bool evicts);
  /// Whether a fork may hold pages that the next append writes.
  bool shared() const;
  /// Makes all bounds exact when some are not: waits then.
  void sync();
  int64_t bytes();
  int64_t entries() const;
  /// I32 [Σ segments], layer by layer: the entries of each.
  Tensor lengths() const { return lengths_; }
  /// The number of a column by its name, or −1.
  int column(const std::string& name) const;

 private:
  friend class LayerStore;
  void read_bounds();
  struct Group {  // layers of one shape share layouts and pools
    StoreShape shape;
    std::vector<PageLayout> layouts;
    std::vector<std::shared_ptr<PagePool>> pools;
    std::shared_ptr<SlotPool> slots;
  };
  Queue& queue_;
  StoreOptions options_;
  int sequences_;
  std::vector<Group> groups_;
  Buffer lengths_;  // I32 [Σ segments], layer by layer
  std::vector<const void*> recorded_supplies_;
  std::vector<std::unique_ptr<LayerStore>> layers_;
};

}  // namespace heed

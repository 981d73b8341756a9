// The key-value store: ragged per layer and KV head, paged, every entry with its true position.
//
// A segment is one (sequence, KV head) of one layer and has a page list of its own, so a head that keeps 200 entries
// holds the pages of 200. Pages are shared between forks and copied when one of them writes. Nobody above the store
// computes a position: an entry's true position never changes, whatever is evicted around it.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/queue.h"
#include "kernels/kernels.h"

namespace heed {

/// What one layer of a store holds: g KV heads of keys [d] and values [d_v].
struct StoreShape {
  int kv_heads = 1;
  int d = 0, d_v = 0;
  bool operator==(const StoreShape&) const = default;
};

struct StoreOptions {
  PageType k, v;             // how entries are kept
  bool plain_keys = false;   // keys before rotary embedding, rotated where they are read
  bool bias = false;         // a logit bias for each entry (synthetic entries)
  std::vector<Column> columns;
};

/// Pages of equal size, counted by how many page lists hold them. A page given back is kept for the next taker while
/// few lie idle, so a steady decode allocates nothing; the rest returns to the system.
class PagePool {
 public:
  explicit PagePool(int64_t page_bytes) : page_bytes_(page_bytes) {}
  ~PagePool();
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;
  char* take();            // held once; throws Error(Memory)
  void hold(char* page);   // once more
  void drop(char* page);   // once less
  static bool shared(const char* page);
  int64_t page_bytes() const { return page_bytes_; }

 private:
  int64_t page_bytes_;
  std::vector<char*> idle_;
};

class Store;

/// One layer of a store.
class LayerStore {
 public:
  ~LayerStore();
  LayerStore(const LayerStore&) = delete;
  LayerStore& operator=(const LayerStore&) = delete;

  int64_t segments() const { return int64_t(segments_.size()); }
  const StoreShape& shape() const { return shape_; }
  int64_t length(int64_t segment) const { return segments_[size_t(segment)].length; }
  int64_t longest() const;
  /// Σ lengths.
  int64_t entries() const;
  /// Bytes of the pages this layer holds; a page shared by forks counts in each of them.
  int64_t bytes() const;

  /// What kernels read; valid until the layer next changes.
  const Pages& pages();
  /// Offsets (I64 [segments + 1]) of the Ragged of all entries that page_read fills; valid like pages().
  Tensor offsets();

  /// Rows of k and v (head-major, one segment for each of this layer's, any plain type; keys plain or rotated as the
  /// store's options say) go behind each segment's last entry. positions: I32, indexed as k's rows.
  void append(Queue&, const Ragged& k, const Ragged& v, Tensor positions);

  /// Keeps entries index[s · capacity + i], i < count[s] (ascending), of each segment; pages left over are given back.
  void compact(Queue&, Tensor index, Tensor count, int64_t capacity);

  /// Pages first … last of `segment` are kept in layout `layout` from now on (Store::add_layout).
  void convert(Queue&, int64_t segment, int64_t first, int64_t last, int layout);

  /// Forgets entries whose position is ≥ `position` in every segment of `sequence`.
  void truncate(Queue&, int sequence, int64_t position);

  /// True positions of a segment's entries, ascending.
  std::vector<int32_t> positions(int64_t segment) const;
  /// Which layout a page of a segment has.
  int layout(int64_t segment, int64_t page) const { return segments_[size_t(segment)].layouts[size_t(page)]; }

 private:
  friend class Store;
  struct Segment {
    std::vector<char*> pages;
    std::vector<uint8_t> layouts;
    int64_t length = 0;
  };
  LayerStore(Store& store, int group, StoreShape shape, int64_t segments);
  LayerStore(Store& store, const LayerStore& other);    // shares the pages
  const PageLayout& layout_of(const Segment& segment, size_t page) const;
  void own(Segment& segment, size_t page);              // makes a page writable, copying it if it is shared
  void shrink(Segment& segment, int64_t length);

  Store* store_;
  int group_;
  StoreShape shape_;
  std::vector<Segment> segments_;
  bool stale_ = true;
  Pages view_;
  std::vector<uint64_t> table_;
  std::vector<uint8_t> layout_table_;
  std::vector<int32_t> lengths_;
  std::vector<int64_t> offsets_;
};

class Store {
 public:
  /// One StoreShape for each layer. v_transposed: as the backend's table says (Kernels::v_transposed).
  Store(std::span<const StoreShape> layers, StoreOptions options, bool v_transposed, int sequences = 1);
  Store(const Store& other);  // a fork: shares every page
  Store& operator=(const Store&) = delete;

  int layers() const { return int(layers_.size()); }
  int sequences() const { return sequences_; }
  LayerStore& layer(int l) { return *layers_[size_t(l)]; }
  const LayerStore& layer(int l) const { return *layers_[size_t(l)]; }
  const StoreOptions& options() const { return options_; }
  /// Another way of keeping pages (at most three besides the first): its number for LayerStore::convert.
  int add_layout(PageType k, PageType v);
  void truncate(Queue&, int sequence, int64_t position);
  int64_t bytes() const;
  int64_t entries() const;
  /// The number of a column by its name, or −1.
  int column(const std::string& name) const;

 private:
  friend class LayerStore;
  struct Group {  // layers of one shape share layouts and pools
    StoreShape shape;
    std::vector<PageLayout> layouts;
    std::vector<std::shared_ptr<PagePool>> pools;
  };
  StoreOptions options_;
  bool v_transposed_;
  int sequences_;
  std::vector<Group> groups_;
  std::vector<std::unique_ptr<LayerStore>> layers_;
};

}  // namespace heed

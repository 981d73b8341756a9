// Ranks as threads of one process. A message holds a copy: a rank that throws takes its own tensors with it, while others
// may still be reading what it sent.
#include <condition_variable>
#include <exception>
#include <functional>
#include <map>
#include <mutex>
#include <thread>
#include <tuple>

#include "base/comm.h"
#include "base/threads.h"

namespace heed {
namespace {

using Channel = std::tuple<int, int, int>;  // group, from, to; ranks of the world

/// What the ranks share. Everything is guarded by `mutex`, except the copies themselves.
struct World {
  explicit World(int count) : alive(count), wanting(size_t(count)), left(size_t(count), false) {}

  std::mutex mutex;
  std::condition_variable changed;
  std::map<Channel, std::map<int64_t, Buffer>> posts;   // by the number of the message on its channel
  std::map<std::tuple<int, int64_t, int>, int> groups;  // (parent, its nth split, colour) → group
  int alive;
  std::vector<const std::function<bool()>*> wanting;  // for each rank that sleeps: what it sleeps for
  std::vector<bool> left;
  std::exception_ptr error;
  std::string failure;
  const Memory* memory = &cpu_memory();
  void* stream = nullptr;

  void fail(std::string why) {
    if (failure.empty()) failure = std::move(why);
    changed.notify_all();
  }

  /// Nobody is awake and nobody's wish is granted: no message can come any more.
  bool stuck() const {
    int asleep = 0;
    for (const auto* want : wanting) {
      if (!want) continue;
      if ((*want)()) return false;
      ++asleep;
    }
    return asleep == alive;
  }

  void wait(std::unique_lock<std::mutex>& lock, int rank, const std::function<bool()>& want) {
    wanting[size_t(rank)] = &want;
    if (failure.empty() && stuck())
      fail(alive == int(left.size()) ? "every rank waits for another" : "the remaining ranks wait for one that has returned");
    changed.wait(lock, [&] { return !failure.empty() || want(); });
    wanting[size_t(rank)] = nullptr;
    if (!want()) throw Error(Code::Internal, "Comm", failure);
  }

  void leave(int rank, std::exception_ptr thrown) {
    std::lock_guard lock(mutex);
    left[size_t(rank)] = true;
    --alive;
    if (thrown) {
      // A rank that was told of a failure is not the cause of it.
      if (!error && failure.empty()) error = thrown;
      fail("rank " + std::to_string(rank) + " failed");
    } else if (alive > 0 && failure.empty() && stuck()) {
      fail("rank " + std::to_string(rank) + " returned while others wait for it");
    }
  }
};

class ThreadComm final : public Comm {
 public:
  ThreadComm(World& world, int group, std::vector<int> members, int rank)
      : world_(world), group_(group), members_(std::move(members)), rank_(rank), sent_(members_.size()),
        received_(members_.size()) {}

  int rank() const override { return rank_; }
  int size() const override { return int(members_.size()); }

  std::unique_ptr<Comm> split(int colour, int key) override {
    const int32_t mine[2] = {colour, key};
    std::vector<int32_t> all(size_t(size()) * 2);
    gather_all(Tensor(const_cast<int32_t*>(mine), Dtype::I32, {2}), Tensor(all.data(), Dtype::I32, {size(), 2}));
    std::map<std::pair<int, int>, int> order;  // (key, rank in this group) → rank in the world
    for (int r = 0; r < size(); ++r)
      if (all[size_t(r) * 2] == colour) order[{all[size_t(r) * 2 + 1], r}] = members_[size_t(r)];
    std::vector<int> members;
    int rank = 0;
    for (const auto& [place, member] : order) {
      if (place.second == rank_) rank = int(members.size());
      members.push_back(member);
    }
    std::lock_guard lock(world_.mutex);
    const int group = world_.groups.try_emplace({group_, splits_++, colour}, int(world_.groups.size()) + 1).first->second;
    return std::make_unique<ThreadComm>(world_, group, std::move(members), rank);
  }

  void finish(Ticket ticket) override {
    require(!inside_parallel(), "Comm::finish",
            "called inside a parallel region, which would keep the other ranks out of theirs");
    const auto found = started_.find(ticket);
    require(found != started_.end(), "Comm::finish", "a ticket that was not given, or is finished");
    const std::vector<Receive> receives = std::move(found->second);
    started_.erase(found);
    for (const auto& [channel, number, tensor] : receives) take(channel, number, tensor);
  }

 protected:
  Ticket post(std::span<const Message> sends, std::span<const Message> receives) override {
    std::vector<Receive>& work = started_[++last_];
    for (const Message& m : receives) {
      const Channel channel{group_, members_[size_t(m.peer)], world_rank()};
      work.push_back({channel, received_[size_t(m.peer)]++, m.tensor});
    }
    for (const Message& m : sends) {
      // Ranks may tell each other host numbers even where their tensors lie on a device.
      const Memory& memory = m.tensor.device == Device::Cpu ? cpu_memory() : *world_.memory;
      Buffer held(m.tensor.type, std::span(m.tensor.size).first(size_t(m.tensor.rank)), memory);
      memory.move(world_.stream, m.tensor.data, held->data, m.tensor.bytes());
      std::lock_guard lock(world_.mutex);
      world_.posts[{group_, world_rank(), members_[size_t(m.peer)]}].emplace(sent_[size_t(m.peer)]++, std::move(held));
    }
    world_.changed.notify_all();
    return last_;
  }

 private:
  struct Receive {
    Channel channel;
    int64_t number;
    Tensor tensor;
  };
  int world_rank() const { return members_[size_t(rank_)]; }

  void take(const Channel& channel, int64_t number, const Tensor& to) {
    Buffer held;
    {
      std::unique_lock lock(world_.mutex);
      auto& box = world_.posts[channel];
      world_.wait(lock, world_rank(), [&] { return box.contains(number); });
      held = std::move(box.extract(number).mapped());
    }
    const Tensor& from = held;
    require(from.type == to.type && from.numel() == to.numel(), "Comm",
            "rank " + std::to_string(std::get<1>(channel)) + " sends " + info(from.type).name + from.shape() +
                ", rank " + std::to_string(std::get<2>(channel)) + " expects " + info(to.type).name + to.shape());
    require(from.device == to.device, "Comm", "a message between two kinds of memory");
    (to.device == Device::Cpu ? cpu_memory() : *world_.memory).move(world_.stream, from.data, to.data, from.bytes());
  }

  World& world_;
  int group_;
  std::vector<int> members_;  // ranks of the world
  int rank_;
  std::vector<int64_t> sent_, received_;  // messages to and from each member
  std::map<Ticket, std::vector<Receive>> started_;
  Ticket last_ = 0;
  int64_t splits_ = 0;
};

}  // namespace

void run_ranks(int count, const std::function<void(Comm&)>& fn, const Queue* on) {
  require(count > 0, "run_ranks", std::to_string(count) + " ranks");
  World world(count);
  if (on) world.memory = on->memory, world.stream = on->stream;
  std::vector<int> everybody;
  for (int r = 0; r < count; ++r) everybody.push_back(r);
  std::vector<std::thread> crew;
  const auto run = [&](int rank) {
    std::exception_ptr thrown;
    try {
      ThreadComm comm(world, 0, everybody, rank);
      fn(comm);
    } catch (...) { thrown = std::current_exception(); }
    world.leave(rank, thrown);
  };
  try {
    for (int r = 0; r < count; ++r) crew.emplace_back(run, r);
  } catch (const std::system_error&) {
    // Ranks without a thread have failed; those that run must not wait for them.
    for (int r = int(crew.size()); r < count; ++r)
      world.leave(r, std::make_exception_ptr(Error(Code::Memory, "run_ranks", "no thread for rank " + std::to_string(r))));
  }
  for (std::thread& t : crew) t.join();
  if (world.error) std::rethrow_exception(world.error);
  if (!world.failure.empty()) throw Error(Code::Internal, "run_ranks", world.failure);
}

}  // namespace heed

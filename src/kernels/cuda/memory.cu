// The memory of the GPU: allocation, streams, and copies that do not wait.
#include <cuda.h>

#include <cstdio>
#include <cstring>
#include <mutex>
#include <unordered_map>

#include "kernels/cuda/device.cuh"

namespace heed::cuda {

void check(cudaError_t status, const char* where) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // forget it, so that a later call does not report it again
  if (status == cudaErrorMemoryAllocation) throw Error(Code::Memory, where, "the GPU has too little memory left");
  throw Error(Code::Device, where, std::string("the GPU reports: ") + cudaGetErrorString(status));
}

cudaStream_t stream(Queue& queue) {
  ++queue.launches;
  return static_cast<cudaStream_t>(queue.stream);
}

namespace {

/// Pinned memory through which host bytes leave: a copy from it needs no waiting host. Four slots take turns; a slot is
/// written again once what it held has left, so an upload waits only when 4 MB of earlier ones are still on their way.
class Staging {
 public:
  Staging() = default;
  ~Staging() {
    for (cudaEvent_t event : left_)
      if (event) cudaEventDestroy(event);
    if (memory_) cudaFreeHost(memory_);
  }
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  void copy(cudaStream_t stream, const char* host, char* to, size_t bytes) {
    if (!memory_) {
      check(cudaMallocHost(&memory_, kSlots * kSlot), "cuda staging");
      for (cudaEvent_t& event : left_) check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cuda staging");
    }
    while (bytes > 0) {
      if (used_ == kSlot) {
        check(cudaEventRecord(left_[slot_], stream), "cuda upload");
        slot_ = (slot_ + 1) % kSlots;
        check(cudaEventSynchronize(left_[slot_]), "cuda upload");
        used_ = 0;
      }
      const size_t piece = std::min(bytes, kSlot - used_);
      char* at = memory_ + slot_ * kSlot + used_;
      std::memcpy(at, host, piece);
      check(cudaMemcpyAsync(to, at, piece, cudaMemcpyHostToDevice, stream), "cuda upload");
      used_ += piece;
      host += piece;
      to += piece;
      bytes -= piece;
    }
  }

 private:
  static constexpr size_t kSlots = 4, kSlot = 1 << 20;
  char* memory_ = nullptr;
  cudaEvent_t left_[kSlots] = {};
  size_t slot_ = 0, used_ = 0;
};

struct Stages {
  std::mutex mutex;
  std::unordered_map<void*, Staging> of;
  std::unordered_map<void*, int*> counters;
};
/// Never destroyed: at exit the driver may be gone before statics are.
Stages& stages() {
  static Stages* made = new Stages;
  return *made;
}

std::string megabytes(size_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f MB", double(bytes) / 1e6);
  return text;
}

void* allocate(int64_t bytes) {
  void* out = nullptr;
  const cudaError_t status = cudaMalloc(&out, size_t(std::max<int64_t>(bytes, 1)));
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    throw Error(Code::Memory, "cuda memory",
                megabytes(size_t(bytes)) + " asked for, " + megabytes(free) + " of " + megabytes(total) + " free",
                "use a shorter context, a smaller model, a keep policy, or --backend cpu");
  }
  check(status, "cuda memory");
  return out;
}

void* open_stream() {
  cudaStream_t out;
  check(cudaStreamCreateWithFlags(&out, cudaStreamNonBlocking), "cuda stream");
  void* counters = nullptr;
  check(cudaMalloc(&counters, kCounters * sizeof(int)), "cuda stream");
  check(cudaMemsetAsync(counters, 0, kCounters * sizeof(int), out), "cuda stream");
  const std::lock_guard lock(stages().mutex);
  stages().counters[out] = static_cast<int*>(counters);
  return out;
}

void close_stream(void* stream) noexcept {
  if (!stream) return;
  cudaStreamSynchronize(static_cast<cudaStream_t>(stream));
  {
    const std::lock_guard lock(stages().mutex);
    stages().of.erase(stream);
    cudaFree(stages().counters[stream]);
    stages().counters.erase(stream);
  }
  cudaStreamDestroy(static_cast<cudaStream_t>(stream));
}

void upload(void* stream, const void* host, void* to, int64_t bytes) {
  if (bytes <= 0) return;
  Staging* stage;
  {
    const std::lock_guard lock(stages().mutex);
    stage = &stages().of[stream];
  }
  stage->copy(static_cast<cudaStream_t>(stream), static_cast<const char*>(host), static_cast<char*>(to), size_t(bytes));
}

void download(void* stream, const void* from, void* host, int64_t bytes) {
  if (bytes > 0)
    check(cudaMemcpyAsync(host, from, size_t(bytes), cudaMemcpyDeviceToHost, static_cast<cudaStream_t>(stream)),
          "cuda download");
  check(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)), "cuda download");
}

void move(void* stream, const void* from, void* to, int64_t bytes) {
  if (bytes > 0)
    check(cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream)),
          "cuda move");
}

void fill(void* stream, void* to, int byte, int64_t bytes) {
  if (bytes > 0) check(cudaMemsetAsync(to, byte, size_t(bytes), static_cast<cudaStream_t>(stream)), "cuda fill");
}

/// Allocations, which scratch may make meanwhile, are allowed.
void begin_recording(void* stream) {
  check(cudaStreamBeginCapture(static_cast<cudaStream_t>(stream), cudaStreamCaptureModeRelaxed), "cuda recording");
}

void* end_recording(void* stream) {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t out = nullptr;
  if (cudaStreamEndCapture(static_cast<cudaStream_t>(stream), &graph) == cudaSuccess && graph &&
      cudaGraphInstantiate(&out, graph, 0) != cudaSuccess)
    out = nullptr;
  if (graph) cudaGraphDestroy(graph);
  cudaGetLastError();  // what could not be kept is no error
  return out;
}

void replay(void* stream, void* recording) {
  check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(recording), static_cast<cudaStream_t>(stream)), "cuda replay");
}

void drop_recording(void* recording) noexcept {
  if (recording) cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(recording));
}

void finish(void* stream) { check(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)), "cuda"); }

/// The driver's calls for address space, found at run time: heed does not link the driver.
struct Spaces {
  int64_t grain = 0;  // 0: there are none
  CUmemAllocationProp kind{};
  CUmemAccessDesc access{};
  decltype(&cuMemAddressReserve) reserve = nullptr;
  decltype(&cuMemAddressFree) unreserve = nullptr;
  decltype(&cuMemCreate) create = nullptr;
  decltype(&cuMemRelease) release = nullptr;
  decltype(&cuMemMap) map = nullptr;
  decltype(&cuMemUnmap) unmap = nullptr;
  decltype(&cuMemSetAccess) set_access = nullptr;
  decltype(&cuMemGetAllocationGranularity) granularity = nullptr;

  template <class F>
  bool find(const char* name, F& to) {
    void* at = nullptr;
    cudaDriverEntryPointQueryResult found{};
    if (cudaGetDriverEntryPointByVersion(name, &at, 12000, cudaEnableDefault, &found) != cudaSuccess ||
        found != cudaDriverEntryPointSuccess)
      return cudaGetLastError(), false;
    to = reinterpret_cast<F>(at);
    return true;
  }
  Spaces() {
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || !find("cuMemAddressReserve", reserve) ||
        !find("cuMemAddressFree", unreserve) || !find("cuMemCreate", create) || !find("cuMemRelease", release) ||
        !find("cuMemMap", map) || !find("cuMemUnmap", unmap) || !find("cuMemSetAccess", set_access) ||
        !find("cuMemGetAllocationGranularity", granularity))
      return;
    kind.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    kind.location.type = access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    kind.location.id = access.location.id = device;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    size_t least = 0;
    if (granularity(&least, &kind, CU_MEM_ALLOC_GRANULARITY_MINIMUM) == CUDA_SUCCESS) grain = int64_t(least);
  }
};
const Spaces& spaces() {
  static const Spaces made;
  return made;
}

void* reserve(int64_t bytes) {
  CUdeviceptr at = 0;
  if (spaces().reserve(&at, size_t(bytes), 0, 0, 0) != CUDA_SUCCESS)
    throw Error(Code::Memory, "cuda memory", megabytes(size_t(bytes)) + " of address space asked for, not available");
  return reinterpret_cast<void*>(at);
}

void decommit(void* at, int64_t bytes) noexcept {
  cudaDeviceSynchronize();  // unmapping does not wait for kernels
  for (int64_t done = 0; done < bytes; done += spaces().grain)
    spaces().unmap(reinterpret_cast<CUdeviceptr>(at) + size_t(done), size_t(spaces().grain));
}

/// Grain by grain, since only what was mapped as one can be unmapped.
void commit(void* at, int64_t bytes) {
  const Spaces& by = spaces();
  const CUdeviceptr begin = reinterpret_cast<CUdeviceptr>(at);
  for (int64_t done = 0; done < bytes; done += by.grain) {
    CUmemGenericAllocationHandle memory = 0;
    const bool made = by.create(&memory, size_t(by.grain), &by.kind, 0) == CUDA_SUCCESS;
    const bool mapped = made && by.map(begin + size_t(done), size_t(by.grain), 0, memory, 0) == CUDA_SUCCESS;
    if (made) by.release(memory);  // the mapping holds it
    if (mapped) continue;
    decommit(at, done);
    throw Error(Code::Memory, "cuda memory", megabytes(size_t(bytes)) + " asked for, not available");
  }
  if (by.set_access(begin, size_t(bytes), &by.access, 1) == CUDA_SUCCESS) return;
  decommit(at, bytes);
  throw Error(Code::Device, "cuda memory", "memory that was mapped could not be opened");
}

// Without pinned memory a copy to the host goes through the driver's own.
const Memory& pinned() {
  static const Memory made = [] {
    Memory m = cpu_memory();
    m.allocate = [](int64_t bytes) {
      void* out = nullptr;
      check(cudaMallocHost(&out, size_t(std::max<int64_t>(bytes, 1))), "cuda host memory");
      return out;
    };
    m.release = [](void* p) noexcept { cudaFreeHost(p); };
    return m;
  }();
  return made;
}

}  // namespace

int* counters(const Queue& queue) {
  const std::lock_guard lock(stages().mutex);
  return stages().counters.at(queue.stream);
}

const Memory& memory() {
  static const Memory made = [] {
    Memory m;
    m.device = Device::Cuda;
    m.allocate = allocate;
    m.release = [](void* p) noexcept { cudaFree(p); };
    m.open_stream = open_stream;
    m.close_stream = close_stream;
    m.upload = upload;
    m.download = download;
    m.move = move;
    m.fill = fill;
    m.finish = finish;
    m.grain = spaces().grain;
    if (m.grain > 0) {
      m.reserve = reserve, m.commit = commit, m.decommit = decommit;
      m.unreserve = [](void* at, int64_t bytes) noexcept {
        spaces().unreserve(reinterpret_cast<CUdeviceptr>(at), size_t(bytes));
      };
    }
    m.begin_recording = begin_recording;
    m.end_recording = end_recording;
    m.replay = replay;
    m.drop_recording = drop_recording;
    m.host = &pinned();
    return m;
  }();
  return made;
}

}  // namespace heed::cuda

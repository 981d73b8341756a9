// The table of the GPU, and whether there is one.
#include <cstdlib>

#include "kernels/cuda/device.cuh"

namespace heed {
namespace cuda {

const Memory& memory();

namespace {

struct Found {
  bool usable = false;
  std::string state;
};

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

Found look() {
  int driver = 0, runtime = 0, count = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (driver == 0) return {false, "CUDA: this machine has no NVIDIA driver"};
  if (driver / 1000 < runtime / 1000)
    return {false, "CUDA: the driver supports CUDA " + version(driver) + ", heed was built with " + version(runtime) +
                       "; a newer driver is needed"};
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0) {
    cudaGetLastError();
    return {false, std::string("CUDA: no usable GPU (") +
                       cudaGetErrorString(status == cudaSuccess ? cudaErrorNoDevice : status) + ")"};
  }
  int device = 0;
  cudaDeviceProp of{};
  if (cudaGetDevice(&device) != cudaSuccess || cudaGetDeviceProperties(&of, device) != cudaSuccess) {
    cudaGetLastError();
    return {false, "CUDA: the GPU does not answer"};
  }
  const std::string name = std::string(of.name) + ", compute capability " + std::to_string(of.major) + "." +
                           std::to_string(of.minor);
  if (of.major < 8) return {false, "CUDA: " + name + " is older than 8.0, which heed needs"};
  return {true, "CUDA: " + name + ", " + std::to_string(of.totalGlobalMem >> 20) + " MB, driver " + version(driver)};
}

const Found& found() {
  static const Found once = look();
  return once;
}

}  // namespace

bool hopper() {
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 &&
         minor == 0;
}

}  // namespace cuda

std::string cuda_state() { return cuda::found().state; }

const Kernels* cuda_kernels() {
  if (!cuda::found().usable) return nullptr;
  static const Kernels table = [] {
    Kernels t{};
    t.name = "cuda";
    t.memory = &cuda::memory();
    t.tile_rows = 8192;  // weights are unpacked for each tile
    t.prompt_rows = Dtype::BF16;
    if (cuda::hopper()) t.plan_rows = 128;
    t.plan_sequences = true;  // a KV head's segments fill a few multiprocessors
    t.attend = cuda::attend;
    t.attend_backward = cuda::attend_backward;
    t.attend_store = cuda::attend_store;
    t.merge = cuda::merge;
    t.observe = cuda::observe;
    t.observe_runs = cuda::observe_runs;
    t.observe_rows = cuda::observe_rows;
    t.pool = cuda::pool;
    t.smooth = cuda::smooth;
    t.proxy = cuda::proxy;
    t.reduce = cuda::reduce;
    t.select = cuda::select;
    t.recur = cuda::recur;
    t.recur_backward = cuda::recur_backward;
    t.scan = cuda::scan;
    t.page_write = cuda::page_write;
    t.page_read = cuda::page_read;
    t.page_move = cuda::page_move;
    t.column_read = cuda::column_read;
    t.column_write = cuda::column_write;
    t.page_score = cuda::page_score;
    t.page_choose = cuda::page_choose;
    t.matmul = cuda::matmul;
    t.matmul_each = cuda::matmul_each;
    t.matmul_glu = cuda::matmul_glu;
    t.rounds = true;
    t.combine = cuda::combine;
    t.spread = cuda::spread;
    t.embed = cuda::embed;
    t.rms_norm = cuda::rms_norm;
    t.split_heads = cuda::split_heads;
    t.merge_heads = cuda::merge_heads;
    t.append_heads = cuda::append_heads;
    t.glu = cuda::glu;
    t.add = cuda::add;
    t.dequantise = cuda::dequantise;
    t.compute = cuda::compute;
    t.offsets = cuda::offsets;
    t.tile_blocks = cuda::tile_blocks;
    t.unite = cuda::unite;
    t.proxy_reduce = cuda::proxy_reduce;
    t.count_pairs = cuda::count_pairs;
    t.page_supply = cuda::page_supply;
    t.page_grow = cuda::page_grow;
    t.page_own = cuda::page_own;
    t.page_pair = cuda::page_pair;
    t.page_shrink = cuda::page_shrink;
    t.page_hold = cuda::page_hold;
    t.page_convert = cuda::page_convert;
    return t;
  }();
  return &table;
}

}  // namespace heed

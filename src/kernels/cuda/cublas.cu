// bf16 products through cuBLASLt, which is looked for when the first one is asked for: heed runs without it.
#include "kernels/cuda/matmul.cuh"

#if __has_include(<cublasLt.h>)
#include <cublasLt.h>
#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <tuple>

namespace heed::cuda {
namespace {

constexpr size_t kWorkspace = 32 << 20;

struct Library {
  decltype(&cublasLtMatmulDescCreate) desc_create = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) desc_set = nullptr;
  decltype(&cublasLtMatrixLayoutCreate) layout_create = nullptr;
  decltype(&cublasLtMatmulPreferenceCreate) preference_create = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set = nullptr;
  decltype(&cublasLtMatmulPreferenceDestroy) preference_destroy = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic = nullptr;
  decltype(&cublasLtMatmul) matmul = nullptr;
  cublasLtHandle_t handle = nullptr;

  Library() {
    if (std::getenv("HEED_NO_CUBLAS")) return;
    void* library = nullptr;
    const std::string version = "libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR);
    for (const char* name : {version.c_str(), "/usr/local/cuda/lib64/libcublasLt.so"})
      if (!library) library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!library) return;
    auto find = [&](auto& to, const char* name) {
      to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(dlsym(library, name));
      return to != nullptr;
    };
    decltype(&cublasLtCreate) create = nullptr;
    const bool all = find(desc_create, "cublasLtMatmulDescCreate") && find(desc_set, "cublasLtMatmulDescSetAttribute") &&
                     find(layout_create, "cublasLtMatrixLayoutCreate") &&
                     find(preference_create, "cublasLtMatmulPreferenceCreate") &&
                     find(preference_set, "cublasLtMatmulPreferenceSetAttribute") &&
                     find(preference_destroy, "cublasLtMatmulPreferenceDestroy") &&
                     find(heuristic, "cublasLtMatmulAlgoGetHeuristic") && find(matmul, "cublasLtMatmul") &&
                     find(create, "cublasLtCreate");
    if (!all || create(&handle) != CUBLAS_STATUS_SUCCESS) handle = nullptr;
  }
};

/// One shape's way, asked for once: the heuristic takes tens of microseconds.
struct Way {
  bool there = false;
  cublasLtMatmulDesc_t desc = nullptr;
  cublasLtMatrixLayout_t w = nullptr, x = nullptr, y = nullptr;
  cublasLtMatmulAlgo_t algorithm{};
};

using Key = std::tuple<int, int, int, int64_t, int64_t, int64_t, Dtype, unsigned>;

uint32_t alignment(const void* p) {
  const uint64_t address = reinterpret_cast<uint64_t>(p);
  return address % 256 == 0 ? 256u : uint32_t(address & -address);
}

Way find_way(const Library& lib, const Panel& p) {
  Way out;
  const cublasOperation_t transposed = CUBLAS_OP_T;
  // Column-major y^T [outputs, tokens] = w [width, outputs]^T · x [width, tokens].
  if (lib.desc_create(&out.desc, CUBLAS_COMPUTE_32F, CUDA_R_32F) != CUBLAS_STATUS_SUCCESS) return out;
  lib.desc_set(out.desc, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed);
  if (lib.layout_create(&out.w, CUDA_R_16BF, p.width, p.outputs, p.w_stride) != CUBLAS_STATUS_SUCCESS ||
      lib.layout_create(&out.x, CUDA_R_16BF, p.width, p.tokens, p.x_stride) != CUBLAS_STATUS_SUCCESS ||
      lib.layout_create(&out.y, p.y.type == Dtype::BF16 ? CUDA_R_16BF : CUDA_R_32F, p.outputs, p.tokens, p.y.stride) !=
          CUBLAS_STATUS_SUCCESS)
    return out;
  cublasLtMatmulPreference_t wish;
  if (lib.preference_create(&wish) != CUBLAS_STATUS_SUCCESS) return out;
  const uint32_t at[] = {alignment(p.w), alignment(p.x), alignment(p.y.data)};
  lib.preference_set(wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &kWorkspace, sizeof kWorkspace);
  lib.preference_set(wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &at[0], sizeof at[0]);
  lib.preference_set(wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &at[1], sizeof at[1]);
  lib.preference_set(wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &at[2], sizeof at[2]);
  lib.preference_set(wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &at[2], sizeof at[2]);
  cublasLtMatmulHeuristicResult_t found{};
  int count = 0;
  const cublasStatus_t status = lib.heuristic(lib.handle, out.desc, out.w, out.x, out.y, out.y, wish, 1, &found, &count);
  lib.preference_destroy(wish);
  out.there = status == CUBLAS_STATUS_SUCCESS && count > 0;
  out.algorithm = found.algo;
  return out;
}

}  // namespace

bool multiply_with_cublas(Queue& queue, const Panel& p) {
  static const Library lib;
  if (!lib.handle) return false;
  static std::mutex mutex;
  static std::map<Key, Way> ways;
  const unsigned aligned = alignment(p.w) << 20 | alignment(p.x) << 10 | alignment(p.y.data);
  Way way;
  {
    const std::lock_guard lock(mutex);
    const Key key{p.tokens, p.outputs, p.width, p.x_stride, p.w_stride, p.y.stride, p.y.type, aligned};
    auto at = ways.find(key);
    if (at == ways.end()) at = ways.emplace(key, find_way(lib, p)).first;
    way = at->second;
  }
  if (!way.there) return false;
  Scratch scratch(queue.scratch);
  void* workspace = queue.scratch.take(Dtype::U8, {int64_t(kWorkspace)}).data;
  const float one = 1, before = p.add ? 1 : 0;
  return lib.matmul(lib.handle, way.desc, &one, p.w, way.w, p.x, way.x, &before, p.y.data, way.y, p.y.data, way.y,
                    &way.algorithm, workspace, kWorkspace, stream(queue)) == CUBLAS_STATUS_SUCCESS;
}

}  // namespace heed::cuda
#else
namespace heed::cuda {
bool multiply_with_cublas(Queue&, const Panel&) { return false; }
}  // namespace heed::cuda
#endif

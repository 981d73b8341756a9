// Runs a fuzz target on every file of the folders and files named: kept inputs stay checked without libFuzzer.
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

void replay(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<uint8_t> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
}

}  // namespace

int main(int count, char** paths) {
  namespace fs = std::filesystem;
  int runs = 0;
  for (int i = 1; i < count; ++i) {
    std::error_code none;
    if (fs::is_regular_file(paths[i], none)) {
      replay(paths[i]);
      ++runs;
      continue;
    }
    for (const auto& entry : fs::recursive_directory_iterator(paths[i], none)) {
      if (!entry.is_regular_file()) continue;
      replay(entry.path());
      ++runs;
    }
  }
  std::printf("%d inputs\n", runs);
  return runs > 0 ? 0 : 1;
}

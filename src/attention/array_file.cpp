#include "attention/array_file.h"

#include "base/hash.h"
#include "base/npy.h"

namespace heed {

Result<ArrayFile> ArrayFile::parse(const std::string& text) {
  if (text.empty()) return ArrayFile{};
  if (text[0] != '@') return fail(Code::Invalid, "", "'" + text + "' names no file", "write @FILE.npz");
  auto arrays = read_npz(text.substr(1));
  if (!arrays) {
    const Failure& failure = arrays.error();
    return fail(failure.code, "", failure.where + ": " + failure.what, failure.remedy);
  }
  return ArrayFile{text.substr(1), std::make_shared<const std::map<std::string, Buffer>>(std::move(*arrays))};
}

const Buffer& ArrayFile::array(const std::string& name, std::initializer_list<int64_t> sizes) const {
  const auto found = arrays->find(name);
  require(found != arrays->end(), path.c_str(), "has no array '" + name + "'");
  const Tensor& x = found->second;
  const Tensor wanted(nullptr, Dtype::F32, sizes);
  require(x.type == Dtype::F32 && x.rank == wanted.rank && x.size == wanted.size, path.c_str(),
          "'" + name + "' is " + x.shape() + " of " + info(x.type).name + "; " + wanted.shape() + " of f32 is needed");
  return found->second;
}

void ArrayFile::check_model(const ModelInfo& model) const {
  const auto found = arrays->find("model");
  if (found == arrays->end() || model.hash == 0) return;
  const Tensor& x = found->second;
  require(x.type == Dtype::U64 && x.numel() == 1, path.c_str(), "'model' is no hash");
  require(*x.as<uint64_t>() == model.hash, path.c_str(),
          "was made for a model with the hash " + hexadecimal(*x.as<uint64_t>()) + "; this one's is " +
              hexadecimal(model.hash),
          "`heed calibrate` makes one for this model");
}

}  // namespace heed

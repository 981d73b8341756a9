// A parameter that names arrays learnt beforehand: "@FILE.npz".
#pragma once
#include <initializer_list>
#include <map>
#include <memory>
#include <string>

#include "attention/mechanism.h"

namespace heed {

/// Arrays by name, read when the spec is. An array "model" (U64 [1]) is the hash of the model that they were made for.
struct ArrayFile {
  std::string path;  // empty: none is named
  std::shared_ptr<const std::map<std::string, Buffer>> arrays;

  static Result<ArrayFile> parse(const std::string& text);
  explicit operator bool() const { return arrays != nullptr; }
  /// Throws Error(Invalid) unless the array is there, F32 and of these sizes.
  const Buffer& array(const std::string& name, std::initializer_list<int64_t> sizes) const;
  /// Throws Error(Invalid) when the file was made for another model than this.
  void check_model(const ModelInfo&) const;
};

/// A parameter of this kind.
template <class M>
ParamInfo array_file_param(ArrayFile M::* field, const char* name, const char* help) {
  return param(field, name, "file", "", "@FILE.npz", help);
}

}  // namespace heed

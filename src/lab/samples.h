// Samples of an evaluation as they are finished, a line of JSON each, so that long work can be taken up again.
#pragma once
#include <map>
#include <nlohmann/json.hpp>
#include <string>

namespace heed {

/// Lines are objects. What makes a sample the one asked for (model, text, mechanism, task, length, seed, number …) are
/// the fields of its key; all others are the result. One file may hold samples of many runs: those with another key are
/// left alone.
class SampleFile {
 public:
  using Json = nlohmann::ordered_json;

  /// No file: nothing is kept. A last line without its end (the program was killed) is cut off. Throws Error(Invalid)
  /// for a line that is no sample, with its number, and Error(Io).
  explicit SampleFile(const std::string& path);

  /// The finished sample with this key, or null. All fields of `key` must be in a line and equal.
  const Json* find(const Json& key) const;
  /// Appends key and result as one line; it is in the file when this returns. Throws Error(Io).
  void add(const Json& key, const Json& result);

 private:
  std::string path_;
  std::map<std::string, Json> done_;  // by identity()
};

/// Tells texts and files apart: FNV-1a of their bytes, 16 hexadecimal digits.
std::string fingerprint(std::string_view bytes);

}  // namespace heed

// Samples of an evaluation as they are finished, a line of JSON each, so that long work can be taken up again.
#pragma once
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "model/model.h"

namespace heed {

/// Lines are objects. What makes a sample the one asked for (model, text, mechanism, task, length, seed, number …) are
/// the fields of its key; all others are the result. One file may hold samples of many runs: those with another key are
/// left alone.
class SampleFile {
 public:
  using Json = nlohmann::ordered_json;

  /// What lines of a file are.
  struct Form {
    const char* what;              // "sample of `heed eval`"
    std::vector<const char*> key;  // the fields that make a line the one asked for
    bool (*valid)(const Json& line);
  };
  static const Form& eval_samples();

  /// No file: nothing is kept. A last line without its end (the program was killed) is cut off. Throws Error(Invalid)
  /// for a line that is not of that form, with its number, and where no file can be made; Error(Io).
  explicit SampleFile(const std::string& path, const Form& form = eval_samples());

  /// The finished sample with this key, or null. All fields of `key` must be in a line and equal.
  const Json* find(const Json& key) const;
  /// Appends key and result as one line; it is in the file when this returns. Throws Error(Io).
  void add(const Json& key, const Json& result);

 private:
  std::string identity(const Json& line) const;

  std::string path_;
  const Form* form_;
  std::map<std::string, Json> done_;  // by identity()
};

/// Tells apart what the files that a spec names hold, a profile and learnt arrays; empty: it names none. Throws Error for a
/// bad spec and a file that cannot be read.
std::string files_of(const std::string& attention, const ModelInfo& model);

/// Tells texts and files apart: FNV-1a of their bytes, 16 hexadecimal digits.
std::string fingerprint(std::string_view bytes);

}  // namespace heed

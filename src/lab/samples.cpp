#include "lab/samples.h"

#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>

#include "base/hash.h"
#include "base/whole_file.h"
#include "lab/files.h"
#include "mechanisms/registry.h"

namespace heed {
namespace {

bool is_sample(const SampleFile::Json& line) {
  const auto text = [&](const char* field) { return line.contains(field) && line[field].is_string(); };
  const auto number = [&](const char* field) {
    return line.contains(field) && line[field].is_number() && std::isfinite(line[field].get<double>());
  };
  if (!line.is_object() || !text("model") || !text("task") || !text("answer") || !number("index") || !number("score"))
    return false;
  const double score = line["score"];
  return score >= 0 && score <= 1 && number("chance") && number("tokens") && number("density");
}

}  // namespace

const SampleFile::Form& SampleFile::eval_samples() {
  static const Form form = {"sample of `heed eval`",
                            {"model", "attention", "files", "kv", "chunk", "text", "task", "query", "length", "depth",
                             "seed", "example", "index"},
                            is_sample};
  return form;
}

std::string SampleFile::identity(const Json& line) const {
  std::string out;
  for (const char* field : form_->key)
    out += line.contains(field) ? line[field].dump(-1, ' ', false, Json::error_handler_t::replace) + "\n" : "\n";
  return out;
}

SampleFile::SampleFile(const std::string& path, const Form& form) : path_(path), form_(&form) {
  if (path_.empty()) return;
  auto text = read_file(path_);
  if (!text && text.error().code == Code::NotFound) {
    value_or_throw(can_be_written(path_));
    return;
  }
  const std::string bytes = value_or_throw(std::move(text));
  size_t at = 0;
  for (int64_t number = 1; at < bytes.size(); ++number) {
    const size_t end = bytes.find('\n', at);
    const bool cut = end == std::string::npos;
    const Json line = Json::parse(bytes.begin() + std::ptrdiff_t(at),
                                  cut ? bytes.end() : bytes.begin() + std::ptrdiff_t(end), nullptr, false);
    if (cut) {  // never finished: it is made again
      if (line.is_discarded() && bytes[at] == '{' && truncate(path_.c_str(), off_t(at)) == 0) break;
      throw Error(Code::Invalid, path_ + ":" + std::to_string(number), "the line has no end",
                  "remove the file or name another");
    }
    if (!form.valid(line))
      throw Error(Code::Invalid, path_ + ":" + std::to_string(number), std::string("it is no ") + form.what,
                  "remove the file or name another");
    done_[identity(line)] = line;
    at = end + 1;
  }
}

const SampleFile::Json* SampleFile::find(const Json& key) const {
  const auto found = done_.find(identity(key));
  return found == done_.end() ? nullptr : &found->second;
}

void SampleFile::add(const Json& key, const Json& result) {
  if (path_.empty()) return;
  Json line = key;
  line.update(result);
  const std::string text = line.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path_.c_str(), "ab"), &std::fclose);
  const bool written = file && std::fwrite(text.data(), 1, text.size(), file.get()) == text.size() &&
                       std::fclose(file.release()) == 0;
  if (!written)
    throw Error(Code::Io, path_, std::string("cannot be written: ") + std::strerror(errno),
                "is there space, and may you write here?");
  done_[identity(key)] = std::move(line);
}

std::string files_of(const std::string& attention, const ModelInfo& model) {
  if (attention.find('@') == std::string::npos) return {};
  // A composition says what a profile comes to; what is left are names of arrays.
  std::string out;
  const auto add = [&](const auto& self, const Spec& spec) -> void {
    for (const Spec::Setting& s : spec.settings)
      if (s.value[0] == '@') out += fingerprint(value_or_throw(read_file(s.value.substr(1))));
    for (const Spec& inner : spec.inner) self(self, inner);
  };
  const std::string text = value_or_throw(Composition::parse(attention, model, registry())).text();
  for (const Spec& spec : value_or_throw(parse_spec(text))) add(add, spec);
  return fingerprint(text + out);
}

std::string fingerprint(std::string_view bytes) { return hexadecimal(fnv1a(bytes)); }

}  // namespace heed

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <numeric>

#include "apps/command.h"
#include "base/hash.h"
#include "base/threads.h"
#include "base/whole_file.h"
#include "lab/compare.h"
#include "lab/files.h"

namespace heed::apps {
namespace {

PageType page_type(const std::string& name) {
  using Kind = PageType::Kind;
  static const std::pair<const char*, Kind> kinds[] = {
      {"bf16", Kind::BF16}, {"f16", Kind::F16}, {"f32", Kind::F32}, {"q8", Kind::Q8}, {"q4", Kind::Q4}};
  for (const auto& [text, kind] : kinds)
    if (name == text) return PageType{.kind = kind};
  throw Error(Code::Invalid, "--kv", "'" + name + "' is no type of cache entries",
              "one of bf16, f16, f32, q8, q4, or two for keys and values: q8,q4");
}

/// Characters as a terminal shows them, near enough: code points.
size_t width(const std::string& text) {
  return size_t(std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xc0) != 0x80; }));
}

}  // namespace

void ModelFlags::declare(CLI::App& app, bool required) {
  auto* file = app.add_option("-m,--model", model, "GGUF file of the model")->type_name("FILE");
  if (required) file->required();
  app.add_option("-t,--threads", threads, "threads; 0: one a core")->type_name("N")->check(CLI::Range(0, 4096));
  app.add_option(
         "--backend", backend,
         "auto (cuda when there is a usable GPU, else cpu), cpu, reference, or a kernel table's name (heed info)")
      ->type_name("NAME")
      ->capture_default_str();
  app.add_option("--device", device, "which of the backend's devices, counted from 0")->type_name("N")->check(CLI::Range(0, 1023));
  app.add_option("--kv", kv, "how the cache keeps entries: bf16, f16, f32, q8, q4, or keys,values")
      ->type_name("TYPE")
      ->capture_default_str();
  app.add_option("--ubatch,--ubatch-size", ubatch,
                 "-ub: rows worked on at once; bounds memory, not meaning (0: what suits the backend, 1024 or 8192)")
      ->type_name("N")
      ->check(CLI::Range(int64_t(0), int64_t(1) << 20))
      ->capture_default_str();
  app.add_option("--chunk", chunk, "feed prompts in parts of N tokens; mechanisms then plan for each part (0: whole)")
      ->type_name("N")
      ->check(CLI::Range(int64_t(0), int64_t(1) << 30))
      ->capture_default_str();
}

void ModelFlags::prepare() const {
  set_threads(threads);
  page_types(kv);
  heed::backend(backend, device);
}

std::shared_ptr<const Model> ModelFlags::load() const {
  prepare();
  return value_or_throw(Model::load(model));
}

SessionOptions ModelFlags::session(const std::string& attention) const {
  SessionOptions options;
  options.attention = attention;
  options.ubatch = ubatch, options.chunk = chunk, options.backend = backend, options.device = device;
  std::tie(options.k, options.v) = page_types(kv);
  return options;
}

Json run_key(const ModelFlags& flags, const Model& model, const Passage& passage) {
  const auto& tokens = passage.tokens;
  return {{"model", hexadecimal(model.info().hash)},
          {"backend", backend(flags.backend, flags.device).name},
          {"kv", flags.kv},
          {"chunk", flags.chunk},
          {"text", fingerprint({reinterpret_cast<const char*>(tokens.data()), tokens.size() * sizeof(int32_t)})},
          {"prompt", passage.prompt},
          {"scored", passage.scored()}};
}

std::pair<PageType, PageType> page_types(const std::string& text) {
  const size_t comma = text.find(',');
  if (comma == std::string::npos) return {page_type(text), page_type(text)};
  return {page_type(text.substr(0, comma)), page_type(text.substr(comma + 1))};
}

const Tokenizer& tokenizer(const Model& model) {
  if (!model.tokenizer())
    throw Error(Code::Unsupported, model.path(), "the file has no vocabulary",
                "use a GGUF file that was converted with its tokenizer");
  return *model.tokenizer();
}

std::vector<int32_t> tokens_of(const Model& model, const std::string& path) {
  const Tokenizer& words = tokenizer(model);
  const std::string text = value_or_throw(read_file(path));
  auto tokens = words.encode(text, {.special = false, .bos = words.add_bos()});
  require(!tokens.empty(), path.c_str(), "the text is empty", "give a file with text");
  return tokens;
}

void check_outputs(std::initializer_list<std::string> paths) {
  for (const std::string& path : paths)
    if (!path.empty()) value_or_throw(can_be_written(path));
}

CLI::Validator at_least(int64_t least) {
  const std::string range = "≥ " + std::to_string(least);
  return {[=](const std::string& text) -> std::string {
            char* end = nullptr;
            errno = 0;
            const long long number = std::strtoll(text.c_str(), &end, 0);
            const bool read = errno == 0 && end != text.c_str() && *end == '\0';
            return read && number >= least ? "" : "'" + text + "' is no whole number " + range;
          },
          range};
}

void add_json(CLI::App& app, bool& json) { app.add_flag("--json", json, "one JSON document on standard output"); }

void print(const Json& json) { std::cout << json.dump(1, ' ', false, Json::error_handler_t::replace) << '\n'; }

Json to_json(const Times& t) {
  return {{"plan", t.plan},     {"observe", t.observe},   {"select", t.select},
          {"attend", t.attend}, {"products", t.products}, {"rest", t.rest}};
}

std::string size_text(double bytes) {
  const char* const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  size_t unit = 0;
  for (; bytes >= 1024 && unit + 1 < std::size(units); ++unit) bytes /= 1024;
  return fixed(bytes, unit == 0 || bytes >= 100 ? 0 : 1) + " " + units[unit];
}

std::string fixed(double x, int digits) {
  if (std::isnan(x)) return "–";
  char buffer[64];
  std::snprintf(buffer, sizeof buffer, "%.*f", digits, x);
  return buffer;
}

std::string nearest(const std::string& word, const std::vector<std::string>& words) {
  std::string best;
  size_t least = word.size() / 3 + 2;  // further than a third of its letters is another word
  for (const std::string& other : words) {
    std::vector<size_t> row(other.size() + 1);
    std::iota(row.begin(), row.end(), size_t(0));
    for (size_t i = 1; i <= word.size(); ++i) {
      size_t diagonal = row[0];
      row[0] = i;
      for (size_t j = 1; j <= other.size(); ++j) {
        const size_t above = row[j];
        row[j] = std::min({above + 1, row[j - 1] + 1, diagonal + (word[i - 1] != other[j - 1])});
        diagonal = above;
      }
    }
    if (row.back() < least) least = row.back(), best = other;
  }
  return best;
}

std::string table(const std::vector<std::string>& header, const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> widths(header.size());
  std::vector<bool> left(header.size());
  std::vector<std::string> names = header;
  for (size_t c = 0; c < names.size(); ++c) {
    left[c] = !names[c].empty() && names[c][0] == '<';
    if (left[c]) names[c].erase(0, 1);
    widths[c] = std::max<size_t>(3, width(names[c]));
    for (const auto& row : rows) widths[c] = std::max(widths[c], width(row[c]));
  }
  std::string out;
  const auto line = [&](const std::vector<std::string>& cells) {
    for (size_t c = 0; c < cells.size(); ++c) {
      const std::string pad(widths[c] - width(cells[c]), ' ');
      out += c == 0 ? "| " : " | ";
      out += left[c] ? cells[c] + pad : pad + cells[c];
    }
    out += " |\n";
  };
  line(names);
  for (size_t c = 0; c < names.size(); ++c) out += "|" + std::string(widths[c] + 1, '-') + (left[c] ? "-" : ":");
  out += "|\n";
  for (const auto& row : rows) line(row);
  return out;
}

}  // namespace heed::apps

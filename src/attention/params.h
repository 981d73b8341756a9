// Parameters of mechanisms: declared once, and from that parsed, checked, printed and listed.
#pragma once
#include <concepts>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/error.h"

namespace heed {

/// Layers or heads by number: "2-", "-3", "0-3", "5", "[0-3,7]", "last". Empty: all.
struct Range {
  std::string text;
  std::vector<std::pair<int, int>> spans;  // inclusive; −1 stands for the last
  bool all() const { return spans.empty(); }
  /// Whether `index` of `count` is in it.
  bool holds(int index, int count) const;
  /// The largest number named, −1 if none.
  int highest() const;
  static Result<Range> parse(const std::string& text);
};

/// How much to keep: entries for each KV head, sinks and window included ("512"), or a fraction of the prompt ("0.1",
/// "10%"; 1.0 is all of it). A keep policy may also be given a fraction of all text so far, "seen(0.1)".
struct Budget {
  double amount = 1024;
  bool fraction = false;
  bool seen = false;  // the fraction is of all text so far
  /// Entries for a prompt of `length`: max(1, ⌊length · fraction⌋), or the number itself.
  int64_t entries(int64_t length) const;
  static Result<Budget> parse(const std::string& text);
  /// "seen(…)" too.
  static Result<Budget> parse_kept(const std::string& text);
};

/// When a keep policy cuts: "prompt" (once, behind the prompt), "chunk" (behind each part of it), "every(n)" (behind
/// each part, and while decoding behind every n-th token) or "decode(n)" (behind every n-th token alone).
struct When {
  enum class At : uint8_t { Prompt, Chunk, Every, Decode } at = At::Prompt;
  int every = 1;
  bool prompts() const { return at != At::Decode; }
  bool decodes() const { return at == At::Every || at == At::Decode; }
  static Result<When> parse(const std::string& text);
};

/// One of a fixed set of words, kept as its number.
struct Choice {
  int value = 0;
};

struct ParamInfo {
  std::string name, type, fallback, range, help;
  /// Parses `text` into the mechanism at `object`.
  std::function<Result<void>(void* object, const std::string& text)> set;
};

namespace detail {
Result<double> parse_number(const char* name, const std::string& text, bool integer, double low, double high);
std::string number_text(double x);
}  // namespace detail

template <class M, class T>
  requires(std::integral<T> || std::floating_point<T>)
ParamInfo param(T M::* field, const char* name, std::type_identity_t<T> fallback, std::type_identity_t<T> low,
                std::type_identity_t<T> high, const char* help) {
  constexpr bool integer = std::integral<T>;
  return {name,
          integer ? "int" : "float",
          detail::number_text(double(fallback)),
          detail::number_text(double(low)) + "…" + detail::number_text(double(high)),
          help,
          [=](void* object, const std::string& text) -> Result<void> {
            auto x = detail::parse_number(name, text, integer, double(low), double(high));
            if (!x) return tl::unexpected(x.error());
            static_cast<M*>(object)->*field = T(*x);
            return {};
          }};
}

template <class M>
ParamInfo param(bool M::* field, const char* name, bool fallback, const char* help) {
  return {
      name, "bool", fallback ? "true" : "false", "true, false", help, [=](void* object, const std::string& text) -> Result<void> {
        if (text != "true" && text != "false" && text != "1" && text != "0")
          return fail(Code::Invalid, name, "'" + text + "' is neither true nor false");
        static_cast<M*>(object)->*field = text == "true" || text == "1";
        return {};
      }};
}

template <class M>
ParamInfo param(Choice M::* field, const char* name, std::vector<std::string> words, int fallback, const char* help) {
  std::string range;
  for (const std::string& w : words) range += (range.empty() ? "" : ", ") + w;
  return {name, "choice", words[size_t(fallback)], range, help, [=](void* object, const std::string& text) -> Result<void> {
            for (size_t i = 0; i < words.size(); ++i)
              if (words[i] == text) {
                (static_cast<M*>(object)->*field).value = int(i);
                return {};
              }
            return fail(Code::Invalid, name, "'" + text + "' is not one of " + range);
          }};
}

/// Budget, When and Range.
template <class M, class T>
  requires requires(std::string s) {
    { T::parse(s) } -> std::same_as<Result<T>>;
  }
ParamInfo param(T M::* field, const char* name, const char* type, const char* fallback, const char* range, const char* help) {
  return {name, type, fallback, range, help, [=](void* object, const std::string& text) -> Result<void> {
            auto x = T::parse(text);
            if (!x) return fail(x.error().code, name, x.error().what, x.error().remedy);
            static_cast<M*>(object)->*field = *x;
            return {};
          }};
}

/// The parameter `budget`.
template <class M>
ParamInfo budget_param(Budget M::* field, const char* fallback, const char* help) {
  return param(field, "budget", "budget", fallback, "entries ≥ 1, or a fraction: 0.1, 10%", help);
}

/// The two parameters of every keep policy.
template <class M>
std::vector<ParamInfo> keep_params(const char* budget, const char* when, std::vector<ParamInfo> more = {}) {
  std::vector<ParamInfo> all = {
      budget_param(&M::budget, budget, "entries kept for each KV head, forced ones included"),
      param(&M::when, "when", "when", when, "prompt, chunk, every(n), decode(n)", "when the policy cuts")};
  all[0].range += ", or one of all text so far: seen(0.1)";
  all[0].set = [](void* object, const std::string& text) -> Result<void> {
    auto x = Budget::parse_kept(text);
    if (!x) return tl::unexpected(x.error());
    static_cast<M*>(object)->budget = *x;
    return {};
  };
  all.insert(all.end(), more.begin(), more.end());
  return all;
}

}  // namespace heed

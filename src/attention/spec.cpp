#include "attention/spec.h"

#include <algorithm>
#include <set>

namespace heed {
namespace {

constexpr size_t kMostText = 64 << 10;
constexpr int kMostDepth = 16;

bool is_space(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r'; }
bool is_word(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == '_' || c == '.';
}

/// What a message may repeat of the user's text: short, and free of bytes that a terminal or JSON would stumble over.
std::string shown(const std::string& text) {
  std::string out;
  for (char c : text.substr(0, 40)) out += c >= ' ' && c <= '~' ? c : '?';
  return text.size() > 40 ? out + "…" : out;
}

tl::unexpected<Failure> bad(const std::string& text, size_t at, std::string what, std::string remedy = {},
                            Code code = Code::Invalid) {
  at = std::min(at, text.size());
  const size_t from = at > 24 ? at - 24 : 0;
  const std::string before = (from ? "…" : "") + shown(text.substr(from, at - from));
  const std::string where = "attention, character " + std::to_string(at + 1) + " (" + before + "▸" +
                            shown(text.substr(at, 24)) + ")";
  return fail(code, where, std::move(what), std::move(remedy));
}

/// Edit distance, for "did you mean"; inputs are short.
size_t distance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t corner = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t above = row[j];
      row[j] = std::min({above + 1, row[j - 1] + 1, corner + (a[i - 1] != b[j - 1])});
      corner = above;
    }
  }
  return row[b.size()];
}

/// Names compare without case, and _ is -.
std::string plain(std::string name) {
  for (char& c : name) c = c == '_' ? '-' : c >= 'A' && c <= 'Z' ? char(c - 'A' + 'a') : c;
  return name;
}

/// "did you mean 'x'?", or, when nothing is near, the whole choice where a line has room for it.
std::string suggestion(const std::string& name, const std::vector<std::string>& names) {
  const std::string wanted = plain(name.substr(0, 64));
  std::string best;
  size_t least = std::max<size_t>(2, wanted.size() / 3) + 1;
  for (const std::string& candidate : names) {
    size_t d = distance(wanted, plain(candidate));
    // A beginning ("stream" for streaming-llm) is a better guess than its distance tells.
    if (wanted.size() >= 3 && plain(candidate).starts_with(wanted)) d = 1;
    if (d < least) least = d, best = candidate;
  }
  if (!best.empty()) return "did you mean '" + best + "'?";
  if (names.size() > 40) return "`heed list` names them";
  std::string all;
  for (const std::string& candidate : names) all += (all.empty() ? "" : ", ") + candidate;
  return "there are: " + all;
}

class Parser {
 public:
  explicit Parser(const std::string& text) : text_(text) {}

  Result<std::vector<Spec>> all() {
    std::vector<Spec> out;
    skip();
    if (at_ == text_.size()) return out;
    while (true) {
      auto spec = one(0);
      if (!spec) return tl::unexpected(spec.error());
      out.push_back(std::move(*spec));
      skip();
      if (at_ == text_.size()) return out;
      if (text_[at_] != '+')
        return bad(text_, at_, "unexpected '" + shown(text_.substr(at_, 1)) + "'", "join mechanisms with +");
      ++at_;
      skip();
    }
  }

 private:
  void skip() {
    while (at_ < text_.size() && is_space(text_[at_])) ++at_;
  }
  bool next(char c) const { return at_ < text_.size() && text_[at_] == c; }
  std::string word() {
    const size_t from = at_;
    while (at_ < text_.size() && is_word(text_[at_])) ++at_;
    return text_.substr(from, at_ - from);
  }

  Result<Spec> one(int depth) {
    if (depth >= kMostDepth) return bad(text_, at_, "mechanisms nested more than 16 deep");
    Spec spec;
    spec.at = at_;
    spec.name = word();
    if (spec.name.empty())
      return bad(text_, at_, "a mechanism's name belongs here",
                 "write name(key=value, …), for example snapkv(budget=512)");
    skip();
    if (!next('(')) return spec;
    const size_t open = at_++;
    skip();
    if (next(')')) {
      ++at_;
      return spec;
    }
    while (true) {
      if (auto done = argument(spec, depth); !done) return tl::unexpected(done.error());
      skip();
      if (at_ == text_.size()) return bad(text_, open, "this bracket is never closed", "add )");
      if (next(')')) {
        ++at_;
        return spec;
      }
      if (!next(',')) return bad(text_, at_, "a comma or ) belongs here");
      ++at_;
      skip();
    }
  }

  Result<void> argument(Spec& spec, int depth) {
    const size_t from = at_;
    const std::string key = word();
    skip();
    if (!next('=')) {
      at_ = from;
      if (key.empty()) return bad(text_, at_, "a parameter belongs here", "write key=value");
      auto inner = one(depth + 1);
      if (!inner) return tl::unexpected(inner.error());
      spec.inner.push_back(std::move(*inner));
      return {};
    }
    if (key.empty()) return bad(text_, from, "a parameter's name belongs before =");
    ++at_;
    skip();
    auto text = value();
    if (!text) return tl::unexpected(text.error());
    spec.settings.push_back({key, std::move(*text), from});
    return {};
  }

  /// Up to the comma or bracket that ends it; brackets inside a value are balanced: every(4), [0-3,7].
  Result<std::string> value() {
    const size_t from = at_;
    std::string open;
    for (; at_ < text_.size(); ++at_) {
      const char c = text_[at_];
      if (c == '(' || c == '[') {
        open += c;
      } else if (c == ')' || c == ']') {
        if (open.empty()) {
          if (c == ')') break;
          return bad(text_, at_, "] without [");
        }
        if ((c == ')') != (open.back() == '(')) return bad(text_, at_, "brackets that do not match");
        open.pop_back();
      } else if (open.empty() && (c == ',' || c == '+')) {
        break;
      }
    }
    if (!open.empty()) return bad(text_, from, "a bracket in this value is never closed");
    size_t end = at_;
    while (end > from && is_space(text_[end - 1])) --end;
    if (end == from) return bad(text_, from, "a value belongs here");
    return text_.substr(from, end - from);
  }

  const std::string& text_;
  size_t at_ = 0;
};

tl::unexpected<Failure> at_spec(const Spec& spec, size_t at, Failure failure) {
  // The text around a part is known to the parser alone, so a later error shows the part and counts from the text's start.
  failure.where = "attention, character " + std::to_string(at + 1) + " (" + shown(spec.text()) + ")" +
                  (failure.where.empty() ? "" : ", " + failure.where);
  return tl::unexpected(std::move(failure));
}

}  // namespace

std::string Spec::text() const {
  std::string list;
  for (const Spec& s : inner) list += (list.empty() ? "" : ",") + s.text();
  for (const Setting& s : settings) list += (list.empty() ? "" : ",") + s.key + "=" + s.value;
  return list.empty() ? name : name + "(" + list + ")";
}

Result<std::vector<Spec>> parse_spec(const std::string& text) {
  if (text.size() > kMostText)
    return fail(Code::Invalid, "attention", "a spec longer than 64 KiB",
                "put settings by layer into a profile: @file.json");
  return Parser(text).all();
}

Result<const Entry*> find_entry(const std::string& name, std::span<const Entry> registry) {
  std::vector<std::string> names;
  for (const Entry& e : registry) {
    if (plain(e.name) == plain(name)) return &e;
    names.push_back(e.name);
  }
  return fail(Code::NotFound, "", "there is no mechanism '" + shown(name) + "'", suggestion(name, names));
}

Result<std::unique_ptr<Mechanism>> make_mechanism(const Spec& spec, std::span<const Entry> registry) {
  auto found = find_entry(spec.name, registry);
  if (!found) return at_spec(spec, spec.at, found.error());
  const Entry& entry = **found;
  if (!entry.make)
    return at_spec(spec, spec.at,
                   {Code::Unsupported, "", "'" + entry.name + "' is of kind " + entry.kind + ", not a way to run attention",
                    "`heed info " + entry.name + "` says how it is used"});
  std::unique_ptr<Mechanism> made = entry.make();
  for (const ParamInfo& p : entry.params)
    if (auto set = p.set(made.get(), p.fallback); !set) return at_spec(spec, spec.at, set.error());

  std::set<std::string> given;
  for (const Spec::Setting& setting : spec.settings) {
    const auto p = std::find_if(entry.params.begin(), entry.params.end(),
                                [&](const ParamInfo& i) { return plain(i.name) == plain(setting.key); });
    if (p == entry.params.end()) {
      std::vector<std::string> names;
      for (const ParamInfo& i : entry.params) names.push_back(i.name);
      return at_spec(spec, setting.at,
                     {Code::Invalid, "", entry.name + " has no parameter '" + shown(setting.key) + "'",
                      suggestion(setting.key, names)});
    }
    if (!given.insert(p->name).second)
      return at_spec(spec, setting.at, {Code::Invalid, "", "'" + p->name + "' is given twice", "leave one out"});
    if (shown(setting.value) != setting.value && setting.value.size() <= 40)
      return at_spec(spec, setting.at,
                     {Code::Invalid, p->name, "a value holds characters that belong in no value", p->range});
    if (auto set = p->set(made.get(), setting.value); !set) {
      Failure failure = set.error();
      failure.where = p->name;
      if (setting.value.size() > 40 && p->type != "file") failure.what = "the value is too long to be one";
      if (failure.remedy.empty()) failure.remedy = p->range;
      return at_spec(spec, setting.at, std::move(failure));
    }
  }

  if (!entry.wrapper && !spec.inner.empty())
    return at_spec(spec, spec.inner[0].at,
                   {Code::Invalid, "",
                    entry.name + " holds no other mechanism, but '" + shown(spec.inner[0].name) + "' stands in it",
                    "join mechanisms with +, set parameters with key=value"});
  if (entry.wrapper) {
    if (spec.inner.size() != 1)
      return at_spec(spec, spec.at,
                     {Code::Invalid, "", entry.name + " holds exactly one keep policy",
                      "write " + entry.name + "(snapkv(budget=512))"});
    const Spec& inside = spec.inner[0];
    for (const Spec::Setting& s : inside.settings)
      if (plain(s.key) == "layers" || plain(s.key) == "heads")
        return at_spec(inside, s.at,
                       {Code::Invalid, "", "'" + s.key + "' belongs to the outermost mechanism", "give it to " + entry.name});
    auto inner = make_mechanism(inside, registry);
    if (!inner) return tl::unexpected(inner.error());
    auto* policy = dynamic_cast<KeepPolicy*>(inner->get());
    if (!policy)
      return at_spec(inside, inside.at,
                     {Code::Invalid, "", "'" + shown(inside.name) + "' is no keep policy",
                      "put one of cache role here, such as snapkv"});
    inner->release();
    static_cast<KeepWrapper&>(*made).inner.reset(policy);
  }
  if (const std::string message = made->check(); !message.empty())
    return at_spec(spec, spec.at, {Code::Invalid, entry.name, message, ""});
  return made;
}

}  // namespace heed

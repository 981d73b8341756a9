// Spec strings: "xattention(threshold=0.9)+adakv(snapkv(budget=1024))" → mechanisms, ready to compose.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "attention/mechanism.h"

namespace heed {

/// The text of a spec, taken apart: name(key=value, …, inner(…)).
struct Spec {
  struct Setting {
    std::string key, value;
    size_t at = 0;  // of the key in the text
  };
  std::string name;
  std::vector<Setting> settings;
  std::vector<Spec> inner;
  size_t at = 0;  // where it stood in the text
  std::string text() const;
};

/// a + b + …; errors point at the character. Nesting is limited to 16 and the text to 64 KiB.
Result<std::vector<Spec>> parse_spec(const std::string& text);

/// How a catalogue entry is listed, described and made.
struct Entry {
  std::string name, title, paper;
  int year = 0;
  std::string kind = "mechanism";  // only these are a legal --attention; others: layer, analysis, …
  uint8_t roles = 0;
  bool wrapper = false;               // takes one inner keep policy
  std::string equation;               // a line of text
  std::string needs;                  // in words
  std::string identity;               // the spec at which it equals dense, or
  std::string no_identity;            // why there is none
  std::vector<std::string> verified;  // "identity", "formula", "model", "bench"
  // Tensors that `heed apply --input` may give and a model has or does without, as in Needs::inputs.
  std::vector<std::string> apply_inputs;
  std::vector<ParamInfo> params;
  std::function<std::unique_ptr<Mechanism>()> make;
};

/// An entry for a mechanism type M with M::params().
template <class M>
Entry entry(std::string name, std::string title, std::string paper, int year, uint8_t roles) {
  Entry e;
  e.name = std::move(name), e.title = std::move(title), e.paper = std::move(paper), e.year = year, e.roles = roles;
  e.wrapper = std::derived_from<M, KeepWrapper>;
  e.params = M::params();
  e.params.push_back(
      param(&Mechanism::layers, "layers", "range", "", "0-3, 2-, [0,4-7], last", "layers it applies to; all if empty"));
  e.params.push_back(
      param(&Mechanism::heads, "heads", "range", "", "0-3, 2-, [0,4-7], last", "heads it applies to; all if empty"));
  e.make = []() -> std::unique_ptr<Mechanism> { return std::make_unique<M>(); };
  return e;
}

/// All mechanisms at work in one session: who has which role in which layer.
class Composition {
 public:
  struct Part {
    const Entry* entry = nullptr;
    std::unique_ptr<Mechanism> mechanism;
    uint8_t roles = 0;
  };
  /// "dense" and the empty text have no parts. "@file.json" reads a profile: {"attention": SPEC} or
  /// {"attention": [{"spec": SPEC, "layers": RANGE, "heads": RANGE}, …]}; with "model": the hash (hexadecimal()) of the
  /// model that it was made for, it is refused for others.
  /// Errors: unknown names (with the nearest one), bad parameters, two claims on a role of a layer, layers or heads the
  /// model does not have.
  static Result<Composition> parse(const std::string& text, const ModelInfo& model, std::span<const Entry> registry);

  std::span<const Part> parts() const { return parts_; }
  /// The number of the part that has a role in a layer, or −1.
  int owner(Role role, int layer) const;
  /// Every edit of a layer, left to right.
  std::vector<int> edits(int layer) const;
  /// Every keep policy of a layer: one, or one for prompts and one for decoding.
  std::vector<int> keepers(int layer) const;
  const std::string& text() const { return text_; }

 private:
  std::vector<int> with(Role role, int layer) const;
  std::vector<Part> parts_;
  std::string text_ = "dense";
  int layers_ = 0;
};

/// The entry of that name, or an error that names the nearest.
Result<const Entry*> find_entry(const std::string& name, std::span<const Entry> registry);

/// A mechanism from one spec, inner ones included, every parameter at its default or as set.
Result<std::unique_ptr<Mechanism>> make_mechanism(const Spec&, std::span<const Entry> registry);

}  // namespace heed

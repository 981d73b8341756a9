// Code books of a model's keys and values, for kvquant.
#pragma once
#include <array>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "attention/spec.h"
#include "model/session.h"

namespace heed {

struct CodeBookOptions {
  SessionOptions session;
  int64_t length = 2048;   // tokens of a text
  int texts = 100;         // at most; parts of the text that follow one another
  bool gradients = false;  // numbers count by their squared gradients of the text's loss (its Fisher information)
};

/// Of every layer: 2^bits points between the ends of a group's range.
struct CodeBooks {
  int bits = 0;
  int64_t pages = 0;  // of each KV head, that they were learnt from
  int texts = 0;
  bool gradients = false;
  std::vector<PagePoints> points;
};

/// Reads parts of the text under dense attention; groups are those of the pages (k, v; Codes::Sparse). A part's first page does
/// not count, nor does what fills no page: both stay exact. progress(share) may be empty. Throws Error(Invalid) when no part
/// has a page that counts.
CodeBooks learn_code_books(std::shared_ptr<const Model>, std::span<const int32_t> text, const PageType& k,
                           const PageType& v, const CodeBookOptions&, const std::function<void(double)>& progress = {});

/// Writes `arrays` (npz: keys, values, model) and returns the profile of the spec that names it; `named` is the file's path
/// seen from the profile. Throws Error(Invalid) when the spec sets what is learnt, Error(Io).
nlohmann::ordered_json code_books_profile(const Spec&, const ModelInfo&, const CodeBooks&, const std::string& arrays,
                                          const std::string& named);

}  // namespace heed

// The catalogue as a page of Markdown.
#pragma once
#include <span>
#include <string>

#include "apps/command.h"
#include "attention/spec.h"

namespace heed::apps {

/// What `heed compare --json` printed on one model and text.
struct Measured {
  std::string name;  // of the table
  Json rows;
};

/// Reads a file that `heed compare --json` wrote; its name without folder and ending is the table's. Throws Error.
Measured measured(const std::string& path);

/// For every entry: title, paper, equation, parameters, needs, where it equals dense, what is checked, and its rows of
/// `results`; before them, for each of `results`, all rows from the lowest perplexity on.
std::string catalogue_page(std::span<const Entry> entries, std::span<const Measured> results);

}  // namespace heed::apps

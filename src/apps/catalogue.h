// Catalogue entries as JSON and as text.
#pragma once
#include "apps/command.h"
#include "attention/spec.h"

namespace heed::apps {

std::vector<std::string> role_names(uint8_t roles);
/// What `heed apply --input` gives it, needed or not, each with its shape: "beta [h, n]: step in (0, 1)".
std::vector<std::string> inputs_of(const Entry& entry);
/// The fields of `heed list --json`, and kind, wrapper, equation, identity, inputs.
Json to_json(const Entry& entry);

}  // namespace heed::apps

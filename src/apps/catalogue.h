// Catalogue entries as JSON and as text.
#pragma once
#include "apps/command.h"
#include "attention/spec.h"

namespace heed::apps {

std::vector<std::string> role_names(uint8_t roles);
/// heed::inputs_of it with its defaults; a wrapper is around SnapKV.
std::vector<std::string> inputs_of(const Entry& entry);
/// The fields of `heed list --json`, and kind, wrapper, equation, identity, inputs.
Json to_json(const Entry& entry);

}  // namespace heed::apps

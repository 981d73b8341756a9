// Catalogue entries as JSON and as text.
#pragma once
#include "apps/command.h"
#include "attention/spec.h"

namespace heed::apps {

std::vector<std::string> role_names(uint8_t roles);
/// The fields of `heed list --json`, and kind, wrapper, equation, identity.
Json to_json(const Entry& entry);

}  // namespace heed::apps

// What `heed eval` says, as JSON and as text.
#pragma once
#include "apps/command.h"
#include "lab/questions.h"

namespace heed::apps {

Json to_json(const TaskRow& row, const std::string& attention);

/// The document for a person: tables of what are rows, lines of what are numbers.
void show(const Json& out);

}  // namespace heed::apps

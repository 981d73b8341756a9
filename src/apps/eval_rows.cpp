#include "apps/eval_rows.h"

#include <iostream>

#include "lab/compare.h"

namespace heed::apps {

Json to_json(const TaskRow& row, const std::string& attention) {
  const Interval ci = row.interval();
  Row exercised;  // only what not_exercised() looks at
  exercised.attention = attention, exercised.density_kept = row.density;
  exercised.kv_share = attention == "dense" ? 1 : row.density;
  const std::string idle = not_exercised(exercised, row.length);
  Json out = {{"task", row.task}, {"query", name(row.query)}, {"length", row.length}};
  if (row.depth >= 0) out["depth"] = row.depth;
  out.update({{"metric", row.metric},
              {"score", row.score()},
              {"low", ci.low},
              {"high", ci.high},
              {"interval", ci.method},
              {"samples", row.scores.size()},
              {"chance", row.chance},
              {"at_chance", row.at_chance()},
              {"tokens", row.tokens},
              {"density", row.density},
              {"not_exercised", idle.empty() ? Json(nullptr) : Json(idle)}});
  return out;
}

void show(const Json& out) {
  for (const auto& [key, value] : out.items()) {
    if (key == "tasks") continue;
    std::cout << key << std::string(key.size() < 16 ? 16 - key.size() : 1, ' ')
              << (value.is_string() ? value.get<std::string>() : value.dump()) << '\n';
  }
  if (!out.contains("tasks")) return;
  std::vector<std::vector<std::string>> rows;
  for (const Json& row : out["tasks"]) {
    std::string note = row["at_chance"].get<bool>() ? "at chance" : "";
    if (row["not_exercised"].is_string())
      note += (note.empty() ? "" : "; ") + ("not exercised: " + row["not_exercised"].get<std::string>());
    rows.push_back({row["task"].get<std::string>(), row["query"].get<std::string>(),
                    std::to_string(row["length"].get<int64_t>()),
                    row.contains("depth") ? fixed(100 * row["depth"].get<double>(), 0) + " %" : "",
                    fixed(100 * row["score"].get<double>(), 1),
                    fixed(100 * row["low"].get<double>(), 1) + " to " + fixed(100 * row["high"].get<double>(), 1),
                    row["interval"].get<std::string>(), std::to_string(row["samples"].get<int64_t>()),
                    fixed(100 * row["chance"].get<double>(), 1), fixed(row["density"].get<double>(), 3), note});
  }
  std::cout << '\n'
            << table({"<task", "<query", "length", "depth", "score", "95 %", "<interval", "samples", "chance",
                      "density", "<note"},
                     rows);
}

}  // namespace heed::apps

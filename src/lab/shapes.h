// Published shapes of models, to measure speed at without their weights.
#pragma once
#include <memory>
#include <string>

#include "model/model.h"

namespace heed {

/// "llama-1b", "llama-8b" or "llama-70b" (Llama 3.1 and 3.2: Grattafiori et al., 2024, table 3) with random weights of
/// a type named as in GGUF files ("bf16", "q4_k", …). Throws Error(NotFound) for other names, with those there are.
std::shared_ptr<const Model> random_model(const std::string& shape, const std::string& type);

}  // namespace heed

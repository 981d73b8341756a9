// heed, for programs: models, sessions, and attention on arrays.
//
//   auto model = heed::value_or_throw(heed::Model::load("model.gguf"));
//   heed::Session session(model, {.attention = "quest(budget=512)"});
//   heed::Tensor logits = session.prefill(model->tokenizer()->encode("Once upon a time"));
//   heed::Sampler sampler;
//   int32_t next = sampler(logits.select(0, 0).span<const float>());
//
//   auto [out, lse] = heed::attend(q, k, v, heed::Plan(), {.causal = true});  // the operation alone, no model
//
// What reads files returns Result<T>; everything else throws heed::Error. Sessions are used by one thread at a time,
// models by any number.
#pragma once
#include "attention/plans.h"
#include "base/npy.h"
#include "base/threads.h"
#include "lab/apply.h"
#include "lab/attend.h"
#include "mechanisms/registry.h"
#include "model/sampler.h"
#include "model/session.h"

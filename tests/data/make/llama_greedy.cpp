// Greedy continuations by llama.cpp (built as llama_logits.cpp says), one line for each prompt of a text file (a prompt a
// line): ids of the prompt, "|", ids of the continuation, "|", for each of these how far its logit lies above the next.
//
// The models' weights are first written out in F32 (f32_model.py), so that llama.cpp rounds no activation to 8 bits.
//
//     for m in smollm2-135m gemma3-270m; do
//       python3 f32_model.py models/$m.gguf $m-f32.gguf
//       ./llama_greedy $m-f32.gguf tests/data/greedy/prompts.txt 64 > tests/data/greedy/$m.txt
//     done
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "llama.h"

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  llama_backend_init();
  llama_model* model = llama_model_load_from_file(argv[1], llama_model_default_params());
  if (!model) return 1;
  const llama_vocab* vocab = llama_model_get_vocab(model);
  const int steps = std::atoi(argv[3]), vocabulary = llama_vocab_n_tokens(vocab);
  llama_context_params params = llama_context_default_params();
  params.n_ctx = params.n_batch = params.n_ubatch = 1024;
  params.n_threads = params.n_threads_batch = 2;
  std::ifstream prompts(argv[2]);
  for (std::string prompt; std::getline(prompts, prompt);) {
    std::vector<llama_token> ids(prompt.size() + 8);
    ids.resize(size_t(llama_tokenize(vocab, prompt.data(), int(prompt.size()), ids.data(), int(ids.size()), true, false)));
    llama_context* context = llama_init_from_model(model, params);
    for (llama_token id : ids) std::printf("%d ", id);
    std::string gaps;
    std::printf("|");
    llama_token next = 0;
    for (int i = 0; i < steps; ++i) {
      llama_batch batch = i == 0 ? llama_batch_get_one(ids.data(), int(ids.size())) : llama_batch_get_one(&next, 1);
      if (llama_decode(context, batch) != 0) return 1;
      const float* logits = llama_get_logits_ith(context, -1);
      next = 0;
      for (int v = 1; v < vocabulary; ++v)
        if (logits[v] > logits[next]) next = v;
      float second = -1e30f;
      for (int v = 0; v < vocabulary; ++v)
        if (v != next && logits[v] > second) second = logits[v];
      std::printf(" %d", next);
      char text[32];
      std::snprintf(text, sizeof text, " %.3f", double(logits[next] - second));
      gaps += text;
    }
    std::printf(" |%s\n", gaps.c_str());
    llama_free(context);
  }
  llama_model_free(model);
}

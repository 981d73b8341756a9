// Logits of a model by llama.cpp (the source in the sdist of llama-cpp-python 0.3.36), as raw little-endian f32
// [tokens, vocabulary]; token i is (i · 37 + 11) mod vocabulary.
//
//     cmake -S vendor/llama.cpp -B build -DGGML_NATIVE=OFF -DGGML_AVX512=ON -DBUILD_SHARED_LIBS=OFF && cmake --build build
//     g++ -std=c++17 -O2 -I vendor/llama.cpp/include -I vendor/llama.cpp/ggml/include llama_logits.cpp \
//         build/src/libllama.a build/ggml/src/libggml.a build/ggml/src/libggml-cpu.a build/ggml/src/libggml-base.a \
//         -fopenmp -lpthread -ldl -o llama_logits
//     for a in llama qwen2 qwen3 gemma3; do ./llama_logits tests/data/tiny/$a.gguf 40 tests/data/tiny/$a.logits; done
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "llama.h"

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  llama_backend_init();
  llama_model_params model_params = llama_model_default_params();
  llama_model* model = llama_model_load_from_file(argv[1], model_params);
  if (!model) return 1;
  const int n = std::atoi(argv[2]), vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
  llama_context_params params = llama_context_default_params();
  params.n_ctx = 512;
  params.n_batch = params.n_ubatch = 512;
  params.n_threads = params.n_threads_batch = 1;
  params.type_k = params.type_v = GGML_TYPE_F32;
  params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
  llama_context* context = llama_init_from_model(model, params);
  llama_batch batch = llama_batch_init(n, 0, 1);
  batch.n_tokens = n;
  for (int i = 0; i < n; ++i) {
    batch.token[i] = (i * 37 + 11) % vocabulary;
    batch.pos[i] = i;
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = 0;
    batch.logits[i] = 1;
  }
  if (llama_decode(context, batch) != 0) return 1;
  std::FILE* out = std::fopen(argv[3], "wb");
  for (int i = 0; i < n; ++i) std::fwrite(llama_get_logits_ith(context, i), sizeof(float), size_t(vocabulary), out);
  return std::fclose(out) != 0;
}

// Learnt rows behind a prompt: budgets, positions, and files that do not fit. What they say is held against kvpress in
// golden_model_test.cpp.
#include "learnt_rows.h"
#include "session_case.h"

namespace heed::test {
namespace {

std::vector<int32_t> some(int32_t count) {
  std::vector<int32_t> out;
  for (int32_t i = 0; i < count; ++i) out.push_back((i * 37 + 11) % 61);
  return out;
}

TEST(RestoreKv, HoldsAsMuchAsKvZip) {
  const auto model = tiny_model(6, 2);
  const std::string file = ",weights=@" + learnt_rows(4, 48, 64);
  for (const char* options :
       {"budget=0.4,chunk=32", "budget=30,chunk=50", "budget=0.5,share=head", "budget=0.4,share=layer"}) {
    const auto text = some(90);
    Session plain(model, in_f32(std::string("kvzip(") + options + ")")),
        restored(model, in_f32(std::string("restorekv(") + options + file + ")"));
    plain.prefill(text), restored.prefill(text);
    int64_t one = 0, other = 0;
    for (int l = 0; l < 4; ++l)
      for (int kv = 0; kv < 2; ++kv) {
        one += plain.store().layer(l).length(kv), other += restored.store().layer(l).length(kv);
        const auto positions = restored.store().layer(l).positions(kv);
        ASSERT_GE(positions.size(), 8u);
        for (int32_t i = 0; i < 8; ++i)
          EXPECT_EQ(positions[positions.size() - 8 + size_t(i)], 90 + i) << options << " layer " << l << " head " << kv;
        if (l != 1) {  // not the window
          for (int32_t i = 0; i < 4; ++i) EXPECT_EQ(positions[size_t(i)], i);
        }
      }
    EXPECT_EQ(one, other) << options;
    EXPECT_EQ(restored.tokens().size(), 98u);
    EXPECT_EQ(restored.tokens().back(), -1);
    // What follows stands behind them, and a later prompt is not cut.
    restored.decode(5);
    EXPECT_EQ(restored.store().layer(0).positions(0).back(), 98);
    const int64_t held = restored.store().layer(0).length(0);
    restored.prefill(some(20));
    EXPECT_EQ(restored.store().layer(0).length(0), held + 20);
  }
}

TEST(RestoreKv, WithoutRowsIsKvZip) {
  const auto model = tiny_model(6, 2);
  Session plain(model, in_f32("kvzip(budget=0.3,chunk=32)")), restored(model, in_f32("restorekv(budget=0.3,chunk=32)"));
  plain.prefill(some(90)), restored.prefill(some(90));
  const Tensor a = plain.decode(7), b = restored.decode(7);
  for (int64_t i = 0; i < a.numel(); ++i) ASSERT_EQ(a.as<float>()[i], b.as<float>()[i]);
}

TEST(RestoreKv, RefusesWhatDoesNotFit) {
  const auto model = tiny_model(6, 2);
  const std::string right = learnt_rows(4, 48, 64), other = learnt_rows(4, 32, 64), deep = learnt_rows(3, 48, 60);
  for (const std::string& options : {"weights=@" + other, "weights=@" + deep, std::string("weights=@none.npz"),
                                     std::string("weights=rows.npz"), "budget=11,weights=@" + right}) {
    try {
      const Session session(model, in_f32("restorekv(" + options + ")"));
      ADD_FAILURE() << options;
    } catch (const Error& e) { EXPECT_NE(e.failure().exit_status(), 0) << options; }
  }
}

}  // namespace
}  // namespace heed::test

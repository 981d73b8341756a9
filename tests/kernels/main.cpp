// Registers every check with every table of this machine as Kernels/<table>.<check>.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <string>

#include "kernels/checks.h"
#include "kernels/on_device.h"

namespace {

using heed::Kernels;
using heed::test::Check;

class OneCheck : public testing::Test {
 public:
  OneCheck(const Kernels& table, Check check) : table_(table), check_(check) {}
  void TestBody() override { check_.run(table_, heed::Random(2024)); }

 private:
  const Kernels& table_;
  Check check_;
};

void add(const Kernels& table, const Check& check) {
  std::string suite = "Kernels/" + table.name;
  std::replace(suite.begin(), suite.end(), '-', '_');  // a dash means "not" in --gtest_filter
  testing::RegisterTest(suite.c_str(), check.name, nullptr, nullptr, __FILE__, __LINE__,
                        [&table, check]() -> testing::Test* { return new OneCheck(table, check); });
}

}  // namespace

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  using namespace heed::test;
  const Kernels& oracle = heed::reference_kernels();
  const std::vector<const Kernels*> all = tables();
  const auto register_all = [&](const std::vector<Check>& checks, bool products) {
    for (const Check& check : checks) {
      if (check.against == Check::Against::Property) add(oracle, check);
      for (size_t i = 0; i < all.size(); ++i) {
        const bool like_next = i + 1 < all.size() && same_but_products(*all[i], *all[i + 1]);
        if (all[i] != &oracle && (products || !like_next)) add(*all[i], check);
      }
    }
  };
  for (const auto& checks :
       {attention_checks(), store_checks(), observe_checks(), planning_checks(), count_checks(), recurrence_checks()})
    register_all(checks, false);
  register_all(model_checks(), true);
  std::string names;
  for (const Kernels* table : all) names += (names.empty() ? "" : ", ") + table->name;
  std::printf("tables: %s; %s\n", names.c_str(), heed::cuda_state().c_str());
  return RUN_ALL_TESTS();
}

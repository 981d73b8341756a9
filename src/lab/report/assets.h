// The parts of the report's page, as built into the program.
#pragma once
#include <string_view>

namespace heed {

std::string_view report_page();
std::string_view report_style();
std::string_view report_script();
/// Chart.js as the distribution packages it.
std::string_view chart_library();

}  // namespace heed

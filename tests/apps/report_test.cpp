// The report in a browser: every picture is drawn, and nothing is said on the console.
#include <cstdio>

#include "apps/program.h"
#include "apps/tiny_model.h"

namespace heed {
namespace {

std::string browser() {
  for (const char* name : {"/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"})
    if (access(name, X_OK) == 0) return name;
  return {};
}

std::string output_of(const std::string& command) {
  std::string out;
  std::FILE* pipe = popen(command.c_str(), "r");
  if (!pipe) return out;
  char buffer[4096];
  for (size_t n; (n = std::fread(buffer, 1, sizeof buffer, pipe)) > 0;) out.append(buffer, n);
  pclose(pipe);
  return out;
}

using ReportPage = ProgramTest;

TEST_F(ReportPage, DrawsEverythingWithoutComplaint) {
  if (browser().empty()) GTEST_SKIP() << "no Chromium on this machine";
  TinyModel().write(path("tiny.gguf"));
  std::string text;
  while (text.size() < 400) text += "the harbour was quiet and nobody saw the ship. ";
  const Outcome outcome = heed({"compare", "-m", path("tiny.gguf"), "-f", write("text.txt", text), "-c", "160",
                                "--score", "32", "--attention", "streaming-llm(sinks=2,window=14)", "--attention",
                                "snapkv(budget=40)", "--tasks", "niah", "--report", path("page.html"), "--json"});
  ASSERT_EQ(outcome.status, 0) << outcome.err;

  // A picture counts as drawn when not all of its pixels are the same.
  std::string page = read(path("page.html"));
  const std::string probe = R"(<script>
    const drawn = [...document.querySelectorAll('canvas')].filter((c) => {
      const pixels = new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer);
      return pixels.some((p) => p !== pixels[0]);
    });
    document.documentElement.dataset.drawn = drawn.length + '/' + document.querySelectorAll('canvas').length;
    document.documentElement.dataset.fits = String(document.documentElement.scrollWidth <= innerWidth);
  </script></body>)";
  const size_t end = page.rfind("</body>");
  ASSERT_NE(end, std::string::npos);
  page.replace(end, 7, probe);
  write("page.html", page);
  const std::string dom = output_of("HOME='" + folder_ + "' timeout 100 " + browser() +
                                    " --headless --no-sandbox --disable-gpu --window-size=390,844 " +
                                    "--virtual-time-budget=3000 --enable-logging=stderr --dump-dom 'file://" +
                                    path("page.html") + "' 2>'" + path("log") + "'");
  ASSERT_NE(dom.find("<html"), std::string::npos) << read(path("log"));
  EXPECT_NE(dom.find("data-charts=\"5\""), std::string::npos) << dom.substr(0, 400);
  // Five charts, one map of what was kept, four plans and four maps of reads.
  EXPECT_NE(dom.find("data-drawn=\"14/14\""), std::string::npos) << dom.substr(0, 400);
  EXPECT_NE(dom.find("data-fits=\"true\""), std::string::npos);
  EXPECT_EQ(read(path("log")).find("CONSOLE"), std::string::npos) << read(path("log"));
  // The table has a line for each mechanism.
  size_t lines = 0;
  for (size_t at = 0; (at = dom.find("<tr>", at)) != std::string::npos; ++at) ++lines;
  EXPECT_EQ(lines, 4u);
}

}  // namespace
}  // namespace heed

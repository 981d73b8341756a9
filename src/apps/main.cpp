// The program: finds the command, reads its flags, runs it, and turns what goes wrong into one line and a status.
#include <fcntl.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <ctime>
#include <iostream>

#include "apps/command.h"

namespace heed::apps {
namespace {

struct Named {
  const char* name;
  const char* help;
  std::unique_ptr<Command> (*make)();
};

constexpr Named commands[] = {
    {"run", "continue a text, with the attention of your choice", run_command},
    {"compare", "what each mechanism costs in quality and saves in time and memory", compare_command},
    {"eval", "measure a model and a mechanism: perplexity, divergence, RULER, LongBench, needles", eval_command},
    {"pairs", "whether each planner, keep policy and reader works beside each other", pairs_command},
    {"trace", "what a mechanism kept, read and lost on a text, as arrays", trace_command},
    {"apply", "one mechanism on tensors, without a model", apply_command},
    {"tokenize", "text to token ids", tokenize_command},
    {"list", "the catalogue of mechanisms", list_command},
    {"info", "one mechanism, a model, or this machine", info_command},
    {"heads", "which heads retrieve, which look near, where the sinks are", heads_command},
    {"calibrate", "what a mechanism must be told of this model's heads, as a profile", calibrate_command},
    {"bench", "tokens per second, as llama-bench; `bench kernels`: every kernel beside the machine's limits", bench_command},
};

int bad_usage(const std::string& what, const std::string& remedy) {
  std::cerr << "heed: " << what << (remedy.empty() ? "" : " (" + remedy + ")") << '\n';
  return 2;
}

/// What CLI11 left over, told with the flag that was probably meant.
int unknown_argument(const CLI::App& app, const std::string& command) {
  const std::vector<std::string> left = app.remaining(true);
  const std::string word = left.empty() ? "" : left.front().substr(0, left.front().find('='));
  std::vector<std::string> flags;
  for (const CLI::Option* option : app.get_options())
    for (const std::string& name : option->get_lnames()) flags.push_back("--" + name);
  const std::string near = word.rfind("--", 0) == 0 ? nearest(word, flags) : "";
  const std::string name = command.empty() ? "heed" : "heed " + command;
  return bad_usage("'" + word + "' is not an argument of `" + name + "`",
                   near.empty() ? "see `" + name + " --help`" : "did you mean " + near + "?");
}

int start(int argc, char** argv) {
  CLI::App app("heed runs language models over long text with the attention of your choice.", "heed");
  app.set_version_flag("--version", "heed " HEED_VERSION);
  app.footer("`heed COMMAND --help` shows flags and examples.");

  std::vector<std::string> names;
  for (const Named& c : commands) names.push_back(c.name);
  const std::string word = argc > 1 ? argv[1] : "";
  const Named* chosen = nullptr;
  std::unique_ptr<Command> command;
  CLI::App* mine = nullptr;
  for (const Named& c : commands) {
    CLI::App* sub = app.add_subcommand(c.name, c.help);
    if (word == c.name) chosen = &c, mine = sub, command = c.make();
  }
  if (word.empty()) return std::cout << app.help(), 0;
  if (!chosen && word[0] != '-') {
    const std::string near = nearest(word, names);
    return bad_usage("'" + word + "' is not a command",
                     near.empty() ? "see `heed --help`" : "did you mean `heed " + near + "`?");
  }
  if (command) command->declare(*mine);

  // CLI11 has no flags of two letters behind one dash; llama.cpp's -ub is one.
  std::vector<std::string> arguments;
  for (int i = argc; i-- > 1;) arguments.push_back(std::string(argv[i]) == "-ub" ? "--ubatch" : argv[i]);
  try {
    app.parse(arguments);
  } catch (const CLI::Success& e) { return app.exit(e); } catch (const CLI::ExtrasError&) {
    return unknown_argument(mine ? *mine : app, mine ? word : "");
  } catch (const CLI::ParseError& e) {
    // A mistyped flag is told before the flag that is missing for it.
    const bool missing = dynamic_cast<const CLI::RequiredError*>(&e) != nullptr;
    if (missing && mine && !mine->remaining().empty()) return unknown_argument(*mine, word);
    return bad_usage(word + ": " + e.what(), "see `heed " + word + " --help`");
  }
  if (!command) return bad_usage("which command?", "see `heed --help`");

  const int status = command->run();
  std::cout.flush();
  if (!std::cout) return std::cerr << "heed: standard output cannot be written\n", 1;
  return status;
}

/// The first Ctrl-C asks for an orderly end, another has the default effect: not one within half a second, since
/// `timeout` and some shells signal a program and its group.
void on_signal(int number) {
  static volatile std::sig_atomic_t asked = 0;
  static timespec first = {};
  timespec here = {};
  clock_gettime(CLOCK_MONOTONIC, &here);
  if (asked == 0) {
    asked = 1, first = here;
    interrupt();
  } else if (double(here.tv_sec - first.tv_sec) + double(here.tv_nsec - first.tv_nsec) * 1e-9 > 0.5) {
    std::signal(number, SIG_DFL);
    std::raise(number);
  }
}

/// A stream that the caller has closed gets a descriptor that refuses to be written to; a file opened later would be it.
void hold_streams() {
  int file = 0;
  while (file >= 0 && file <= 2) file = open("/dev/null", O_RDONLY | O_CLOEXEC);
  if (file > 2) close(file);
}

int guarded(int argc, char** argv) {
  hold_streams();
  struct sigaction action = {};
  action.sa_handler = on_signal;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  try {
    return start(argc, argv);
  } catch (const Error& e) {
    std::cout.flush();
    std::cerr << "heed: " << e.what() << '\n';
    return e.failure().exit_status();
  } catch (const std::bad_alloc&) {
    std::cerr << "heed: not enough memory (a smaller -c or -ub needs less)\n";
    return 1;
  } catch (const std::exception& e) {
    std::cerr << "heed: " << e.what() << '\n';
    return 1;
  }
}

}  // namespace
}  // namespace heed::apps

int main(int argc, char** argv) { return heed::apps::guarded(argc, argv); }

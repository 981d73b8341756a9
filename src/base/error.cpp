#include "base/error.h"

#include <utility>

namespace heed {

std::string Failure::text() const {
  std::string out = where.empty() ? what : where + ": " + what;
  if (!remedy.empty()) out += " (" + remedy + ")";
  return out;
}

int Failure::exit_status() const {
  switch (code) {
    case Code::Invalid:
    case Code::NotFound:
    case Code::Unsupported:
    case Code::Corrupt:
    case Code::Conflict: return 2;
    case Code::Interrupted: return 130;
    case Code::Io:
    case Code::Memory:
    case Code::Device:
    case Code::Internal: return 1;
  }
  return 1;
}

void throw_invalid(const char* where, std::string what, std::string remedy) {
  throw Error(Code::Invalid, where, std::move(what), std::move(remedy));
}

}  // namespace heed

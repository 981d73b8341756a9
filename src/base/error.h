// Errors: what parses outside data returns Result<T>; what computes throws Error.
#pragma once
#include <exception>
#include <string>
#include <tl/expected.hpp>
#include <type_traits>

namespace heed {

enum class Code {
  Invalid,      // an argument, flag, spec or file says something impossible
  NotFound,     // a file, mechanism, tensor or token that does not exist
  Unsupported,  // well formed, but not something heed can do
  Corrupt,      // a file that contradicts itself or ends early
  Io,           // the operating system said no
  Memory,       // not enough memory; `what` says how much was asked for
  Conflict,     // two claims on the same role of the same layer
  Device,       // an accelerator failed, or is not there
  Interrupted,  // stopped by the user; what was finished is kept
  Internal,     // a bug in heed
};

/// One failure, told as a person needs it: where it happened, what is wrong, what to do about it.
struct Failure {
  Code code = Code::Internal;
  std::string where, what, remedy;
  /// "where: what (remedy)"; empty parts are left out.
  std::string text() const;
  /// The process exit status of interfaces: 2 for bad input, 130 when interrupted, 1 otherwise.
  int exit_status() const;
};

template <class T>
using Result = tl::expected<T, Failure>;

inline tl::unexpected<Failure> fail(Code code, std::string where, std::string what, std::string remedy = {}) {
  return tl::unexpected<Failure>(Failure{code, std::move(where), std::move(what), std::move(remedy)});
}

/// What compute throws; every public entry converts it to a Failure.
class Error : public std::exception {
 public:
  explicit Error(Failure failure) : failure_(std::move(failure)), text_(failure_.text()) {}
  Error(Code code, std::string where, std::string what, std::string remedy = {})
      : Error(Failure{code, std::move(where), std::move(what), std::move(remedy)}) {}
  const char* what() const noexcept override { return text_.c_str(); }
  const Failure& failure() const { return failure_; }

 private:
  Failure failure_;
  std::string text_;
};

/// The value, or the failure thrown as an Error.
template <class T>
T value_or_throw(Result<T> result) {
  if (!result) throw Error(std::move(result.error()));
  if constexpr (!std::is_void_v<T>) return std::move(*result);
}

[[noreturn]] void throw_invalid(const char* where, std::string what, std::string remedy);

/// Throws Code::Invalid unless `ok`: the check of an argument at a public boundary. Where it stands in front of every access,
/// `what` is a function that makes the text: putting a sentence together takes longer than what it guards.
inline void require(bool ok, const char* where, const std::string& what, const std::string& remedy = {}) {
  if (!ok) throw_invalid(where, what, remedy);
}
inline void require(bool ok, const char* where, const char* what, const char* remedy = "") {
  if (!ok) throw_invalid(where, what, remedy);
}
template <class What>
  requires std::is_invocable_r_v<std::string, const What&>
void require(bool ok, const char* where, const What& what, const char* remedy = "") {
  if (!ok) throw_invalid(where, what(), remedy);
}

}  // namespace heed

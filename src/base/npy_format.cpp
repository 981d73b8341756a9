#include "base/npy_format.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <optional>
#include <vector>

namespace heed {
namespace {

struct Name {
  const char* descr;
  Dtype type;
};
// The first name of a type is the one written.
constexpr Name names[] = {
    {"<f4", Dtype::F32}, {"<f2", Dtype::F16}, {"<f8", Dtype::F64}, {"|i1", Dtype::I8},
    {"|u1", Dtype::U8},  {"<i4", Dtype::I32}, {"<i8", Dtype::I64}, {"<u8", Dtype::U64},
    {"<i1", Dtype::I8},  {"<u1", Dtype::U8},  {"|b1", Dtype::U8},
};

/// The header is a Python dictionary: {'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }
class Header {
 public:
  Header(std::string_view text, const std::string& file) : text_(text), file_(file) {
    expect('{');
    while (!take('}')) {
      const std::string_view key = string();
      expect(':');
      if (key == "descr" && !descr_) {
        if (peek() == '[') unsupported("holds a structured type", "save each field as an array of its own");
        descr_ = string();
      } else if (key == "fortran_order" && !fortran_) {
        fortran_ = word("True") || (word("False") ? false : malformed());
      } else if (key == "shape" && !shape_) {
        shape();
      } else {
        malformed();
      }
      if (!take(',') && peek() != '}') malformed();
    }
    if (peek() != '\0' || !descr_ || !fortran_ || !shape_) malformed();
  }

  Dtype type() const {
    for (const Name& name : names) {
      if (*descr_ == name.descr) return name.type;
    }
    const std::string descr(descr_->substr(0, 40));
    if (descr.starts_with('>')) unsupported("is big-endian ('" + descr + "')", "save it with .astype('<f4')");
    unsupported("holds numbers of type '" + descr + "'",
                "save it with .astype(numpy.float32) or another of f2 f4 f8 i1 i4 i8 u1");
  }

  const std::vector<int64_t>& sizes() const {
    if (*fortran_) unsupported("is in Fortran order", "save it with numpy.ascontiguousarray");
    if (shape_->size() > 5)
      unsupported("has " + std::to_string(shape_->size()) + " dimensions", "at most five are supported");
    return *shape_;
  }

 private:
  [[noreturn]] bool malformed() const {
    throw Error(Code::Corrupt, file_, "has a malformed header near '" + std::string(text_.substr(0, 20)) + "'",
                "save it again with numpy.save");
  }
  [[noreturn]] void unsupported(std::string what, std::string remedy) const {
    throw Error(Code::Unsupported, file_, std::move(what), std::move(remedy));
  }

  /// The next character that is no space; 0 at the end.
  char peek() {
    const size_t at = text_.find_first_not_of(" \t\r\n");
    text_.remove_prefix(at == text_.npos ? text_.size() : at);
    return text_.empty() ? '\0' : text_[0];
  }
  bool take(char c) {
    if (peek() != c) return false;
    text_.remove_prefix(1);
    return true;
  }
  void expect(char c) {
    if (!take(c)) malformed();
  }
  bool word(std::string_view expected) {
    peek();
    if (!text_.starts_with(expected)) return false;
    text_.remove_prefix(expected.size());
    return true;
  }
  std::string_view string() {
    const char quote = peek();
    if (quote != '\'' && quote != '"') malformed();
    const size_t end = text_.find(quote, 1);
    if (end == text_.npos) malformed();
    const std::string_view out = text_.substr(1, end - 1);
    text_.remove_prefix(end + 1);
    return out;
  }
  void shape() {
    expect('(');
    shape_.emplace();
    while (!take(')')) {
      peek();
      int64_t size;
      const auto [end, error] = std::from_chars(text_.data(), text_.data() + text_.size(), size);
      if (error != std::errc() || size < 0) malformed();
      text_.remove_prefix(size_t(end - text_.data()));
      shape_->push_back(size);
      if (!take(',') && peek() != ')') malformed();
    }
  }

  std::string_view text_;
  const std::string& file_;
  std::optional<std::string_view> descr_;
  std::optional<bool> fortran_;
  std::optional<std::vector<int64_t>> shape_;
};

}  // namespace

Buffer read_npy_stream(ReadBytes read, uint64_t size, const std::string& name) {
  const auto take = [&](void* to, uint64_t bytes) {
    if (bytes > size || !read(to, size_t(bytes))) {
      throw Error(Code::Corrupt, name, "ends early", "the file is damaged or not fully written; save it again");
    }
    size -= bytes;
  };
  uint8_t start[8];
  if (size < sizeof start) throw Error(Code::Corrupt, name, "is not an npy file", "save the array with numpy.save");
  take(start, sizeof start);
  if (std::memcmp(start, "\x93NUMPY", 6) != 0)
    throw Error(Code::Corrupt, name, "is not an npy file", "save the array with numpy.save");
  const int version = start[6];
  if (version < 1 || version > 3) {
    throw Error(Code::Unsupported, name, "has npy version " + std::to_string(version), "save it with a current numpy");
  }
  uint8_t length[4] = {};
  take(length, version == 1 ? 2 : 4);
  const uint32_t bytes = uint32_t(length[0]) | uint32_t(length[1]) << 8 | uint32_t(length[2]) << 16 |
                         uint32_t(length[3]) << 24;
  if (bytes > size || bytes > 65536) {
    throw Error(Code::Corrupt, name, "claims a header of " + std::to_string(bytes) + " bytes",
                "save it again with numpy.save");
  }
  std::string text(bytes, '\0');
  take(text.data(), bytes);
  const Header header(text, name);
  const Dtype type = header.type();
  const std::vector<int64_t>& sizes = header.sizes();
  uint64_t data = uint64_t(info(type).bytes), steps = data;
  for (const int64_t n : sizes) {
    // The strides of an empty array must be numbers too, so its other sizes are multiplied without the 0.
    if (__builtin_mul_overflow(steps, uint64_t(std::max<int64_t>(n, 1)), &steps) || steps > uint64_t(INT64_MAX)) {
      throw Error(Code::Corrupt, name, "claims an impossible shape", "save it again with numpy.save");
    }
    data *= uint64_t(n);
  }
  if (data > size) {
    throw Error(Code::Corrupt, name,
                "should hold " + std::to_string(data) + " bytes of numbers and has " + std::to_string(size),
                "the file is damaged or not fully written; save it again");
  }
  Buffer out(type, std::span<const int64_t>(sizes));
  if (data > 0) take(out->data, data);
  return out;
}

std::string npy_header(const Tensor& tensor) {
  const char* descr = nullptr;
  for (const Name& name : names) {
    if (!descr && name.type == tensor.type) descr = name.descr;
  }
  if (!descr) {
    throw Error(Code::Unsupported, "npy", std::string("has no number type for ") + info(tensor.type).name,
                "convert to f32 first");
  }
  std::string text = std::string("{'descr': '") + descr + "', 'fortran_order': False, 'shape': (";
  for (int axis = 0; axis < tensor.rank; ++axis) {
    text += (axis ? ", " : "") + std::to_string(tensor.size[size_t(axis)]);
  }
  text += tensor.rank == 1 ? ",), }" : "), }";
  // numpy pads so that the data begins at a multiple of 64.
  text.append((64 - (10 + text.size() + 1) % 64) % 64, ' ');
  text += '\n';
  return std::string("\x93NUMPY\x01\x00", 8) + char(text.size() & 255) + char(text.size() >> 8) + text;
}

}  // namespace heed

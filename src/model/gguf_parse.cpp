// Reading the bytes of a GGUF file; gguf.cpp answers questions about what was read.
#include <algorithm>
#include <bit>
#include <cstring>
#include <new>
#include <optional>

#include "model/gguf.h"

namespace heed {
namespace {

static_assert(std::endian::native == std::endian::little, "files are read in place");

struct KnownType {
  uint32_t id;
  const char* name;
  std::optional<Dtype> dtype;  // none: a type that ggml has and heed has not
};

constexpr KnownType known_types[] = {
    {0, "F32", Dtype::F32},
    {1, "F16", Dtype::F16},
    {2, "Q4_0", Dtype::Q4_0},
    {3, "Q4_1", Dtype::Q4_1},
    {6, "Q5_0", Dtype::Q5_0},
    {7, "Q5_1", Dtype::Q5_1},
    {8, "Q8_0", Dtype::Q8_0},
    {9, "Q8_1", {}},
    {10, "Q2_K", Dtype::Q2_K},
    {11, "Q3_K", Dtype::Q3_K},
    {12, "Q4_K", Dtype::Q4_K},
    {13, "Q5_K", Dtype::Q5_K},
    {14, "Q6_K", Dtype::Q6_K},
    {15, "Q8_K", {}},
    {16, "IQ2_XXS", {}},
    {17, "IQ2_XS", {}},
    {18, "IQ3_XXS", {}},
    {19, "IQ1_S", {}},
    {20, "IQ4_NL", Dtype::IQ4_NL},
    {21, "IQ3_S", {}},
    {22, "IQ2_S", {}},
    {23, "IQ4_XS", {}},
    {24, "I8", Dtype::I8},
    {25, "I16", {}},
    {26, "I32", Dtype::I32},
    {27, "I64", Dtype::I64},
    {28, "F64", Dtype::F64},
    {29, "IQ1_M", {}},
    {30, "BF16", Dtype::BF16},
    {34, "TQ1_0", {}},
    {35, "TQ2_0", {}},
    {39, "MXFP4", {}},
};

constexpr int64_t kMaxDims = 4;
constexpr int kMaxNesting = 4;

uint64_t width_of(Gguf::Type type) {
  using enum Gguf::Type;
  switch (type) {
    case U8:
    case I8:
    case Bool: return 1;
    case U16:
    case I16: return 2;
    case U32:
    case I32:
    case F32: return 4;
    case U64:
    case I64:
    case F64: return 8;
    case String:
    case Array: break;
  }
  return 0;
}

/// Keys and names come from the file: shortened and made printable before they enter a message.
std::string quoted(std::string_view text) {
  std::string out = "'";
  for (const char c : text.substr(0, 80)) out += c >= ' ' && c < 127 ? c : '?';
  return out + (text.size() > 80 ? "…'" : "'");
}

}  // namespace

/// Throws Error; parse() turns it into a Failure.
class Gguf::Parser {
 public:
  explicit Parser(Gguf& out) : out_(out), file_(out.file_) {}

  void parse() {
    if (file_.size() < 4 || std::memcmp(file_.data(), "GGUF", 4) != 0) {
      stop(Code::Corrupt, "is not a GGUF file", "give a model in GGUF format");
    }
    at_ = 4;
    out_.version_ = read<uint32_t>();
    if (out_.version_ != 0 && (out_.version_ & 0xffff) == 0) {
      stop(Code::Unsupported, "is a big-endian GGUF file", "convert the model for little-endian machines");
    }
    if (out_.version_ != 2 && out_.version_ != 3) {
      stop(Code::Unsupported, "has GGUF version " + std::to_string(out_.version_),
           "convert the model to version 2 or 3");
    }
    const auto tensors = read<uint64_t>(), keys = read<uint64_t>();
    // A key takes at least 13 bytes and a tensor's entry 32: a count that cannot fit is refused before it allocates.
    if (keys > left() / 13) damaged(std::to_string(keys) + " metadata keys do not fit into the file");
    for (uint64_t i = 0; i < keys; ++i) metadata();
    if (tensors > left() / 32) damaged(std::to_string(tensors) + " tensors do not fit into the file");
    set_alignment();
    std::vector<uint64_t> offsets;
    for (uint64_t i = 0; i < tensors; ++i) offsets.push_back(entry());
    out_.data_at_ = at_;
    const uint64_t padding = (out_.alignment_ - at_ % out_.alignment_) % out_.alignment_;
    if (tensors > 0 && padding > left()) damaged("the file ends before its tensor data");
    for (size_t i = 0; i < offsets.size(); ++i) place(out_.tensors_[i], at_ + padding, offsets[i]);
  }

 private:
  [[noreturn]] void stop(Code code, std::string what, std::string remedy) const {
    throw Error(code, out_.name_, std::move(what), std::move(remedy));
  }
  [[noreturn]] void damaged(std::string what) const {
    stop(Code::Corrupt, std::move(what), "the file is damaged or not fully downloaded; fetch it again");
  }

  uint64_t left() const { return file_.size() - at_; }

  std::span<const std::byte> take(uint64_t bytes, std::string_view what) {
    if (bytes > left()) {
      damaged(quoted(what) + " at byte " + std::to_string(at_) + " needs " + std::to_string(bytes) + " bytes and " +
              std::to_string(left()) + " remain");
    }
    const auto piece = file_.subspan(at_, bytes);
    at_ += bytes;
    return piece;
  }

  template <class T>
  T read() {
    T value;
    std::memcpy(&value, take(sizeof value, "a number").data(), sizeof value);
    return value;
  }

  std::string_view text(std::string_view what) {
    const auto length = read<uint64_t>();
    const auto piece = take(length, what);
    return {reinterpret_cast<const char*>(piece.data()), piece.size()};
  }

  Type type(std::string_view key) {
    const auto id = read<uint32_t>();
    if (id > uint32_t(Type::F64)) damaged("key " + quoted(key) + " has the unknown type " + std::to_string(id));
    return Type(id);
  }

  void metadata() {
    const std::string_view key = text("a key");
    const Type kind = type(key);
    const auto [place, is_new] = out_.metadata_.try_emplace(key);
    if (!is_new) damaged("key " + quoted(key) + " appears twice");
    value(key, kind, 0, place->second);
  }

  void value(std::string_view key, Type kind, int depth, Value& out) {
    out.type = kind;
    if (kind == Type::String) {
      out.bytes = std::as_bytes(std::span(text(key)));
    } else if (kind == Type::Array) {
      array(key, depth, out);
    } else {
      out.bytes = take(width_of(kind), key);
    }
  }

  void array(std::string_view key, int depth, Value& out) {
    out.element = type(key);
    out.count = read<uint64_t>();
    // The smallest an element can be: a string begins with its length, an array with its type and length.
    const uint64_t least = out.element == Type::String ? 8 : out.element == Type::Array ? 12 : width_of(out.element);
    if (out.count > left() / least) {
      damaged("array " + quoted(key) + " of " + std::to_string(out.count) + " elements does not fit into the file");
    }
    if (out.element == Type::String) {
      out.strings.reserve(out.count);
      for (uint64_t i = 0; i < out.count; ++i) out.strings.push_back(text(key));
    } else if (out.element == Type::Array) {
      if (depth == kMaxNesting) damaged("array " + quoted(key) + " is nested too deeply");
      for (uint64_t i = 0; i < out.count; ++i) value(key, Type::Array, depth + 1, out.values.emplace_back());
    } else {
      out.bytes = take(out.count * least, key);
    }
  }

  void set_alignment() {
    const Value* given = out_.find("general.alignment");
    if (!given) return;
    if (given->type != Type::U32) damaged("general.alignment is not a u32");
    uint32_t alignment;
    std::memcpy(&alignment, given->bytes.data(), sizeof alignment);
    if (alignment < 8 || !std::has_single_bit(alignment)) {
      damaged("general.alignment is " + std::to_string(alignment) + ", not a power of two from 8 on");
    }
    out_.alignment_ = alignment;
  }

  Dtype dtype(std::string_view name, uint32_t id) const {
    const auto known = std::ranges::find(known_types, id, &KnownType::id);
    const bool named = known != std::end(known_types);
    if (named && known->dtype) return *known->dtype;
    stop(Code::Unsupported, "tensor " + quoted(name) + " has ggml type " + (named ? known->name : std::to_string(id)),
         "use a file with F32, F16, BF16, Q4_0 to Q8_0, Q2_K to Q6_K or IQ4_NL weights");
  }

  /// Reads one line of the tensor table; its data is placed once the table's end is known. Returns the offset.
  uint64_t entry() {
    const std::string_view name = text("a tensor's name");
    const auto dims = read<uint32_t>();
    if (dims < 1 || dims > kMaxDims) damaged("tensor " + quoted(name) + " has " + std::to_string(dims) + " dimensions");
    std::array<int64_t, kMaxDims> sizes;
    int64_t elements = 1;
    for (uint32_t i = 0; i < dims; ++i) {
      const auto size = read<int64_t>();
      if (size < 1 || __builtin_mul_overflow(elements, size, &elements)) {
        damaged("tensor " + quoted(name) + " has an impossible dimension " + std::to_string(size));
      }
      sizes[dims - 1 - i] = size;
    }
    const Dtype kind = dtype(name, read<uint32_t>());
    const DtypeInfo format = info(kind);
    if (sizes[dims - 1] % format.block != 0) {
      damaged("rows of tensor " + quoted(name) + " hold " + std::to_string(sizes[dims - 1]) +
              " values, not a multiple of " + std::to_string(format.block) + " as " + format.name + " needs");
    }
    const auto offset = read<uint64_t>();
    if (offset % out_.alignment_ != 0) damaged("tensor " + quoted(name) + " is not aligned");
    if (!out_.by_name_.try_emplace(name, out_.tensors_.size()).second)
      damaged("tensor " + quoted(name) + " appears twice");
    out_.tensors_.push_back({name, Tensor(nullptr, kind, std::span<const int64_t>(sizes.data(), dims))});
    return offset;
  }

  void place(Entry& entry, uint64_t data_at, uint64_t offset) {
    const DtypeInfo format = info(entry.tensor.type);
    const uint64_t blocks = uint64_t(entry.tensor.numel()) / uint64_t(format.block);
    const uint64_t room = file_.size() - data_at;
    if (blocks > room / uint64_t(format.bytes) || offset > room - blocks * uint64_t(format.bytes)) {
      damaged("tensor " + quoted(entry.name) + " reaches past the end of the file");
    }
    entry.tensor.data = const_cast<std::byte*>(file_.data() + data_at + offset);
  }

  Gguf& out_;
  std::span<const std::byte> file_;
  uint64_t at_ = 0;
};

Result<Gguf> Gguf::parse(std::span<const std::byte> file, std::string name) {
  Gguf out;
  out.name_ = std::move(name);
  out.file_ = file;
  try {
    Parser(out).parse();
  } catch (const Error& error) { return tl::unexpected<Failure>(error.failure()); } catch (const std::bad_alloc&) {
    return fail(Code::Memory, out.name_, "there is not enough memory for its metadata", "close other programs");
  }
  return out;
}

Result<Gguf> Gguf::open(const std::string& path) {
  auto mapped = MappedFile::open(path);
  if (!mapped) return tl::unexpected<Failure>(mapped.error());
  auto out = parse(mapped->bytes(), path);
  if (out) out->mapped_ = std::move(*mapped);
  return out;
}

}  // namespace heed

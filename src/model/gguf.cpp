#include "model/gguf.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>

namespace heed {
namespace {

using Type = Gguf::Type;

template <class Wide, class T>
std::optional<Wide> widen(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  if constexpr (std::is_floating_point_v<T> && !std::is_floating_point_v<Wide>) return {};
  if constexpr (std::is_same_v<T, uint64_t> && std::is_same_v<Wide, int64_t>) {
    if (value > uint64_t(std::numeric_limits<int64_t>::max())) return {};
  }
  return Wide(value);
}

/// Number `index` of what lies at `bytes`; none when the type is no number of that sort or the number does not fit.
template <class Wide>
std::optional<Wide> read(Type type, const std::byte* bytes, uint64_t index) {
  switch (type) {
    case Type::U8: return widen<Wide, uint8_t>(bytes + index);
    case Type::I8: return widen<Wide, int8_t>(bytes + index);
    case Type::U16: return widen<Wide, uint16_t>(bytes + index * 2);
    case Type::I16: return widen<Wide, int16_t>(bytes + index * 2);
    case Type::U32: return widen<Wide, uint32_t>(bytes + index * 4);
    case Type::I32: return widen<Wide, int32_t>(bytes + index * 4);
    case Type::F32: return widen<Wide, float>(bytes + index * 4);
    case Type::U64: return widen<Wide, uint64_t>(bytes + index * 8);
    case Type::I64: return widen<Wide, int64_t>(bytes + index * 8);
    case Type::F64: return widen<Wide, double>(bytes + index * 8);
    case Type::Bool: return Wide(bytes[index] != std::byte{0});
    case Type::String:
    case Type::Array: return {};
  }
  return {};
}

tl::unexpected<Failure> wrong(const Gguf& file, std::string_view key, const Gguf::Value& value, const char* expected) {
  const std::string is = value.type == Type::Array ? std::string("an array of ") + type_name(value.element)
                                                   : type_name(value.type);
  return fail(Code::Invalid, file.name(), "key " + std::string(key) + " is " + is + ", not " + expected + " that fits",
              "convert the model again");
}

template <class Wide, class Element>
Result<std::vector<Element>> read_all(const Gguf& file, std::string_view key, const Gguf::Value& value, const char* expected) {
  const Type element = value.type == Type::Array ? value.element : value.type;
  if (element == Type::String || element == Type::Array) return wrong(file, key, value, expected);
  std::vector<Element> out;
  out.reserve(value.count);
  for (uint64_t i = 0; i < value.count; ++i) {
    const auto number = read<Wide>(element, value.bytes.data(), i);
    if (!number) return wrong(file, key, value, expected);
    out.push_back(Element(*number));
  }
  return out;
}

}  // namespace

const char* type_name(Gguf::Type type) {
  constexpr const char* names[] = {"u8",   "i8",     "u16",   "i16", "u32", "i32", "f32",
                                   "bool", "string", "array", "u64", "i64", "f64"};
  return names[uint32_t(type)];
}

const Gguf::Value* Gguf::find(std::string_view key) const {
  const auto at = metadata_.find(key);
  return at == metadata_.end() ? nullptr : &at->second;
}

Result<const Gguf::Value*> Gguf::found(std::string_view key) const {
  if (const Value* value = find(key)) return value;
  return fail(Code::NotFound, name_, "has no key " + std::string(key), "convert the model with a newer converter");
}

Result<int64_t> Gguf::integer(std::string_view key) const {
  return found(key).and_then([&](const Value* value) -> Result<int64_t> {
    if (const auto number = read<int64_t>(value->type, value->bytes.data(), 0)) return *number;
    return wrong(*this, key, *value, "an integer");
  });
}

Result<double> Gguf::number(std::string_view key) const {
  return found(key).and_then([&](const Value* value) -> Result<double> {
    if (const auto number = read<double>(value->type, value->bytes.data(), 0)) return *number;
    return wrong(*this, key, *value, "a number");
  });
}

Result<bool> Gguf::boolean(std::string_view key) const {
  return found(key).and_then([&](const Value* value) -> Result<bool> {
    if (value->type == Type::Bool) return value->bytes[0] != std::byte{0};
    return wrong(*this, key, *value, "a bool");
  });
}

Result<std::string_view> Gguf::string(std::string_view key) const {
  return found(key).and_then([&](const Value* value) -> Result<std::string_view> {
    if (value->type != Type::String) return wrong(*this, key, *value, "a string");
    return std::string_view(reinterpret_cast<const char*>(value->bytes.data()), value->bytes.size());
  });
}

Result<int64_t> Gguf::integer(std::string_view key, int64_t absent) const { return find(key) ? integer(key) : absent; }
Result<double> Gguf::number(std::string_view key, double absent) const { return find(key) ? number(key) : absent; }
Result<bool> Gguf::boolean(std::string_view key, bool absent) const { return find(key) ? boolean(key) : absent; }
Result<std::string_view> Gguf::string(std::string_view key, std::string_view absent) const {
  return find(key) ? string(key) : absent;
}

Result<std::vector<int64_t>> Gguf::integers(std::string_view key) const {
  return found(key).and_then(
      [&](const Value* value) { return read_all<int64_t, int64_t>(*this, key, *value, "an array of integers"); });
}

Result<std::vector<float>> Gguf::numbers(std::string_view key) const {
  return found(key).and_then(
      [&](const Value* value) { return read_all<double, float>(*this, key, *value, "an array of numbers"); });
}

Result<std::span<const std::string_view>> Gguf::strings(std::string_view key) const {
  return found(key).and_then([&](const Value* value) -> Result<std::span<const std::string_view>> {
    if (value->type == Type::Array && value->element == Type::String) return std::span(value->strings);
    return wrong(*this, key, *value, "an array of strings");
  });
}

const Tensor* Gguf::tensor(std::string_view name) const {
  const auto at = by_name_.find(name);
  return at == by_name_.end() ? nullptr : &tensors_[at->second].tensor;
}

Result<Tensor> Gguf::tensor(std::string_view name, std::initializer_list<int64_t> sizes) const {
  const Tensor* found = tensor(name);
  if (!found) {
    return fail(Code::NotFound, name_, "has no tensor " + std::string(name),
                "the model is of another kind, or incomplete");
  }
  const std::span<const int64_t> have(found->size.data(), size_t(found->rank));
  if (!std::ranges::equal(have, sizes)) {
    const std::string wanted = Tensor(nullptr, Dtype::F32, sizes).shape();
    return fail(Code::Invalid, name_, "tensor " + std::string(name) + " is " + found->shape() + ", not " + wanted,
                "metadata and weights disagree; convert the model again");
  }
  return *found;
}

uint64_t Gguf::hash() const {
  // FNV-1a over 8-byte words, the high half folded down after each so that every bit reaches the low ones.
  uint64_t hash = 0xcbf29ce484222325ull;
  const auto add = [&](std::span<const std::byte> bytes) {
    for (size_t at = 0; at < bytes.size(); at += 8) {
      uint64_t word = 0;
      std::memcpy(&word, bytes.data() + at, std::min<size_t>(8, bytes.size() - at));
      hash = (hash ^ word) * 0x100000001b3ull;
      hash ^= hash >> 32;
    }
  };
  add(file_.first(data_at_));
  for (const Entry& entry : tensors_) {
    const std::span data(static_cast<const std::byte*>(entry.tensor.data), size_t(entry.tensor.bytes()));
    const size_t piece = std::min<size_t>(64, data.size());
    add(data.first(piece));
    add(data.subspan((data.size() - piece) / 2, piece));
    add(data.last(piece));
  }
  return hash;
}

}  // namespace heed

#include "base/npy.h"

#include <zip.h>

#include <cstring>
#include <memory>
#include <new>
#include <set>

#include "base/mapped_file.h"
#include "base/npy_format.h"
#include "base/whole_file.h"

namespace heed {
namespace {

/// Runs what throws; the way out for a public function.
template <class F>
auto caught(const std::string& name, F&& body) -> Result<decltype(body())> {
  try {
    if constexpr (std::is_void_v<decltype(body())>) {
      body();
      return {};
    } else {
      return body();
    }
  } catch (const Error& error) { return tl::unexpected<Failure>(error.failure()); } catch (const std::bad_alloc&) {
    return fail(Code::Memory, name, "does not fit into memory");
  }
}

struct Discard {
  void operator()(zip_t* p) const { zip_discard(p); }
};
using Archive = std::unique_ptr<zip_t, Discard>;
struct CloseFile {
  void operator()(zip_file_t* p) const { zip_fclose(p); }
};

[[noreturn]] void damaged(const std::string& name, const std::string& what) {
  throw Error(Code::Corrupt, name, what, "the file is damaged or not fully written; save it again");
}

std::string message(zip_error_t& error) {
  std::string text = zip_error_strerror(&error);
  zip_error_fini(&error);
  return text;
}

std::map<std::string, Buffer> read_archive(std::span<const std::byte> file, const std::string& name) {
  // libzip takes an empty file for an archive without entries.
  if (file.empty()) damaged(name, "is empty");
  zip_error_t error;
  zip_error_init(&error);
  zip_source_t* source = zip_source_buffer_create(file.data(), file.size(), 0, &error);
  if (!source) throw Error(Code::Memory, name, message(error));
  const Archive archive(zip_open_from_source(source, ZIP_RDONLY, &error));
  if (!archive) {
    zip_source_free(source);
    damaged(name, "is not an npz file: " + message(error));
  }
  std::map<std::string, Buffer> out;
  for (zip_int64_t i = 0; i < zip_get_num_entries(archive.get(), 0); ++i) {
    zip_stat_t about;
    constexpr zip_uint64_t needed = ZIP_STAT_NAME | ZIP_STAT_SIZE | ZIP_STAT_COMP_SIZE;
    if (zip_stat_index(archive.get(), zip_uint64_t(i), 0, &about) != 0 || (about.valid & needed) != needed) {
      damaged(name, "has an entry without name or size");
    }
    std::string key = about.name;
    if (!key.ends_with(".npy")) continue;
    key.resize(key.size() - 4);
    const std::string where = name + "[" + key.substr(0, 80) + "]";
    // Deflate shrinks at most 1032 times: an entry that claims more is a bomb or a lie.
    if (about.comp_size > file.size() || about.size / 1032 > about.comp_size)
      damaged(where, "claims an impossible size");
    const std::unique_ptr<zip_file_t, CloseFile> entry(zip_fopen_index(archive.get(), zip_uint64_t(i), 0));
    if (!entry) throw Error(Code::Unsupported, where, zip_strerror(archive.get()), "save it with numpy.savez");
    const auto read = [&](void* to, size_t bytes) { return zip_fread(entry.get(), to, bytes) == zip_int64_t(bytes); };
    Buffer array = read_npy_stream(read, about.size, where);
    // The checksum is compared only when the end is read.
    char rest[4096];
    zip_int64_t more;
    while ((more = zip_fread(entry.get(), rest, sizeof rest)) > 0) {}
    if (more < 0)
      damaged(where, std::string("cannot be unpacked: ") + zip_error_strerror(zip_file_get_error(entry.get())));
    if (!out.try_emplace(key, std::move(array)).second) damaged(name, "holds '" + key.substr(0, 80) + "' twice");
  }
  return out;
}

/// `tensor` itself when contiguous, else a copy that `kept` holds.
Tensor contiguous(const Tensor& tensor, std::vector<Buffer>& kept) {
  if (tensor.contiguous()) return tensor;
  const Buffer& copied = kept.emplace_back(tensor.type, std::span<const int64_t>(tensor.size.data(), size_t(tensor.rank)));
  copy(tensor, copied);
  return copied;
}

std::span<const char> data_of(const Tensor& tensor) {
  return {static_cast<const char*>(tensor.data), size_t(tensor.bytes())};
}

[[noreturn]] void stop(const std::string& path, const Archive& archive) {
  throw Error(Code::Io, path, zip_strerror(archive.get()), "check the folder, its permissions and the space left");
}

void write_archive(const std::string& path, const std::vector<std::pair<std::string, Tensor>>& arrays, bool compress) {
  const std::string target = value_or_throw(regular_target(path));  // libzip would put its file in a device's place
  int code = 0;
  std::set<std::string> names;
  std::vector<Buffer> copies;
  std::vector<std::string> headers;
  headers.reserve(arrays.size());  // libzip reads headers and data when it closes the archive: nothing may move
  Archive archive(zip_open(target.c_str(), ZIP_CREATE | ZIP_TRUNCATE, &code));
  if (!archive) {
    zip_error_t error;
    zip_error_init_with_code(&error, code);
    throw Error(Code::Io, path, message(error), "check the folder and its permissions");
  }
  for (const auto& [name, tensor] : arrays) {
    require(!name.empty() && names.insert(name).second, "write_npz", "array name '" + name + "' is empty or used twice");
    const Tensor plain = contiguous(tensor, copies);
    headers.push_back(npy_header(plain));
    const zip_buffer_fragment_t fragments[] = {
        {reinterpret_cast<zip_uint8_t*>(headers.back().data()), headers.back().size()},
        {static_cast<zip_uint8_t*>(plain.data), zip_uint64_t(plain.bytes())},
    };
    zip_source_t* source = zip_source_buffer_fragment(archive.get(), fragments, plain.bytes() > 0 ? 2 : 1, 0);
    if (!source) stop(path, archive);
    const zip_int64_t index = zip_file_add(archive.get(), (name + ".npy").c_str(), source, ZIP_FL_ENC_UTF_8);
    if (index < 0) {
      zip_source_free(source);
      stop(path, archive);
    }
    const auto entry = zip_uint64_t(index);
    constexpr zip_uint16_t kFirstDay = 1 << 5 | 1;  // 1980-01-01: the clock must not change the bytes
    if (zip_set_file_compression(archive.get(), entry, compress ? ZIP_CM_DEFLATE : ZIP_CM_STORE, 0) != 0 ||
        zip_file_set_dostime(archive.get(), entry, 0, kFirstDay, 0) != 0) {
      stop(path, archive);
    }
  }
  // libzip would remove a file that is to hold no entries.
  if (arrays.empty()) {
    constexpr char kEmpty[22] = {'P', 'K', 5, 6};
    archive.reset();
    return value_or_throw(write_whole(path, {std::span<const char>(kEmpty)}));
  }
  // Closing writes beside the file and renames.
  if (zip_close(archive.get()) != 0) stop(path, archive);
  (void)archive.release();
}

}  // namespace

Result<Buffer> parse_npy(std::span<const std::byte> file, const std::string& name) {
  return caught(name, [&] {
    auto rest = file;
    const auto read = [&](void* to, size_t bytes) {
      std::memcpy(to, rest.data(), bytes);
      rest = rest.subspan(bytes);
      return true;
    };
    return read_npy_stream(read, file.size(), name);
  });
}

Result<Buffer> read_npy(const std::string& path) {
  return MappedFile::open(path).and_then([&](MappedFile file) { return parse_npy(file.bytes(), path); });
}

Result<std::string> npy_bytes(const Tensor& tensor) {
  return caught("npy", [&] {
    std::vector<Buffer> kept;
    const auto data = data_of(contiguous(tensor, kept));
    return npy_header(tensor).append(data.data(), data.size());
  });
}

Result<void> write_npy(const std::string& path, const Tensor& tensor) {
  return caught(path, [&] {
    std::vector<Buffer> kept;
    const std::string header = npy_header(tensor);
    value_or_throw(write_whole(path, {std::span<const char>(header), data_of(contiguous(tensor, kept))}));
  });
}

Result<std::map<std::string, Buffer>> parse_npz(std::span<const std::byte> file, const std::string& name) {
  return caught(name, [&] { return read_archive(file, name); });
}

Result<std::map<std::string, Buffer>> read_npz(const std::string& path) {
  return MappedFile::open(path).and_then([&](MappedFile file) { return parse_npz(file.bytes(), path); });
}

Result<void> write_npz(const std::string& path, const std::vector<std::pair<std::string, Tensor>>& arrays, bool compress) {
  return caught(path, [&] { write_archive(path, arrays, compress); });
}

}  // namespace heed

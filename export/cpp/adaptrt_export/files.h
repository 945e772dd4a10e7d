// Reads files, after making sure that they are ordinary files, and computes their SHA-256 (FIPS 180-4).
//
// Known limits: POSIX only.

#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "json.h"

namespace adaptrt {

namespace fs = std::filesystem;

class Sha256 {
 public:
  void update(const void* data, size_t size) {
    const auto* bytes = static_cast<const unsigned char*>(data);
    total_ += size;
    while (size > 0) {
      const size_t part = std::min(size, block_.size() - filled_);
      std::memcpy(block_.data() + filled_, bytes, part);
      filled_ += part;
      bytes += part;
      size -= part;
      if (filled_ == block_.size()) {
        compress();
        filled_ = 0;
      }
    }
  }

  // Returns the digest in hexadecimal digits. Nothing may be added afterwards.
  std::string hex() {
    const uint64_t bits = total_ * 8;
    const unsigned char end = 0x80, zero = 0;
    update(&end, 1);
    while (filled_ != 56) update(&zero, 1);
    for (int shift = 56; shift >= 0; shift -= 8) {
      const auto byte = static_cast<unsigned char>(bits >> shift);
      update(&byte, 1);
    }
    std::string found;
    for (const uint32_t word : state_)
      for (int shift = 28; shift >= 0; shift -= 4) found += "0123456789abcdef"[(word >> shift) & 15];
    return found;
  }

 private:
  // The first 32 bits of the fractional parts of the cube roots of the first 64 primes.
  static constexpr std::array<uint32_t, 64> kRound = {
      0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be,
      0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa,
      0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85,
      0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3,
      0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f,
      0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

  void compress() {
    std::array<uint32_t, 64> w{};
    for (size_t t = 0; t < 16; ++t)
      w[t] = uint32_t{block_[4 * t]} << 24 | uint32_t{block_[4 * t + 1]} << 16 | uint32_t{block_[4 * t + 2]} << 8 | block_[4 * t + 3];
    for (size_t t = 16; t < 64; ++t) {
      const uint32_t s0 = std::rotr(w[t - 15], 7) ^ std::rotr(w[t - 15], 18) ^ (w[t - 15] >> 3);
      const uint32_t s1 = std::rotr(w[t - 2], 17) ^ std::rotr(w[t - 2], 19) ^ (w[t - 2] >> 10);
      w[t] = w[t - 16] + s0 + w[t - 7] + s1;
    }
    auto [a, b, c, d, e, f, g, h] = state_;
    for (size_t t = 0; t < 64; ++t) {
      const uint32_t s1 = std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25);
      const uint32_t one = h + s1 + ((e & f) ^ (~e & g)) + kRound[t] + w[t];
      const uint32_t s0 = std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22);
      const uint32_t two = s0 + ((a & b) ^ (a & c) ^ (b & c));
      h = g, g = f, f = e, e = d + one, d = c, c = b, b = a, a = one + two;
    }
    const std::array<uint32_t, 8> added = {a, b, c, d, e, f, g, h};
    for (size_t place = 0; place < 8; ++place) state_[place] += added[place];
  }

  std::array<uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<unsigned char, 64> block_{};
  size_t filled_ = 0;
  uint64_t total_ = 0;
};

// An ordinary file, open for reading.
class File {
 public:
  // `links`: whether the path may be a link to the file.
  File(const fs::path& path, bool links) : path_(path) {
    descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | (links ? 0 : O_NOFOLLOW));
    if (descriptor_ < 0 && errno == ELOOP && !links) throw Error(path.string() + " is a link to another place; copy the file itself");
    if (descriptor_ < 0 && errno == ENOENT) throw Error(path.string() + " is missing");
    if (descriptor_ < 0) throw Error(path.string() + " cannot be opened: " + std::strerror(errno));
    struct stat found {};
    if (::fstat(descriptor_, &found) != 0 || !S_ISREG(found.st_mode)) {
      ::close(descriptor_);
      throw Error(path.string() + " is no ordinary file");
    }
    size_ = static_cast<uint64_t>(found.st_size);
    identity_ = {static_cast<int64_t>(found.st_dev), static_cast<int64_t>(found.st_ino), static_cast<int64_t>(found.st_size),
#ifdef __APPLE__
                 found.st_mtimespec.tv_sec, found.st_mtimespec.tv_nsec, found.st_ctimespec.tv_sec, found.st_ctimespec.tv_nsec};
#else
                 found.st_mtim.tv_sec, found.st_mtim.tv_nsec, found.st_ctim.tv_sec, found.st_ctim.tv_nsec};
#endif
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File() { ::close(descriptor_); }

  uint64_t size() const { return size_; }

  // Which file it is, and when it was last changed. It differs after a change, but for one within the same tick of the file system's clock.
  using Identity = std::array<int64_t, 7>;
  Identity identity() const { return identity_; }

  // Gives all bytes to `take(data, size)`, in parts.
  template <typename Take>
  void read(Take take) {
    std::vector<char> part(1 << 20);
    while (true) {
      const ssize_t found = ::read(descriptor_, part.data(), part.size());
      if (found < 0 && errno == EINTR) continue;
      if (found < 0) throw Error(path_.string() + " cannot be read: " + std::strerror(errno));
      if (found == 0) return;
      take(part.data(), static_cast<size_t>(found));
    }
  }

  std::string read_all() {
    std::string found;
    found.reserve(size_);
    read([&](const char* data, size_t size) { found.append(data, size); });
    return found;
  }

 private:
  fs::path path_;
  int descriptor_;
  uint64_t size_ = 0;
  Identity identity_{};
};

inline std::string sha256(std::string_view data) {
  Sha256 hash;
  hash.update(data.data(), data.size());
  return hash.hex();
}

}  // namespace adaptrt

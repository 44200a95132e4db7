// One number per op and format that says whether this build, on this CPU, computes the agreed bits.
//
// Every op runs on fixed pseudo-random inputs through its public function, on the current
// instruction set and the pool's threads; the digest is a hash of the output bytes.  The golden
// values are in shoal/golden_digests.txt (exactness rule 9).
#pragma once
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace shoal {

struct OpDigest {
  std::string op, format;
  uint64_t value;
};

// All of them, in a fixed order.  A few milliseconds.
std::vector<OpDigest> compute_digests();

// Parts of compute_digests.
void digest_matrices(std::vector<OpDigest>& digests);
void digest_floats(std::vector<OpDigest>& digests);
void digest_attention(std::vector<OpDigest>& digests);
void digest_sampling(std::vector<OpDigest>& digests);

// FNV-1a with 64 bits over the bytes of arrays.  Assumes a little-endian machine, as the formats
// do.
class Hash {
 public:
  template <class T>
  void add(const std::vector<T>& values) {
    add(values.data(), values.size() * sizeof(T));
  }
  template <class T>
  void add_value(const T& value) {
    add(&value, sizeof value);
  }
  uint64_t value() const { return value_; }

 private:
  void add(const void* data, size_t num_bytes) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    for (size_t i = 0; i < num_bytes; i += 8) {
      uint64_t word = 0;
      std::memcpy(&word, bytes + i, num_bytes - i < 8 ? num_bytes - i : 8);
      value_ = (value_ ^ word) * 0x9E3779B97F4A7C15u;
      value_ ^= value_ >> 32;
    }
  }
  uint64_t value_ = 0xCBF29CE484222325u;
};

// Integers from splitmix64 and floats made of them exactly: the same everywhere.
class Inputs {
 public:
  explicit Inputs(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  int32_t below(int32_t n) { return int32_t(bits() % uint64_t(n)); }

  // In [-4, 4], of many magnitudes; about one in 64 is zero.
  float value() {
    static constexpr float kScales[8] = {0x1p-21f, 0x1p-22f, 0x1p-23f, 0x1p-24f,
                                         0x1p-25f, 0x1p-26f, 0x1p-27f, 0x1p-28f};
    const uint64_t random = bits();
    const float v = float(int32_t(random >> 40) - (1 << 23)) * kScales[random >> 8 & 7];  // exact
    return random % 64 == 0 ? 0.0f : v;
  }
  std::vector<float> values(int64_t n) {
    std::vector<float> v(static_cast<size_t>(n));
    for (float& x : v) x = value();
    return v;
  }
  std::vector<uint8_t> bytes(int64_t n) {
    std::vector<uint8_t> v(static_cast<size_t>(n));
    uint64_t random = 0;
    for (size_t i = 0; i < v.size(); ++i, random >>= 8) {
      if (i % 8 == 0) random = bits();
      v[i] = uint8_t(random);
    }
    return v;
  }

 private:
  uint64_t state_;
};

}  // namespace shoal

// Bit equality of matrix products and expert calls over row counts, threads and instruction sets.
//
// What every run must reproduce is the portable code on one thread, one row at a time.  Prints one
// line a format, with a digest that is the same on every machine, and exits 1 on a difference.
// Build: this file with every kernels/*.cpp that does not bind; see tests/kernels/test_exact.py.
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "../cpu_features.h"
#include "../matmul.h"
#include "../pack.h"
#include "../quantise.h"
#include "../thread_pool.h"

using namespace shoal;

namespace {

const char* const kNames[kNumFormats] = {"f32",  "f16",  "bf16", "q8_0", "q4_0",
                                         "q4_1", "q4_k", "q4_t", "q3_t"};
constexpr int kRows = 32;

struct Random {
  uint64_t state;
  uint64_t next() {  // splitmix64
    uint64_t z = (state += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
  float uniform() { return float(int32_t(next() >> 40)) * 0x1p-23f - 1.0f; }  // [-1, 1)
};

// 64-byte aligned; as_bytes() never moves.
struct Aligned {
  std::vector<uint8_t> storage;
  uint8_t* data;
  explicit Aligned(int64_t n) : storage(size_t(n) + 64) {
    data = storage.data() + (64 - reinterpret_cast<uintptr_t>(storage.data()) % 64) % 64;
  }
};

// Weights of a standard deviation around 0.1, in row-major blocks.
std::vector<uint8_t> random_weights(Random& random, Format f, int rows, int cols) {
  std::vector<uint8_t> bytes(size_t(rows) * size_t(row_bytes(f, cols)));
  for (uint8_t& b : bytes) b = uint8_t(random.next() >> 56);
  const auto put_half = [&](uint8_t* at, int exponent) {
    const uint16_t h = uint16_t((random.next() & 0x83FF) | uint64_t(exponent) << 10);
    std::memcpy(at, &h, 2);
  };
  const size_t step = size_t(row_bytes(f, 1));
  for (size_t at = 0; at < bytes.size(); at += step) {
    if (f == Format::f32 || f == Format::bf16) {
      const float v = random.uniform() * 0.2f;
      std::memcpy(&bytes[at], reinterpret_cast<const uint8_t*>(&v) + 4 - step, step);
    } else {
      put_half(&bytes[at], f == Format::f16    ? 11
                           : f == Format::q8_0 ? 5
                           : f == Format::q4_k ? 4
                           : f == Format::q4_t ? 7
                           : f == Format::q3_t ? 7
                                               : 9);
      if (f == Format::q4_1 || f == Format::q4_k) put_half(&bytes[at + 2], 7);
    }
  }
  return bytes;
}

// Ordinary rows plus the awkward ones: zeros, outliers, huge, tiny, subnormal, exact ties.
std::vector<float> make_rows(Random& random, int dim) {
  std::vector<float> x(size_t(kRows) * size_t(dim));
  for (int t = 0; t < kRows; ++t)
    for (int i = 0; i < dim; ++i) {
      float v = (random.uniform() + random.uniform()) + random.uniform();
      if (t == 3 && i % 64 < 32) v = 0.0f;     // all-zero blocks
      if (t == 5 && i % 97 == 0) v *= 300.0f;  // outliers
      if (t == 7) v *= 1e4f;                   // exp clamps
      if (t == 9) v *= 3e-19f;                 // h straddles kTinyBlock
      if (t == 11) v *= 1e-30f;                // x straddles kTinyBlock
      if (t == 13) v *= 1e-42f;                // subnormals
      if (t == 15) v = i % 32 == 0 ? 127.0f : float(int(random.next() % 253) - 126) + 0.5f;  // ties
      if (t == 17) v = -0.0f;
      if (t == 19) v *= 1e12f;
      if (t == 21) v *= 1e25f;  // h overflows
      x[size_t(t) * size_t(dim) + size_t(i)] = v;
    }
  return x;
}

struct Rows {
  std::vector<int8_t> quants;
  std::vector<float> scales;
  RowsView view;
};

Rows quantise(Scheme scheme, const float* x, int rows, int dim) {
  Rows r;
  const int64_t padded = round_up(dim, span_of(scheme));
  r.quants.resize(size_t(rows * padded));
  r.scales.resize(size_t(rows * padded / span_of(scheme)));
  std::vector<uint8_t> bad(static_cast<size_t>(rows));
  quantise_rows(scheme, x, rows, dim, r.quants.data(), r.scales.data(), bad.data());
  r.view = {scheme, rows, dim, x, r.quants.data(), r.scales.data()};
  return r;
}

struct Model {
  ExpertShape shape;
  std::vector<Aligned> experts;
  std::vector<float> x, bias;
  int out_rows;
  Aligned matrix;
};

Model make_model(Format gate_up, Format down, int dim, int ffn_dim, int out_rows) {
  Random random{1000 + uint64_t(gate_up)};
  Model m{{dim, ffn_dim, gate_up, down},
          {},
          {},
          {},
          out_rows,
          Aligned(num_groups(out_rows) * group_bytes(gate_up, dim))};
  for (int e = 0; e < 3; ++e) {
    m.experts.emplace_back(m.shape.bytes());
    const auto gate = random_weights(random, gate_up, ffn_dim, dim);
    const auto up = random_weights(random, gate_up, ffn_dim, dim);
    const auto out = random_weights(random, down, dim, ffn_dim);
    pack_expert(m.shape, gate.data(), up.data(), out.data(), m.experts.back().data);
  }
  const auto rows = random_weights(random, gate_up, out_rows, dim);
  pack_rows(gate_up, rows.data(), out_rows, dim, group_bytes(gate_up, dim), m.matrix.data);
  m.x = make_rows(random, dim);
  for (int i = 0; i < out_rows; ++i) m.bias.push_back(random.uniform());
  return m;
}

// What one run gives for rows [first, first + n): products, expert outputs, integer sums.
struct Result {
  std::vector<float> product, y;
  std::vector<int64_t> sums;
  std::vector<uint8_t> bad;
};

Result compute(const Model& m, int first, int n) {
  const int dim = m.shape.dim;
  std::vector<float> x;
  for (int t = first; t < first + n; ++t) {  // more rows than there are: again from the start
    const float* row = &m.x[size_t(t % kRows) * size_t(dim)];
    x.insert(x.end(), row, row + dim);
  }
  if (n % 2) prepare_threads();  // or not: it decides nothing
  const Rows rows = quantise(scheme_of(m.shape.gate_up), x.data(), n, dim);
  Result r;
  r.product.resize(size_t(n) * size_t(m.out_rows));
  r.y.resize(size_t(n) * size_t(dim));
  r.sums.resize(size_t(n) * size_t(dim));
  r.bad.resize(size_t(n));
  matmul({m.shape.gate_up, m.out_rows, dim, m.matrix.data}, rows.view, m.bias.data(),
         r.product.data());
  expert_ffn(m.shape, m.experts[0].data, rows.view, r.y.data(), r.bad.data());
  std::vector<int32_t> offsets{0}, pair_rows;
  std::vector<float> weights;
  std::vector<const uint8_t*> experts;
  for (int e = 0; e < 3; ++e) {  // expert e gets every (e + 1)th row
    experts.push_back(m.experts[size_t(e)].data);
    for (int t = 0; t < n; ++t)
      if ((first + t) % kRows % (e + 1) == 0) {
        pair_rows.push_back(t);
        weights.push_back(0.25f + float((first + t) % kRows) / 64);  // exact in any mode
      }
    offsets.push_back(int32_t(pair_rows.size()));
  }
  expert_sums({m.shape, 3, experts.data(), offsets.data(), pair_rows.data(), weights.data(), 12},
              rows.view, r.sums.data(), r.bad.data());
  for (int t = 0; t < n; ++t)
    if (r.bad[size_t(t)])  // undefined by contract
      for (int i = 0; i < dim; ++i) {
        r.sums[size_t(t) * size_t(dim) + size_t(i)] = 0;
        r.y[size_t(t) * size_t(dim) + size_t(i)] = 0.0f;
      }
  return r;
}

template <class T>
bool same(const std::vector<T>& got, const std::vector<T>& all, int first, int n) {
  const size_t width = got.size() / size_t(n) * sizeof(T);
  for (int t = 0; t < n; ++t)
    if (std::memcmp(reinterpret_cast<const char*>(got.data()) + size_t(t) * width,
                    reinterpret_cast<const char*>(all.data()) + size_t((first + t) % kRows) * width,
                    width) != 0)
      return false;
  return true;
}

template <class T>
uint64_t fnv(uint64_t h, const std::vector<T>& v) {
  const auto* p = reinterpret_cast<const uint8_t*>(v.data());
  for (size_t i = 0; i < v.size() * sizeof(T); ++i) h = (h ^ p[i]) * 0x100000001B3ull;
  return h;
}

bool same_result(const Result& r, const Result& all, int first, int n) {
  return same(r.product, all.product, first, n) && same(r.y, all.y, first, n) &&
         same(r.sums, all.sums, first, n) && same(r.bad, all.bad, first, n);
}

// Callers that share the pool: one of them gets it, the others compute alone.
int check_concurrent_callers(const Model& m, const Result& all) {
  bool right[3] = {false, false, false};
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i)
    callers.emplace_back([&, i] { right[i] = same_result(compute(m, 5 * i, 17), all, 5 * i, 17); });
  for (std::thread& caller : callers) caller.join();
  const int wrong = 3 - right[0] - right[1] - right[2];
  if (wrong) std::printf("  DIFFERS: concurrent callers\n");
  return wrong;
}

// A caller whose thread flushes denormals and rounds toward zero, as a library may leave it.
int check_float_mode(const Model& m, const Result& all) {
#if defined(__x86_64__)
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040 | 0x6000);  // FTZ, DAZ; round toward zero
  const Result r = compute(m, 0, kRows);
  const bool kept = _mm_getcsr() >> 6 == (before | 0x8040 | 0x6000) >> 6;
  _mm_setcsr(before);
  if (same_result(r, all, 0, kRows) && kept) return 0;
  std::printf("  DIFFERS: caller's float mode\n");
  return 1;
#else
  (void)m, (void)all;
  return 0;
#endif
}

int check(Format gate_up, Format down, int dim, int ffn_dim, int out_rows) {
  set_pool_threads(1);
  set_isa(Isa::scalar);
  const Model m = make_model(gate_up, down, dim, ffn_dim, out_rows);
  Result all;
  for (int t = 0; t < kRows; ++t) {
    const Result one = compute(m, t, 1);
    all.product.insert(all.product.end(), one.product.begin(), one.product.end());
    all.y.insert(all.y.end(), one.y.begin(), one.y.end());
    all.sums.insert(all.sums.end(), one.sums.begin(), one.sums.end());
    all.bad.insert(all.bad.end(), one.bad.begin(), one.bad.end());
  }
  int runs = 0, differ = 0, bad = 0;
  for (const uint8_t b : all.bad) bad += b;
  for (const int threads : {1, 2, 4}) {
    set_pool_threads(threads);
    for (int isa = 0; isa < kNumIsas; ++isa) {
      if (!isa_available(Isa(isa)) || (isa == 0 && threads == 4)) continue;
      set_isa(Isa(isa));
      for (const int n : {1, 2, 3, 8, 17, 32, 512}) {
        if (n == 512 && (isa == 0 || threads != 2 || dim > 200)) continue;
        for (const int first : {0, 5, 20}) {
          if (first + n > kRows && first > 0) continue;
          const Result r = compute(m, first, n);
          ++runs;
          if (same_result(r, all, first, n)) continue;
          if (differ++ < 5)
            std::printf("  DIFFERS: %s threads %d rows %d first %d\n", isa_name(Isa(isa)), threads,
                        n, first);
        }
      }
    }
  }
  differ += check_concurrent_callers(m, all) + check_float_mode(m, all);
  uint64_t digest = fnv(fnv(0xCBF29CE484222325ull, all.product), all.y);
  digest = fnv(fnv(digest, all.sums), all.bad);
  std::printf("%s/%s [%d, %d]: %d runs, %d differ, %d rows out of range, digest %016" PRIx64 "\n",
              kNames[int(gate_up)], kNames[int(down)], dim, ffn_dim, runs, differ, bad, digest);
  return differ + (bad == kRows);
}

}  // namespace

int main() {
  std::printf("instruction sets:");
  for (int isa = 0; isa < kNumIsas; ++isa)
    if (isa_available(Isa(isa))) std::printf(" %s", isa_name(Isa(isa)));
  std::printf("\n");
  int failures = 0;
  for (int f = 0; f < kNumFormats; ++f) {
    failures += check(Format(f), Format(f), 320, 96, 70);
    failures += check(Format(f), Format(f), 100, 33, 20);
  }
  failures += check(Format::q4_k, Format::q8_0, 288, 100, 16);
  failures += check(Format::f16, Format::q4_1, 72, 40, 5);
  std::printf(failures ? "FAILED\n" : "all bit-identical\n");
  return failures != 0;
}

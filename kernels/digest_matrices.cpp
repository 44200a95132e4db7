// Digests of the matrix kernels: packing, quantising, products, expert FFN, expert sums.
#include <memory>

#include "digest.h"
#include "matmul.h"
#include "pack.h"
#include "quantise.h"
#include "quantise_q4_k.h"
#include "quantise_table.h"

namespace shoal {
namespace {

const char* const kFormatNames[kNumFormats] = {"f32",  "f16",  "bf16", "q8_0", "q4_0",
                                               "q4_1", "q4_k", "q4_t", "q3_t"};
const char* const kSchemeNames[] = {"f32", "int8_32", "int8_256"};

// Every tile size: 16 + 8 + 4 + 2 + 1.  A row group that is not full; an odd number of blocks,
// a super-block that is not full.
constexpr int kRows = 31, kOutputs = 24, kInputs = 288;
constexpr int kFloatInputs = 45;  // float formats have no blocks, and software fma is slow

struct AlignedBytes {
  explicit AlignedBytes(int64_t n) : storage(size_t(n) + 64) {
    const auto address = reinterpret_cast<uintptr_t>(storage.data());
    data = storage.data() + (64 - address % 64) % 64;
  }
  std::vector<uint8_t> storage;
  uint8_t* data;
};

void put_half(uint8_t* at, uint64_t random, uint32_t exponent) {
  const uint16_t half = uint16_t((random & 0x83FF) | (exponent + (random >> 16) % 4) << 10);
  std::memcpy(at, &half, 2);
}

// Row-major weights with scales of either sign around 2^-7.
std::vector<uint8_t> random_weights(Inputs& inputs, Format format, int rows, int cols) {
  const int64_t n = rows * row_bytes(format, cols);
  std::vector<uint8_t> bytes = inputs.bytes(n);
  if (format == Format::f32 || format == Format::bf16) {
    const int width = format == Format::f32 ? 4 : 2;
    for (int64_t i = 0; i < n; i += width) {
      const float v = inputs.value();
      std::memcpy(&bytes[size_t(i)], reinterpret_cast<const uint8_t*>(&v) + 4 - width,
                  size_t(width));
    }
    return bytes;
  }
  const int64_t step = row_bytes(format, 1);  // of a block
  const bool two = format == Format::q4_1 || format == Format::q4_k;
  for (int64_t i = 0; i < n; i += step) {
    put_half(&bytes[size_t(i)], inputs.bits(), format == Format::f16 ? 11 : 5);
    if (two) put_half(&bytes[size_t(i) + 2], inputs.bits(), 7);
  }
  return bytes;
}

struct QuantisedRows {
  std::vector<float> floats;
  std::vector<int8_t> quants;
  std::vector<float> scales;
  std::vector<uint8_t> bad;
  RowsView view;
};

QuantisedRows random_rows(Inputs& inputs, Scheme scheme, int rows, int dim) {
  QuantisedRows r;
  r.floats = inputs.values(int64_t(rows) * dim);
  r.bad.assign(size_t(rows), 0);
  if (scheme != Scheme::f32) {
    const int64_t padded = round_up(dim, span_of(scheme));
    r.quants.resize(size_t(rows * padded));
    r.scales.resize(size_t(rows * padded / span_of(scheme)));
  }
  quantise_rows(scheme, r.floats.data(), rows, dim, r.quants.data(), r.scales.data(), r.bad.data());
  r.view = {scheme, rows, dim, r.floats.data(), r.quants.data(), r.scales.data()};
  return r;
}

void digest_quantise(std::vector<OpDigest>& digests) {
  for (const Scheme scheme : {Scheme::int8_32, Scheme::int8_256}) {
    Inputs inputs(1);
    const QuantisedRows rows = random_rows(inputs, scheme, 3, kInputs);
    Hash hash;
    hash.add(rows.quants);
    hash.add(rows.scales);
    digests.push_back({"quantise_rows", kSchemeNames[int(scheme)], hash.value()});
  }
  Inputs inputs(2);
  std::vector<uint8_t> blocks(2 * 144);
  quantise_q4_k(inputs.values(512).data(), 2, 256, blocks.data());
  Hash hash;
  hash.add(blocks);
  digests.push_back({"quantise_weights", "q4_k", hash.value()});
}

void digest_quantise_table(std::vector<OpDigest>& digests) {
  constexpr int kTableRows = 3, kTableCols = 160;  // a full sixteen of blocks crosses a row's end
  Inputs inputs(4);
  const std::vector<float> values = inputs.values(kTableRows * kTableCols);
  std::vector<float> importance = inputs.values(kTableCols);
  for (float& weight : importance) weight = weight * weight;
  for (const Format format : {Format::q4_0, Format::q4_t, Format::q3_t}) {
    std::vector<uint8_t> blocks(size_t(kTableRows * row_bytes(format, kTableCols)));
    Hash hash;
    for (const bool weighed : {false, true}) {
      quantise_table(format, values.data(), weighed ? importance.data() : nullptr, kTableRows,
                     kTableCols, blocks.data());
      hash.add(blocks);
    }
    digests.push_back({"quantise_weights", kFormatNames[int(format)], hash.value()});
  }
}

void digest_matmul(std::vector<OpDigest>& digests, Format format) {
  const int cols = scheme_of(format) == Scheme::f32 ? kFloatInputs : kInputs;
  Inputs inputs(3 + uint64_t(format));
  const std::vector<uint8_t> weights = random_weights(inputs, format, kOutputs, cols);
  const int64_t group = group_bytes(format, cols);
  const AlignedBytes packed(num_groups(kOutputs) * group);
  pack_rows(format, weights.data(), kOutputs, cols, group, packed.data);
  const MatrixView matrix{format, kOutputs, cols, packed.data};
  std::vector<float> row(cols), out(size_t(kRows) * kOutputs);
  Hash unpacked;
  for (int i = 0; i < kOutputs; ++i) {
    unpack_row(matrix, i, row.data());
    unpacked.add(row);
  }
  digests.push_back({"unpack", kFormatNames[int(format)], unpacked.value()});
  const QuantisedRows rows = random_rows(inputs, scheme_of(format), kRows, cols);
  const std::vector<float> bias = inputs.values(kOutputs);
  matmul(matrix, rows.view, bias.data(), out.data());
  Hash hash;
  hash.add(out);
  digests.push_back({"matmul", kFormatNames[int(format)], hash.value()});
}

void digest_experts(std::vector<OpDigest>& digests, Format format) {
  constexpr int kDim = 72, kFfnDim = 24, kExperts = 2, kTokens = 17;
  Inputs inputs(20 + uint64_t(format));
  const ExpertShape shape{kDim, kFfnDim, format, format};
  std::vector<std::unique_ptr<AlignedBytes>> experts;
  std::vector<const uint8_t*> packed;
  for (int e = 0; e < kExperts; ++e) {
    const auto gate = random_weights(inputs, format, kFfnDim, kDim);
    const auto up = random_weights(inputs, format, kFfnDim, kDim);
    const auto down = random_weights(inputs, format, kDim, kFfnDim);
    experts.push_back(std::make_unique<AlignedBytes>(shape.bytes()));
    pack_expert(shape, gate.data(), up.data(), down.data(), experts.back()->data);
    packed.push_back(experts.back()->data);
  }
  const QuantisedRows rows = random_rows(inputs, scheme_of(format), kTokens, kDim);
  std::vector<float> y(size_t(kTokens) * kDim);
  std::vector<uint8_t> bad(kTokens, 0);
  expert_ffn(shape, packed[0], rows.view, y.data(), bad.data());
  Hash ffn;
  ffn.add(y);
  ffn.add(bad);
  digests.push_back({"expert_ffn", kFormatNames[int(format)], ffn.value()});
  std::vector<int32_t> pair_rows;
  std::vector<float> pair_weights;
  for (int i = 0; i < kTokens + 3; ++i) {
    pair_rows.push_back(i < kTokens ? i : i - kTokens);
    pair_weights.push_back(inputs.value());
  }
  const int32_t offsets[] = {0, kTokens, kTokens + 3};
  const ExpertCall call{
      shape, kExperts, packed.data(), offsets, pair_rows.data(), pair_weights.data(), 16};
  std::vector<int64_t> sums(size_t(kTokens) * kDim, 0);
  expert_sums(call, rows.view, sums.data(), bad.data());
  Hash hash;
  hash.add(sums);
  hash.add(bad);
  digests.push_back({"expert_sums", kFormatNames[int(format)], hash.value()});
}

}  // namespace

void digest_matrices(std::vector<OpDigest>& digests) {
  digest_quantise(digests);
  digest_quantise_table(digests);
  for (int f = 0; f < kNumFormats; ++f) digest_matmul(digests, Format(f));
  for (int f = 0; f < kNumFormats; ++f) digest_experts(digests, Format(f));
}

}  // namespace shoal

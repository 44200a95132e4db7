// The expert FFN of one call: all experts of a layer, all their rows.
//
// A call runs in *waves* of bounded scratch; a wave is a list of *pieces* (some pairs of one
// expert).  In a wave:
//   1. each piece's rows become tiles;
//   2. threads claim (piece, gate and up group) items: h = silu(gate) * up;
//   3. each pair's h is quantised into tiles;
//   4. threads claim column groups of the output: for every piece, y of those columns is computed
//      and added as integers.  A thread owns its columns, so nothing is shared and no y is stored.
#include <algorithm>
#include <numeric>
#include <vector>

#include "matmul.h"
#include "thread_pool.h"
#include "tiles.h"

namespace shoal {

namespace {

// Scratch of a wave: with its weights it should stay in a last-level cache.
constexpr int64_t kWaveBytes = 16 << 20;

struct Piece {
  const uint8_t* expert;
  int first_pair, count;
  TileBuffer x, h_tiles;
  float* h;
  uint8_t* finite;
};

// What expert_sums and expert_ffn share: everything up to the quantised h of each piece.
class Wave {
 public:
  Wave(const ExpertShape& shape, const RowsView& rows, const int32_t* pair_rows, uint8_t* bad)
      : isa_(current_isa()),
        kernels_(matrix_kernels(isa_)),
        shape_(shape),
        rows_(rows),
        pair_rows_(pair_rows),
        bad_(bad),
        h_stride_(round_up(shape.ffn_dim, kLanes)) {}

  int64_t pair_bytes() const { return piece_bytes(1) + 64; }

  // Returns how many of the pairs it took: as many as fit, at least one into an empty wave.
  int add(const uint8_t* expert, int first_pair, int count) {
    const int64_t room = (kWaveBytes - used_) / pair_bytes();
    const int taken = int(std::min<int64_t>(count, std::max<int64_t>(room, pieces_.empty())));
    if (taken <= 0 || (taken < count && !pieces_.empty())) return 0;  // split no expert needlessly
    pieces_.push_back({expert, first_pair, taken, {}, {}, nullptr, nullptr});
    used_ += piece_bytes(taken);
    return taken;
  }

  void compute_h() {
    lay_out(static_cast<uint8_t*>(thread_scratch(used_)));
    for_each_piece(shape_.dim, [&](const Piece& piece) {
      fill_tiles(isa_, rows_, pair_rows_ + piece.first_pair, piece.x, max_tile(shape_.gate_up));
    });
    gate_up();
    for_each_piece(shape_.ffn_dim, [&](const Piece& piece) {
      quantise_tiles(isa_, piece.h, h_stride_, piece.h_tiles, max_tile(shape_.down), piece.finite);
      for (int i = 0; i < piece.count; ++i)
        if (!piece.finite[i]) mark_bad(piece.first_pair + i);
    });
  }

  // Calls body(piece, group, first row of the tile, its rows, its h) for every tile of every piece
  // and column group; one thread makes all calls of a group.
  template <class F>
  void for_each_down_tile(F&& body) {
    const int groups = num_groups(shape_.dim), largest = max_tile(shape_.down);
    // Long runs of one expert's bytes stream best; 8 chunks a thread balance.
    const int chunk = std::clamp(groups / (8 * pool_threads()), 1, 8);
    parallel_for(groups, chunk, [&](int64_t begin, int64_t end, int) {
      for (const Piece& piece : pieces_)
        for (int group = int(begin); group < end; ++group)
          for (int t = 0, n; t < piece.count; t += n) {
            n = tile_rows(piece.count - t, largest);
            body(piece, group, t, n, piece.h_tiles.tile(t));
          }
    });
  }

  int row_of(int pair) const { return pair_rows_[pair]; }
  void mark_bad(int pair) { __atomic_store_n(&bad_[row_of(pair)], 1, __ATOMIC_RELAXED); }
  const MatrixKernels& kernels() const { return kernels_; }
  bool empty() const { return pieces_.empty(); }
  void clear() { pieces_.clear(), used_ = 0; }

 private:
  int max_tile(Format f) const { return kernels_.max_tile[int(f)]; }

  int64_t piece_bytes(int count) const {
    return TileBuffer::bytes(shape_.gate_up, count, shape_.dim) +
           TileBuffer::bytes(shape_.down, count, shape_.ffn_dim) +
           round_up(count * h_stride_ * 4, 64) + round_up(count, 64);
  }

  void lay_out(uint8_t* memory) {
    for (Piece& p : pieces_) {
      p.x = {memory, p.count, shape_.dim, shape_.gate_up};
      memory += TileBuffer::bytes(shape_.gate_up, p.count, shape_.dim);
      p.h_tiles = {memory, p.count, shape_.ffn_dim, shape_.down};
      memory += TileBuffer::bytes(shape_.down, p.count, shape_.ffn_dim);
      p.h = reinterpret_cast<float*>(memory);
      memory += round_up(p.count * h_stride_ * 4, 64);
      p.finite = memory;
      memory += round_up(p.count, 64);
    }
  }

  // In parallel, unless there is too little to share (a decode step).
  template <class F>
  void for_each_piece(int cols, F&& body) {
    int64_t values = 0;
    for (const Piece& piece : pieces_) values += int64_t(piece.count) * cols;
    const int64_t chunk = values < 32768 ? int64_t(pieces_.size()) : 1;
    parallel_for(int64_t(pieces_.size()), chunk, [&](int64_t i, int64_t end, int) {
      for (; i < end; ++i) body(pieces_[size_t(i)]);
    });
  }

  void gate_up() {
    const int groups = num_groups(shape_.ffn_dim), largest = max_tile(shape_.gate_up);
    const int64_t items = int64_t(groups) * int64_t(pieces_.size());
    const int64_t chunk = std::clamp<int64_t>(items / (16 * pool_threads()), 1, 8);
    parallel_for(items, chunk, [&](int64_t item, int64_t end, int) {
      for (; item < end; ++item) {
        const Piece& piece = pieces_[size_t(item / groups)];
        const int64_t group = item % groups;
        for (int t = 0, n; t < piece.count; t += n) {
          n = tile_rows(piece.count - t, largest);
          kernels_.gate_up(shape_.gate_up, piece.expert + group * 2 * shape_.gate_bytes(),
                           shape_.dim, piece.x.tile(t), n, piece.h + t * h_stride_ + group * kLanes,
                           h_stride_);
        }
      }
    });
  }

  const Isa isa_;
  const MatrixKernels& kernels_;
  const ExpertShape shape_;
  const RowsView rows_;
  const int32_t* const pair_rows_;
  uint8_t* const bad_;
  const int64_t h_stride_;
  int64_t used_ = 0;
  std::vector<Piece> pieces_;
};

double power_of_two(int exponent) {
  double result = 1.0;
  for (; exponent > 0; --exponent) result *= 2.0;
  for (; exponent < 0; ++exponent) result *= 0.5;
  return result;
}

void add_down(Wave& wave, const ExpertCall& call, int64_t* sums) {
  const ExpertShape& shape = call.shape;
  const double two_to_grid = power_of_two(call.grid);
  const int64_t bytes = shape.down_bytes(), offset = shape.down_offset();
  wave.for_each_down_tile([&](const Piece& piece, int group, int t, int n, const Tile& h) {
    const int column = group * kLanes, first = piece.first_pair + t;
    int64_t* at[kMaxTile];
    for (int i = 0; i < n; ++i) at[i] = sums + int64_t(wave.row_of(first + i)) * shape.dim + column;
    const uint32_t bad = wave.kernels().down_sums(
        shape.down, piece.expert + offset + group * bytes, std::min(kLanes, shape.dim - column),
        shape.ffn_dim, h, n, call.pair_weights + first, two_to_grid, at);
    for (int i = 0; bad >> i; ++i)
      if (bad >> i & 1) wave.mark_bad(first + i);
  });
}

void store_down(Wave& wave, const ExpertShape& shape, float* y) {
  const int64_t bytes = shape.down_bytes(), offset = shape.down_offset();
  wave.for_each_down_tile([&](const Piece& piece, int group, int t, int n, const Tile& h) {
    const int column = group * kLanes, lanes = std::min(kLanes, shape.dim - column);
    float* to = y + int64_t(piece.first_pair + t) * shape.dim + column;
    wave.kernels().matmul(shape.down, piece.expert + offset + group * bytes, 1, lanes,
                          shape.ffn_dim, h, n, nullptr, to, shape.dim);
    for (int i = 0; i < n; ++i)
      if (!all_finite(to + int64_t(i) * shape.dim, lanes)) wave.mark_bad(piece.first_pair + t + i);
  });
}

}  // namespace

void expert_sums(const ExpertCall& call, const RowsView& rows, int64_t* sums, uint8_t* bad) {
  Wave wave(call.shape, rows, call.pair_rows, bad);
  const auto flush = [&] {
    if (wave.empty()) return;
    wave.compute_h();
    add_down(wave, call, sums);
    wave.clear();
  };
  for (int e = 0; e < call.num_experts; ++e) {
    for (int pair = call.offsets[e]; pair < call.offsets[e + 1];) {
      const int taken = wave.add(call.experts[e], pair, call.offsets[e + 1] - pair);
      if (taken == 0) flush();
      pair += taken;
    }
  }
  flush();
}

void expert_ffn(const ExpertShape& shape, const uint8_t* expert, const RowsView& rows, float* y,
                uint8_t* bad) {
  std::vector<int32_t> every_row(static_cast<size_t>(rows.num_rows));
  std::iota(every_row.begin(), every_row.end(), 0);
  Wave wave(shape, rows, every_row.data(), bad);
  for (int first = 0; first < rows.num_rows;) {
    first += wave.add(expert, first, rows.num_rows - first);
    wave.compute_h();
    store_down(wave, shape, y);
    wave.clear();
  }
}

}  // namespace shoal

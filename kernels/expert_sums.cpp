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

// Sums of all threads, where each has its own.
constexpr int64_t kOwnSumsBytes = 128 << 10;

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
    const auto fill = [&](const Piece& piece) {
      fill_tiles(isa_, rows_, pair_rows_ + piece.first_pair, piece.x, max_tile(shape_.gate_up));
    };
    if (is_one_row())
      fill(pieces_[0]);
    else
      for_each_piece(shape_.dim, fill);
    gate_up();
    for_each_piece(shape_.ffn_dim, [&](const Piece& piece) {
      quantise_tiles(isa_, piece.h, h_stride_, piece.h_tiles, max_tile(shape_.down), piece.finite);
      for (int i = 0; i < piece.count; ++i)
        if (!piece.finite[i]) mark_bad(piece.first_pair + i);
    });
  }

  // Calls body(piece, group, count of groups, first row of the tile, its rows, its h) until every
  // tile of every piece has met every column group; one thread makes all calls of a group.
  template <class F>
  void for_each_down_tile(F&& body) {
    const int groups = num_groups(shape_.dim);
    // Long runs of one expert's bytes stream best; 8 chunks a thread balance.
    const int chunk = std::clamp(groups / (8 * pool_threads()), 1, 8);
    parallel_for(groups, chunk, [&](int64_t group, int64_t end, int) {
      for (const Piece& piece : pieces_)
        for_each_tile(piece, shape_.down, int(group), int(end), kMaxGroups,
                      [&](int g, int count, int t, int n) {
                        body(piece, g, count, t, n, piece.h_tiles.tile(t));
                      });
    });
  }

  // The same, in the order of the weights: body(thread, piece, group, ...) as above, but a group's
  // calls come from several threads.
  template <class F>
  void for_each_down_tile_in_order(F&& body) {
    for_each_run(num_groups(shape_.dim), [&](int thread, const Piece& piece, int group, int end) {
      for_each_tile(piece, shape_.down, group, end, kMaxGroups,
                    [&](int g, int count, int t, int n) {
                      body(thread, piece, g, count, t, n, piece.h_tiles.tile(t));
                    });
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

  // One that visits each expert once: all pieces share its tile.
  bool is_one_row() const {
    return rows_.num_rows == 1 && std::all_of(pieces_.begin(), pieces_.end(),
                                              [](const Piece& piece) { return piece.count == 1; });
  }

  void lay_out(uint8_t* memory) {
    uint8_t* const first = memory;
    const bool shares = is_one_row();
    for (Piece& p : pieces_) {
      p.x = {shares ? first : memory, p.count, shape_.dim, shape_.gate_up};
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

  // Threads claim (piece, group) items in that order, one or two at last: body(thread, piece, first
  // group, end).
  template <class F>
  void for_each_run(int groups, F&& body) {
    const int64_t items = int64_t(groups) * int64_t(pieces_.size());
    const int64_t chunk = std::clamp<int64_t>(items / (16 * pool_threads()), 1, 2);
    parallel_for_ranges(items, chunk, [&](int64_t item, int64_t end, int thread) {
      while (item < end) {
        const Piece& piece = pieces_[size_t(item / groups)];
        const int64_t first = item % groups, last = std::min<int64_t>(groups, first + end - item);
        body(thread, piece, int(first), int(last));
        item += last - first;
      }
    });
  }

  // body(group, count of groups, first row of the tile, its rows): a piece of one tile meets all
  // groups at a stroke, one of several tiles takes a few at a time through them while these are in
  // a cache.
  template <class F>
  void for_each_tile(const Piece& piece, Format format, int group, int end, int few, F&& body) {
    const int largest = max_tile(format);
    const bool is_one = piece.count == tile_rows(piece.count, largest);
    for (int count; group < end; group += count) {
      count = is_one ? end - group : std::min(few, end - group);
      for (int t = 0, n; t < piece.count; t += n) {
        n = tile_rows(piece.count - t, largest);
        body(group, count, t, n);
      }
    }
  }

  void gate_up() {
    const int64_t pair_bytes = 2 * shape_.gate_bytes();
    for_each_run(num_groups(shape_.ffn_dim), [&](int, const Piece& piece, int group, int end) {
      for_each_tile(piece, shape_.gate_up, group, end, 1, [&](int g, int count, int t, int n) {
        kernels_.gate_up(shape_.gate_up, piece.expert + g * pair_bytes, count, shape_.dim,
                         piece.x.tile(t), n, piece.h + t * h_stride_ + g * kLanes, h_stride_);
      });
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

// sums of the call's rows, a tile at a time.
class DownSums {
 public:
  DownSums(Wave& wave, const ExpertCall& call)
      : wave_(wave), call_(call), two_to_grid_(power_of_two(call.grid)) {}

  void add(const Piece& piece, int group, int count, int t, int n, const Tile& h, int64_t* sums) {
    const ExpertShape& shape = call_.shape;
    const int column = group * kLanes, first = piece.first_pair + t;
    int64_t* at[kMaxTile];
    for (int i = 0; i < n; ++i)
      at[i] = sums + int64_t(wave_.row_of(first + i)) * shape.dim + column;
    const uint32_t bad = wave_.kernels().down_sums(
        shape.down, piece.expert + shape.down_offset() + group * shape.down_bytes(), count,
        std::min(count * kLanes, shape.dim - column), shape.ffn_dim, h, n,
        call_.pair_weights + first, two_to_grid_, at);
    for (int i = 0; bad >> i; ++i)
      if (bad >> i & 1) wave_.mark_bad(first + i);
  }

 private:
  Wave& wave_;
  const ExpertCall& call_;
  const double two_to_grid_;
};

// Few rows wait for memory: each thread reads whole experts, and has sums of its own.
void add_down_in_order(Wave& wave, const ExpertCall& call, int64_t num_sums, int64_t* sums) {
  DownSums down(wave, call);
  const size_t threads = size_t(pool_threads());
  std::vector<int64_t> own((threads - 1) * size_t(num_sums));
  wave.for_each_down_tile_in_order(
      [&](int thread, const Piece& piece, int group, int count, int t, int n, const Tile& h) {
        int64_t* const to = thread == 0 ? sums : own.data() + (thread - 1) * num_sums;
        down.add(piece, group, count, t, n, h, to);
      });
  for (const int64_t* from = own.data(); from < own.data() + own.size(); from += num_sums)
    for (int64_t i = 0; i < num_sums; ++i) sums[i] += from[i];
}

void add_down(Wave& wave, const ExpertCall& call, int num_rows, int64_t* sums) {
  const int64_t num_sums = int64_t(num_rows) * call.shape.dim;
  if (pool_threads() * num_sums * int64_t(sizeof *sums) <= kOwnSumsBytes) {
    add_down_in_order(wave, call, num_sums, sums);
    return;
  }
  DownSums down(wave, call);
  wave.for_each_down_tile([&](const Piece& piece, int group, int count, int t, int n,
                              const Tile& h) { down.add(piece, group, count, t, n, h, sums); });
}

void store_down(Wave& wave, const ExpertShape& shape, float* y) {
  const int64_t bytes = shape.down_bytes(), offset = shape.down_offset();
  wave.for_each_down_tile(
      [&](const Piece& piece, int group, int count, int t, int n, const Tile& h) {
        const int column = group * kLanes, lanes = std::min(count * kLanes, shape.dim - column);
        float* to = y + int64_t(piece.first_pair + t) * shape.dim + column;
        wave.kernels().matmul(shape.down, piece.expert + offset + group * bytes, count, lanes,
                              shape.ffn_dim, h, n, nullptr, to, shape.dim);
        for (int i = 0; i < n; ++i)
          if (!all_finite(to + int64_t(i) * shape.dim, lanes))
            wave.mark_bad(piece.first_pair + t + i);
      });
}

}  // namespace

void expert_sums(const ExpertCall& call, const RowsView& rows, int64_t* sums, uint8_t* bad) {
  Wave wave(call.shape, rows, call.pair_rows, bad);
  const auto flush = [&] {
    if (wave.empty()) return;
    wave.compute_h();
    add_down(wave, call, rows.num_rows, sums);
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

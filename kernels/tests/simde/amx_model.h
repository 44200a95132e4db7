// AMX for CPUs that lack it: the tile instructions as the manual's pseudocode says, over an array.
//
// What no tile would be given by a CPU aborts: a use without a configuration, shapes beyond a
// register or that do not fit each other.  Intel SDM, volume 1, chapter 18, and volume 2, TDPBSUD.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud
#define _tile_loadconfig shoal_amx_model::load_config
#define _tile_release shoal_amx_model::release
#define _tile_zero shoal_amx_model::zero
#define _tile_loadd shoal_amx_model::load
#define _tile_stored shoal_amx_model::store
#define _tile_dpbsud shoal_amx_model::multiply

namespace shoal_amx_model {
namespace {  // a file that ends in _amx leaves nothing that another could link with

constexpr int kTiles = 8, kMaxRows = 16, kRowBytes = 64;

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// Of a thread, as the registers are.
thread_local Config config{};
thread_local uint8_t tiles[kTiles][kMaxRows][kRowBytes];

void require(bool holds) {
  if (!holds) std::abort();
}
bool is_configured(int tile) {
  return config.palette == 1 && tile < kTiles && config.rows[tile] > 0 &&
         config.row_bytes[tile] > 0;
}

__attribute__((unused)) void load_config(const void* from) {
  std::memcpy(&config, from, sizeof config);
  require(config.palette == 1 && config.start_row == 0);
  for (const uint8_t byte : config.reserved) require(byte == 0);
  for (int i = 0; i < 16; ++i) {
    const int most_rows = i < kTiles ? kMaxRows : 0, most_bytes = i < kTiles ? kRowBytes : 0;
    require(config.rows[i] <= most_rows && config.row_bytes[i] <= most_bytes);
    require((config.rows[i] == 0) == (config.row_bytes[i] == 0));
  }
  std::memset(tiles, 0, sizeof tiles);
}

__attribute__((unused)) void release() { config = Config{}; }

__attribute__((unused)) void zero(int tile) {
  require(is_configured(tile));
  std::memset(tiles[tile], 0, sizeof tiles[tile]);
}

__attribute__((unused)) void load(int tile, const void* from, int64_t stride) {
  zero(tile);  // what lies beyond the configured shape
  for (int row = 0; row < config.rows[tile]; ++row)
    std::memcpy(tiles[tile][row], static_cast<const uint8_t*>(from) + row * stride,
                config.row_bytes[tile]);
}

__attribute__((unused)) void store(int tile, void* to, int64_t stride) {
  require(is_configured(tile));
  for (int row = 0; row < config.rows[tile]; ++row)
    std::memcpy(static_cast<uint8_t*>(to) + row * stride, tiles[tile][row], config.row_bytes[tile]);
}

// sums[m][n] += signed bytes a[m][4k + i] * unsigned bytes b[k][4n + i], i < 4, modulo 2^32.
__attribute__((unused)) void multiply(int sums, int a, int b) {
  require(is_configured(sums) && is_configured(a) && is_configured(b));
  require(sums != a && sums != b && a != b);
  require(config.rows[sums] == config.rows[a] && config.row_bytes[sums] == config.row_bytes[b]);
  require(config.row_bytes[a] == 4 * config.rows[b] && config.row_bytes[b] % 4 == 0);
  for (int m = 0; m < config.rows[sums]; ++m)
    for (int n = 0; n < config.row_bytes[sums] / 4; ++n) {
      uint32_t sum;
      std::memcpy(&sum, tiles[sums][m] + 4 * n, 4);
      for (int k = 0; k < config.rows[b]; ++k)
        for (int i = 0; i < 4; ++i)
          sum +=
              uint32_t(int32_t(int8_t(tiles[a][m][4 * k + i])) * int32_t(tiles[b][k][4 * n + i]));
      std::memcpy(tiles[sums][m] + 4 * n, &sum, 4);
    }
}

}  // namespace
}  // namespace shoal_amx_model

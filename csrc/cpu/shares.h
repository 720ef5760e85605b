// How the work of a kernel is divided among threads: arithmetic on the shape and the number of threads alone, so that
// `cpu_plan` can tell it for any number. What a position holds never depends on the division.
//
// A kernel has one of two divisions. `Line`: the work is a line of units of equal size, and a thread takes a run of
// them. `Grid`: a matrix of rows by channels, cut into blocks of rows, each for a number of threads; within a block the
// work is a line, too, one unit of channels after the other with all its rows. The more blocks, the more threads pack
// the same weights; the fewer, the more threads prepare the same rows.
//
// A unit is the smallest piece that is worth doing by itself: one output row of a block of channels, half a tile of
// pixels by a cache line of channels. With eight units for each thread no thread has more than 1.15 times the mean.
// With fewer, the largest share of a line is the whole number of units above the mean, and threads that would not make
// it smaller get nothing to do.
#pragma once
#include <vector>

#include "vector.h"

namespace effkernels::cpu::EFFKERNELS_ISA {

struct Line {
  int64_t units = 0, count = 1;         // count: of the shares
  int64_t begin(int64_t share) const {  // units may have 50 bits and a share 10: no product of both
    return units / count * share + units % count * share / count;
  }
  int64_t end(int64_t share) const { return begin(share + 1); }
};

inline Line divide_line(int64_t units, int threads) {
  if (units <= 0) return {};
  const int64_t largest = ceil_div(units, threads);
  return {units, ceil_div(units, largest)};
}

struct Rectangle {
  int64_t row_begin, row_end, channel_begin, channel_end;
};

// The share of a thread: whole units of channels, and rows of one before and of one after them.
struct Rectangles {
  int count = 0;
  Rectangle all[3];
  const Rectangle* begin() const { return all; }
  const Rectangle* end() const { return all + count; }
};

struct Grid {
  int64_t rows = 0, channels = 0, unit = 1;
  int64_t blocks = 1, count = 1;  // blocks of rows; shares
  int64_t tile = 1;               // rows of a tile: where a block is large it is a whole number of them

  int64_t units() const { return ceil_div(channels, unit); }

  Rectangles share(int64_t i) const {
    const int64_t block = ((i + 1) * blocks - 1) / count, first = first_share(block);
    const int64_t shares = first_share(block + 1) - first, row = first_row(block), own = first_row(block + 1) - row;
    const Line line{units() * own, shares};
    const int64_t begin = to_whole_unit(line.begin(i - first), own, line),
                  end = to_whole_unit(line.end(i - first), own, line);
    Rectangles found;
    const auto add = [&](int64_t row_begin, int64_t row_end, int64_t unit_begin, int64_t unit_end) {
      if (row_begin < row_end && unit_begin < unit_end)
        found.all[found.count++] = {row + row_begin, row + row_end, unit_begin * unit,
                                    min_of(channels, unit_end * unit)};
    };
    if (own == 0) return found;
    const int64_t unit_begin = ceil_div(begin, own), unit_end = end / own;
    if (unit_begin > unit_end) {  // a part of one unit
      add(begin % own, end % own, unit_end, unit_begin);
      return found;
    }
    if (begin % own) add(begin % own, own, unit_begin - 1, unit_begin);
    add(0, own, unit_begin, unit_end);
    if (end % own) add(0, end % own, unit_end, unit_end + 1);
    return found;
  }

 private:
  int64_t first_share(int64_t block) const { return count * block / blocks; }
  int64_t first_row(int64_t block) const {
    const int64_t exact = Line{rows, count}.begin(first_share(block));
    return block == blocks || rows / blocks < 32 * tile ? exact : (exact + tile / 2) / tile * tile;
  }
  // A few rows of a unit are not worth preparing: the nearest whole unit where that is near.
  static int64_t to_whole_unit(int64_t position, int64_t own, const Line& line) {
    const int64_t nearest = own == 0 ? 0 : (position + own / 2) / own * own;
    const int64_t distance = position < nearest ? nearest - position : position - nearest;
    return distance * 32 * line.count <= line.units ? nearest : position;
  }
};

// Of a block of rows that is rounded to whole ones: the rounding is 1/16 at most.
constexpr int64_t kFewestRows = 16;

// The grid that costs the least: cost(rows of a block, units of channels of a share, whether units are cut).
template <class Cost>
inline Grid divide_grid(int64_t rows, int64_t channels, int64_t unit, int64_t tile, int threads, const Cost& cost) {
  Grid best{rows, channels, unit, 1, 1, tile};
  if (rows <= 0 || channels <= 0) return best;
  best.count = threads;
  const int64_t units = best.units();
  double least = 0;
  for (int64_t blocks = 1; blocks <= min_of<int64_t>(threads, rows); blocks++) {
    const int64_t fewest = rows / threads * (threads / blocks) + rows % threads * (threads / blocks) / threads;
    const bool even = threads % blocks == 0 && rows % blocks == 0;
    if (blocks > 1 && !even && fewest < kFewestRows) continue;
    const double own_units = double(units) * double(blocks) / threads;
    const bool cut = threads % blocks != 0 || units % (threads / blocks) != 0;
    const double price = cost(double(ceil_div(rows, blocks)), own_units, cut && blocks != threads);
    if (blocks == 1 || price < least) least = price, best.blocks = blocks;
  }
  return best;
}

// What each thread computes, for `cpu_plan`.
inline Division describe(const Line& line, int64_t work_of_unit) {
  Division division{line.units, {}};
  for (int64_t i = 0; i < line.count; i++) division.shares.push_back((line.end(i) - line.begin(i)) * work_of_unit);
  return division;
}
inline Division describe(const Grid& grid, int64_t units) {
  Division division{units, {}};
  for (int64_t i = 0; i < grid.count; i++) {
    int64_t work = 0;
    for (const Rectangle& r : grid.share(i))
      work += (r.row_end - r.row_begin) * ceil_div(r.channel_end - r.channel_begin, grid.unit);
    division.shares.push_back(work);
  }
  return division;
}

// Runs body(share) for each share, a share on a thread.
template <class Body>
inline void for_shares(const Parallel& parallel, int64_t count, const Body& body) {
  parallel_for(parallel, count, [=](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; share++) body(share);
  });
}

}  // namespace effkernels::cpu::EFFKERNELS_ISA

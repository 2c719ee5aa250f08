// blocked: a product's rows in use, in blocks that its kernel takes together, and its columns, over the pool's threads.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "scratch.h"
#include "used.h"

namespace mlspecqd {

constexpr int64_t kChunkBytes = 64 << 10;    // of a weight: some microseconds of reading
constexpr int64_t kLeastShared = 128 << 10;  // multiply-adds below which waking a thread takes longer than the work
constexpr int64_t kChunkColumns = 12;        // a multiple of the tiles' widths

// Computes the rows in use of out [M, N] from x [M, K], over the pool's threads; the others are left as they are.
//
// Rows are taken in blocks, whichever windows they are of, each of one expert's rows: a block whose rows do not lie side by side is
// put together and its results are put where they belong.
//
// Args:
//   n: rows of the weight, or of each expert's.
//   row_bytes: of a row of the weight.
//   block: rows prepared together, `prepared_bytes` for each of them.
//   prepare(rows of x, how many, prepared): writes a block.
//   columns(prepared, how many rows, begin, end, out, stride): computes these columns of a block, which are rows of the whole
//     weight, the first of them to out[begin].
template <class Pool, class X, class Prepare, class Columns>
void blocked(Pool& pool, const X* x, Used used, float* out, int64_t m, int64_t n, int64_t k, int64_t row_bytes, int block,
             int64_t prepared_bytes, const Prepare& prepare, const Columns& columns) {
  std::vector<int64_t> rows = rows_in_use(used, m);
  const std::vector<Group> groups = grouped(used, rows);
  const int64_t count = static_cast<int64_t>(rows.size());
  if (count == 0 || n == 0) return;
  // Calls body(where the block begins, how many rows it has, whether they lie side by side).
  const auto for_each_block = [&](const Group& group, const auto& body) {
    for (int64_t at = group.begin; at < group.end; at += block) {
      const int size = static_cast<int>(std::min<int64_t>(block, group.end - at));
      body(at, size, rows[at + size - 1] - rows[at] == size - 1);
    }
  };
  const bool scattered = groups.size() > 1 || rows[count - 1] - rows[0] != count - 1;
  const Scratch prepared = scratch(count * prepared_bytes);
  const Scratch gathered = scratch(scattered ? block * k * static_cast<int64_t>(sizeof(X)) : 0);
  {
    FlushSubnormals flush;
    for (const Group& group : groups) {
      for_each_block(group, [&](int64_t at, int size, bool side_by_side) {
        const X* from = x + rows[at] * k;
        if (!side_by_side) {
          X* const to = reinterpret_cast<X*>(gathered.get());
          for (int i = 0; i < size; ++i) std::copy_n(x + rows[at + i] * k, k, to + i * k);
          from = to;
        }
        prepare(from, size, prepared.get() + at * prepared_bytes);
      });
    }
  }
  const int64_t wanted = std::max<int64_t>(kChunkBytes / std::max<int64_t>(row_bytes, 1), 1);
  const bool alone = count * n * k < kLeastShared;
  const int64_t width = alone ? n : rounded_up(wanted, kChunkColumns), each = (n + width - 1) / width;
  const int64_t results = scattered ? block * width * static_cast<int64_t>(sizeof(float)) : 0;
  const auto compute = [&](const Group& group, int64_t begin, int64_t end, char* memory) noexcept {
    const int64_t before = group.expert * n;  // of the weight's rows
    for_each_block(group, [&](int64_t at, int size, bool side_by_side) {
      const char* const x_of_block = prepared.get() + at * prepared_bytes;
      float* const to = side_by_side ? out + rows[at] * n + begin : reinterpret_cast<float*>(memory);
      const uintptr_t first = reinterpret_cast<uintptr_t>(to) - (before + begin) * sizeof(float);  // whose column `begin` is `to`
      columns(x_of_block, size, before + begin, before + end, reinterpret_cast<float*>(first), side_by_side ? n : width);
      if (side_by_side) return;
      for (int i = 0; i < size; ++i) {
        std::memcpy(out + rows[at + i] * n + begin, memory + i * width * sizeof(float), (end - begin) * sizeof(float));
      }
    });
  };
  const int64_t chunks = alone ? 1 : static_cast<int64_t>(groups.size()) * each;
  for_each_chunk(pool, chunks, results, [&](int64_t chunk, char* memory) noexcept {
    if (!alone) {
      const int64_t begin = chunk % each * width;
      compute(groups[chunk / each], begin, std::min(n, begin + width), memory);
      return;
    }
    for (const Group& group : groups) compute(group, 0, n, memory);
  });
}

}  // namespace mlspecqd

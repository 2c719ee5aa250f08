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
// Rows are taken in blocks, whichever windows they are of: a block whose rows do not lie side by side is put together and its
// results are put where they belong.
//
// Args:
//   row_bytes: of a row of the weight.
//   block: rows prepared together, `prepared_bytes` for each of them.
//   prepare(rows of x, how many, prepared): writes a block.
//   columns(prepared, how many rows, begin, end, out, stride): computes these columns of a block, the first of which is out[begin].
template <class Pool, class X, class Prepare, class Columns>
void blocked(Pool& pool, const X* x, Used used, float* out, int64_t m, int64_t n, int64_t k, int64_t row_bytes, int block,
             int64_t prepared_bytes, const Prepare& prepare, const Columns& columns) {
  const std::vector<int64_t> rows = rows_in_use(used, m);
  const int64_t count = static_cast<int64_t>(rows.size());
  if (count == 0 || n == 0) return;
  const auto size_of = [&](int64_t at) { return static_cast<int>(std::min<int64_t>(block, count - at)); };
  const auto side_by_side = [&](int64_t at) { return rows[at + size_of(at) - 1] - rows[at] == size_of(at) - 1; };
  const bool scattered = rows[count - 1] - rows[0] != count - 1;
  const Scratch prepared = scratch(count * prepared_bytes);
  const Scratch gathered = scratch(scattered ? block * k * static_cast<int64_t>(sizeof(X)) : 0);
  {
    FlushSubnormals flush;
    for (int64_t at = 0; at < count; at += block) {
      const X* from = x + rows[at] * k;
      if (!side_by_side(at)) {
        X* const to = reinterpret_cast<X*>(gathered.get());
        for (int i = 0; i < size_of(at); ++i) std::copy_n(x + rows[at + i] * k, k, to + i * k);
        from = to;
      }
      prepare(from, size_of(at), prepared.get() + at * prepared_bytes);
    }
  }
  const int64_t wanted = std::max<int64_t>(kChunkBytes / std::max<int64_t>(row_bytes, 1), 1);
  const int64_t width = count * n * k < kLeastShared ? n : rounded_up(wanted, kChunkColumns);
  const int64_t results = scattered ? block * width * static_cast<int64_t>(sizeof(float)) : 0;
  for_each_chunk(pool, (n + width - 1) / width, results, [&](int64_t chunk, char* memory) noexcept {
    const int64_t begin = chunk * width, end = std::min(n, begin + width);
    for (int64_t at = 0; at < count; at += block) {
      const char* const x_of_block = prepared.get() + at * prepared_bytes;
      if (side_by_side(at)) {
        columns(x_of_block, size_of(at), begin, end, out + rows[at] * n, n);
        continue;
      }
      const uintptr_t first = reinterpret_cast<uintptr_t>(memory) - begin * sizeof(float);  // whose column `begin` is in memory
      columns(x_of_block, size_of(at), begin, end, reinterpret_cast<float*>(first), width);
      for (int i = 0; i < size_of(at); ++i) {
        std::memcpy(out + rows[at + i] * n + begin, memory + i * width * sizeof(float), (end - begin) * sizeof(float));
      }
    }
  });
}

}  // namespace mlspecqd

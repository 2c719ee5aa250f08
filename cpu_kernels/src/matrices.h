// What the products of packed weights by activations in bfloat16 are given.

#pragma once

#include "handlers.h"

namespace mlspecqd {

using X = Matrix<ffi::BF16>;
using Bytes = Matrix<ffi::U8>;

// Whether x, the weight's rows, those in use and the result belong together.
inline bool fits(X x, int64_t rows, UsedRows used, Experts experts, ffi::Result<Y>& y) {
  const auto a = x.dimensions(), c = y->dimensions();
  return c[0] == a[0] && are_outputs(a[0], c[1], rows, experts) && are_windows(a[0], used);
}

}  // namespace mlspecqd

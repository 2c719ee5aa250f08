// The products of weights in the formats of OCP Microscaling, by activations in bfloat16.

#include "handlers.h"

namespace mlspecqd {

using X = Matrix<ffi::BF16>;
using Bytes = Matrix<ffi::U8>;

// Whether x, the weight's rows, those in use and the result belong together.
static bool fits(X x, int64_t rows, UsedRows used, Experts experts, ffi::Result<Y>& y) {
  const auto a = x.dimensions(), c = y->dimensions();
  return c[0] == a[0] && are_outputs(a[0], c[1], rows, experts) && are_windows(a[0], used);
}

static ffi::Error mxfp4_handler(ffi::ThreadPool pool, Isa isa, X x, Bytes packed, Bytes scales, UsedRows used, Experts experts,
                                ffi::Result<Y> y) {
  const auto a = x.dimensions(), b = packed.dimensions(), s = scales.dimensions(), c = y->dimensions();
  if (2 * b[1] != a[1] || four_bits::kBlock * s[1] != a[1] || s[0] != b[0] || !fits(x, b[0], used, experts, y)) return unfitting();
  const auto* kernel = choose(four_bits_choices<four_bits::Mxfp4>(), *isa);
  if (kernel == nullptr) return unsupported(*isa);
  const four_bits::Weight w = {packed.typed_data(), scales.typed_data(), nullptr, b[0], 1};
  four_bits_matmul(*kernel, pool, x.typed_data(), w, y->typed_data(), a[0], c[1], a[1], of(used, experts, c[1], b[0]));
  return ffi::Error::Success();
}

static ffi::Error mxfp6_handler(ffi::ThreadPool pool, Isa isa, Elements elements, X x, Bytes codes, Bytes scales, UsedRows used,
                                Experts experts, ffi::Result<Y> y) {
  const auto a = x.dimensions(), b = codes.dimensions(), s = scales.dimensions(), c = y->dimensions();
  if (8 * b[1] != 6 * a[1] || six_bits::kBlock * s[1] != a[1] || s[0] != b[0] || !fits(x, b[0], used, experts, y))
    return unfitting();
  const bool e2m3 = *elements == "e2m3";
  const auto* kernel = choose(e2m3 ? six_bits_choices<six_bits::E2m3>() : six_bits_choices<six_bits::E3m2>(), *isa);
  if (kernel == nullptr) return unsupported(*isa);
  const six_bits::Weight w = {codes.typed_data(), scales.typed_data(), nullptr, b[0], 1};
  six_bits_matmul(*kernel, pool, x.typed_data(), w, y->typed_data(), a[0], c[1], a[1], of(used, experts, c[1], b[0]));
  return ffi::Error::Success();
}

static ffi::Error mx8_handler(ffi::ThreadPool pool, Isa isa, Elements elements, X x, Bytes codes, Bytes scales, UsedRows used,
                              Experts experts, ffi::Result<Y> y) {
  const auto a = x.dimensions(), b = codes.dimensions(), s = scales.dimensions(), c = y->dimensions();
  if (b[1] != a[1] || mx8::kBlock * s[1] != a[1] || s[0] != b[0] || !fits(x, b[0], used, experts, y)) return unfitting();
  const auto* kernel = choose(mx8_choices(), *isa);
  if (kernel == nullptr) return unsupported(*isa);
  const mx8::Format format = {(*elements)[1] - '0', (*elements)[3] - '0'};
  mx8_matmul(*kernel, pool, format, x.typed_data(), codes.typed_data(), scales.typed_data(), y->typed_data(), a[0], c[1], a[1],
             of(used, experts, c[1], b[0]));
  return ffi::Error::Success();
}

}  // namespace mlspecqd

MLSPECQD_PRODUCT(mxfp4_matmul, mxfp4_handler, four_bits_choices<mlspecqd::four_bits::Mxfp4>)
MLSPECQD_PRODUCT(mxfp6_matmul, mxfp6_handler, six_bits_choices<mlspecqd::six_bits::E2m3>)
MLSPECQD_PRODUCT(mx8_matmul, mx8_handler, mx8_choices)

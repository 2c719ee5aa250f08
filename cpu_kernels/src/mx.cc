// The products of weights in OCP Microscaling's formats of four and eight bits, which a twin has by default, by activations in
// bfloat16.

#include "matrices.h"

namespace mlspecqd {

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
MLSPECQD_PRODUCT(mx8_matmul, mx8_handler, mx8_choices)

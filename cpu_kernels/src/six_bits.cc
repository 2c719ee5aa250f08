// The product of weights in OCP Microscaling's formats of six bits, by activations in bfloat16.

#include "matrices.h"

namespace mlspecqd {

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

}  // namespace mlspecqd

MLSPECQD_PRODUCT(mxfp6_matmul, mxfp6_handler, six_bits_choices<mlspecqd::six_bits::E2m3>)

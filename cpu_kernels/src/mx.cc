// The products of weights in the formats of OCP Microscaling, by activations in bfloat16.

#include "handlers.h"

namespace mlspecqd {

using X = Matrix<ffi::BF16>;
using Bytes = Matrix<ffi::U8>;

static ffi::Error mxfp4_handler(ffi::ThreadPool pool, std::string_view isa, X x, Bytes packed, Bytes scales, ffi::Result<Y> y) {
  const auto a = x.dimensions(), b = packed.dimensions(), s = scales.dimensions(), c = y->dimensions();
  if (2 * b[1] != a[1] || mxfp4::kBlock * s[1] != a[1] || s[0] != b[0] || c[0] != a[0] || c[1] != b[0]) return unfitting();
  const auto* kernel = choose(mxfp4_choices(), isa);
  if (kernel == nullptr) return unsupported(isa);
  mxfp4_matmul(*kernel, pool, x.typed_data(), packed.typed_data(), scales.typed_data(), y->typed_data(), a[0], b[0], a[1]);
  return ffi::Error::Success();
}

// Args:
//   elements: the format's exponent and mantissa bits, as in "e4m3".
static ffi::Error mx8_handler(ffi::ThreadPool pool, std::string_view isa, std::string_view elements, X x, Bytes codes, Bytes scales,
                              ffi::Result<Y> y) {
  const auto a = x.dimensions(), b = codes.dimensions(), s = scales.dimensions(), c = y->dimensions();
  if (b[1] != a[1] || mx8::kBlock * s[1] != a[1] || s[0] != b[0] || c[0] != a[0] || c[1] != b[0]) return unfitting();
  const auto* kernel = choose(mx8_choices(), isa);
  if (kernel == nullptr) return unsupported(isa);
  const mx8::Format format = {elements[1] - '0', elements[3] - '0'};
  mx8_matmul(*kernel, pool, format, x.typed_data(), codes.typed_data(), scales.typed_data(), y->typed_data(), a[0], b[0], a[1]);
  return ffi::Error::Success();
}

}  // namespace mlspecqd

XLA_FFI_DEFINE_HANDLER_SYMBOL(mxfp4_matmul, mlspecqd::mxfp4_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<std::string_view>("isa")
                                  .Arg<mlspecqd::X>()
                                  .Arg<mlspecqd::Bytes>()
                                  .Arg<mlspecqd::Bytes>()
                                  .Ret<mlspecqd::Y>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(mx8_matmul, mlspecqd::mx8_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<std::string_view>("isa")
                                  .Attr<std::string_view>("elements")
                                  .Arg<mlspecqd::X>()
                                  .Arg<mlspecqd::Bytes>()
                                  .Arg<mlspecqd::Bytes>()
                                  .Ret<mlspecqd::Y>());

extern "C" const char* mxfp4_matmul_isas() { return mlspecqd::names(mlspecqd::mxfp4_choices()); }
extern "C" const char* mx8_matmul_isas() { return mlspecqd::names(mlspecqd::mx8_choices()); }

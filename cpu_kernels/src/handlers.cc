// The handlers behind XLA's FFI, and the names of the instruction sets that this processor can run.

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "products.h"
#include "put_window.h"
#include "xla/ffi/api/ffi.h"

namespace mlspecqd {

namespace ffi = xla::ffi;

using X = ffi::Buffer<ffi::BF16, 2>;
using Bytes = ffi::Buffer<ffi::U8, 2>;
using Y = ffi::Buffer<ffi::F32, 2>;
using Heads = ffi::Buffer<ffi::BF16, 4>;
using HeadsOut = ffi::Buffer<ffi::F32, 4>;
using Slots = ffi::Buffer<ffi::S32, 2>;
using Slot = ffi::Buffer<ffi::S32, 1>;

static ffi::Error unsupported(std::string_view isa) {
  return ffi::Error::InvalidArgument("this processor cannot run '" + std::string(isa) + "'");
}

static ffi::Error unfitting() { return ffi::Error::InvalidArgument("the shapes do not belong together"); }

static ffi::Error bf16_handler(ffi::ThreadPool pool, std::string_view isa, X x, X w, ffi::Result<Y> y) {
  const auto a = x.dimensions(), b = w.dimensions(), c = y->dimensions();
  if (b[1] != a[1] || c[0] != a[0] || c[1] != b[0]) return unfitting();
  const auto* kernel = choose(bf16_choices(), isa);
  if (kernel == nullptr) return unsupported(isa);
  bf16_matmul(*kernel, pool, x.typed_data(), w.typed_data(), y->typed_data(), a[0], b[0], a[1]);
  return ffi::Error::Success();
}

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

static ffi::Error attention_handler(ffi::ThreadPool pool, std::string_view isa, Heads q, Heads k, Heads v, Slots first, Slots last,
                                    ffi::Result<HeadsOut> y) {
  const auto a = q.dimensions(), b = k.dimensions(), c = v.dimensions(), f = first.dimensions(), l = last.dimensions();
  const auto out = y->dimensions();
  const attention::Shape shape = {a[0], a[1], b[1], a[2], b[2], a[3]};
  const bool windows = f[0] == a[0] && f[1] == a[2] && l[0] == a[0] && l[1] == a[2];
  const bool result = out[0] == a[0] && out[1] == a[2] && out[2] == a[1] && out[3] == a[3];
  if (!std::equal(b.begin(), b.end(), c.begin()) || b[0] != a[0] || b[3] != a[3] || b[1] == 0 || a[1] % b[1] || !windows || !result) {
    return unfitting();
  }
  const auto* kernel = choose(attention_choices(), isa);
  if (kernel == nullptr) return unsupported(isa);
  attention::attention(*kernel, pool, q.typed_data(), k.typed_data(), v.typed_data(), first.typed_data(), last.typed_data(),
                       y->typed_data(), shape);
  return ffi::Error::Success();
}

static ffi::Error put_window_handler(Heads buffer, Slot start, Heads values, ffi::Result<Heads> out) {
  const auto a = buffer.dimensions(), b = values.dimensions();
  if (a[0] != b[0] || a[1] != b[1] || a[3] != b[3] || start.dimensions()[0] != a[0] || out->element_count() != buffer.element_count()) {
    return unfitting();
  }
  if (out->typed_data() != buffer.typed_data()) std::memcpy(out->typed_data(), buffer.typed_data(), buffer.size_bytes());
  put_window(out->typed_data(), start.typed_data(), values.typed_data(), a[0], a[1], a[2], b[2], a[3]);
  return ffi::Error::Success();
}

template <class Choices>
static const char* names(const Choices& choices) {
  static const std::string joined = [&] {
    std::string all;
    for (const auto& choice : choices) {
      if (choice.supported) all += (all.empty() ? "" : ",") + std::string(choice.isa);
    }
    return all;
  }();
  return joined.c_str();
}

}  // namespace mlspecqd

XLA_FFI_DEFINE_HANDLER_SYMBOL(bf16_matmul, mlspecqd::bf16_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<std::string_view>("isa")
                                  .Arg<mlspecqd::X>()
                                  .Arg<mlspecqd::X>()
                                  .Ret<mlspecqd::Y>());

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

XLA_FFI_DEFINE_HANDLER_SYMBOL(attention, mlspecqd::attention_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<std::string_view>("isa")
                                  .Arg<mlspecqd::Heads>()
                                  .Arg<mlspecqd::Heads>()
                                  .Arg<mlspecqd::Heads>()
                                  .Arg<mlspecqd::Slots>()
                                  .Arg<mlspecqd::Slots>()
                                  .Ret<mlspecqd::HeadsOut>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(put_window, mlspecqd::put_window_handler,
                              xla::ffi::Ffi::Bind()
                                  .Arg<mlspecqd::Heads>()
                                  .Arg<mlspecqd::Slot>()
                                  .Arg<mlspecqd::Heads>()
                                  .Ret<mlspecqd::Heads>());

extern "C" const char* bf16_matmul_isas() { return mlspecqd::names(mlspecqd::bf16_choices()); }
extern "C" const char* mxfp4_matmul_isas() { return mlspecqd::names(mlspecqd::mxfp4_choices()); }
extern "C" const char* mx8_matmul_isas() { return mlspecqd::names(mlspecqd::mx8_choices()); }
extern "C" const char* attention_isas() { return mlspecqd::names(mlspecqd::attention_choices()); }

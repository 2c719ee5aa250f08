// The handlers behind XLA's FFI of the kernels that exist for every type of float, and the names of the instruction sets that this
// processor can run. Each .cc file makes a library of some kernels, so that they are compiled side by side and when they are
// needed.

#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "products.h"
#include "xla/ffi/api/ffi.h"

namespace mlspecqd {

namespace ffi = xla::ffi;

template <ffi::DataType type>
struct Stored;  // in which a kernel reads numbers of this type
template <>
struct Stored<ffi::BF16> {
  using Element = Bf16;
};
template <>
struct Stored<ffi::F16> {
  using Element = Half;
};
template <>
struct Stored<ffi::F32> {
  using Element = float;
};

template <ffi::DataType type>
using Matrix = ffi::Buffer<type, 2>;
template <ffi::DataType type>
using Heads = ffi::Buffer<type, 4>;
template <ffi::DataType type>
using Row = ffi::Buffer<type, 1>;
using Y = Matrix<ffi::F32>;
using HeadsOut = Heads<ffi::F32>;
using Slots = Matrix<ffi::S32>;
using Slot = Row<ffi::S32>;

template <ffi::DataType type, size_t rank>
static const typename Stored<type>::Element* elements(const ffi::Buffer<type, rank>& buffer) {
  return reinterpret_cast<const typename Stored<type>::Element*>(buffer.typed_data());
}

static ffi::Error unsupported(std::string_view isa) {
  return ffi::Error::InvalidArgument("this processor cannot run '" + std::string(isa) + "'");
}

static ffi::Error unfitting() { return ffi::Error::InvalidArgument("the shapes do not belong together"); }

template <ffi::DataType type>
static ffi::Error dense_handler(ffi::ThreadPool pool, std::string_view isa, Matrix<type> x, Matrix<type> w, ffi::Result<Y> y) {
  const auto a = x.dimensions(), b = w.dimensions(), c = y->dimensions();
  if (b[1] != a[1] || c[0] != a[0] || c[1] != b[0]) return unfitting();
  const auto* kernel = choose(dense_choices<typename Stored<type>::Element>(), isa);
  if (kernel == nullptr) return unsupported(isa);
  dense_matmul(*kernel, pool, elements(x), elements(w), y->typed_data(), a[0], b[0], a[1]);
  return ffi::Error::Success();
}

template <ffi::DataType type>
static ffi::Error norm_handler(ffi::ThreadPool pool, std::string_view isa, float eps, Matrix<type> x, Row<type> weight,
                               ffi::Result<Matrix<type>> y) {
  using Element = typename Stored<type>::Element;
  const auto a = x.dimensions(), b = weight.dimensions(), c = y->dimensions();
  if (a[1] != b[0] || !std::equal(a.begin(), a.end(), c.begin())) return unfitting();
  const auto* kernel = choose(norm_choices<Element>(), isa);
  if (kernel == nullptr) return unsupported(isa);
  norm::rms_norm(*kernel, pool, elements(x), elements(weight), eps, reinterpret_cast<Element*>(y->typed_data()), a[0], a[1]);
  return ffi::Error::Success();
}

using Thirds = ffi::Buffer<ffi::F32, 3>;

template <ffi::DataType type>
static ffi::Error rotate_handler(ffi::ThreadPool pool, Heads<type> x, Thirds cos, Thirds sin, ffi::Result<Heads<type>> y) {
  using Element = typename Stored<type>::Element;
  const auto a = x.dimensions(), c = cos.dimensions(), s = sin.dimensions(), out = y->dimensions();
  const bool result = out[0] == a[0] && out[1] == a[2] && out[2] == a[1] && out[3] == a[3];
  if (c[0] != a[0] || c[1] != a[1] || 2 * c[2] != a[3] || !std::equal(c.begin(), c.end(), s.begin()) || !result) return unfitting();
  rotary::rotate(pool, elements(x), cos.typed_data(), sin.typed_data(), reinterpret_cast<Element*>(y->typed_data()), a[0], a[1],
                 a[2], a[3]);
  return ffi::Error::Success();
}

template <ffi::DataType type>
static ffi::Error attention_handler(ffi::ThreadPool pool, std::string_view isa, Heads<type> q, Heads<type> k, Heads<type> v,
                                    Slots first, Slots last, ffi::Result<HeadsOut> y) {
  const auto a = q.dimensions(), b = k.dimensions(), c = v.dimensions(), f = first.dimensions(), l = last.dimensions();
  const auto out = y->dimensions();
  const attention::Shape shape = {a[0], a[1], b[1], a[2], b[2], a[3]};
  const bool windows = f[0] == a[0] && f[1] == a[2] && l[0] == a[0] && l[1] == a[2];
  const bool result = out[0] == a[0] && out[1] == a[2] && out[2] == a[1] && out[3] == a[3];
  if (!std::equal(b.begin(), b.end(), c.begin()) || b[0] != a[0] || b[3] != a[3] || b[1] == 0 || a[1] % b[1] || !windows ||
      !result) {
    return unfitting();
  }
  const auto* kernel = choose(attention_choices<typename Stored<type>::Element>(), isa);
  if (kernel == nullptr) return unsupported(isa);
  attention::attention(*kernel, pool, elements(q), elements(k), elements(v), first.typed_data(), last.typed_data(), y->typed_data(),
                       shape);
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

#define MLSPECQD_HANDLERS(name, type) \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(matmul_##name, mlspecqd::dense_handler<xla::ffi::type>, \
                                xla::ffi::Ffi::Bind() \
                                    .Ctx<xla::ffi::ThreadPool>() \
                                    .Attr<std::string_view>("isa") \
                                    .Arg<mlspecqd::Matrix<xla::ffi::type>>() \
                                    .Arg<mlspecqd::Matrix<xla::ffi::type>>() \
                                    .Ret<mlspecqd::Y>()); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(rms_norm_##name, mlspecqd::norm_handler<xla::ffi::type>, \
                                xla::ffi::Ffi::Bind() \
                                    .Ctx<xla::ffi::ThreadPool>() \
                                    .Attr<std::string_view>("isa") \
                                    .Attr<float>("eps") \
                                    .Arg<mlspecqd::Matrix<xla::ffi::type>>() \
                                    .Arg<mlspecqd::Row<xla::ffi::type>>() \
                                    .Ret<mlspecqd::Matrix<xla::ffi::type>>()); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(attention_##name, mlspecqd::attention_handler<xla::ffi::type>, \
                                xla::ffi::Ffi::Bind() \
                                    .Ctx<xla::ffi::ThreadPool>() \
                                    .Attr<std::string_view>("isa") \
                                    .Arg<mlspecqd::Heads<xla::ffi::type>>() \
                                    .Arg<mlspecqd::Heads<xla::ffi::type>>() \
                                    .Arg<mlspecqd::Heads<xla::ffi::type>>() \
                                    .Arg<mlspecqd::Slots>() \
                                    .Arg<mlspecqd::Slots>() \
                                    .Ret<mlspecqd::HeadsOut>()); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(rotate_##name, mlspecqd::rotate_handler<xla::ffi::type>, \
                                xla::ffi::Ffi::Bind() \
                                    .Ctx<xla::ffi::ThreadPool>() \
                                    .Arg<mlspecqd::Heads<xla::ffi::type>>() \
                                    .Arg<mlspecqd::Thirds>() \
                                    .Arg<mlspecqd::Thirds>() \
                                    .Ret<mlspecqd::Heads<xla::ffi::type>>()); \
  extern "C" const char* matmul_##name##_isas() { \
    return mlspecqd::names(mlspecqd::dense_choices<mlspecqd::Stored<xla::ffi::type>::Element>()); \
  } \
  extern "C" const char* rms_norm_##name##_isas() { \
    return mlspecqd::names(mlspecqd::norm_choices<mlspecqd::Stored<xla::ffi::type>::Element>()); \
  } \
  extern "C" const char* attention_##name##_isas() { \
    return mlspecqd::names(mlspecqd::attention_choices<mlspecqd::Stored<xla::ffi::type>::Element>()); \
  }

// The handlers behind XLA's FFI of the kernels that exist for every type of float. Each .cc file makes a library of some kernels,
// so that they are compiled side by side and when they are needed.

#pragma once

#include <algorithm>
#include <cstddef>
#include <string>
#include <string_view>

#include "export.h"
#include "products.h"
#include "xla/ffi/api/ffi.h"

namespace mlspecqd {

namespace ffi = xla::ffi;

template <ffi::DataType type>
struct Stored;
template <>
struct Stored<ffi::BF16> {
  using Type = Bf16;
};
template <>
struct Stored<ffi::F16> {
  using Type = Half;
};
template <>
struct Stored<ffi::F32> {
  using Type = float;
};
template <ffi::DataType type>
using Element = typename Stored<type>::Type;  // in which a kernel reads numbers of this type

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
using UsedRows = Row<ffi::S32>;  // how many of each window
using Experts = Row<ffi::S32>;   // whose weight each row is multiplied by, or none at all where there is one weight
using Thirds = ffi::Buffer<ffi::F32, 3>;

inline constexpr char kIsa[] = "isa", kEps[] = "eps", kOffset[] = "offset", kElements[] = "elements", kScale[] = "scale",
                      kCap[] = "cap";
using Isa = ffi::Attr<std::string_view, kIsa>;  // of the instruction set; the best for an empty one
using Eps = ffi::Attr<float, kEps>;
using Offset = ffi::Attr<float, kOffset>;
using Scale = ffi::Attr<float, kScale>;                   // of scores
using Cap = ffi::Attr<float, kCap>;                       // of scores; 0 is none
using Elements = ffi::Attr<std::string_view, kElements>;  // the format's exponent and mantissa bits, as in "e4m3"

template <ffi::DataType type, size_t rank>
const Element<type>* elements(const ffi::Buffer<type, rank>& buffer) {
  return reinterpret_cast<const Element<type>*>(buffer.typed_data());
}

inline ffi::Error unsupported(std::string_view isa) {
  return ffi::Error::InvalidArgument("this processor cannot run '" + std::string(isa) + "'");
}

// Whether m rows are as many equal windows as `used` tells of.
inline bool are_windows(int64_t m, UsedRows used) {
  const int64_t windows = used.dimensions()[0];
  return windows == 0 ? m == 0 : m % windows == 0;
}

// Whether a weight of so many rows gives results of n columns for m rows, by itself or as that of several experts.
inline bool are_outputs(int64_t m, int64_t n, int64_t rows, Experts experts) {
  const int64_t given = experts.dimensions()[0];
  return given == 0 ? rows == n : given == m && n != 0 && rows % n == 0;
}

inline Used of(UsedRows used) { return {used.typed_data(), used.dimensions()[0]}; }

// The same of a product, whose weight has so many rows for its n outputs.
inline Used of(UsedRows used, Experts experts, int64_t n, int64_t rows) {
  if (experts.dimensions()[0] == 0) return of(used);
  return {used.typed_data(), used.dimensions()[0], experts.typed_data(), rows / n};
}

inline ffi::Error unfitting() { return ffi::Error::InvalidArgument("the shapes do not belong together"); }

template <ffi::DataType type>
ffi::Error dense_handler(ffi::ThreadPool pool, Isa isa, Matrix<type> x, Matrix<type> w, UsedRows used, Experts experts,
                         ffi::Result<Y> y) {
  const auto a = x.dimensions(), b = w.dimensions(), c = y->dimensions();
  if (b[1] != a[1] || c[0] != a[0] || !are_outputs(a[0], c[1], b[0], experts) || !are_windows(a[0], used)) return unfitting();
  const auto* kernel = choose(dense_choices<Element<type>>(), *isa);
  if (kernel == nullptr) return unsupported(*isa);
  dense_matmul(*kernel, pool, elements(x), elements(w), y->typed_data(), a[0], c[1], a[1], of(used, experts, c[1], b[0]));
  return ffi::Error::Success();
}

template <ffi::DataType type>
ffi::Error norm_handler(ffi::ThreadPool pool, Isa isa, Eps eps, Offset offset, Matrix<type> x, Row<type> weight, UsedRows used,
                        ffi::Result<Matrix<type>> y) {
  const auto a = x.dimensions(), b = weight.dimensions(), c = y->dimensions();
  if (a[1] != b[0] || !std::equal(a.begin(), a.end(), c.begin()) || !are_windows(a[0], used)) return unfitting();
  const auto* kernel = choose(norm_choices<Element<type>>(), *isa);
  if (kernel == nullptr) return unsupported(*isa);
  norm::norm(*kernel, pool, elements(x), elements(weight), static_cast<const Element<type>*>(nullptr), {*eps, *offset},
             reinterpret_cast<Element<type>*>(y->typed_data()), a[0], a[1], of(used));
  return ffi::Error::Success();
}

template <ffi::DataType type>
ffi::Error layer_norm_handler(ffi::ThreadPool pool, Isa isa, Eps eps, Offset offset, Matrix<type> x, Row<type> weight,
                              Row<type> bias, UsedRows used, ffi::Result<Matrix<type>> y) {
  const auto a = x.dimensions(), b = weight.dimensions(), c = bias.dimensions(), d = y->dimensions();
  if (a[1] != b[0] || a[1] != c[0] || !std::equal(a.begin(), a.end(), d.begin()) || !are_windows(a[0], used)) return unfitting();
  const auto* kernel = choose(norm_choices<Element<type>>(), *isa);
  if (kernel == nullptr) return unsupported(*isa);
  norm::norm(*kernel, pool, elements(x), elements(weight), elements(bias), {*eps, *offset, true},
             reinterpret_cast<Element<type>*>(y->typed_data()), a[0], a[1], of(used));
  return ffi::Error::Success();
}

template <ffi::DataType type>
ffi::Error rotate_handler(ffi::ThreadPool pool, Heads<type> x, Thirds cos, Thirds sin, UsedRows used, ffi::Result<Heads<type>> y) {
  const auto a = x.dimensions(), c = cos.dimensions(), s = sin.dimensions(), out = y->dimensions();
  const bool result = out[0] == a[0] && out[1] == a[2] && out[2] == a[1] && out[3] == a[3] && used.dimensions()[0] == a[0];
  if (c[0] != a[0] || c[1] != a[1] || 2 * c[2] != a[3] || !std::equal(c.begin(), c.end(), s.begin()) || !result) return unfitting();
  rotary::rotate(pool, elements(x), cos.typed_data(), sin.typed_data(), reinterpret_cast<Element<type>*>(y->typed_data()), a[0],
                 a[1], a[2], a[3], of(used));
  return ffi::Error::Success();
}

template <ffi::DataType type>
ffi::Error attention_handler(ffi::ThreadPool pool, Isa isa, Scale scale, Cap cap, Heads<type> q, Heads<type> k, Heads<type> v,
                             Slots first, Slots last, Row<ffi::F32> sinks, UsedRows used, ffi::Result<HeadsOut> y) {
  const auto a = q.dimensions(), b = k.dimensions(), c = v.dimensions(), f = first.dimensions(), l = last.dimensions();
  const auto out = y->dimensions();
  const attention::Shape shape = {a[0], a[1], b[1], a[2], b[2], {a[3], c[3]}};
  const bool windows = f[0] == a[0] && f[1] == a[2] && l[0] == a[0] && l[1] == a[2] && used.dimensions()[0] == a[0];
  const bool result = out[0] == a[0] && out[1] == a[2] && out[2] == a[1] && out[3] == c[3];
  const bool cache = std::equal(b.begin(), b.begin() + 3, c.begin()) && b[0] == a[0] && b[3] == a[3] && b[1] != 0;
  if (!cache || a[1] % b[1] || sinks.dimensions()[0] != a[1] || !windows || !result) return unfitting();
  const auto* kernel = choose(attention_choices<Element<type>>(), *isa);
  if (kernel == nullptr) return unsupported(*isa);
  attention::attention(*kernel, pool, elements(q), elements(k), elements(v), first.typed_data(), last.typed_data(),
                       sinks.typed_data(), y->typed_data(), {*scale, *cap}, shape, of(used));
  return ffi::Error::Success();
}

}  // namespace mlspecqd

// What there is for each type of float.
#define MLSPECQD_OF_FLOATS(name, type) \
  MLSPECQD_PRODUCT(matmul_##name, dense_handler<xla::ffi::type>, dense_choices<mlspecqd::Element<xla::ffi::type>>) \
  MLSPECQD_PRODUCT(rms_norm_##name, norm_handler<xla::ffi::type>, norm_choices<mlspecqd::Element<xla::ffi::type>>) \
  MLSPECQD_PRODUCT(layer_norm_##name, layer_norm_handler<xla::ffi::type>, norm_choices<mlspecqd::Element<xla::ffi::type>>) \
  MLSPECQD_PRODUCT(attention_##name, attention_handler<xla::ffi::type>, attention_choices<mlspecqd::Element<xla::ffi::type>>) \
  MLSPECQD_HANDLER(rotate_##name, rotate_handler<xla::ffi::type>)

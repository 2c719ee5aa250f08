// The products of weights in integers or E2M1 whose scales are numbers, by activations in bfloat16.

#include "handlers.h"

namespace mlspecqd {

using X = Matrix<ffi::BF16>;
using Bytes = Matrix<ffi::U8>;
using Halves = Matrix<ffi::F16>;
using Floats = Matrix<ffi::F32>;

// Whether x, codes of `bits`, the rows in use and the result belong together.
static bool fits(X x, Bytes codes, UsedRows used, Experts experts, ffi::Result<Y>& y, int bits) {
  const auto a = x.dimensions(), b = codes.dimensions(), c = y->dimensions();
  const bool whole = a[1] % four_bits::kBlock == 0 && 8 * b[1] == bits * a[1];
  return whole && c[0] == a[0] && are_outputs(a[0], c[1], b[0], experts) && are_windows(a[0], used);
}

// Of how many parts (2^this) a group of [N, G] scales is: the least power of two with which G of them suffice.
static int shift_of(int64_t parts, int64_t groups) {
  int shift = 0;
  while (groups << shift < parts) ++shift;
  return shift;
}

static int64_t blocks_of(int64_t blocks, int64_t groups) { return int64_t{1} << shift_of(blocks, groups); }

static ffi::Error nvfp4_handler(ffi::ThreadPool pool, Isa isa, X x, Bytes packed, Bytes scales, UsedRows used, Experts experts,
                                ffi::Result<Y> y) {
  const auto a = x.dimensions(), b = packed.dimensions(), s = scales.dimensions(), c = y->dimensions();
  if (!fits(x, packed, used, experts, y, 4) || 16 * s[1] != a[1] || s[0] != b[0]) return unfitting();
  const auto* kernel = choose(four_bits_choices<four_bits::Nvfp4>(), *isa);
  if (kernel == nullptr) return unsupported(*isa);
  const four_bits::Weight w = {packed.typed_data(), scales.typed_data(), nullptr, b[0], 1};
  four_bits_matmul(*kernel, pool, x.typed_data(), w, y->typed_data(), a[0], c[1], a[1], of(used, experts, c[1], b[0]));
  return ffi::Error::Success();
}

static ffi::Error int4_handler(ffi::ThreadPool pool, Isa isa, X x, Bytes packed, Halves scales, UsedRows used, Experts experts,
                               ffi::Result<Y> y) {
  const auto a = x.dimensions(), b = packed.dimensions(), s = scales.dimensions(), c = y->dimensions();
  if (!fits(x, packed, used, experts, y, 4) || s[1] == 0 || s[0] != b[0]) return unfitting();
  const auto* kernel = choose(four_bits_choices<four_bits::Int4>(), *isa);
  if (kernel == nullptr) return unsupported(*isa);
  const four_bits::Weight w = {packed.typed_data(), scales.untyped_data(), nullptr, b[0],
                               blocks_of(a[1] / four_bits::kBlock, s[1])};
  four_bits_matmul(*kernel, pool, x.typed_data(), w, y->typed_data(), a[0], c[1], a[1], of(used, experts, c[1], b[0]));
  return ffi::Error::Success();
}

static ffi::Error uint4_handler(ffi::ThreadPool pool, Isa isa, X x, Bytes packed, Halves scales, Halves minima, UsedRows used,
                                Experts experts, ffi::Result<Y> y) {
  const auto a = x.dimensions(), b = packed.dimensions(), s = scales.dimensions(), t = minima.dimensions(), c = y->dimensions();
  if (!fits(x, packed, used, experts, y, 4) || s[1] == 0 || s[0] != b[0] || t[0] != s[0] || t[1] != s[1]) return unfitting();
  const auto* kernel = choose(four_bits_choices<four_bits::Uint4>(), *isa);
  if (kernel == nullptr) return unsupported(*isa);
  const auto* least = static_cast<const uint16_t*>(minima.untyped_data());
  const four_bits::Weight w = {packed.typed_data(), scales.untyped_data(), least, b[0], blocks_of(a[1] / four_bits::kBlock, s[1])};
  four_bits_matmul(*kernel, pool, x.typed_data(), w, y->typed_data(), a[0], c[1], a[1], of(used, experts, c[1], b[0]));
  return ffi::Error::Success();
}

static ffi::Error int8_handler(ffi::ThreadPool pool, Isa isa, X x, Bytes codes, Floats scales, UsedRows used, Experts experts,
                               ffi::Result<Y> y) {
  const auto a = x.dimensions(), b = codes.dimensions(), s = scales.dimensions(), c = y->dimensions();
  if (!fits(x, codes, used, experts, y, 8) || s[1] != 1 || s[0] != b[0]) return unfitting();
  const auto* kernel = choose(int8_choices<int8::Rows>(), *isa);
  if (kernel == nullptr) return unsupported(*isa);
  const int8::Weight w = {codes.typed_data(), scales.typed_data(), nullptr, b[0], 0};
  int8_matmul(*kernel, pool, x.typed_data(), w, y->typed_data(), a[0], c[1], a[1], of(used, experts, c[1], b[0]));
  return ffi::Error::Success();
}

static ffi::Error int8_groups_handler(ffi::ThreadPool pool, Isa isa, X x, Bytes codes, Halves scales, UsedRows used,
                                      Experts experts, ffi::Result<Y> y) {
  const auto a = x.dimensions(), b = codes.dimensions(), s = scales.dimensions(), c = y->dimensions();
  if (!fits(x, codes, used, experts, y, 8) || s[1] == 0 || s[0] != b[0]) return unfitting();
  const auto* kernel = choose(int8_choices<int8::Groups>(), *isa);
  if (kernel == nullptr) return unsupported(*isa);
  const int8::Weight w = {codes.typed_data(), scales.untyped_data(), nullptr, b[0], shift_of(a[1] / int8::kHalf, s[1])};
  int8_matmul(*kernel, pool, x.typed_data(), w, y->typed_data(), a[0], c[1], a[1], of(used, experts, c[1], b[0]));
  return ffi::Error::Success();
}

static ffi::Error uint8_handler(ffi::ThreadPool pool, Isa isa, X x, Bytes codes, Halves scales, Halves minima, UsedRows used,
                                Experts experts, ffi::Result<Y> y) {
  const auto a = x.dimensions(), b = codes.dimensions(), s = scales.dimensions(), t = minima.dimensions(), c = y->dimensions();
  if (!fits(x, codes, used, experts, y, 8) || s[1] == 0 || s[0] != b[0] || t[0] != s[0] || t[1] != s[1]) return unfitting();
  const auto* kernel = choose(int8_choices<int8::Unsigned>(), *isa);
  if (kernel == nullptr) return unsupported(*isa);
  const auto* least = static_cast<const uint16_t*>(minima.untyped_data());
  const int8::Weight w = {codes.typed_data(), scales.untyped_data(), least, b[0], shift_of(a[1] / int8::kHalf, s[1])};
  int8_matmul(*kernel, pool, x.typed_data(), w, y->typed_data(), a[0], c[1], a[1], of(used, experts, c[1], b[0]));
  return ffi::Error::Success();
}

}  // namespace mlspecqd

MLSPECQD_PRODUCT(nvfp4_matmul, nvfp4_handler, four_bits_choices<mlspecqd::four_bits::Nvfp4>)
MLSPECQD_PRODUCT(int4_matmul, int4_handler, four_bits_choices<mlspecqd::four_bits::Int4>)
MLSPECQD_PRODUCT(uint4_matmul, uint4_handler, four_bits_choices<mlspecqd::four_bits::Uint4>)
MLSPECQD_PRODUCT(int8_matmul, int8_handler, int8_choices<mlspecqd::int8::Rows>)
MLSPECQD_PRODUCT(int8_groups_matmul, int8_groups_handler, int8_choices<mlspecqd::int8::Groups>)
MLSPECQD_PRODUCT(uint8_matmul, uint8_handler, int8_choices<mlspecqd::int8::Unsigned>)

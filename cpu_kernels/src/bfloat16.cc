// What there is for bfloat16, and what depends on positions, whatever the type of the numbers: angles, and writing a window into a
// cache.

#include <cstring>

#include "handlers.h"
#include "put_window.h"

namespace mlspecqd {

static ffi::Error angles_handler(Slots positions, Row<ffi::F32> frequencies, ffi::Result<Thirds> cos, ffi::Result<Thirds> sin) {
  const auto a = positions.dimensions(), f = frequencies.dimensions(), c = cos->dimensions(), s = sin->dimensions();
  if (c[0] != a[0] || c[1] != a[1] || c[2] != f[0] || !std::equal(c.begin(), c.end(), s.begin())) return unfitting();
  rotary::angles(positions.typed_data(), frequencies.typed_data(), cos->typed_data(), sin->typed_data(), a[0] * a[1], f[0]);
  return ffi::Error::Success();
}

static ffi::Error put_window_handler(ffi::AnyBuffer buffer, Slot start, ffi::AnyBuffer values, UsedRows used,
                                     ffi::Result<ffi::AnyBuffer> out) {
  const auto a = buffer.dimensions(), b = values.dimensions();
  const bool types = buffer.element_type() == values.element_type() && buffer.element_type() == out->element_type();
  if (!types || a.size() != 4 || b.size() != 4 || a[0] != b[0] || a[1] != b[1] || a[3] != b[3] || start.dimensions()[0] != a[0] ||
      used.dimensions()[0] != a[0] || out->element_count() != buffer.element_count()) {
    return unfitting();
  }
  if (out->untyped_data() != buffer.untyped_data()) std::memcpy(out->untyped_data(), buffer.untyped_data(), buffer.size_bytes());
  const auto row_bytes = a[3] * static_cast<int64_t>(ffi::ByteWidth(buffer.element_type()));
  put_window(static_cast<char*>(out->untyped_data()), start.typed_data(), static_cast<const char*>(values.untyped_data()), a[0],
             a[1], a[2], b[2], row_bytes, of(used));
  return ffi::Error::Success();
}

}  // namespace mlspecqd

MLSPECQD_HANDLER(angles, angles_handler)
MLSPECQD_HANDLER(put_window, put_window_handler)
MLSPECQD_OF_FLOATS(bfloat16, BF16)

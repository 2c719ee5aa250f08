// What makes a handler a function of a library: XLA calls it with what its parameters say, and no exception leaves it.

#pragma once

#include <algorithm>
#include <array>
#include <new>
#include <string_view>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace mlspecqd {

namespace ffi = xla::ffi;

// What XLA hands over for a handler's parameter.
template <class Parameter>
struct Bound {
  template <class Binding>
  static auto to(Binding&& binding) {
    return std::move(binding).template Arg<Parameter>();
  }
};
template <>
struct Bound<ffi::ThreadPool> {
  template <class Binding>
  static auto to(Binding&& binding) {
    return std::move(binding).template Ctx<ffi::ThreadPool>();
  }
};
template <class T, const char* name>
struct Bound<ffi::Attr<T, name>> {
  template <class Binding>
  static auto to(Binding&& binding) {
    return std::move(binding).template Attr<T>(name);
  }
};
template <class T>
struct Bound<ffi::Result<T>> {
  template <class Binding>
  static auto to(Binding&& binding) {
    return std::move(binding).template Ret<T>();
  }
};

template <auto handler>
struct Export;  // a handler as XLA calls it, by its parameters

template <class... Parameters, ffi::Error (*handler)(Parameters...)>
struct Export<handler> {
  // XLA's interface, which is C's, knows no exceptions. The texts are short enough to need no memory.
  static ffi::Error call(Parameters... parameters) noexcept {
    try {
      return handler(std::move(parameters)...);
    } catch (const std::bad_alloc&) {
      return ffi::Error(ffi::ErrorCode::kResourceExhausted, "out of memory");
    } catch (...) {
      return ffi::Error::Internal("C++ exception");
    }
  }

  static XLA_FFI_Error* run(XLA_FFI_CallFrame* frame) {
    static const auto* bound = bind<Parameters...>(ffi::Ffi::Bind()).To(&call).release();
    return bound->Call(frame);
  }

 private:
  template <class First, class... Rest, class Binding>
  static auto bind(Binding&& binding) {
    if constexpr (sizeof...(Rest) == 0) {
      return Bound<First>::to(std::move(binding));
    } else {
      return bind<Rest...>(Bound<First>::to(std::move(binding)));
    }
  }
};

// The names of the instruction sets for which there is a kernel that this processor can run, by commas.
template <auto choices>
const char* names() noexcept {
  static const auto joined = [] {
    std::array<char, 64> all = {};
    char* end = all.data();
    for (const auto& choice : choices()) {
      if (!choice.supported) continue;
      if (end != all.data()) *end++ = ',';
      end = std::copy(choice.isa.begin(), choice.isa.end(), end);
    }
    return all;
  }();
  return joined.data();
}

}  // namespace mlspecqd

// A handler under the name by which it is looked up.
#define MLSPECQD_HANDLER(name, handler) \
  extern "C" XLA_FFI_Error* name(XLA_FFI_CallFrame* frame) { return mlspecqd::Export<&mlspecqd::handler>::run(frame); }

// The same of a product that is there for several instruction sets, and the function that names them.
#define MLSPECQD_PRODUCT(name, handler, choices) \
  MLSPECQD_HANDLER(name, handler) \
  extern "C" const char* name##_isas() { return mlspecqd::names<&mlspecqd::choices>(); }

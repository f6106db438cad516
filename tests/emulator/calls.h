// How Python calls a launcher: an array of Args becomes the launcher's own parameters, and its Status a code
// and a message.
#pragma once
#include <array>
#include <optional>
#include <stdexcept>
#include <utility>

#include "conv_problem.h"
#include "emulator.h"
#include "tensor.h"

namespace emu {

struct Arg {  // the same as in emulator.py
  vtok::Tensor tensor;
  const int64_t* integers;
  const double* reals;
  int64_t count, integer;
  double real;
  int present;
};

template <class P>
struct Read {  // numbers and enums
  static P from(const Arg& a) {
    if constexpr (std::is_floating_point_v<P>)
      return static_cast<P>(a.real);
    else
      return static_cast<P>(a.integer);
  }
};
template <>
struct Read<vtok::Tensor> {
  static vtok::Tensor from(const Arg& a) { return a.tensor; }
};
template <class T>
struct Read<T*> {  // a stream
  static T* from(const Arg&) { return nullptr; }
};
template <class T>
struct Read<std::optional<T>> {
  static std::optional<T> from(const Arg& a) {
    return a.present ? std::optional<T>(Read<T>::from(a)) : std::nullopt;
  }
};
template <class T>
T item(const Arg& a, int64_t i) {
  if constexpr (std::is_floating_point_v<T>)
    return static_cast<T>(a.reals[i]);
  else
    return static_cast<T>(a.integers[i]);
}
template <class T>
struct Read<std::vector<T>> {
  static std::vector<T> from(const Arg& a) {
    std::vector<T> v(a.count);
    for (int64_t i = 0; i < a.count; ++i) v[i] = item<T>(a, i);
    return v;
  }
};
template <class T, size_t N>
struct Read<std::array<T, N>> {
  static std::array<T, N> from(const Arg& a) {
    if (a.count != int64_t(N))
      throw std::runtime_error("expected " + std::to_string(N) + " numbers, got " + std::to_string(a.count));
    std::array<T, N> v;
    for (size_t i = 0; i < N; ++i) v[i] = item<T>(a, i);
    return v;
  }
};

// Its numbers in the order of Python's Geometry, in one row.
template <>
struct Read<vtok::ConvGeometry> {
  static vtok::ConvGeometry from(const Arg& a) {
    if (a.count != 19) throw std::runtime_error("expected 19 numbers, got " + std::to_string(a.count));
    vtok::ConvGeometry g;
    const int64_t* at = a.integers;
    for (int& n : g.stride) n = int(*at++);
    for (int& n : g.dilation) n = int(*at++);
    g.groups = int(*at++);
    for (int64_t& n : g.pad) n = *at++;
    g.time_mode = static_cast<vtok::PadMode>(*at++);
    g.spatial_mode = static_cast<vtok::PadMode>(*at++);
    for (int& n : g.upsample) n = int(*at++);
    g.upsample_first_frame_once = *at != 0;
    return g;
  }
};

int answer(const vtok::Status& status, char* message, size_t room);

template <class... P>
int call(vtok::Status (*launcher)(P...), const Arg* args, int count, char* message, size_t room) {
  if (count != int(sizeof...(P)))
    return answer(vtok::Status::Invalid("expected " + std::to_string(sizeof...(P)) + " arguments, got " +
                                        std::to_string(count)),
                  message, room);
  try {
    return [&]<size_t... I>(std::index_sequence<I...>) {
      return answer(launcher(Read<std::remove_cvref_t<P>>::from(args[I])...), message, room);
    }(std::index_sequence_for<P...>());
  } catch (const std::exception& e) {
    return answer(vtok::Status::Internal(e.what()), message, room);
  }
}

}  // namespace emu

#define EMU_EXPORT(name, ...)                                                                   \
  extern "C" int emu_call_##name(const emu::Arg* args, int count, char* message, size_t room) { \
    return emu::call(__VA_ARGS__, args, count, message, room);                                  \
  }

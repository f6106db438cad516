// How errors come back: every launcher returns a Status, and only bindings.cpp turns one into a Python
// exception.
#pragma once
#include <string>
#include <utility>

namespace vtok {

enum class Code { ok, invalid, unsupported, out_of_memory, internal };

struct Status {
  Code code = Code::ok;
  std::string message;

  bool ok() const { return code == Code::ok; }
  static Status Ok() { return {}; }
  static Status Invalid(std::string m) { return {Code::invalid, std::move(m)}; }  // ValueError
  // NotImplementedError
  static Status Unsupported(std::string m) { return {Code::unsupported, std::move(m)}; }
  static Status OutOfMemory(std::string m) { return {Code::out_of_memory, std::move(m)}; }  // MemoryError
  static Status Internal(std::string m) { return {Code::internal, std::move(m)}; }          // RuntimeError
};

}  // namespace vtok

#define VTOK_RETURN_IF_ERROR(expr)             \
  do {                                         \
    ::vtok::Status vtok_status = (expr);       \
    if (!vtok_status.ok()) return vtok_status; \
  } while (0)

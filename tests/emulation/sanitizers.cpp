// What the compiler's other checks find in a kernel becomes a fault of the launch: -fsanitize=alignment,bounds,...
// calls the functions below in place of libubsan's, and AddressSanitizer hands over its report.
#include <cstdio>
#include <cstdlib>
#include <sstream>

#include "engine.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace {

using emulation::Where;

// As the compiler lays them out.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
struct TypeDescriptor {
  uint16_t kind, info;
  char name[1];
};
struct TypeMismatch {
  SourceLocation where;
  const TypeDescriptor* type;
  unsigned char log_alignment, check;
};
struct OutOfBounds {
  SourceLocation where;
  const TypeDescriptor *array_type, *index_type;
};
struct Overflow {
  SourceLocation where;
  const TypeDescriptor* type;
};
struct Shift {
  SourceLocation where;
  const TypeDescriptor *left, *right;
};

void found(const std::string& what, const SourceLocation& where) {
  const Where place{where.file, int(where.line)};
  if (emulation::current != nullptr) emulation::fault(what, place);
  std::fprintf(stderr, "host code of an emulated kernel: %s%s\n", what.c_str(), emulation::at_place(place).c_str());
  std::abort();
}

}  // namespace

#define HANDLER extern "C" __attribute__((used, visibility("hidden"))) void

HANDLER __ubsan_handle_type_mismatch_v1(TypeMismatch* data, uintptr_t address) {
  const unsigned alignment = 1u << data->log_alignment;
  found("misaligned address: " + std::string(data->type->name) + " at an address that is " +
            std::to_string(address % alignment) + " modulo " + std::to_string(alignment),
        data->where);
}
HANDLER __ubsan_handle_out_of_bounds(OutOfBounds* data, uintptr_t index) {
  found("out of bounds: index " + std::to_string(int64_t(index)) + " of " + data->array_type->name, data->where);
}
HANDLER __ubsan_handle_add_overflow(Overflow* data, uintptr_t, uintptr_t) {
  found("overflow of a signed sum of " + std::string(data->type->name), data->where);
}
HANDLER __ubsan_handle_sub_overflow(Overflow* data, uintptr_t, uintptr_t) {
  found("overflow of a signed difference of " + std::string(data->type->name), data->where);
}
HANDLER __ubsan_handle_mul_overflow(Overflow* data, uintptr_t, uintptr_t) {
  found("overflow of a signed product of " + std::string(data->type->name), data->where);
}
HANDLER __ubsan_handle_negate_overflow(Overflow* data, uintptr_t) {
  found("overflow of the negation of " + std::string(data->type->name), data->where);
}
HANDLER __ubsan_handle_divrem_overflow(Overflow* data, uintptr_t, uintptr_t) {
  found("division by zero, or overflow of a division, of " + std::string(data->type->name), data->where);
}
HANDLER __ubsan_handle_shift_out_of_bounds(Shift* data, uintptr_t, uintptr_t count) {
  found("shift of " + std::string(data->left->name) + " by " + std::to_string(int64_t(count)), data->where);
}

#ifdef __SANITIZE_ADDRESS__
namespace {

// Of the report: what was done where, and the innermost lines of the kernel.
void take_report(const char* report) {
  if (emulation::running == nullptr || !emulation::running->fault.empty()) return;
  std::istringstream lines(report);
  std::string line, text = "out of bounds (AddressSanitizer):";
  int frames = 0;
  while (std::getline(lines, line)) {
    const size_t error = line.find("ERROR: AddressSanitizer: ");
    if (error != std::string::npos) text += " " + line.substr(error + 25, line.find(" on address", error) - error - 25);
    if (line.compare(0, 7, "READ of") == 0 || line.compare(0, 8, "WRITE of") == 0)
      text += ", " + line.substr(0, line.find(" at 0x"));
    const size_t slash = line.rfind('/');
    const bool has_source = slash != std::string::npos && line.find(".so+", slash) == std::string::npos;
    if (line.compare(0, 5, "    #") == 0 && has_source && frames++ < 2)
      text += (frames == 1 ? " at " : " in ") + line.substr(slash + 1);
  }
  const auto address = reinterpret_cast<uintptr_t>(__asan_get_report_address());
  if (emulation::current != nullptr && emulation::in_shared_memory(address)) {
    const emulation::Block& block = *emulation::current->block;
    text += ", shared memory at byte " + std::to_string(int64_t(address) - int64_t(uintptr_t(block.shared))) + " of " +
            std::to_string(block.shared_bytes);
  }
  if (emulation::current != nullptr) text += ", by " + emulation::thread_name(*emulation::current);
  emulation::running->fault = text;  // the runtime holds its locks here: the scheduler stops the launch
}

const bool kReportsAreTaken = [] {
  __asan_set_error_report_callback(take_report);
  return true;
}();

}  // namespace
#endif

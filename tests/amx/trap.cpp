// Machine code with tile instructions on a processor that refuses them: a handler of SIGILL decodes the instruction and
// lets the model (tiles.h) compute it. So the code that the compiler makes of csrc/cpu/amx.h runs everywhere, as it is.
//
// Where Linux has granted the tiles, nothing is refused, and the processor computes. A signal at anything but a tile
// instruction goes to the handler that was there before.
#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>

#include "tiles.h"

namespace {

constexpr int kRegisters[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

struct Memory {
  char* address;
  int64_t stride;  // the scaled index, which the instructions on tiles add from row to row
  int length;      // of SIB and displacement
};

// `at` is the byte after ModRM; the instruction ends with the displacement.
Memory decode_memory(const unsigned char* at, int mod, int rm, int high_base, int high_index, const greg_t* registers) {
  Memory memory{nullptr, 0, 0};
  int base = rm | high_base;
  bool has_base = !(mod == 0 && rm == 5);
  if (rm == 4) {
    const int scale = at[0] >> 6, index = (at[0] >> 3 & 7) | high_index;
    base = (at[0] & 7) | high_base;
    has_base = !(mod == 0 && (at[0] & 7) == 5);
    if (index != 4) memory.stride = int64_t(registers[kRegisters[index]]) << scale;
    memory.length = 1;
  }
  int64_t displacement = 0;
  if (mod == 1) {
    displacement = static_cast<signed char>(at[memory.length]);
    memory.length += 1;
  } else if (mod == 2 || !has_base) {
    int32_t wide;
    std::memcpy(&wide, at + memory.length, 4);
    displacement = wide, memory.length += 4;
  }
  int64_t address = displacement;
  if (has_base)
    address += registers[kRegisters[base]];
  else if (rm == 5)
    address += reinterpret_cast<intptr_t>(at) + memory.length;  // relative to the next instruction
  memory.address = reinterpret_cast<char*>(address);
  return memory;
}

// Returns the length of the instruction, or 0 where it is not one of the model's.
int compute(const unsigned char* at, const greg_t* registers) {
  enum Prefix { kNone, k66, kF3, kF2 };
  if (at[0] != 0xc4 || (at[1] & 31) != 2 || (at[2] & 0x84) != 0) return 0;  // VEX of three bytes, 0F38, W0, 128 bits
  const int opcode = at[3], mod = at[4] >> 6, reg = at[4] >> 3 & 7, rm = at[4] & 7, prefix = at[2] & 3;
  const int third = ~at[2] >> 3 & 15;
  const auto memory = [&] {
    return decode_memory(at + 5, mod, rm, at[1] & 0x20 ? 0 : 8, at[1] & 0x40 ? 0 : 8, registers);
  };
  amx_model::Tiles& tiles = amx_model::tiles();
  if (opcode == 0x49 && prefix == kNone && at[4] == 0xc0) return tiles.release(), 5;
  if (opcode == 0x49 && prefix == kNone && mod != 3 && reg == 0) {
    const Memory from = memory();
    tiles.load_configuration(from.address + from.stride);
    return 5 + from.length;
  }
  if (opcode == 0x49 && prefix == kF2 && mod == 3 && rm == 0) return tiles.zero(reg), 5;
  if (opcode == 0x4b && (prefix == kF2 || prefix == kF3) && mod != 3 && rm == 4) {
    const Memory rows = memory();
    if (prefix == kF2)
      tiles.load(reg, rows.address, rows.stride);
    else
      tiles.store(reg, rows.address, rows.stride);
    return 5 + rows.length;
  }
  if (opcode == 0x5c && prefix == kF3 && mod == 3) return tiles.multiply_add(reg, rm, third), 5;
  return 0;
}

struct sigaction former;

void on_illegal_instruction(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const int length = compute(reinterpret_cast<const unsigned char*>(registers[REG_RIP]), registers);
  if (length == 0) sigaction(SIGILL, &former, nullptr);  // the instruction is tried again
  registers[REG_RIP] += length;
}

const bool installed = [] {
  struct sigaction action = {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO;
  return sigaction(SIGILL, &action, &former) == 0;
}();

}  // namespace

// A kernel of the emulator's own tests (selftest.cu), by name.
#pragma once
#include <map>
#include <string>

namespace emulation {

struct SelfTestArguments {
  const void* input = nullptr;
  void* output = nullptr;
  int n = 0;
};
using SelfTest = void (*)(SelfTestArguments);
const std::map<std::string, SelfTest>& self_tests();

}  // namespace emulation

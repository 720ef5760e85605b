// Runs an AOTInductor package made by `effkernels export --format aoti`, without Python.
//
//   run_package [--device cpu|cuda] [--library FILE] PACKAGE INPUT N C H W OUTPUT
//
// INPUT holds N x C x H x W float32 values in the order of memory, OUTPUT gets the float32 results the same way; the
// package may compute in another dtype. The library of the fused operators has to be loaded before the package is: by
// default it is the one beside the package, where there is one.
#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

namespace {

struct Arguments {
  std::string device = "cpu";
  std::string library;
  std::string package;
  std::string input;
  std::string output;
  std::vector<int64_t> shape;
};

constexpr const char* kUsage = "usage: run_package [--device cpu|cuda] [--library FILE] PACKAGE INPUT N C H W OUTPUT";

int64_t size_of(const std::string& text) {
  size_t read = 0;
  int64_t value = 0;
  try {
    value = std::stoll(text, &read);
  } catch (const std::logic_error&) {
    read = 0;
  }
  if (read != text.size() || value < 1) throw std::invalid_argument("'" + text + "' is not a size; " + kUsage);
  return value;
}

Arguments parse(const std::vector<std::string>& words) {
  Arguments found;
  std::vector<std::string> rest;
  for (size_t i = 0; i < words.size(); ++i) {
    if (words[i] == "--device" && i + 1 < words.size()) {
      found.device = words[++i];
    } else if (words[i] == "--library" && i + 1 < words.size()) {
      found.library = words[++i];
    } else {
      rest.push_back(words[i]);
    }
  }
  if (rest.size() != 7) throw std::invalid_argument(kUsage);
  if (found.device != "cpu" && found.device != "cuda") {
    throw std::invalid_argument("--device " + found.device + "; allowed: cpu, cuda");
  }
  found.package = rest[0];
  found.input = rest[1];
  for (size_t i = 2; i < 6; ++i) found.shape.push_back(size_of(rest[i]));
  found.output = rest[6];
  if (found.library.empty()) {
    const auto beside = std::filesystem::absolute(found.package).parent_path() / "libeffkernels.so";
    if (std::filesystem::exists(beside)) {
      found.library = beside.string();
    } else {
      std::cerr << "run_package: no " << beside.string() << "; fused operators need it, or --library FILE\n";
    }
  }
  return found;
}

at::Tensor read(const std::string& file, const std::vector<int64_t>& shape) {
  at::Tensor values = at::empty(shape, at::kFloat);
  std::ifstream stream(file, std::ios::binary);
  if (!stream) throw std::runtime_error(file + ": cannot be read");
  const auto bytes = static_cast<uintmax_t>(values.nbytes());
  const uintmax_t present = std::filesystem::file_size(file);
  if (present != bytes) {
    throw std::runtime_error(file + ": " + std::to_string(present) + " bytes, and the shape given has " +
                             std::to_string(bytes));
  }
  stream.read(static_cast<char*>(values.data_ptr()), static_cast<std::streamsize>(bytes));
  if (!stream) throw std::runtime_error(file + ": cannot be read");
  return values;
}

void write(const std::string& file, const std::vector<at::Tensor>& results) {
  std::ofstream stream(file, std::ios::binary);
  for (const at::Tensor& result : results) {
    const at::Tensor values = result.to(at::kCPU, at::kFloat).contiguous();
    stream.write(static_cast<const char*>(values.data_ptr()), static_cast<std::streamsize>(values.nbytes()));
    std::cout << "output " << values.sizes() << '\n';
  }
  stream.flush();
  if (!stream) throw std::runtime_error(file + ": cannot be written");
}

// Refuses a shape that the package was not made for; `made_for` is "1:64,3,224,224" with a range where a size is open.
// AOTInductor's own checks know no smallest size of a batch that may be one image.
void check_shape(const std::vector<int64_t>& shape, const std::string& made_for) {
  std::istringstream sizes(made_for);
  std::string size;
  for (const int64_t given : shape) {
    if (!std::getline(sizes, size, ',')) return;  // made by something else than effkernels export
    const size_t colon = size.find(':');
    const int64_t low = std::stoll(size), high = colon == std::string::npos ? low : std::stoll(size.substr(colon + 1));
    if (given < low || given > high) {
      throw std::runtime_error("a size of " + std::to_string(given) + "; the package is for (" + made_for + ")");
    }
  }
}

at::ScalarType dtype_of(const std::string& name) {
  if (name == "bfloat16") return at::kBFloat16;
  if (name == "float16") return at::kHalf;
  return at::kFloat;
}

void run(const Arguments& arguments) {
  if (!arguments.library.empty() && dlopen(arguments.library.c_str(), RTLD_NOW | RTLD_LOCAL) == nullptr) {
    throw std::runtime_error(std::string("the operator library cannot be loaded: ") + dlerror());
  }
  // Checks of dtype, strides and sizes, without which a package answers nonsense for what it was not made for.
  setenv("AOTI_RUNTIME_CHECK_INPUTS", "1", /*overwrite=*/0);
  const c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader loader(arguments.package);
  const auto metadata = loader.get_metadata();
  const auto noted = [&](const char* key) {
    const auto found = metadata.find(key);
    return found == metadata.end() ? std::string() : found->second;
  };
  check_shape(arguments.shape, noted("input_shape"));
  const at::ScalarType dtype = dtype_of(noted("dtype"));
  const at::Device device(arguments.device);
  write(arguments.output, loader.run({read(arguments.input, arguments.shape).to(device, dtype)}));
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse({argv + 1, argv + argc}));
    return 0;
  } catch (const std::invalid_argument& error) {
    std::cerr << "run_package: " << error.what() << '\n';
    return 2;
  } catch (const c10::Error& error) {
    std::cerr << "run_package: " << error.what_without_backtrace() << '\n';
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "run_package: " << error.what() << '\n';
    return 1;
  }
}

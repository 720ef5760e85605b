// The Python module: what a test sets before a launch and reads after it, and the kernels of the emulator's own tests.
// Importing it also registers the operators of csrc/ops over the emulated kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <stdexcept>

#include "../../csrc/cuda/counters.h"
#include "emulated_ptx.cuh"
#include "selftest.h"
#include "settings.h"

namespace py = pybind11;
using namespace emulation;

namespace {

void set_order(const std::string& name, uint64_t seed) {
  const std::map<std::string, Order> orders = {
      {"forward", Order::kForward}, {"reverse", Order::kReverse}, {"random", Order::kRandom}};
  const auto found = orders.find(name);
  if (found == orders.end()) throw std::invalid_argument("order=" + name + "; allowed: forward, reverse, random");
  settings().order = found->second;
  settings().seed = seed;
}

void set_copies(const std::string& when) {
  if (when != "early" && when != "late") throw std::invalid_argument("copies=" + when + "; allowed: early, late");
  settings().late_copies = when == "late";
}

py::dict record_of(const LaunchRecord& r) {
  py::dict d;
  d["grid"] = py::make_tuple(r.grid.x, r.grid.y, r.grid.z);
  d["block"] = py::make_tuple(r.block.x, r.block.y, r.block.z);
  d["shared_bytes"] = r.shared_bytes;
  d["cluster"] = r.cluster;
  d["cooperative"] = r.cooperative;
  d["unique_bytes_read"] = r.traffic.unique_read;
  d["unique_bytes_written"] = r.traffic.unique_written;
  d["bytes_read"] = r.traffic.read;
  d["bytes_written"] = r.traffic.written;
  d["bytes_read_by_16"] = r.traffic.read_by_16;
  d["bytes_written_by_16"] = r.traffic.written_by_16;
  return d;
}

py::list launches() {
  py::list list;
  for (const LaunchRecord& record : launch_log()) list.append(record_of(record));
  return list;
}

// Runs a self test; the name of the error that a real launch would return, or an exception for what the kernel did.
std::string run(const std::string& name, std::array<unsigned, 3> grid, std::array<unsigned, 3> block,
                size_t shared_bytes, unsigned cluster, bool cooperative, bool overlaps, uintptr_t input,
                uintptr_t output, int n) {
  const SelfTest kernel = self_tests().at(name);
  const SelfTestArguments arguments{reinterpret_cast<const void*>(input), reinterpret_cast<void*>(output), n};
  const LaunchShape shape{
      {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared_bytes, cluster, cooperative, overlaps};
  return cudaGetErrorName(launch(shape, [&] { kernel(arguments); }));
}

int multiprocessor_blocks(int threads, size_t shared_bytes) {
  int count = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, &cudaGetErrorName, threads, shared_bytes);
  return count;
}

}  // namespace

PYBIND11_MODULE(EFFKERNELS_EMULATION_MODULE, m) {
  m.attr("flavour") = EFFKERNELS_EMULATION_FLAVOUR;
  m.def("set_order", &set_order, py::arg("name"), py::arg("seed") = 1);
  m.def("set_copies", &set_copies, py::arg("when"));
  m.def("set_residents", [](unsigned blocks) { settings().most_residents = blocks; }, py::arg("blocks"));
  m.def(
      "use_device",
      [](const std::array<int, 8>& v, int registers_per_thread) {
        return use_device({v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], registers_per_thread});
      },
      py::arg("limits"), py::arg("registers_per_thread") = Limits{}.registers_per_thread);
  m.def("current_device", &current_device);
  m.def("set_stream", &set_current_stream, py::arg("id"));
  m.def("set_capturing", &set_capturing, py::arg("capturing"));
  m.def("destroy_graphs", &destroy_user_objects);
  m.def("counters_lent_to_graphs", &effkernels::cuda::counters_lent_to_graphs);
  m.def("allocated_bytes", &allocated_bytes);
  m.def("fail_allocations", &fail_allocations, py::arg("count"));
  m.def("refuse_cooperative", &refuse_cooperative, py::arg("refuse"));
  m.def("refuse_clusters_above", &refuse_clusters_above, py::arg("blocks"));
  m.def("function_attributes_set", &function_attributes_set);
  m.def("launches", &launches);
  m.def("clear_launches", [] { launch_log().clear(); });
  m.def("self_tests", [] {
    std::vector<std::string> names;
    for (const auto& [name, kernel] : self_tests()) names.push_back(name);
    return names;
  });
  m.def("run", &run, py::arg("name"), py::kw_only(), py::arg("grid") = std::array<unsigned, 3>{1, 1, 1},
        py::arg("block") = std::array<unsigned, 3>{32, 1, 1}, py::arg("shared_bytes") = 0, py::arg("cluster") = 1,
        py::arg("cooperative") = false, py::arg("overlaps") = false, py::arg("input") = 0, py::arg("output") = 0,
        py::arg("n") = 0);
  m.def("blocks_per_multiprocessor", &multiprocessor_blocks, py::arg("threads"), py::arg("shared_bytes"));
}

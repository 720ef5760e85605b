#include "counters.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "compat.cuh"

namespace effkernels::cuda {
namespace {

constexpr int64_t kSmallest = 64;    // counters of one loan: 256 bytes
constexpr int64_t kPiece = 1 << 16;  // counters taken from CUDA at once

// The counters of one device. Loans have a power of two of counters, and those that come back wait for the next loan of
// their size. Nothing goes back to CUDA: a piece serves for the life of the process.
class DeviceCounters {
 public:
  const char* of_stream(unsigned long long stream, int64_t count, unsigned** counters) {
    Loan& loan = streams_[stream];
    if (loan.count < count) {
      // The smaller loan stays with the stream: launches that use it may be under way.
      Loan larger;
      if (const char* error = borrow(count, &larger)) return error;
      loan = larger;
    }
    *counters = loan.at;
    return nullptr;
  }

  struct Loan {
    unsigned* at = nullptr;
    int64_t count = 0;
  };

  const char* borrow(int64_t count, Loan* loan) {
    int64_t size = kSmallest;
    while (size < count) size *= 2;
    std::vector<unsigned*>& returned = returned_[size];
    if (returned.empty()) {
      if (left_ < size)
        if (const char* error = take_piece(std::max(size, kPiece))) return error;
      returned.push_back(piece_);
      piece_ += size, left_ -= size;
    }
    *loan = {returned.back(), size};
    returned.pop_back();
    return nullptr;
  }

  void give_back(const Loan& loan) { returned_[loan.count].push_back(loan.at); }

 private:
  const char* take_piece(int64_t count) {
    // A capture on this thread would forbid the allocation; relaxed, it may be made beside the capture.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    void* memory = nullptr;
    cudaStream_t stream = nullptr;
    error = cudaMalloc(&memory, count * sizeof(unsigned));
    if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (error == cudaSuccess) {
      count_launch();
      error = cudaMemsetAsync(memory, 0, count * sizeof(unsigned), stream);
    }
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
    if (stream != nullptr) cudaStreamDestroy(stream);
    cudaThreadExchangeStreamCaptureMode(&mode);
    if (error != cudaSuccess) {
      if (memory != nullptr) cudaFree(memory);
      return cudaGetErrorString(error);
    }
    piece_ = static_cast<unsigned*>(memory), left_ = count;
    return nullptr;
  }

  std::map<unsigned long long, Loan> streams_;
  std::map<int64_t, std::vector<unsigned*>> returned_;
  unsigned* piece_ = nullptr;
  int64_t left_ = 0;
};

// Never destroyed: a graph may give its counters back after the end of main.
struct AllCounters {
  std::mutex mutex;
  std::map<int, DeviceCounters> devices;
  int64_t lent_to_graphs = 0;
};
AllCounters& all() {
  static AllCounters* const counters = new AllCounters;
  return *counters;
}

struct GraphLoan {
  int device;
  DeviceCounters::Loan loan;
};

void give_back_of_graph(void* pointer) {
  GraphLoan* given = static_cast<GraphLoan*>(pointer);
  {
    const std::lock_guard<std::mutex> lock(all().mutex);
    all().devices[given->device].give_back(given->loan);
    all().lent_to_graphs -= given->loan.count;
  }
  delete given;
}

// The graph that a stream is captured into; null where it is not.
cudaError_t graph_of(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = nullptr;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaError_t error = cudaStreamIsCapturing(stream, &status);
  if (error != cudaSuccess || status != cudaStreamCaptureStatusActive) return error;
  unsigned long long id = 0;
#if CUDART_VERSION >= 13000
  return cudaStreamGetCaptureInfo(stream, &status, &id, graph, nullptr, nullptr, nullptr);
#else
  return cudaStreamGetCaptureInfo_v2(stream, &status, &id, graph, nullptr, nullptr);
#endif
}

}  // namespace

const char* acquire_counters(int device, void* handle, int64_t count, unsigned** counters) {
  const cudaStream_t stream = static_cast<cudaStream_t>(handle);
  cudaGraph_t graph = nullptr;
  cudaError_t error = graph_of(stream, &graph);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  AllCounters& every = all();
  const std::lock_guard<std::mutex> lock(every.mutex);
  DeviceCounters& here = every.devices[device];
  if (graph == nullptr) {
    unsigned long long id = 0;  // a handle may come back for another stream, an id never does
    error = cudaStreamGetId(stream, &id);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    return here.of_stream(id, count, counters);
  }
  GraphLoan* given = new GraphLoan{device, {}};
  if (const char* refused = here.borrow(count, &given->loan)) {
    delete given;
    return refused;
  }
  every.lent_to_graphs += given->loan.count;
  *counters = given->loan.at;
  cudaUserObject_t object = nullptr;
  error = cudaUserObjectCreate(&object, given, give_back_of_graph, 1, cudaUserObjectNoDestructorSync);
  // If the graph cannot be identified, the counters stay lent: better lost than used twice.
  if (error == cudaSuccess) error = cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

int64_t counters_lent_to_graphs() {
  const std::lock_guard<std::mutex> lock(all().mutex);
  return all().lent_to_graphs;
}

}  // namespace effkernels::cuda

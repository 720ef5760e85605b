// One mistake for each tool of compute-sanitizer: `planted memcheck|racecheck|synccheck`. A tool that does not report
// its mistake on a machine says nothing about other programs there.
#include <cstdio>
#include <cstring>

__global__ void out_of_bounds(int* values, int count) { values[count + threadIdx.x] = 1; }

__global__ void race(int* values) {
  __shared__ int shared[64];
  shared[threadIdx.x] = threadIdx.x;
  values[threadIdx.x] = shared[(threadIdx.x + 33) % 64];  // no __syncthreads() between two warps
}

__global__ void divergent_barrier(int* values) {
  if (threadIdx.x % 32 < 16) __syncthreads();
  values[threadIdx.x] = 1;
}

int main(int count, char** arguments) {
  const char* tool = count > 1 ? arguments[1] : "";
  int* values = nullptr;
  if (cudaMalloc(&values, 64 * sizeof(int)) != cudaSuccess) return 1;
  if (!std::strcmp(tool, "memcheck")) out_of_bounds<<<1, 32>>>(values, 1 << 20);
  if (!std::strcmp(tool, "racecheck")) race<<<1, 64>>>(values);
  if (!std::strcmp(tool, "synccheck")) divergent_barrier<<<1, 64>>>(values);
  std::printf("%s\n", cudaGetErrorString(cudaDeviceSynchronize()));
  return 0;
}

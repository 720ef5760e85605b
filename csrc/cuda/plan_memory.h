// Plans that were made before. A plan of a whole block weighs hundreds of cuts: for the fifteen of EfficientNet-B0 that
// takes the host some 0.1 ms (EPYC), and an eager forward would do it again at every call.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>

#include "../params.h"
#include "device.h"

namespace effkernels::cuda {

// What a plan depends on, as bytes: every field of its arguments; of a pointer, whether it is null and how it is
// aligned. The lists of fields are complete, or they would not compile.
class PlanKey {
 public:
  template <class... Values>
  explicit PlanKey(const Values&... values) {
    (add(values), ...);
  }

  template <class T>
  std::enable_if_t<std::is_arithmetic_v<T> || std::is_enum_v<T>> add(T value) {
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof(value));
  }
  template <class T>
  std::enable_if_t<std::is_void_v<T> || std::is_arithmetic_v<T>> add(T* pointer) {
    add(static_cast<uint8_t>(pointer == nullptr ? 255 : reinterpret_cast<uintptr_t>(pointer) % 16));
  }
  void add(const Param& p) {
    const auto& [data, dtype] = p;
    add_all(data, dtype);
  }
  void add(const Norm& p) {
    const auto& [conv_bias, weight, bias, mean, var, eps] = p;
    add_all(conv_bias, weight, bias, mean, var, eps);
  }
  void add(const DepthwiseParams& p) {
    const auto& [x, y, weight, norm, pooled, dtype, activation, batch, channels, height, width, out_height, out_width,
                 x_stride_n, x_stride_h, x_stride_w, kernel_h, kernel_w, stride, dilation, pad_top, pad_left] = p;
    add_all(x, y, weight, norm, pooled, dtype, activation, batch, channels, height, width, out_height, out_width,
            x_stride_n, x_stride_h, x_stride_w, kernel_h, kernel_w, stride, dilation, pad_top, pad_left);
  }
  void add(const SqueezeExciteParams& p) {
    const auto& [pooled, w_reduce, b_reduce, w_expand, b_expand, gate, gate_dtype, activation, gate_activation, batch,
                 channels, reduced] = p;
    add_all(pooled, w_reduce, b_reduce, w_expand, b_expand, gate, gate_dtype, activation, gate_activation, batch,
            channels, reduced);
  }
  void add(const PointwiseParams& p) {
    const auto& [x, y, weight, packed, norm, gate, residual, dtype, activation, allow_tf32, pools, batch, pixels,
                 in_channels, out_channels, x_stride_n, x_stride_p, residual_stride_n, residual_stride_p] = p;
    add_all(x, y, weight, packed, norm, gate, residual, dtype, activation, allow_tf32, pools, batch, pixels,
            in_channels, out_channels, x_stride_n, x_stride_p, residual_stride_n, residual_stride_p);
  }
  void add(const DeviceLimits& p) {
    const auto& [capability, multiprocessors, shared_per_multiprocessor, shared_per_block, threads_per_multiprocessor,
                 blocks_per_multiprocessor, registers_per_multiprocessor, largest_cluster] = p;
    add_all(capability, multiprocessors, shared_per_multiprocessor, shared_per_block, threads_per_multiprocessor,
            blocks_per_multiprocessor, registers_per_multiprocessor, largest_cluster);
  }
  // Of arguments that may be missing.
  template <class T>
  std::enable_if_t<std::is_class_v<T>> add(const T* optional) {
    add(optional != nullptr);
    if (optional != nullptr) add(*optional);
  }

  const std::string& bytes() const { return bytes_; }

 private:
  template <class... Values>
  void add_all(const Values&... values) {
    (add(values), ...);
  }

  std::string bytes_;
};

// The plans of the last shapes, at most kMostPlans; then it begins anew. For any number of threads.
template <class Plan>
class PlanMemory {
 public:
  template <class Make>
  std::shared_ptr<const Plan> of(const PlanKey& key, const Make& make) {
    {
      const std::lock_guard<std::mutex> guard(lock_);
      const auto found = plans_.find(key.bytes());
      if (found != plans_.end()) return found->second;
    }
    auto made = std::make_shared<const Plan>(make());
    const std::lock_guard<std::mutex> guard(lock_);
    if (plans_.size() >= kMostPlans) plans_.clear();
    return plans_.emplace(key.bytes(), std::move(made)).first->second;
  }
  int64_t size() {
    const std::lock_guard<std::mutex> guard(lock_);
    return static_cast<int64_t>(plans_.size());
  }

 private:
  static constexpr size_t kMostPlans = 512;

  std::mutex lock_;
  std::unordered_map<std::string, std::shared_ptr<const Plan>> plans_;
};

}  // namespace effkernels::cuda

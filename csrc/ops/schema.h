// The operators of namespace `effkernels`: the one place where their signatures stand. An op is added by one line.
#pragma once

// clang-format off
#define EFFKERNELS_NORM \
  "Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? norm_mean, Tensor? norm_var, float eps"
#define EFFKERNELS_DEPTHWISE \
  "Tensor x, Tensor weight, " EFFKERNELS_NORM ", int stride, SymInt[4] padding, int dilation, str activation"
#define EFFKERNELS_EXPAND                                                                   \
  "Tensor expand_weight, Tensor? expand_bias, Tensor? expand_norm_weight, Tensor? expand_norm_bias, "                  \
  "Tensor? expand_norm_mean, Tensor? expand_norm_var, float expand_eps, str expand_activation"
#define EFFKERNELS_SE \
  "Tensor w_reduce, Tensor? b_reduce, Tensor w_expand, Tensor? b_expand, str se_activation, str gate"

// The operators that kernels compute: name, arguments, results. Each is defined a second time for recordings
// (recording.h) as recorded_<name>, with the recording in front of its arguments.
#define EFFKERNELS_KERNEL_SCHEMAS(OP)                                                                                 \
  OP("depthwise_bn_act", EFFKERNELS_DEPTHWISE, "Tensor")                                                              \
  OP("depthwise_bn_act_squeeze", EFFKERNELS_DEPTHWISE, "(Tensor, Tensor)")                                            \
  OP("squeeze_excite_gate", "Tensor pooled, " EFFKERNELS_SE, "Tensor")                                                \
  OP("depthwise_bn_act_gate", EFFKERNELS_DEPTHWISE ", " EFFKERNELS_SE, "(Tensor, Tensor)")                            \
  OP("depthwise_bn_act_se", EFFKERNELS_DEPTHWISE ", " EFFKERNELS_SE, "Tensor")                                        \
  OP("pointwise_bn_act",                                                                                              \
     "Tensor x, Tensor weight, " EFFKERNELS_NORM ", Tensor? gate, Tensor? residual, str activation, bool allow_tf32", \
     "Tensor")                                                                                                        \
  OP("expand_depthwise_squeeze",                                                                                      \
     "Tensor x, " EFFKERNELS_EXPAND ", Tensor weight, " EFFKERNELS_NORM                                               \
     ", int stride, SymInt[4] padding, int dilation, str activation, bool allow_tf32",                                \
     "(Tensor, Tensor)")                                                                                              \
  OP("conv_bn_act",                                                                                                   \
     "Tensor x, Tensor weight, " EFFKERNELS_NORM                                                                      \
     ", int stride, SymInt[4] padding, str activation, bool allow_tf32",                                              \
     "Tensor")

// The steps of a training block on the CPU: training_ops.cpp.
#define EFFKERNELS_TRAINING_NORM "Tensor? mean, Tensor? inverse_deviation, Tensor? scale, Tensor? bias"
#define EFFKERNELS_TRAINING_SCHEMAS(OP)                                                                                \
  OP("training_statistics(Tensor t) -> (Tensor, Tensor)")                                                             \
  OP("training_norm_act(Tensor t, " EFFKERNELS_TRAINING_NORM                                                          \
     ", str activation, Tensor? factor, Tensor? residual) -> Tensor")                                                 \
  OP("training_squeeze(Tensor t, " EFFKERNELS_TRAINING_NORM ", str activation) -> Tensor")                            \
  OP("training_gradient_sums(Tensor g, Tensor t, " EFFKERNELS_TRAINING_NORM                                           \
     ", str activation, Tensor? factor, bool with_y) -> (Tensor, Tensor)")                                            \
  OP("training_norm_backward(Tensor dy, Tensor t, " EFFKERNELS_TRAINING_NORM                                          \
     ", str activation, Tensor alpha, Tensor beta, Tensor delta, Tensor? factor) -> Tensor")                          \
  OP("training_depthwise(Tensor t, " EFFKERNELS_TRAINING_NORM                                                         \
     ", str activation, Tensor weight, Tensor? conv_bias, int stride, int[] padding) -> (Tensor, Tensor, Tensor)")    \
  OP("training_depthwise_backward(Tensor g, Tensor z, Tensor z_mean, Tensor z_inverse_deviation, Tensor z_scale, "    \
     "Tensor z_bias, str z_activation, Tensor? factor, Tensor? offset, Tensor alpha, Tensor beta, Tensor delta, "     \
     "Tensor t, " EFFKERNELS_TRAINING_NORM                                                                            \
     ", str activation, Tensor weight, int stride, int[] padding) -> (Tensor, Tensor, Tensor)")

#define EFFKERNELS_SCHEMAS(OP)                                                                                        \
  /* The CPU kernels' instruction set: sets it (name not empty) and tells it. */                                       \
  OP("cpu_isa(str name) -> str")                                                                                      \
  /* The memory pool of CPU results: sets how many unused bytes it may keep (limit not negative), tells the bytes     \
     mapped. */                                                                                                       \
  OP("cpu_memory(int limit) -> int")                                                                                  \
  /* Recordings of CPU kernels (recording.h). A recording is a tensor; with the last tensor that refers to it, it goes. \
     cut ends a piece and returns its number, from 1, or 0 for an empty one. bytes: of results, of kept weights. */    \
  OP("cpu_recording() -> Tensor")                                                                                     \
  OP("cpu_recording_cut(Tensor recording) -> int")                                                                    \
  OP("cpu_recording_replay(Tensor recording, int piece) -> int")                                                      \
  OP("cpu_recording_bytes(Tensor recording) -> int[]")                                                                \
  /* The CUDA launches that an operator would make, one line each: plan_ops.cpp. Needs no GPU. */                      \
  OP("cuda_plan(str op, str dtype, int[] shape, int[] limits) -> str")                                                \
  /* The CUDA kernels and fills that this process has launched. */                                                     \
  OP("cuda_launches() -> int")                                                                                        \
  /* The limits of a CUDA device, in the order that cuda_plan takes them. */                                           \
  OP("cuda_limits(int device) -> int[]")
// clang-format on

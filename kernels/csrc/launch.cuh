// Kernel launches, with programmatic dependent launch where device and code both support it.
//
// From compute capability 9.0 on, a kernel launched with the attribute may start while the one before
// it drains. It then must wait before it touches memory: every kernel here begins with
// `await_previous()`. A kernel that was compiled for an older target has no such instruction, so the
// attribute depends on the loaded code too (a build for sm_80 runs on newer devices through its PTX).
#ifndef BLIP3O_LAUNCH_CUH
#define BLIP3O_LAUNCH_CUH

#include <cuda_runtime.h>

#include <atomic>
#include <climits>
#include <cstdint>

namespace blip3o {

/// Lets the next kernel be scheduled, then waits until the memory of the one before is visible.
__device__ __forceinline__ void await_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

inline constexpr int kMaxDevices = 64;

/// Whether kKernel on the current device waits for the kernel before it; asked once a device.
template <auto kKernel>
cudaError_t waits_for_previous(bool* waits) {
  enum State : char { kUnknown, kNo, kYes };
  static std::atomic<State> known[kMaxDevices];
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  State state = device < kMaxDevices ? known[device].load(std::memory_order_relaxed) : kNo;
  if (state == kUnknown) {
    int major = 0;
    cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error != cudaSuccess) return error;
    cudaFuncAttributes attributes{};
    error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kKernel));
    if (error != cudaSuccess) return error;
    state = major >= 9 && attributes.ptxVersion >= 90 ? kYes : kNo;
    known[device].store(state, std::memory_order_relaxed);
  }
  *waits = state == kYes;
  return cudaSuccess;
}

template <auto kKernel, typename Arguments>
cudaError_t enqueue(int64_t blocks, dim3 threads, Arguments& arguments, cudaStream_t stream) {
  if (blocks > INT_MAX) return cudaErrorInvalidValue;
  bool early = false;
  if (const cudaError_t error = waits_for_previous<kKernel>(&early); error != cudaSuccess) {
    return error;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = early;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = threads;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  void* values[] = {&arguments};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kKernel), values);
}

/// Enqueues kKernel(arguments) on a grid of `blocks`; nothing to do is success without a device.
template <auto kKernel, typename Arguments>
int launch(int64_t blocks, dim3 threads, Arguments arguments, cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  const cudaError_t error = enqueue<kKernel>(blocks, threads, arguments, stream);
  // The error is returned; left recorded as well, it would surface again at somebody else's check.
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error;
}

}  // namespace blip3o

#endif  // BLIP3O_LAUNCH_CUH

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

/// The shared memory that the launch gives a block, beside what its kernel declares.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<char*>(memory);
}

/// A barrier of `threads` threads, whole warps; 1 to 15 barriers beside that of the block.
__device__ __forceinline__ void sync_some(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

inline constexpr int kMaxDevices = 64;

/// Shared memory that a launch may give a block: what compute capability 8.9 has, less 3 KiB that the
/// kernel may declare.
inline constexpr int kMostShared = 96 * 1024;

/// Multiprocessors of the current device, asked once a device; 1 without one: its launches say why.
inline int multiprocessors() {
  static std::atomic<int> known[kMaxDevices];
  int device = 0, count = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess && device < kMaxDevices) {
    count = known[device].load(std::memory_order_relaxed);
  }
  if (count > 0) return count;
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return 1;
  }
  if (device < kMaxDevices) known[device].store(count, std::memory_order_relaxed);
  return count;
}

/// Lets kKernel be launched with shared memory, where it `needs` that; once a device. `waits`: whether it
/// waits for the kernel before it.
template <auto kKernel>
cudaError_t prepare(bool needs, bool* waits) {
  enum State : char { kUnknown, kNo, kYes };
  static std::atomic<State> known[kMaxDevices];
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  State state = device < kMaxDevices ? known[device].load(std::memory_order_relaxed) : kNo;
  if (state == kUnknown) {
    int major = 0;
    cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error != cudaSuccess) return error;
    const void* kernel = reinterpret_cast<const void*>(kKernel);
    cudaFuncAttributes attributes{};
    error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
    if (needs) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostShared);
      if (error != cudaSuccess) return error;
    }
    state = major >= 9 && attributes.ptxVersion >= 90 ? kYes : kNo;
    known[device].store(state, std::memory_order_relaxed);
  }
  *waits = state == kYes;
  return cudaSuccess;
}

template <auto kKernel, typename Arguments>
cudaError_t enqueue(int64_t blocks, dim3 threads, int shared, Arguments& arguments,
                    cudaStream_t stream) {
  if (blocks > INT_MAX) return cudaErrorInvalidValue;
  bool early = false;
  if (const cudaError_t error = prepare<kKernel>(shared > 0, &early); error != cudaSuccess) {
    return error;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = early;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  void* values[] = {&arguments};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kKernel), values);
}

/// Enqueues kKernel(arguments) on a grid of `blocks` with `shared` bytes each; nothing to do is success
/// without a device.
template <auto kKernel, typename Arguments>
int launch(int64_t blocks, dim3 threads, Arguments arguments, cudaStream_t stream, int shared = 0) {
  if (blocks == 0) return cudaSuccess;
  const cudaError_t error = enqueue<kKernel>(blocks, threads, shared, arguments, stream);
  // The error is returned; left recorded as well, it would surface again at somebody else's check.
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error;
}

}  // namespace blip3o

#endif  // BLIP3O_LAUNCH_CUH

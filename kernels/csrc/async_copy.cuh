// Copies from global to shared memory that a thread starts and later waits for, 16 bytes each.
//
// Source: PTX ISA, cp.async.
#ifndef BLIP3O_ASYNC_COPY_CUH
#define BLIP3O_ASYNC_COPY_CUH

#include <cstdint>

namespace blip3o {

/// 16 bytes from global to shared memory behind the thread's back; zeros where there is nothing.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool present) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "r"(present ? 16 : 0)
               : "memory");
}

/// Closes a batch: the copies that this thread has started since the last one.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

/// Waits for all batches of this thread but the last kPending.
template <int kPending>
__device__ __forceinline__ void await_batches() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// Waits for all copies of this thread.
__device__ __forceinline__ void await_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

}  // namespace blip3o

#endif  // BLIP3O_ASYNC_COPY_CUH

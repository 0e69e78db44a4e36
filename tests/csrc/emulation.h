// Runs the CUDA kernels on the host, so that their numbers can be tested where there is no GPU.
//
// Force-included before a .cu file that g++ compiles as C++. Every CUDA thread of a block is a
// coroutine; barriers and warp shuffles hand over to the next one, so the kernels run as written,
// indices, tails and reductions included. Blocks run one after another, the last first: nothing may
// depend on their order. Races and memory coalescing are beyond it.
#pragma once

#define BLIP3O_LAUNCH_CUH  // stands in for kernels/csrc/launch.cuh
#define BLIP3O_ASYNC_COPY_CUH  // and for kernels/csrc/async_copy.cuh

#include <cuda_runtime_api.h>
#include <setjmp.h>
#include <ucontext.h>
#include <vector_functions.h>

#include <array>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)

namespace emulation {

inline constexpr int kWarp = 32;
inline constexpr size_t kStackBytes = 128 * 1024;

struct Barrier {
  int members = 0, arrived = 0, generation = 0;
};

struct Copy {
  void* to;
  const void* from;  // null: zeros
  int barriers = 0;  // that the thread has passed since

  void arrive() const {
    constexpr size_t kBytes = 16;
    if (from) {
      std::memcpy(to, from, kBytes);
    } else {
      std::memset(to, 0, kBytes);
    }
  }
};

struct Thread {
  ucontext_t context;  // enters the thread; later visits jump, which spares a system call
  jmp_buf resume;
  std::vector<char> stack;
  uint3 index;
  int warp, lane;
  bool started, done;
  std::vector<std::vector<Copy>> batches;  // of copies under way; the last one is open
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Barrier> warps;
  std::array<Barrier, 16> named;
  std::vector<float> exchanged;
  std::vector<uint4> shared;
  Barrier all;
  Thread* running = nullptr;
  jmp_buf scheduler;
  std::function<void()> body;
  long events = 0;  // arrivals at barriers and ends of threads
};

inline Block block;

inline void hand_over() {
  if (_setjmp(block.running->resume) == 0) _longjmp(block.scheduler, 1);
}

inline void visit(Thread& thread) {
  block.running = &thread;
  if (_setjmp(block.scheduler) != 0) return;
  if (thread.started) _longjmp(thread.resume, 1);
  thread.started = true;
  setcontext(&thread.context);
}

inline void release_if_complete(Barrier& barrier) {
  if (barrier.arrived == barrier.members && barrier.members > 0) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
}

inline void wait(Barrier& barrier) {
  const int generation = barrier.generation;
  ++barrier.arrived;
  ++block.events;
  release_if_complete(barrier);
  while (barrier.generation == generation) hand_over();
}

inline void enter() {
  block.body();
  Thread& self = *block.running;
  self.done = true;
  ++block.events;
  --block.all.members;
  --block.warps[self.warp].members;
  release_if_complete(block.all);
  release_if_complete(block.warps[self.warp]);
  hand_over();
}

inline void prepare(dim3 threads) {
  const int count = threads.x * threads.y;
  if (static_cast<int>(block.threads.size()) < count) block.threads.resize(count);
  block.warps.assign((count + kWarp - 1) / kWarp, {});
  block.exchanged.assign(block.warps.size() * kWarp, NAN);
  block.all = {};
  block.named = {};
  for (int i = 0; i < count; ++i) {
    Thread& thread = block.threads[i];
    thread.stack.resize(kStackBytes);
    thread.index = make_uint3(i % threads.x, i / threads.x, 0);
    thread.warp = i / kWarp;
    thread.lane = i % kWarp;
    thread.started = thread.done = false;
    thread.batches.assign(1, {});
    ++block.all.members;
    ++block.warps[thread.warp].members;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
  }
}

/// Whether a warp rests in this shift: about half of them do, others in the next.
inline bool rests(uint32_t shift, int warp) {
  return ((shift * 31 + warp + 1) * 2654435761u) >> 31;
}

/// Runs one block to its end, and reports a barrier that some threads never reach. Warps advance
/// unevenly, until none that is awake can go on: what relies on a barrier that is not there meets a
/// warp that is far behind.
inline void run(dim3 threads) {
  prepare(threads);
  const int count = threads.x * threads.y;
  constexpr int kPatience = 64;  // shifts, in many of which each warp is awake
  int idle = 0;
  for (uint32_t shift = 0; block.all.members > 0;) {
    const long before = block.events;
    for (int i = 0; i < count; ++i) {
      if (!block.threads[i].done && !rests(shift, block.threads[i].warp)) visit(block.threads[i]);
    }
    idle = block.events == before ? idle + 1 : 0;
    if (idle > 0) ++shift;
    if (idle > kPatience) {
      std::fprintf(stderr, "deadlock: a barrier waits for threads that never come\n");
      std::abort();
    }
  }
}

}  // namespace emulation

#define threadIdx (emulation::block.running->index)
inline uint3 blockIdx;
inline dim3 blockDim;

/// Copies that nobody has waited for arrive at the second barrier, on top of what was written since.
inline void __syncthreads() {
  for (auto& batch : emulation::block.running->batches) {
    for (emulation::Copy& copy : batch) {
      if (copy.barriers++ > 0) copy.arrive();
    }
  }
  emulation::wait(emulation::block.all);
}

inline float __shfl_sync(unsigned, float value, int lane) {
  using namespace emulation;
  Thread& self = *block.running;
  float* const warp = &block.exchanged[self.warp * kWarp];
  warp[self.lane] = value;
  wait(block.warps[self.warp]);
  const float other = warp[lane];
  wait(block.warps[self.warp]);
  return other;
}

inline float __shfl_xor_sync(unsigned all, float value, int offset) {
  return __shfl_sync(all, value, emulation::block.running->lane ^ offset);
}

inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline int min(int a, int b) { return a < b ? a : b; }

namespace blip3o {

inline constexpr int kMostShared = 96 * 1024;

inline void await_previous() {}

/// Few enough that small tests fill several waves.
inline int multiprocessors() { return 2; }

inline char* shared_memory() { return reinterpret_cast<char*>(emulation::block.shared.data()); }

inline void sync_some(int barrier, int threads) {
  using namespace emulation;
  if (barrier < 1 || barrier > 15 || threads % kWarp != 0) std::abort();
  block.named[barrier].members = threads;
  wait(block.named[barrier]);
}

/// Spoils the target; the bytes arrive when they are waited for, so reading too early shows.
inline void copy_async(void* to, const void* from, bool present) {
  constexpr size_t kBytes = 16;
  if (reinterpret_cast<uintptr_t>(to) % kBytes || reinterpret_cast<uintptr_t>(from) % kBytes) {
    std::abort();
  }
  std::memset(to, 0xff, kBytes);  // NaN in either dtype
  emulation::block.running->batches.back().push_back({to, present ? from : nullptr});
}

inline void commit_copies() { emulation::block.running->batches.push_back({}); }

inline void arrive(std::vector<emulation::Copy>& batch) {
  for (const emulation::Copy& copy : batch) copy.arrive();
  batch.clear();
}

template <int kPending>
void await_batches() {
  auto& batches = emulation::block.running->batches;
  while (batches.size() > kPending + 1) {
    arrive(batches.front());
    batches.erase(batches.begin());
  }
}

inline void await_copies() {
  await_batches<0>();
  arrive(emulation::block.running->batches.back());
}

template <auto kKernel, typename Arguments>
int launch(int64_t blocks, dim3 threads, Arguments arguments, cudaStream_t, int shared = 0) {
  if (blocks > INT_MAX || shared > kMostShared) return cudaErrorInvalidValue;
  blockDim = threads;
  emulation::block.body = [&] { kKernel(arguments); };
  for (int64_t i = blocks - 1; i >= 0; --i) {
    // NaN: what one block leaves is not there for the next.
    emulation::block.shared.assign(shared / sizeof(uint4), make_uint4(~0u, ~0u, ~0u, ~0u));
    blockIdx = make_uint3(static_cast<unsigned>(i), 0, 0);
    emulation::run(threads);
  }
  return cudaSuccess;
}

}  // namespace blip3o

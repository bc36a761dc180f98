// The scheduler of the emulator. It runs one block at a time; the threads of a block are fibers.

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define SANITIZED 1
#else
#define SANITIZED 0
#endif

// The bounds of the section that holds the __shared__ variables.
extern "C" __attribute__((weak)) char __start_opd_shared[], __stop_opd_shared[];

namespace emulator {
namespace {

constexpr size_t kStack = 256 << 10;

enum class State { kReady, kAtBarrier, kInWarp, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state;
  const char* operation = "";
  void* fake_stack = nullptr;  // of the address sanitizer
};

struct Warp {
  unsigned mask = 0, arrived = 0;
  const char* operation = "";
  uint64_t values[32], results[32];  // results stays valid while the next values arrive
};

[[noreturn]] void fail(const char* reason, const char* operation) {
  std::fprintf(stderr, "cuda emulator: %s: %s (block %u, %u; thread %u)\n", operation, reason,
               blockIdx.x, blockIdx.y, threadIdx.x);
  std::_Exit(70);
}

class Block {
 public:
  void run(unsigned threads, Body body, void* arguments, std::mt19937_64& random) {
    while (fibers_.size() < threads) fibers_.emplace_back();
    body_ = body;
    arguments_ = arguments;
    threads_ = threads;
    warps_.assign((threads + 31) / 32, Warp{});
    ready_.clear();
    live_ = threads;
    at_barrier_ = 0;
    for (unsigned i = 0; i < threads; ++i) prepare(i);
    while (!ready_.empty()) {
      std::swap(ready_[random() % ready_.size()], ready_.back());
      current_ = ready_.back();
      ready_.pop_back();
      threadIdx = dim3(current_);
      resume(fibers_[current_]);
    }
    if (live_ > 0) report_deadlock();
  }

  void synchronize() {
    if (++at_barrier_ == threads_) {
      at_barrier_ = 0;
      for (unsigned i = 0; i < threads_; ++i)
        if (i != current_) release(i);
      release(current_);
      fibers_[current_].state = State::kReady;
      suspend();
    } else {
      wait(State::kAtBarrier, "__syncthreads");
    }
  }

  const uint64_t* exchange(unsigned mask, uint64_t value, const char* operation) {
    Warp& warp = warps_[current_ / 32];
    const unsigned lane = current_ % 32;
    if (!(mask >> lane & 1)) fail("the lane is not in its own mask", operation);
    if (warp.arrived == 0) {
      warp.mask = mask;
      warp.operation = operation;
    } else if (warp.mask != mask || warp.operation != operation) {
      fail("lanes of a warp are in different operations", operation);
    }
    warp.arrived |= 1u << lane;
    warp.values[lane] = value;
    if (warp.arrived == mask) {
      std::copy(warp.values, warp.values + 32, warp.results);
      warp.arrived = 0;
      for (unsigned i = 0; i < 32; ++i)
        if (mask >> i & 1) release(current_ / 32 * 32 + i);
      suspend();
    } else {
      wait(State::kInWarp, operation);
    }
    return warp.results;
  }

  unsigned current() const { return current_; }

 private:
  void prepare(unsigned index) {
    Fiber& fiber = fibers_[index];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::enter, 0);
    release(index);
  }

  void release(unsigned index) {
    fibers_[index].state = State::kReady;
    ready_.push_back(index);
  }

  void wait(State state, const char* operation) {
    fibers_[current_].state = state;
    fibers_[current_].operation = operation;
    suspend();
  }

  void resume(Fiber& fiber) {
#if SANITIZED
    void* scheduler_stack = nullptr;
    __sanitizer_start_switch_fiber(&scheduler_stack, fiber.stack.get(), kStack);
#endif
    swapcontext(&scheduler_, &fiber.context);
#if SANITIZED
    __sanitizer_finish_switch_fiber(scheduler_stack, nullptr, nullptr);
#endif
  }

  // Switches to the scheduler. Returns when the scheduler resumes this fiber.
  void suspend() {
    Fiber& fiber = fibers_[current_];
#if SANITIZED
    const bool ends = fiber.state == State::kDone;
    __sanitizer_start_switch_fiber(ends ? nullptr : &fiber.fake_stack, stack_, stack_size_);
#endif
    swapcontext(&fiber.context, &scheduler_);
#if SANITIZED
    __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
  }

  static void enter();

  void report_deadlock() {
    for (unsigned i = 0; i < threads_; ++i) {
      if (fibers_[i].state == State::kDone) continue;
      threadIdx = dim3(i);
      fail("waits for threads that never come", fibers_[i].operation);
    }
  }

  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<unsigned> ready_;
  ucontext_t scheduler_;
  Body body_ = nullptr;
  void* arguments_ = nullptr;
  unsigned threads_ = 0, live_ = 0, current_ = 0, at_barrier_ = 0;
  const void* stack_ = nullptr;  // the scheduler's stack, as the sanitizer reports it
  size_t stack_size_ = 0;
};

Block block;

void Block::enter() {
#if SANITIZED
  __sanitizer_finish_switch_fiber(nullptr, &block.stack_, &block.stack_size_);
#endif
  block.body_(block.arguments_);
  --block.live_;
  block.fibers_[block.current_].state = State::kDone;
  block.suspend();
}

uint64_t seed() {
  const char* text = std::getenv("OPD_EMULATOR_SEED");
  return text ? std::strtoull(text, nullptr, 10) : 0;
}

// Fills shared memory with NaN in every dtype. It is not sanitized, since it also writes the guards
// that the sanitizer puts between variables.
__attribute__((no_sanitize("address"))) void poison_shared_memory() {
  for (volatile char* byte = __start_opd_shared; byte != __stop_opd_shared; ++byte) *byte = -1;
}

}  // namespace

cudaError_t run_grid(const cudaLaunchConfig_t& config, Body body, void* arguments) {
  const dim3 grid = config.gridDim, threads = config.blockDim;
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || threads.x == 0 || threads.x > 1024)
    return cudaErrorInvalidConfiguration;
  std::mt19937_64 random(seed());
  std::vector<uint64_t> order(uint64_t(grid.x) * grid.y);
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  gridDim = grid;
  blockDim = threads;
  for (const uint64_t index : order) {
    blockIdx = dim3(index % grid.x, index / grid.x);
    poison_shared_memory();
    block.run(threads.x, body, arguments, random);
  }
  return cudaSuccess;
}

void synchronize_block() { block.synchronize(); }

const uint64_t* exchange(unsigned mask, uint64_t value, const char* operation) {
  return block.exchange(mask, value, operation);
}

unsigned lane() { return block.current() % 32; }

}  // namespace emulator

#include "emulator.h"

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "../fuzz.h"

namespace pyfinetune {
namespace emulated {

Planted planted = Planted::none;

namespace {

constexpr size_t kStack = 256 << 10;
constexpr int kWarp = 32;

struct Barrier {
  int arrived = 0;
  uint64_t generation = 0;
};

struct Copy {
  void* shared;
  const void* global;
  int bytes;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  Barrier* waits = nullptr;
  uint64_t generation = 0;
  bool done = true;
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
};

struct Warp {
  Barrier barrier;
  Words lanes[2][kWarp];
};

struct Block {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  ucontext_t scheduler;
  std::unique_ptr<unsigned char[]> shared;
  const std::function<void()>* body = nullptr;
  unsigned count = 0, current = 0, index = 0, grid = 0;
  bool late_copies = false;
  const char* problem = nullptr;
  fuzz::Random random{1};
};
Block block;

Thread& self() { return *block.threads[block.current]; }
Warp& own_warp() { return block.warps[block.current / kWarp]; }

void wait_at(Barrier& barrier, int parties) {
  if (++barrier.arrived == parties) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  Thread& thread = self();
  thread.waits = &barrier;
  thread.generation = barrier.generation;
  swapcontext(&thread.context, &block.scheduler);
}

void enter() {
  (*block.body)();
  self().done = true;
}

void resume(unsigned i) {
  block.current = i;
  swapcontext(&block.scheduler, &block.threads[i]->context);
}

void prepare(Thread& thread) {
  thread.waits = nullptr;
  thread.done = false;
  thread.open.clear();
  thread.groups.clear();
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.get();
  thread.context.uc_stack.ss_size = kStack;
  thread.context.uc_link = &block.scheduler;
  makecontext(&thread.context, enter, 0);
}

bool runnable(const Thread& thread) {
  return !thread.done && !(thread.waits && thread.waits->generation == thread.generation);
}

// Nobody can throw on a thread's own stack.
void refuse(const char* problem) { block.problem = problem; }

void perform(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    std::memcpy(copy.shared, copy.global, size_t(copy.bytes));
    if (planted != Planted::short_fill)
      std::memset(static_cast<char*>(copy.shared) + copy.bytes, 0, size_t(16 - copy.bytes));
  }
}

void run_block() {
  for (unsigned i = 0; i < block.count; ++i) prepare(*block.threads[i]);
  std::vector<unsigned> order(block.count);
  for (unsigned i = 0; i < block.count; ++i) order[i] = i;
  for (unsigned left = block.count; left > 0;) {
    // Whole warps in any order, or lanes in any order.
    const unsigned step = block.random.one_in(2) ? 1 : kWarp;
    for (unsigned i = block.count / step; i > 1; --i) {
      const unsigned other = unsigned(block.random.below(i));
      for (unsigned k = 0; k < step; ++k) std::swap(order[(i - 1) * step + k], order[other * step + k]);
    }
    bool moved = false;
    for (const unsigned i : order) {
      Thread& thread = *block.threads[i];
      if (!runnable(thread)) continue;
      moved = true;
      thread.waits = nullptr;
      resume(i);
      left -= thread.done;
    }
    if (!moved) throw fuzz::Difference{"a barrier that not every thread comes to"};
    if (block.problem) throw fuzz::Difference{std::exchange(block.problem, nullptr)};
  }
}

}  // namespace

Index thread_index() { return {block.current}; }
Index block_index() { return {block.index}; }
Index grid_size() { return {block.grid}; }
unsigned char* shared_memory() { return block.shared.get(); }

void seed(uint64_t state) { block.random = fuzz::Random(state); }

void run(unsigned blocks, unsigned threads, size_t shared, const std::function<void()>& thread) {
  if (threads % kWarp != 0 || shared > size_t(kSharedPerBlock)) throw fuzz::Difference{"a launch that no GPU takes"};
  while (block.threads.size() < threads) block.threads.emplace_back(new Thread);
  block.warps.assign(threads / kWarp, Warp());
  block.barrier = Barrier();
  block.count = threads;
  block.grid = blocks;
  block.body = &thread;
  for (block.index = 0; block.index < blocks; ++block.index) {
    block.shared.reset(new unsigned char[shared]);
    // Garbage; in a float of any width, NaN.
    std::memset(block.shared.get(), 0xff, shared);
    block.late_copies = block.random.one_in(2);
    run_block();
  }
}

void block_barrier() {
  if (planted != Planted::no_block_barrier) wait_at(block.barrier, int(block.count));
}
void warp_barrier() { wait_at(own_warp().barrier, kWarp); }

void exchange(const uint32_t* words, int count, const std::function<void(const Words* lanes)>& use) {
  Warp& warp = own_warp();
  // Two sets in turn: nobody is a whole exchange ahead of a lane that still reads.
  Words* lanes = warp.lanes[warp.barrier.generation & 1];
  std::memcpy(lanes[block.current % kWarp], words, size_t(count) * 4);
  wait_at(warp.barrier, kWarp);
  use(lanes);
}

void copy_async(void* shared, const void* global, int bytes) {
  if (bytes < 0 || bytes > 16 || (uintptr_t(shared) | uintptr_t(global)) % 16 != 0)
    return refuse("an asynchronous copy that the hardware would refuse");
  const Copy copy = {shared, global, bytes};
  if (block.late_copies)
    self().open.push_back(copy);
  else
    perform({copy});
}

void close_copies() {
  self().groups.push_back(self().open);
  self().open.clear();
}

void wait_copies(int pending) {
  auto& groups = self().groups;
  if (planted == Planted::no_wait) return;
  while (int(groups.size()) > pending) {
    perform(groups.front());
    groups.erase(groups.begin());
  }
}

}  // namespace emulated
}  // namespace pyfinetune

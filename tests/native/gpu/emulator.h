// Runs the threads of a block one at a time, each on a stack of its own, switching only where they wait for each other:
// at barriers and where a warp acts as one. Who goes first is drawn anew for each block, and asynchronous copies happen
// either at once or not before they are waited for: what a kernel gets wrong by a missing barrier or a missing wait
// comes out different from run to run, and what it reads or writes outside its memory is a sanitizer's to find.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

namespace pyfinetune {
namespace emulated {

constexpr int kSharedPerBlock = 99 << 10;  // the least of the GPUs that are built for

struct Index {
  unsigned x;
};
Index thread_index();
Index block_index();
Index grid_size();

void run(unsigned blocks, unsigned threads, size_t shared, const std::function<void()>& thread);
unsigned char* shared_memory();
void block_barrier();
void warp_barrier();

constexpr int kWords = 6;
using Words = uint32_t[kWords];
// Gives all lanes' words to each lane of the warp.
void exchange(const uint32_t* words, int count, const std::function<void(const Words* lanes)>& use);

void copy_async(void* shared, const void* global, int bytes);
void close_copies();
void wait_copies(int pending);

// Draws of what comes first; the same seed gives the same order.
void seed(uint64_t state);

// Mistakes of a kernel, to see them found.
enum class Planted { none, no_block_barrier, no_wait, swapped_words, short_fill };
extern Planted planted;

}  // namespace emulated
}  // namespace pyfinetune

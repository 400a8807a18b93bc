#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "fuzz.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(begin, bytes) ((void)(begin), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(begin, bytes) ((void)(begin), (void)(bytes))
#endif

// For what looks at bytes that are poisoned for everybody else.
#define UNCHECKED __attribute__((noinline, no_sanitize_address))

namespace pyfinetune {
namespace fuzz {

// Pages for buffers, each stretch between two that nobody may touch.
struct Arena {
  static constexpr int kSlots = 48;
  static constexpr int64_t kPage = 4096, kCapacity = int64_t(4) << 20, kMargin = 64;
  static constexpr unsigned char kPattern = 0xc3;

  char* begin[kSlots];
  Buffer* user[kSlots] = {};

  Arena() {
    for (char*& slot : begin) {
      void* pages = mmap(nullptr, size_t(kCapacity + 2 * kPage), PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (pages == MAP_FAILED || mprotect(pages, kPage, PROT_NONE) != 0 ||
          mprotect(static_cast<char*>(pages) + kPage + kCapacity, kPage, PROT_NONE) != 0) {
        std::perror("mmap");
        std::exit(2);
      }
      slot = static_cast<char*>(pages) + kPage;
      ASAN_POISON_MEMORY_REGION(slot, kCapacity);
    }
  }

  static Arena& get() {
    static Arena* arena = new Arena;
    return *arena;
  }

  // The bytes of a slot around its buffer that hold the pattern.
  static void around(const Buffer& b, char*& low, char*& high) {
    char* slot = get().begin[b.slot_];
    low = std::max(slot, b.begin_ - kMargin);
    high = std::min(slot + kCapacity, b.end_ + kMargin);
  }
};

UNCHECKED static void put_pattern(char* begin, char* end) {
  for (volatile char* p = begin; p < end; ++p) *p = char(Arena::kPattern);
}
// What a kernel forgets to write is never the same twice.
UNCHECKED static void put_garbage(char* p, char* end, uint64_t state) {
  for (; p < end; p += 8) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const uint64_t garbage = state ^ (state >> 31);
    if (end - p >= 8)
      __builtin_memcpy(p, &garbage, 8);
    else
      __builtin_memcpy(p, &garbage, size_t(end - p));
  }
}
UNCHECKED static bool has_pattern(const char* begin, const char* end) {
  for (; begin < end; ++begin)
    if (static_cast<unsigned char>(*begin) != Arena::kPattern) return false;
  return true;
}
UNCHECKED static uint64_t sum_of(const char* p, const char* end) {
  uint64_t sum = 0;
  for (; p + 8 <= end; p += 8) {
    uint64_t word;
    __builtin_memcpy(&word, p, 8);
    sum = (sum ^ word) * 0x9E3779B97F4A7C15u;
    sum ^= sum >> 29;
  }
  for (; p < end; ++p) sum = (sum ^ static_cast<unsigned char>(*p)) * 0x9E3779B97F4A7C15u;
  return sum;
}

// What was wrong about a buffer that is gone; nobody can throw from its destructor.
static const char* past_damage = nullptr;

Buffer::Buffer(Random& random, int64_t bytes, int64_t align) {
  Arena& arena = Arena::get();
  for (slot_ = 0; slot_ < Arena::kSlots && arena.user[slot_]; ++slot_) continue;
  if (slot_ == Arena::kSlots || bytes + 4096 > Arena::kCapacity) {
    std::fprintf(stderr, "a case needs %lld bytes in one buffer, or too many buffers\n", static_cast<long long>(bytes));
    std::exit(2);
  }
  arena.user[slot_] = this;
  char* const slot = arena.begin[slot_];
  if (random.one_in(3))
    begin_ = slot + align * random.below(2048 / align);
  else if (random.one_in(3))
    begin_ = slot;
  else
    begin_ = slot + (Arena::kCapacity - bytes) / align * align;
  end_ = begin_ + bytes;
  data_ = bytes == 0 && random.one_in(2) ? nullptr : begin_;
  char *low, *high;
  Arena::around(*this, low, high);
  put_pattern(low, begin_);
  put_pattern(end_, high);
  ASAN_UNPOISON_MEMORY_REGION(begin_, bytes);
  put_garbage(begin_, end_, random.bits());
}

Buffer::Buffer(Random& random, DType dtype, int64_t count, Values values)
    : Buffer(random, count * item_size(dtype), item_size(dtype)) {
  for (int64_t i = 0; i < count; ++i) store(dtype, begin_, i, draw(random, dtype, values));
}

Buffer::~Buffer() {
  if (const char* problem = damage()) past_damage = problem;
  Arena& arena = Arena::get();
  // Whole granules of AddressSanitizer's shadow.
  char* const slot = arena.begin[slot_];
  const int64_t first = (begin_ - slot) / 8 * 8, last = (end_ - slot + 7) / 8 * 8;
  ASAN_POISON_MEMORY_REGION(slot + first, last - first);
  arena.user[slot_] = nullptr;
}

const char* Buffer::damage() const {
  char *low, *high;
  Arena::around(*this, low, high);
  if (!has_pattern(low, begin_)) return "bytes before a buffer were written";
  if (!has_pattern(end_, high)) return "bytes behind a buffer were written";
  if (frozen_ && sum_of(begin_, end_) != checksum_) return "an input was written";
  return nullptr;
}

void Buffer::freeze_all() {
  for (Buffer* buffer : Arena::get().user) {
    if (!buffer) continue;
    buffer->frozen_ = true;
    buffer->checksum_ = sum_of(buffer->begin_, buffer->end_);
  }
}

void Buffer::check_all() {
  const char* problem = past_damage;
  past_damage = nullptr;
  for (const Buffer* buffer : Arena::get().user)
    if (buffer && !problem) problem = buffer->damage();
  if (problem) throw Difference{problem};
}

}  // namespace fuzz
}  // namespace pyfinetune

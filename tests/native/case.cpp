#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>

#include "fuzz.h"

namespace pyfinetune {
namespace fuzz {

Position position;

void print_position() {
  std::printf(
      "op %s, kernel %s, table %s, seed %llu, case %lld\narguments: %s\nagain: fuzz_kernels --op %s --seed %llu "
      "--first %lld --calls 1\n",
      position.op, position.kernel, position.table, static_cast<unsigned long long>(position.seed), ll(position.number),
      position.arguments, position.op, static_cast<unsigned long long>(position.seed), ll(position.number));
  std::fflush(stdout);
}

void Case::describe(const char* kernel, const char* format, ...) {
  kernel_ = position.kernel = kernel;
  position.table = "none";
  va_list list;
  va_start(list, format);
  const int used = std::vsnprintf(position.arguments, sizeof(position.arguments), format, list);
  va_end(list);
  if (used >= 0 && used < int(sizeof(position.arguments)))
    std::snprintf(position.arguments + used, sizeof(position.arguments) - size_t(used), ", %d threads", threads);
}

static std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
static std::string text(const char* format, ...) {
  char buffer[256];
  va_list list;
  va_start(list, format);
  std::vsnprintf(buffer, sizeof(buffer), format, list);
  va_end(list);
  return buffer;
}

static bool equal(DType dtype, const char* a, const char* b) {
  const size_t item = size_t(item_size(dtype));
  if (std::memcmp(a, b, item) == 0) return true;
  return (dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16) && std::isnan(load(dtype, a, 0)) &&
         std::isnan(load(dtype, b, 0));
}

static double number(DType dtype, const char* p) {
  if (dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16) return load(dtype, p, 0);
  double x = 0;
  int32_t whole = 0;
  if (dtype == DType::f64) std::memcpy(&x, p, 8);
  if (dtype == DType::i32) std::memcpy(&whole, p, 4);
  if (dtype == DType::u8) whole = static_cast<unsigned char>(*p);
  return dtype == DType::f64 ? x : double(whole);
}

static int64_t bytes_of(const Output& o) {
  return o.rows > 0 && o.cols > 0 ? ((o.rows - 1) * o.stride + o.cols) * item_size(o.dtype) : 0;
}

// Puts `initial` in, or gives back what a table made, rows without gaps.
static void put_rows(const Output& o, char* data) {
  if (!o.initial) return;
  const int64_t item = item_size(o.dtype), width = o.cols * item;
  for (int64_t r = 0; r < o.rows && width > 0; ++r)
    std::memcpy(data + r * o.stride * item, o.initial->data() + r * width, size_t(width));
}
static std::vector<char> take_rows(const Output& o, const char* data) {
  const int64_t item = item_size(o.dtype), width = o.cols * item;
  std::vector<char> rows(size_t(o.rows * width));
  for (int64_t r = 0; r < o.rows && width > 0; ++r)
    std::memcpy(rows.data() + r * width, data + r * o.stride * item, size_t(width));
  return rows;
}

static void check_rows(const Output& o, const std::vector<char>& rows, const std::vector<char>& scalar) {
  const int64_t item = item_size(o.dtype);
  for (int64_t i = 0; i < o.rows * o.cols; ++i) {
    const char* p = rows.data() + i * item;
    const long long row = i / o.cols, col = i % o.cols;
    if (o.same_bits && !equal(o.dtype, p, scalar.data() + i * item))
      throw Difference{text("%s[%lld, %lld] is %.9g, the scalar table has %.9g", o.name, row, col, number(o.dtype, p),
                            number(o.dtype, scalar.data() + i * item))};
    if (o.expected && !allowed(o.dtype, number(o.dtype, p), (*o.expected)[size_t(i)]))
      throw Difference{text("%s[%lld, %lld] is %.9g, needs %.17g within %.3g and a rounding", o.name, row, col,
                            number(o.dtype, p), (*o.expected)[size_t(i)].value, (*o.expected)[size_t(i)].error)};
  }
}

static void check_gaps(const Output& o, const std::vector<char>& before, const char* after) {
  const int64_t item = item_size(o.dtype);
  for (int64_t r = 0; r + 1 < o.rows && !before.empty(); ++r) {
    const int64_t gap = (r * o.stride + o.cols) * item;
    if (std::memcmp(before.data() + gap, after + gap, size_t((o.stride - o.cols) * item)) != 0)
      throw Difference{text("%s: something was written behind row %lld", o.name, ll(r))};
  }
}

// Calls one table once, in fresh memory, and returns the outputs' rows.
static std::vector<std::vector<char>> run_once(Random& random, const KernelTable& table,
                                               const std::vector<Output>& outputs, const Case::Call& call) {
  std::vector<std::unique_ptr<Buffer>> buffers;
  std::vector<void*> data;
  std::vector<std::vector<char>> before, rows;
  for (const Output& o : outputs) {
    buffers.emplace_back(new Buffer(random, bytes_of(o), item_size(o.dtype)));
    data.push_back(buffers.back()->data());
    const char* bytes = buffers.back()->data<char>();
    put_rows(o, buffers.back()->data<char>());
    before.emplace_back();
    if (o.stride > o.cols && o.rows > 1) before.back().assign(bytes, bytes + bytes_of(o));
  }
  call(table, data.data());
  Buffer::check_all();
  for (size_t i = 0; i < outputs.size(); ++i) {
    check_gaps(outputs[i], before[i], buffers[i]->data<char>());
    rows.push_back(take_rows(outputs[i], buffers[i]->data<char>()));
  }
  return rows;
}

void Case::run(const std::vector<Output>& outputs, const Call& call) {
  Buffer::freeze_all();
  std::vector<std::vector<char>> scalar_rows;
  for (const KernelTable* table : tables_) {
    position.table = table->name;
    const auto rows = run_once(random, *table, outputs, call);
    ++tallies_[{kernel_, table->name}];
    if (table == tables_.front()) scalar_rows = rows;
    for (size_t i = 0; i < outputs.size(); ++i) check_rows(outputs[i], rows[i], scalar_rows[i]);
    if (threads == 1 && !random.one_in(16)) continue;
    // Equal inputs give equal bits, wherever they lie and whoever shares the work.
    const int usual = threads;
    threads = usual > 1 ? usual - 1 : random.one_in(8) ? 2 : 1;
    const auto again = run_once(random, *table, outputs, call);
    threads = usual;
    ++tallies_[{kernel_, table->name}];
    for (size_t i = 0; i < outputs.size(); ++i) {
      const bool compared = outputs[i].same_bits || outputs[i].expected;
      if (compared && rows[i] != again[i])
        throw Difference{text("%s has other bits in a second run, perhaps with other threads", outputs[i].name)};
    }
  }
}

}  // namespace fuzz
}  // namespace pyfinetune

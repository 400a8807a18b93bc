// Compiled once per instruction set, with PYFINETUNE_ISA naming it and the flags of that set on this file alone. All
// code is in an unnamed namespace; the one symbol that leaves is the table.
#include "dispatch.h"

// clang-format off
#include "nf4.kernel.h"
#include "lora_linear.kernel.h"
#include "varlen_attn_tile.kernel.h"
#include "varlen_attn.kernel.h"
#include "varlen_attn_bwd.kernel.h"
// clang-format on

#define PYFINETUNE_STRINGIFY_(x) #x
#define PYFINETUNE_STRINGIFY(x) PYFINETUNE_STRINGIFY_(x)

namespace pyfinetune {
namespace PYFINETUNE_ISA {

extern const KernelTable table;
const KernelTable table = {
    PYFINETUNE_STRINGIFY(PYFINETUNE_ISA),
    kPacksBf16,
    dequantize_4bit,
    quantize_4bit,
    quantize_absmax,
    small_matmul_4bit,
    row_squares,
    dropout,
    varlen_attn_scratch,
    varlen_attn,
    varlen_attn_bwd,
};

}  // namespace PYFINETUNE_ISA
}  // namespace pyfinetune

// The GPU's kernels behind the CPU tables' functions, and what has none there.
#pragma once
#include "fuzz.h"

namespace pyfinetune {

namespace gpu {

extern const KernelTable table;
void dequantize_beside(fuzz::Case& c);
std::vector<fuzz::Fault> nf4_faults();

// Draws the order in which threads run.
void shuffle(fuzz::Random& random);

}  // namespace gpu
}  // namespace pyfinetune

// What this CPU can do, and what the kernels may use of it.
#pragma once

#include <string>
#include <vector>

namespace stylefast {

// of "avx2", "fma", "f16c", "avx512" (F, DQ, BW and VL) and "avx512_bf16", those that the CPU has and the system saves
std::vector<std::string> cpu_features();

// What the kernels use: "avx512_bf16", "avx512", "avx2" or "" for none. STYLEFAST_CPU, read at every call, caps it,
// "none" leaving the work to PyTorch; std::invalid_argument where it names something unknown or absent.
std::string instruction_set();

}  // namespace stylefast

#pragma once
#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace prosparse {

// Kernel tables this machine can run, best last.
std::vector<const Kernels*> usable_kernels();
// The table named by PROSPARSE_ISA, else the best. Throws std::invalid_argument when it cannot run here.
const Kernels& kernels();

}  // namespace prosparse

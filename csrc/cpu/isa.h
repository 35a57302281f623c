// The instruction sets that csrc/cpu is compiled for, and which of them serves.
#pragma once
#include <string>
#include <vector>

namespace lipgan::cpu {

// Names of the instruction sets that this build has and this processor can run, best last.
std::vector<std::string> supported_isas();

// The one in use: the best supported one unless set_isa or the environment variable LIPGAN_ISA chose another.
std::string isa();

// Throws std::invalid_argument for a name that is not among supported_isas().
void set_isa(const std::string& name);

}  // namespace lipgan::cpu

// What a fuzz target offers to its drivers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

// libFuzzer's entry. Aborts when something that must hold doesn't.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace nbdferry::fuzz {

// Inputs that reach deep; the driver mutates and joins them.
std::vector<std::vector<std::uint8_t>> seeds();

}  // namespace nbdferry::fuzz

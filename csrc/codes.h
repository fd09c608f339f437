// Matrices of small integers, mostly 0, as few bytes: what adapters hold of a change (docs/formats.md).
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace prosparse {

// `codes` [rows][cols], none below -32767.
std::vector<uint8_t> encode_codes(const int16_t* codes, size_t rows, size_t cols);

// False if the bytes end early or late, or hold a code of more than 15 bits: they are of no such matrix.
bool decode_codes(const uint8_t* bytes, size_t n, size_t rows, size_t cols, int16_t* codes);

}  // namespace prosparse

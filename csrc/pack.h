// From GGUF's block formats to the engine's layouts (kernels.h).
#pragma once
#include "kernels/kernels.h"

namespace prosparse {

// Bytes of one row of `cols` values as stored in a GGUF file.
size_t file_row_bytes(Type type, int cols);
// One row-major row; dst has row_bytes(type, cols).
void pack_row(Type type, const uint8_t* src, int cols, uint8_t* dst);
// Neurons [32 group, 32 group + 32) of the file's down matrix [width][count], transposed: codes go to
// records (down_offset already added, `stride` bytes apart), scales and minima to `scales`.
void pack_down_group(Type type, const uint8_t* src, int width, int count, int group, uint8_t* records,
                     size_t stride, uint8_t* scales);

// The reverse: rows [64 chunk, 64 chunk + 64) of a row-major down matrix, `stride` bytes apart, from neurons.
void unpack_down_rows(const Neurons& n, int chunk, uint8_t* rows, size_t stride);

}  // namespace prosparse

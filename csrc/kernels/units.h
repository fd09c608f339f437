// The functions of this instruction set's kernel units, gathered by table.cpp.
#pragma once
#include "simd.h"

namespace prosparse {
namespace PS_NS {

void quantize(const float* x, int n, Acts* out);
void matvec(const Matrix* w, int r0, int r1, const Acts* x, float* out);
void dot_two(const Matrix* w, int r, int apart, const Acts* x, const uint8_t* beside, const uint8_t* other,
             float* out);
float dot(Type type, const uint8_t* row, int cols, const Acts* x, const uint8_t* next, const uint8_t* beside);
void dequantize(Type type, const uint8_t* row, int cols, float* out);
void down(Type type, const uint8_t* const* rows, const float* x, int n, const uint8_t* scales, int width,
          float* y);
size_t gemm_a_bytes(Type type, int m, int k);
size_t gemm_scratch_bytes();
void gemm_pack_a(Type type, const float* x, int m, int k, int ldx, void* a);
void gemm(const Matrix* w, int panel, const void* a, int m, float* c, int ldc, void* tile);
void gemm_down(const Neurons* w, int panel, const void* a, int m, float* c, int ldc, void* tile);
void attend(const AttendArgs* a);
void rmsnorm(const float* x, const float* weight, int n, float eps, float* out);
void rope(float* x, const float* cos, const float* sin, int head_dim);
void to_half(const float* x, int n, uint16_t* out);
void add(float* y, const float* x, float scale, int n);
void activate_all(ActFn fn, float param, const float* x, int n, float* out);
void multiply(const float* x, int n, float* y);
void sign_scores(const uint64_t* rows, int count, int words, int n, const uint64_t* x, float* out);
float read(const void* p, size_t bytes);

extern const int kPanel, kTokenTile;

}  // namespace PS_NS
}  // namespace prosparse

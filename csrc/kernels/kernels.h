// What the engine asks of an instruction set: packed weight layouts and one table of functions.
// Included by kernel units, so it pulls in C headers only (an inline std:: template compiled with
// -mavx512 could be the copy the linker keeps for every CPU).
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace prosparse {

enum class Type : int { f32, f16, bf16, q8_0, q5_1, q4_0, q4_1 };

constexpr bool quantized(Type t) { return t >= Type::q8_0; }
constexpr bool has_min(Type t) { return t == Type::q5_1 || t == Type::q4_1; }
// value = d * (code - offset) for the types without a stored minimum
constexpr int code_offset(Type t) { return t == Type::q8_0 ? 128 : t == Type::q4_0 ? 8 : 0; }
constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }

// Codes of one row; float rows are zero-padded to 16 columns. Quantised columns come in chunks of 64 (two
// quantisation blocks): q8_0 holds 64 bytes (code + 128); the others 32 bytes whose low nibbles are the first
// block and high nibbles the second; q5_1 adds, after all nibbles, 8 bytes a chunk with the fifth bits.
constexpr size_t code_bytes(Type t, int cols) {
    size_t chunks = size_t(round_up(cols, 64)) / 64;
    switch (t) {
        case Type::f32: return size_t(round_up(cols, 16)) * 4;
        case Type::f16:
        case Type::bf16: return size_t(round_up(cols, 16)) * 2;
        case Type::q8_0: return chunks * 64;
        case Type::q5_1: return chunks * 40;
        case Type::q4_0:
        case Type::q4_1: return chunks * 32;
    }
    return 0;
}
constexpr int scale_blocks(int cols) { return round_up(cols, 64) / 32; }
// A row-major row: codes, then one f16 scale a block, then one f16 minimum a block (q4_1, q5_1).
constexpr size_t row_bytes(Type t, int cols) {
    size_t n = code_bytes(t, cols);
    if (quantized(t)) n += size_t(scale_blocks(cols)) * (has_min(t) ? 4 : 2);
    return (n + 15) / 16 * 16;
}

// Row-major weights: row r holds the inputs of output r.
struct Matrix {
    Type type;
    int rows, cols;
    const uint8_t* data;
    size_t stride;
    const uint8_t* row(int r) const { return data + size_t(r) * stride; }
};

constexpr int kGroup = 32;  // neurons that share the scales of down's quantisation blocks

// up and transposed down of one layer, neuron by neuron: record j is [up row | down codes], one contiguous
// read. down's quantisation blocks run across neurons, so each group of 32 neurons shares one scale (and
// minimum) per model column; those rows of f16 lie apart, padded to 64 columns.
struct Neurons {
    Type up_type, down_type;
    int count, width;  // d_ff, d_model
    const uint8_t* records;
    size_t record, down_offset;
    const uint8_t* scales;
    size_t scale_stride;
    Matrix up() const { return {up_type, count, width, records, record}; }
    const uint8_t* up(int j) const { return records + size_t(j) * record; }
    const uint8_t* down(int j) const { return up(j) + down_offset; }
    const uint8_t* group_scales(int g) const { return scales + size_t(g) * scale_stride; }
};

// One token's activations as the dot products want them; arrays are zero-padded to 64 columns, scale and sum
// to 16 blocks.
// q is a 15-bit integer per value, scaled per block of 32, so integer dots lose nothing that f32 would keep
// at these magnitudes. AVX-512 reads it as two signed bytes, q = 128*hi + lo; AVX2 as int16 with the even
// columns of a block before the odd ones; the others as plain int16.
struct Acts {
    int n;
    float* f;  // `quantize` leaves it out where it is null
    int16_t* q;
    int8_t *hi, *lo;
    float* scale;  // per block
    float* sum;    // per block: scale * sum(q)
};

enum class ActFn : int { silu, relu, fatrelu, shiftrelu, gelu };

struct AttendArgs {
    const float* q;            // [heads][head_dim], rotated; heads share one KV head
    const uint16_t *k, *v;     // f16 [n][head_dim]
    int heads, n, head_dim;    // head_dim: padded to 16 with zeros in q, k and v
    int q_stride, out_stride;  // floats between heads
    float scale;
    float* scores;  // [heads][n] scratch
    float* out;
};

struct Kernels {
    const char* isa;
    int panel;       // output columns one gemm call computes
    int token_tile;  // A and C are padded to a multiple of this many tokens

    void (*quantize)(const float* x, int n, Acts* out);
    void (*matvec)(const Matrix* w, int r0, int r1, const Acts* x, float* out);
    // two rows of it, into out[0] and out[apart], while as many bytes from `beside` and `other` on are
    // requested; both may be null
    void (*dot_two)(const Matrix* w, int r, int apart, const Acts* x, const uint8_t* beside,
                    const uint8_t* other, float* out);
    // a row by itself, while as many bytes from `next` and from `beside` on are requested
    float (*dot)(Type type, const uint8_t* row, int cols, const Acts* x, const uint8_t* next,
                 const uint8_t* beside);
    void (*dequantize)(Type type, const uint8_t* row, int cols, float* out);
    // y += sum_j x[j] * down_row[j], n <= 32 rows of one group
    void (*down)(Type type, const uint8_t* const* rows, const float* x, int n, const uint8_t* scales,
                 int width, float* y);

    // C[m][c0..c0+panel) = A[m][:] . W for output columns c0 = panel index * panel: see gemm.cpp
    size_t (*gemm_a_bytes)(Type type, int m, int k);
    size_t (*gemm_scratch_bytes)();
    void (*gemm_pack_a)(Type type, const float* x, int m, int k, int ldx, void* a);
    void (*gemm)(const Matrix* w, int panel, const void* a, int m, float* c, int ldc, void* tile);
    void (*gemm_down)(const Neurons* w, int panel, const void* a, int m, float* c, int ldc, void* tile);

    void (*attend)(const AttendArgs* a);
    void (*rmsnorm)(const float* x, const float* weight, int n, float eps, float* out);
    void (*rope)(float* x, const float* cos, const float* sin, int head_dim);
    void (*to_half)(const float* x, int n, uint16_t* out);
    void (*add)(float* y, const float* x, float scale, int n);  // y += scale * x
    void (*activate)(ActFn fn, float param, const float* x, int n, float* out);
    void (*multiply)(const float* x, int n, float* y);  // y *= x
    // out[r] = signs that agree less signs that do not, of row r and x: `words` words of which `n` bits count
    void (*sign_scores)(const uint64_t* rows, int count, int words, int n, const uint64_t* x, float* out);
    float (*read)(const void* p, size_t bytes);  // touches every line: bandwidth probe
};

}  // namespace prosparse

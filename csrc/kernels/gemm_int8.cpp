// Prefill of quantised weights with VNNI. Codes (unsigned bytes) meet 15-bit activations, q = 128 * hi + lo,
// as in decoding, so a prompt gives the same numbers either way; sums of a quantisation block are exact
// integers.
#include "gemm.h"

#if defined(PS_AVX512)
namespace prosparse {
namespace PS_NS {

constexpr int kTokens = 4;  // 4 tokens x 3 vectors x (hi, lo) = 24 accumulators
constexpr int kBlocks = kKB / 32;

// One token of A. The arrays lie behind each other: hi, lo, then per block the f32 scale, the f32 sum (as in
// Acts) and the integer that takes the codes' offset out.
struct TokenRow {
    int padded;
    int8_t* hi;

    TokenRow(const void* a, int token, int k)
        : padded(round_up(k, 64)), hi((int8_t*)a + size_t(token) * bytes(k)) {}
    static size_t bytes(int k) { return size_t(round_up(k, 64)) / 8 * 19; }
    int8_t* lo() const { return hi + padded; }
    float* scale() const { return (float*)(hi + 2 * padded); }
    float* sum() const { return scale() + padded / 32; }
    int32_t* offset() const { return (int32_t*)(sum() + padded / 32); }
};

// A tile of W: 256 inputs of 48 outputs.
struct Tile {
    uint8_t codes[kKB / 4][kNR][4];  // four inputs of an output side by side
    float scale[kBlocks][kNR], min[kBlocks][kNR];
};

size_t int8_a_bytes(int m, int k) { return size_t(round_up(m, kMR)) * TokenRow::bytes(k); }

void int8_pack_a(Type type, const float* x, int m, int k, int ldx, void* a) {
    for (int i = 0; i < round_up(m, kMR); i++) {
        const TokenRow row(a, i, k);
        if (i >= m) {
            memset(row.hi, 0, TokenRow::bytes(k));
            continue;
        }
        Acts acts{k, nullptr, nullptr, row.hi, row.lo(), row.scale(), row.sum()};
        quantize(x + size_t(i) * size_t(ldx), k, &acts);
        for (int b = 0; b < row.padded / 32; b++) {
            int32_t total = 0;
            for (int j = b * 32; j < b * 32 + 32; j++) total += row.hi[j] * 128 + row.lo()[j];
            row.offset()[b] = -code_offset(type) * total;
        }
    }
}

// c[kTokens][kNR] += A . tile
template <bool HasMin>
static inline void micro(const void* a, int k, int token, int b0, int blocks, const Tile* t, float* c,
                         int ldc) {
    const TokenRow rows[kTokens] = {{a, token, k}, {a, token + 1, k}, {a, token + 2, k}, {a, token + 3, k}};
    for (int b = 0; b < blocks; b++) {
        __m512i h[kTokens][3], l[kTokens][3];
        for (int i = 0; i < kTokens; i++)
            for (int v = 0; v < 3; v++) {
                h[i][v] = _mm512_setzero_si512();
                l[i][v] = _mm512_set1_epi32(rows[i].offset()[b0 + b]);
            }
        for (int q = 0; q < 8; q++) {
            __m512i w[3];
            for (int v = 0; v < 3; v++) w[v] = _mm512_loadu_si512(t->codes[b * 8 + q][v * 16]);
            for (int i = 0; i < kTokens; i++) {
                const size_t at = size_t(b0 + b) * 32 + size_t(q) * 4;
                int32_t xh, xl;
                memcpy(&xh, rows[i].hi + at, 4);
                memcpy(&xl, rows[i].lo() + at, 4);
                const __m512i vh = _mm512_set1_epi32(xh), vl = _mm512_set1_epi32(xl);
                for (int v = 0; v < 3; v++) {
                    h[i][v] = _mm512_dpbusd_epi32(h[i][v], w[v], vh);
                    l[i][v] = _mm512_dpbusd_epi32(l[i][v], w[v], vl);
                }
            }
        }
        for (int i = 0; i < kTokens; i++) {
            const __m512 scale = _mm512_set1_ps(rows[i].scale()[b0 + b]),
                         sum = _mm512_set1_ps(rows[i].sum()[b0 + b]);
            for (int v = 0; v < 3; v++) {
                float* out = c + size_t(i) * size_t(ldc) + v * 16;
                __m512 acc = b0 + b ? _mm512_loadu_ps(out) : _mm512_setzero_ps();
                const __m512 x = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(h[i][v], 7), l[i][v]));
                acc = _mm512_fmadd_ps(x, _mm512_mul_ps(scale, _mm512_loadu_ps(t->scale[b] + v * 16)), acc);
                if constexpr (HasMin) acc = _mm512_fmadd_ps(sum, _mm512_loadu_ps(t->min[b] + v * 16), acc);
                _mm512_storeu_ps(out, acc);
            }
        }
    }
}

static void multiply_tile(Type type, const void* a, int m, int k, int b0, int blocks, const Tile* t, float* c,
                          int ldc) {
    for (int i = 0; i < m; i += kTokens) {
        float* out = c + size_t(i) * size_t(ldc);
        if (has_min(type))
            micro<true>(a, k, i, b0, blocks, t, out, ldc);
        else
            micro<false>(a, k, i, b0, blocks, t, out, ldc);
    }
}

// Blocks b0..b0+blocks of outputs n0..n0+kNR of a row-major matrix.
template <Type T>
static void fetch_rows(const Matrix* w, int n0, int b0, int blocks, Tile* t) {
    const int chunks = round_up(w->cols, 64) / 64, stored = chunks * 2;
    for (int v = 0; v < kNR; v += 16) {
        const uint8_t* row[16];
        for (int i = 0; i < 16; i++) row[i] = n0 + v + i < w->rows ? w->row(n0 + v + i) : nullptr;
        for (int c = 0; c < (blocks + 1) / 2; c++) {
            vf r[16];
            for (int i = 0; i < 16; i++) r[i] = row[i] ? (vf)codes<T>(row[i], chunks, b0 / 2 + c) : vf{};
            transpose(r);
            for (int q = 0; q < 16; q++) _mm512_storeu_ps(t->codes[c * 16 + q][v], (__m512)r[q]);
        }
        for (int i = 0; i < 16; i++) {
            const uint16_t* scales =
                row[i] ? (const uint16_t*)(row[i] + code_bytes(T, w->cols)) + b0 : nullptr;
            for (int b = 0; b < blocks; b++) {
                t->scale[b][v + i] = scales ? half_float(scales[b]) : 0.0f;
                if (has_min(T)) t->min[b][v + i] = scales ? half_float(scales[stored + b]) : 0.0f;
            }
        }
    }
}

// Groups g0..g0+blocks of neurons, model columns c0..c0+kNR.
template <Type T>
static void fetch_neurons(const Neurons* w, int c0, int g0, int blocks, Tile* t) {
    const int padded = round_up(w->width, 64);
    for (int v = 0; v < kNR; v += 16) {
        const int col = c0 + v;
        if (col >= w->width) {
            for (int b = 0; b < blocks; b++) {
                memset(t->scale[b] + v, 0, 64);
                memset(t->min[b] + v, 0, 64);
            }
            continue;  // whatever the codes are
        }
        for (int q = 0; q < blocks * 8; q++) {
            __m128i r[4];
            for (int i = 0; i < 4; i++)
                r[i] = _mm512_cvtepi32_epi8(
                    (__m512i)load_codes<T>(w->down((g0 * 8 + q) * 4 + i), w->width, col));
            const __m128i lo[2] = {_mm_unpacklo_epi8(r[0], r[1]), _mm_unpacklo_epi8(r[2], r[3])};
            const __m128i hi[2] = {_mm_unpackhi_epi8(r[0], r[1]), _mm_unpackhi_epi8(r[2], r[3])};
            __m128i* out = (__m128i*)t->codes[q][v];
            _mm_storeu_si128(out, _mm_unpacklo_epi16(lo[0], lo[1]));
            _mm_storeu_si128(out + 1, _mm_unpackhi_epi16(lo[0], lo[1]));
            _mm_storeu_si128(out + 2, _mm_unpacklo_epi16(hi[0], hi[1]));
            _mm_storeu_si128(out + 3, _mm_unpackhi_epi16(hi[0], hi[1]));
        }
        for (int b = 0; b < blocks; b++) {
            const uint16_t* scales = (const uint16_t*)w->group_scales(g0 + b) + col;
            store(t->scale[b] + v, load_half(scales));
            if (has_min(T)) store(t->min[b] + v, load_half(scales + padded));
        }
    }
}

// CALL(T) for the quantised types
#define PS_BY_QUANTIZED(type, CALL)               \
    switch (type) {                               \
        case Type::q8_0: CALL(Type::q8_0); break; \
        case Type::q5_1: CALL(Type::q5_1); break; \
        case Type::q4_0: CALL(Type::q4_0); break; \
        case Type::q4_1: CALL(Type::q4_1); break; \
        default: break;                           \
    }

void int8_gemm(const Matrix* w, int panel, const void* a, int m, float* c, int ldc, void* tile) {
    const int total = w->cols / 32;
    for (int b0 = 0; b0 < total; b0 += kBlocks) {
        const int blocks = total - b0 < kBlocks ? total - b0 : kBlocks;
#define PS_CALL(T) fetch_rows<T>(w, panel * kNR, b0, blocks, (Tile*)tile)
        PS_BY_QUANTIZED(w->type, PS_CALL)
#undef PS_CALL
        multiply_tile(w->type, a, m, w->cols, b0, blocks, (const Tile*)tile, c + panel * kNR, ldc);
    }
}

void int8_gemm_down(const Neurons* w, int panel, const void* a, int m, float* c, int ldc, void* tile) {
    const int total = w->count / kGroup;
    for (int g0 = 0; g0 < total; g0 += kBlocks) {
        const int blocks = total - g0 < kBlocks ? total - g0 : kBlocks;
#define PS_CALL(T) fetch_neurons<T>(w, panel * kNR, g0, blocks, (Tile*)tile)
        PS_BY_QUANTIZED(w->down_type, PS_CALL)
#undef PS_CALL
        multiply_tile(w->down_type, a, m, w->count, g0, blocks, (const Tile*)tile, c + panel * kNR, ldc);
    }
}

static_assert(sizeof(Tile) <= kNR * kKB * 4, "a tile fits the scratch of gemm_scratch_bytes");

}  // namespace PS_NS
}  // namespace prosparse
#endif

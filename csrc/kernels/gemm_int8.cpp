// Prefill of quantised weights with VNNI. Codes (unsigned bytes) meet 15-bit activations, q = 128 * hi + lo,
// as in decoding, so a prompt gives the same numbers either way; sums of a quantisation block are exact
// integers.
#include "gemm.h"

#if defined(PS_AVX512)
namespace prosparse {
namespace PS_NS {

constexpr int kBlocks = kKB / 32;

// kMR tokens of A over k inputs: hi and lo as quads of inputs, [quad][token][4], then per block of 32 inputs
// [block][token] the f32 scale, the f32 sum (both as in Acts) and the integer that takes the codes' offset
// out.
struct TokenTile {
    int padded;
    int8_t* hi;

    TokenTile(const void* a, int tile, int k)
        : padded(round_up(k, 64)), hi((int8_t*)a + size_t(tile) * bytes(k)) {}
    static size_t bytes(int k) { return size_t(round_up(k, 64)) / 8 * 19 * kMR; }
    int8_t* lo() const { return hi + padded * kMR; }
    float* scale() const { return (float*)(lo() + padded * kMR); }
    float* sum() const { return scale() + padded / 32 * kMR; }
    int32_t* offset() const { return (int32_t*)(sum() + padded / 32 * kMR); }
};

// A tile of W: 256 inputs of 48 outputs.
struct Tile {
    uint8_t codes[kKB / 4][kNR][4];  // four inputs of an output side by side
    float scale[kBlocks][kNR], min[kBlocks][kNR];
};

size_t int8_a_bytes(int m, int k) { return size_t(round_up(m, kMR) / kMR) * TokenTile::bytes(k); }

// Columns k0..k0+n of token i, n <= 256.
static void pack_token(Type type, const float* x, int k0, int n, int i, const TokenTile& t) {
    alignas(64) int8_t hi[256], lo[256];
    float scale[8], sum[8];
    Acts acts{n, nullptr, nullptr, hi, lo, scale, sum};
    quantize(x, n, &acts);
    for (int j = 0; j < round_up(n, 64); j += 4) {
        memcpy(t.hi + (k0 + j) * kMR + i * 4, hi + j, 4);
        memcpy(t.lo() + (k0 + j) * kMR + i * 4, lo + j, 4);
    }
    for (int b = 0; b < round_up(n, 64) / 32; b++) {
        int32_t total = 0;
        for (int j = b * 32; j < b * 32 + 32; j++) total += hi[j] * 128 + lo[j];
        const int at = (k0 / 32 + b) * kMR + i;
        t.scale()[at] = scale[b];
        t.sum()[at] = sum[b];
        t.offset()[at] = -code_offset(type) * total;
    }
}

void int8_pack_a(Type type, const float* x, int m, int k, int ldx, void* a) {
    for (int i = 0; i < m; i++) {
        const TokenTile t(a, i / kMR, k);
        if (i % kMR == 0 && m - i < kMR) memset(t.hi, 0, TokenTile::bytes(k));
        for (int k0 = 0; k0 < k; k0 += 256)
            pack_token(type, x + size_t(i) * size_t(ldx) + k0, k0, k - k0 < 256 ? k - k0 : 256, i % kMR, t);
    }
}

// c[kMR][kNR] += A . tile
template <bool HasMin>
static inline void micro(const TokenTile& a, int b0, int blocks, const Tile* t, float* c, int ldc) {
    const int8_t *hi = a.hi, *lo = a.lo();
    const float *scales = a.scale(), *sums = a.sum();
    const int32_t* offsets = a.offset();
    for (int b = 0; b < blocks; b++) {
        const int at = (b0 + b) * kMR;
        vi acc[kMR][3];  // as __m512i, GCC 12 would copy each through the stack
        auto dot = [&](const int8_t* x) __attribute__((always_inline)) {
            for (int q = 0; q < 8; q++, x += kMR * 4) {
                __m512i w[3];
                unroll<3>([&](auto v) { w[v] = _mm512_loadu_si512(t->codes[b * 8 + q][v * 16]); });
                unroll<kMR>([&](auto i) {
                    int32_t quad;
                    memcpy(&quad, x + i * 4, 4);
                    const __m512i x4 = _mm512_set1_epi32(quad);
                    unroll<3>(
                        [&](auto v) { acc[i][v] = (vi)_mm512_dpbusd_epi32((__m512i)acc[i][v], w[v], x4); });
                });
            }
        };
        unroll<kMR * 3>([&](auto k) { acc[k / 3][k % 3] = vi{}; });
        dot(hi + at * 32);
        unroll<kMR>([&](auto i) {
            unroll<3>([&](auto v) { acc[i][v] = (acc[i][v] << 7) + (HasMin ? 0 : offsets[at + i]); });
        });
        dot(lo + at * 32);
        unroll<kMR>([&](auto i) {
            const __m512 scale = _mm512_set1_ps(scales[at + i]), sum = _mm512_set1_ps(sums[at + i]);
            float* out = c + size_t(i) * size_t(ldc);
            unroll<3>([&](auto v) {
                const __m512 d = _mm512_loadu_ps(t->scale[b] + v * 16);
                __m512 y = b0 + b ? _mm512_loadu_ps(out + v * 16) : _mm512_setzero_ps();
                y = _mm512_fmadd_ps(_mm512_cvtepi32_ps((__m512i)acc[i][v]), _mm512_mul_ps(scale, d), y);
                if (HasMin) y = _mm512_fmadd_ps(sum, _mm512_loadu_ps(t->min[b] + v * 16), y);
                _mm512_storeu_ps(out + v * 16, y);
            });
        });
    }
}

static void multiply_tile(Type type, const void* a, int m, int k, int b0, int blocks, const Tile* t, float* c,
                          int ldc) {
    for (int i = 0; i < m; i += kMR) {
        const TokenTile tokens(a, i / kMR, k);
        float* out = c + size_t(i) * size_t(ldc);
        if (has_min(type))
            micro<true>(tokens, b0, blocks, t, out, ldc);
        else
            micro<false>(tokens, b0, blocks, t, out, ldc);
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

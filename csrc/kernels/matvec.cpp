// Row-major weights times one token: the decode path reads each weight once, so the aim is
// plain sequential streams with as few instructions per byte as the memory bus leaves room for.
//
// Quantised rows: value = d * (code - offset) or d * code + m. With integer activations q (scale s per block)
//   dot = sum_b d_b s_b sum_i code_i q_i  +  sum_b m_b (s_b sum_i q_i),
// the last factor being Acts::sum, so minima and offsets cost one FMA per 16 blocks.
#include "simd.h"
#include "units.h"

namespace prosparse {
namespace PS_NS {

// What is requested while a row is computed, line for line, so that a core's few misses in flight never stand
// in the way of the arithmetic. The L2 prefetcher alone leaves a core a fifth below its bandwidth.
struct Nothing {
    template <size_t bytes>
    __attribute__((always_inline)) void request(size_t) const {}
    __attribute__((always_inline)) void rest(size_t, size_t) const {}
};
template <Type T, int R = 1>
struct Stream {  // two kilobytes ahead of each of R rows: the rows that follow
    const uint8_t* row;
    size_t apart = 0;
    // floats into the second-level cache only: 6 % faster in predicted mode, but codes would be slower
    static constexpr int kLevel = quantized(T) ? 3 : 2;
    template <size_t bytes>
    __attribute__((always_inline)) void request(size_t at) const {
        unroll<R>([&](auto r) __attribute__((always_inline)) {
            const uint8_t* p = row + size_t(r) * apart + 2048 + at;
#pragma GCC unroll 8
            for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, kLevel);
        });
    }
    // the end of a row is left to the hardware: requesting it too gained nothing clear, and made rows that
    // come singly a fifth slower
    __attribute__((always_inline)) void rest(size_t, size_t) const {}
};
template <class First>
struct Beside {  // and a row that lies elsewhere
    First first;
    const uint8_t* row;
    template <size_t bytes>
    __attribute__((always_inline)) void request(size_t at) const {
        first.template request<bytes>(at);
#pragma GCC unroll 8
        for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + at + i, 0, 2);
    }
    __attribute__((always_inline)) void rest(size_t at, size_t end) const {
        first.rest(at, end);
        for (; at < end + 63; at += 64) __builtin_prefetch(row + at, 0, 2);
    }
};
constexpr size_t block_bytes(Type t) { return t == Type::q8_0 ? 32 : t == Type::q5_1 ? 20 : 16; }

// a[0] becomes the sum of N vectors.
template <int N>
__attribute__((always_inline)) static inline void fold(vf* a) {
    if constexpr (N > 1) {
        unroll<N / 2>([&](auto k) __attribute__((always_inline)) { a[k] += a[k + N / 2]; });
        fold<N / 2>(a);
    }
}

// R rows side by side, `apart` bytes from one to the next.
template <Type T, int R, class Ahead>
static inline void dot_float(const uint8_t* row, size_t apart, int cols, const Acts* x, Ahead ahead,
                             float* out) {
    // 4 * 16 running sums in memory order, whatever the vector width: same result on every instruction set
    constexpr int K = 64 / W;
    constexpr size_t bytes = T == Type::f32 ? 4 : 2;
    vf acc[R][K] = {};
    int i = 0;
    auto step = [&](auto r, auto k) __attribute__((always_inline)) {
        acc[r][k] += load_raw<T>(row + size_t(r) * apart, cols, i + k * W) * load(x->f + i + k * W);
    };
    for (; i + 64 <= cols; i += 64) {
        ahead.template request<64 * bytes>(size_t(i) * bytes);
        unroll<R>([&](auto r) __attribute__((always_inline)) {
            unroll<K>([&](auto k) __attribute__((always_inline)) { step(r, k); });
        });
    }
    ahead.rest(size_t(i) * bytes, size_t(cols) * bytes);
    unroll<R>([&](auto r) __attribute__((always_inline)) {
        unroll<K>([&](auto k) __attribute__((always_inline)) {
            if (i + k * W < cols) step(r, k);
        });
        fold<K>(acc[r]);
        out[r] = sum(acc[r][0]);
    });
}

#if defined(PS_AVX512)
// The products of R rows, each in 16 lanes that are still to be added up.
template <Type T, int R, class Ahead>
static inline void dot_lanes(const uint8_t* rows, size_t apart, int cols, const Acts* x, Ahead ahead,
                             __m512* out) {
    const int chunks = round_up(cols, 64) / 64;
    const int8_t *hi = x->hi, *lo = x->lo;
    const float *xscale = x->scale, *xsum = x->sum;
    __m512 even[R], odd[R], corr[R];
    unroll<R>([&](auto r) { even[r] = odd[r] = corr[r] = _mm512_setzero_ps(); });
    auto scales_of = [cols](const uint8_t* row) { return (const uint16_t*)(row + code_bytes(T, cols)); };
    // lanes of a chunk's two blocks: eight 32-bit sums each
    const __m512i block = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi32(1), 1);
    auto chunk = [&](const uint8_t* row, int c, int k, __m512 s, __m512 acc) __attribute__((always_inline)) {
        const __m512i w = codes<T>(row, chunks, c);
        const __m512i h = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w, _mm512_loadu_si512(hi + c * 64));
        const __m512i q = _mm512_dpbusd_epi32(_mm512_slli_epi32(h, 7), w, _mm512_loadu_si512(lo + c * 64));
        const __m512 v = _mm512_cvtepi32_ps(q);
        const __m512i pick = _mm512_add_epi32(block, _mm512_set1_epi32(2 * k));
        return _mm512_fmadd_ps(v, _mm512_permutexvar_ps(pick, s), acc);
    };
    int c = 0;
    for (; c + 8 <= chunks; c += 8) {  // 16 blocks
        const int b = 2 * c;
        ahead.template request<16 * block_bytes(T)>(size_t(b) * block_bytes(T));
        unroll<R>([&](auto r) __attribute__((always_inline)) {
            const uint8_t* row = rows + size_t(r) * apart;
            const uint16_t *scales = scales_of(row), *mins = scales + 2 * chunks;
            const __m512 d = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(scales + b)));
            const __m512 m = has_min(T) ? _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(mins + b))) : d;
            corr[r] = _mm512_fmadd_ps(m, _mm512_loadu_ps(xsum + b), corr[r]);
            const __m512 s = _mm512_mul_ps(d, _mm512_loadu_ps(xscale + b));
            unroll<4>([&](auto i) __attribute__((always_inline)) {
                constexpr int k = 2 * decltype(i){};
                even[r] = chunk(row, c + k, k, s, even[r]);
                odd[r] = chunk(row, c + k + 1, k + 1, s, odd[r]);
            });
        });
    }
    ahead.rest(size_t(2 * c) * block_bytes(T), row_bytes(T, cols));
    const __m512 factor = _mm512_set1_ps(has_min(T) ? 1.0f : -float(code_offset(T)));
    unroll<R>([&](auto r) __attribute__((always_inline)) {
        if (c < chunks) {
            const uint8_t* row = rows + size_t(r) * apart;
            const uint16_t *scales = scales_of(row), *mins = scales + 2 * chunks;
            const int b = 2 * c;
            const __mmask16 some = __mmask16((1u << 2 * (chunks - c)) - 1);
            const __m512 d = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, scales + b));
            const __m512 m = has_min(T) ? _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, mins + b)) : d;
            corr[r] = _mm512_fmadd_ps(m, _mm512_loadu_ps(xsum + b), corr[r]);
            const __m512 s = _mm512_mul_ps(d, _mm512_loadu_ps(xscale + b));
            for (int k = 0; c + k < chunks; k++) even[r] = chunk(row, c + k, k, s, even[r]);
        }
        out[r] = _mm512_fmadd_ps(corr[r], factor, _mm512_add_ps(even[r], odd[r]));
    });
}

template <Type T, class Ahead>
static inline float dot_quantized(const uint8_t* row, int cols, const Acts* x, Ahead ahead) {
    __m512 lanes;
    dot_lanes<T, 1>(row, 0, cols, x, ahead, &lanes);
    return _mm512_reduce_add_ps(lanes);
}

// Rows this short, as a predictor's second matrix has, are computed sixteen side by side: adding up the lanes
// of each by itself would take longer than its products.
constexpr int kShort = 448;  // columns: what the loop over 16 blocks never sees
template <Type T>
static inline void dot_16_rows(const Matrix* w, int r, const Acts* x, float* out) {
    const Stream<T> ahead{w->row(r)};
    for (size_t i = 0; i < 16 * w->stride; i += 64) ahead.template request<64>(i);
    vf lanes[16];
    for (int i = 0; i < 16; i++) dot_lanes<T, 1>(w->row(r + i), 0, w->cols, x, Nothing{}, (__m512*)lanes + i);
    store(out, sums_of(lanes));
}
#elif defined(PS_AVX2)
static inline __m256i load256(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }

// even and odd columns of a block times its activations: eight 32-bit sums
static inline __m256i dot_words(__m256i even, __m256i odd, const int16_t* q) {
    return _mm256_add_epi32(_mm256_madd_epi16(even, load256(q)), _mm256_madd_epi16(odd, load256(q + 16)));
}

// The two blocks of chunk c.
template <Type T>
static inline void dot_chunk(const uint8_t* row, size_t chunks, size_t c, const int16_t* q, __m256i sums[2]) {
    const __m256i low_byte = _mm256_set1_epi16(255), low_nibble = _mm256_set1_epi16(15);
    if constexpr (T == Type::q8_0) {
        for (int b = 0; b < 2; b++) {
            const __m256i w = load256(row + c * 64 + b * 32);
            sums[b] = dot_words(_mm256_and_si256(w, low_byte), _mm256_srli_epi16(w, 8), q + b * 32);
        }
    } else if constexpr (T == Type::q5_1) {
        for (int b = 0; b < 2; b++) {
            const __m256i w = codes<T>(row, int(chunks), int(2 * c) + b);
            sums[b] = dot_words(_mm256_and_si256(w, low_byte), _mm256_srli_epi16(w, 8), q + b * 32);
        }
    } else {
        const __m256i w = load256(row + c * 32);
        sums[0] = dot_words(_mm256_and_si256(w, low_nibble),
                            _mm256_and_si256(_mm256_srli_epi16(w, 8), low_nibble), q);
        sums[1] = dot_words(_mm256_and_si256(_mm256_srli_epi16(w, 4), low_nibble), _mm256_srli_epi16(w, 12),
                            q + 32);
    }
}

template <Type T, class Ahead>
static inline float dot_quantized(const uint8_t* row, int cols, const Acts* x, Ahead ahead) {
    const size_t chunks = size_t(round_up(cols, 64)) / 64, blocks = chunks * 2;
    const uint16_t *scales = (const uint16_t*)(row + code_bytes(T, cols)), *mins = scales + blocks;
    alignas(32) static const int16_t keep[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    __m256 acc[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    __m256 corr = _mm256_setzero_ps();
    for (size_t b = 0; b < blocks; b += 8) {
        const size_t n = blocks - b < 8 ? blocks - b : 8;
        // what lies behind the last scale may read as NaN
        const __m128i mask = _mm_loadu_si128((const __m128i*)(keep + 8 - n));
        auto half8 = [mask](const uint16_t* p) {
            return _mm256_cvtph_ps(_mm_and_si128(_mm_loadu_si128((const __m128i*)p), mask));
        };
        ahead.template request<8 * block_bytes(T)>(b * block_bytes(T));
        const __m256 d = half8(scales + b);
        corr = _mm256_fmadd_ps(has_min(T) ? half8(mins + b) : d, _mm256_loadu_ps(x->sum + b), corr);
        const __m256 s = _mm256_mul_ps(d, _mm256_loadu_ps(x->scale + b));
        const int16_t* q = x->q + b * 32;
        auto step = [&](int k) __attribute__((always_inline)) {
            __m256i v[2];
            dot_chunk<T>(row, chunks, b / 2 + size_t(k), q + k * 64, v);
            for (int i = 0; i < 2; i++) {
                const __m256 scale = _mm256_permutevar8x32_ps(s, _mm256_set1_epi32(2 * k + i));
                __m256& a = acc[2 * (k & 1) + i];
                a = _mm256_fmadd_ps(_mm256_cvtepi32_ps(v[i]), scale, a);
            }
        };
        if (n == 8) {
            unroll<4>([&](auto k) __attribute__((always_inline)) { step(k); });
        } else {
#pragma GCC unroll 1
            for (int k = 0; k < int(n) / 2; k++) step(k);
        }
    }
    ahead.rest(round_up(int(blocks), 8) * block_bytes(T), row_bytes(T, cols));
    const __m256 factor = _mm256_set1_ps(has_min(T) ? 1.0f : -float(code_offset(T)));
    const __m256 a = _mm256_add_ps(_mm256_add_ps(acc[0], acc[1]), _mm256_add_ps(acc[2], acc[3]));
    return sum((vf)_mm256_fmadd_ps(corr, factor, a));
}
#else
// 32 unsigned codes of block b times 32 integer activations.
template <Type T>
static inline int32_t dot_block(const uint8_t* row, int chunks, int b, const int16_t* q) {
    int32_t s = 0;
    if constexpr (T == Type::q8_0) {
        for (int k = 0; k < 32; k++) s += row[b * 32 + k] * q[k];
    } else {
        const uint8_t* v = row + b / 2 * 32;
        const int shift = b % 2 * 4;
        for (int k = 0; k < 32; k++) s += (v[k] >> shift & 15) * q[k];
        if constexpr (T == Type::q5_1) {
            uint32_t bits;
            memcpy(&bits, row + chunks * 32 + b * 4, 4);
            for (int k = 0; k < 32; k++) s += int32_t(bits >> k & 1) * 16 * q[k];
        }
    }
    return s;
}

template <Type T, class Ahead>
static inline float dot_quantized(const uint8_t* row, int cols, const Acts* x, Ahead) {
    const int chunks = round_up(cols, 64) / 64, blocks = chunks * 2;
    const uint16_t* scales = (const uint16_t*)(row + code_bytes(T, cols));
    float acc[2] = {}, corr[2] = {};
    for (int b = 0; b < blocks; b++) {
        const float d = half_float(scales[b]);
        const float v = float(dot_block<T>(row, chunks, b, x->q + b * 32));
        acc[b & 1] += v * (d * x->scale[b]);
        corr[b & 1] += (has_min(T) ? half_float(scales[blocks + b]) : d) * x->sum[b];
    }
    const float a = acc[0] + acc[1], c = corr[0] + corr[1];
    return has_min(T) ? a + c : a - float(code_offset(T)) * c;
}
#endif

template <Type T, class Ahead>
static inline float dot_row(const uint8_t* row, int cols, const Acts* x, Ahead ahead) {
    if constexpr (quantized(T)) {
        return dot_quantized<T>(row, cols, x, ahead);
    } else {
        float out;
        dot_float<T, 1>(row, 0, cols, x, ahead, &out);
        return out;
    }
}

// Rows r and r + apart, into out[0] and out[apart]. A core reads two streams on different pages a tenth
// faster than one.
template <Type T>
static inline void dot_two_rows(const Matrix* w, int r, int apart, const Acts* x, const uint8_t* beside,
                                const uint8_t* other, float* out) {
    const uint8_t* row = w->row(r);
    const size_t bytes = w->stride * size_t(apart);
    float two[2];
#if defined(PS_AVX512)
    auto both = [&](auto ahead) __attribute__((always_inline)) {
        if constexpr (quantized(T)) {
            __m512 lanes[2];
            dot_lanes<T, 2>(row, bytes, w->cols, x, ahead, lanes);
            for (int i = 0; i < 2; i++) two[i] = _mm512_reduce_add_ps(lanes[i]);
        } else {
            dot_float<T, 2>(row, bytes, w->cols, x, ahead, two);
        }
    };
    const Stream<T, 2> streams{row, bytes};
    if (beside)
        both(Beside<Beside<Stream<T, 2>>>{{streams, beside}, other});
    else
        both(streams);
#else
    auto one = [&](const uint8_t* p, const uint8_t* q) {
        return q ? dot_row<T>(p, w->cols, x, Beside<Stream<T>>{{p}, q})
                 : dot_row<T>(p, w->cols, x, Stream<T>{p});
    };
    two[0] = one(row, beside);
    two[1] = one(row + bytes, other);
#endif
    out[0] = two[0];
    out[apart] = two[1];
}

template <Type T>
static inline void dot_rows(const Matrix* w, int r0, int r1, const Acts* x, float* out) {
    int r = r0;
#if defined(PS_AVX512)
    if constexpr (quantized(T))
        if (w->cols <= kShort)
            for (; r + 16 <= r1; r += 16) dot_16_rows<T>(w, r, x, out + (r - r0));
    const int half = (r1 - r) / 2;
    for (const int end = r + half; r < end; r++)
        dot_two_rows<T>(w, r, half, x, nullptr, nullptr, out + (r - r0));
    r += half;
#endif
    for (; r < r1; r++) out[r - r0] = dot_row<T>(w->row(r), w->cols, x, Stream<T>{w->row(r)});
}

void matvec(const Matrix* w, int r0, int r1, const Acts* x, float* out) {
#define PS_CALL(T) dot_rows<T>(w, r0, r1, x, out)
    PS_BY_TYPE(w->type, PS_CALL)
#undef PS_CALL
}

void dot_two(const Matrix* w, int r, int apart, const Acts* x, const uint8_t* beside, const uint8_t* other,
             float* out) {
#define PS_CALL(T) dot_two_rows<T>(w, r, apart, x, beside, other, out)
    PS_BY_TYPE(w->type, PS_CALL)
#undef PS_CALL
}

float dot(Type type, const uint8_t* row, int cols, const Acts* x, const uint8_t* next,
          const uint8_t* beside) {
#define PS_CALL(T) return dot_row<T>(row, cols, x, Beside<Beside<Nothing>>{{{}, next}, beside})
    PS_BY_TYPE(type, PS_CALL)
#undef PS_CALL
    return 0;
}

template <Type T>
static void dequantize_row(const uint8_t* row, int cols, float* out) {
    const uint16_t* scales = (const uint16_t*)(row + code_bytes(T, cols));
    const int blocks = scale_blocks(cols);
    for (int i = 0; i < cols; i += 32) {
        float d = 1, m = 0;
        if constexpr (quantized(T)) {
            d = half_float(scales[i / 32]);
            m = has_min(T) ? half_float(scales[blocks + i / 32]) : -float(code_offset(T)) * d;
        }
        for (int k = i; k < i + 32 && k < cols; k += W) {
            vf v = load_raw<T>(row, cols, k);
            if constexpr (quantized(T)) v = v * d + m;
            if (k + W <= cols) {
                store(out + k, v);
            } else {
                for (int j = 0; k + j < cols; j++) out[k + j] = v[j];
            }
        }
    }
}

void dequantize(Type type, const uint8_t* row, int cols, float* out) {
#define PS_CALL(T) dequantize_row<T>(row, cols, out)
    PS_BY_TYPE(type, PS_CALL)
#undef PS_CALL
}

}  // namespace PS_NS
}  // namespace prosparse

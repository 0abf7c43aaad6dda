// Define float vectors of the width of the instruction set, and the operations that C operators lack.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VW 16
#elif defined(__AVX2__)
#define VW 8
#else
#define VW 4
#endif
#if defined(__AVX512BF16__)
#define LS_BF16 1  // the processor multiplies pairs of bfloat16
#else
#define LS_BF16 0
#endif

#define INLINE static inline __attribute__((always_inline, unused))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vf __attribute__((vector_size(VW * 4)));
typedef int32_t vi __attribute__((vector_size(VW * 4)));
typedef uint32_t vu __attribute__((vector_size(VW * 4)));
typedef float vf_loose __attribute__((vector_size(VW * 4), aligned(4), may_alias));
typedef uint16_t vh_loose __attribute__((vector_size(VW * 2), aligned(2), may_alias));
typedef uint8_t vb_loose __attribute__((vector_size(VW), aligned(1), may_alias));
typedef uint16_t bf16;

INLINE vf load(const float *from) { return *(const vf_loose *)from; }
INLINE void store(float *to, vf x) { *(vf_loose *)to = x; }
INLINE vf splat(float x) { return x - (vf){}; }
INLINE vf load_bf16(const bf16 *from) { return (vf)(__builtin_convertvector(*(const vh_loose *)from, vu) << 16); }
INLINE float to_float(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}
INLINE void store_bf16(bf16 *to, vf x) {  // rounds to nearest, ties to even; NaN stays NaN
    vu bits = (vu)x;
    vu rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    vu nan = (vu)(x != x);
    *(vh_loose *)to = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), vh_loose);
}

INLINE vf vmax(vf a, vf b) {
#if VW == 16
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif VW == 8
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    vi m = a > b;
    return (vf)((m & (vi)a) | (~m & (vi)b));
#endif
}

INLINE vf where(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

INLINE int any(vi mask) {
#if VW == 16
    return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif VW == 8
    return _mm256_movemask_ps((__m256)mask) != 0;
#else
    return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}

// Return 2 to the x with relative error below 3e-7; exactly 0 for -inf (elsewhere than on AVX512 below -125), so that -inf masks a cell.
// NaN stays NaN, so that damaged weights of a model are seen in its logits.
INLINE vf exp2v(vf x) {
#if VW == 16
    vf f = (vf)_mm512_reduce_ps((__m512)x, 1);  // x - floor(x); 0 for -inf
    vf p = splat(0.001893754000775516f);
    p = p * f + 0.008949590846896172f;
    p = p * f + 0.05586033686995506f;
    p = p * f + 0.240141823887825f;
    p = p * f + 0.693154513835907f;
    p = p * f + 0.9999998807907104f;
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);  // p times 2 to the floor(x)
#else
    const float magic = 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer in the low bits
    vi kept = x > -125.0f, nan = x != x;
    vf given = x;
    x = vmax(x, splat(-125.0f));
    vf shifted = x + magic;
    vf f = x - (shifted - magic);
    vf p = splat(1.535336188e-4f);
    p = p * f + 1.339887440e-3f;
    p = p * f + 9.618437357e-3f;
    p = p * f + 5.550332471e-2f;
    p = p * f + 2.402264791e-1f;
    p = p * f + 6.931472029e-1f;
    p = p * f + 1.0f;
    vu power = ((vu)p + ((vu)shifted << 23)) & (vu)kept;  // unsigned, since unused lanes may overflow
    return (vf)(power | ((vu)given & (vu)nan));
#endif
}

INLINE float sum_of(vf x) {
#if VW == 16
    return _mm512_reduce_add_ps((__m512)x);
#else
    float total = 0;
    UNROLL for (int i = 0; i < VW; i++) total += x[i];
    return total;
#endif
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define PAIRS(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef PAIRS
#define PAIRS(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})  // gcc before 12
#endif

// Return the sums of VW vectors as one vector.
#if VW == 16
INLINE vf fold1(vf a, vf b) {  // adds neighbours: a0+a1.. in even positions of blocks of 4
    return PAIRS(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           PAIRS(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}
INLINE vf fold2(vf a, vf b) {
    return PAIRS(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           PAIRS(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}
INLINE vf fold4(vf a, vf b) {
    return PAIRS(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           PAIRS(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
}
INLINE vf fold8(vf a, vf b) {
    return PAIRS(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           PAIRS(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}
INLINE vf sums_of(const vf *x) {
    vf a[8], b[4], c[2];
    UNROLL for (int i = 0; i < 8; i++) a[i] = fold1(x[2 * i], x[2 * i + 1]);
    UNROLL for (int i = 0; i < 4; i++) b[i] = fold2(a[2 * i], a[2 * i + 1]);
    UNROLL for (int i = 0; i < 2; i++) c[i] = fold4(b[2 * i], b[2 * i + 1]);
    return fold8(c[0], c[1]);
}
#elif VW == 8
INLINE vf sums_of(const vf *x) {
    vf a[4], b[2];
    UNROLL for (int i = 0; i < 4; i++)
        a[i] = PAIRS(x[2 * i], x[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) + PAIRS(x[2 * i], x[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    UNROLL for (int i = 0; i < 2; i++)
        b[i] = PAIRS(a[2 * i], a[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) + PAIRS(a[2 * i], a[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    return PAIRS(b[0], b[1], 0, 1, 2, 3, 8, 9, 10, 11) + PAIRS(b[0], b[1], 4, 5, 6, 7, 12, 13, 14, 15);
}
#else
INLINE vf sums_of(const vf *x) { return (vf){sum_of(x[0]), sum_of(x[1]), sum_of(x[2]), sum_of(x[3])}; }
#endif

// Transpose: swap x[i][j] and x[j][i].
INLINE void transpose(vf *x) {
#if defined(__GNUC__) && !defined(__clang__)
#define SWAP(step)                                                       \
    {                                                                    \
        vi low, high;                                                    \
        UNROLL for (int l = 0; l < VW; l++) {                            \
            low[l] = l & step ? VW + l - step : l;                       \
            high[l] = l & step ? VW + l : l + step;                      \
        }                                                                \
        UNROLL for (int i = 0; i < VW; i++)                              \
            if (!(i & step)) {                                           \
                vf a = x[i], b = x[i + step];                            \
                x[i] = __builtin_shuffle(a, b, low);                     \
                x[i + step] = __builtin_shuffle(a, b, high);             \
            }                                                            \
    }
#if VW == 16
    SWAP(8)
#endif
#if VW >= 8
    SWAP(4)
#endif
    SWAP(2)
    SWAP(1)
#undef SWAP
#else
    for (int i = 0; i < VW; i++)
        for (int j = 0; j < i; j++) {
            float kept = x[i][j];
            x[i][j] = x[j][i], x[j][i] = kept;
        }
#endif
}

// Select the best of many scores: a sample excludes most, and a radix search among the others finds the last one selected.
#pragma once
#include "vec.h"

// Map floats to codes of the same order: NaN is lowest, both zeros are equal. No float has code 0.
INLINE uint32_t code_of(float x) {
    uint32_t bits;
    x = x == x ? x + 0.0f : -INFINITY;
    memcpy(&bits, &x, 4);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

INLINE vu codes_of(vf x) {
    x = where(x == x, x + 0.0f, splat(-INFINITY));
    vu negative = (vu)((vi)x < 0);
    return (~(vu)x & negative) | (((vu)x | 0x80000000u) & ~negative);
}

// Return the `wanted`-th best of `count` codes at a step, and how many of those equal to it are selected.
static uint32_t threshold(const uint32_t *codes, int64_t count, int64_t step, int64_t wanted, int64_t *equal) {
    static const int shifts[] = {21, 10, 0}, widths[] = {11, 11, 10};
    uint32_t found = 0, known = 0;  // the bits found so far, and their mask
    for (int pass = 0; pass < 3; pass++) {
        int32_t counts[2048] = {0};
        uint32_t mask = (1u << widths[pass]) - 1;
        for (int64_t c = 0; c < count; c += step)
            if ((codes[c] & known) == found) counts[codes[c] >> shifts[pass] & mask]++;
        int64_t bin = mask;
        while (counts[bin] < wanted) wanted -= counts[bin--];
        found |= (uint32_t)bin << shifts[pass], known |= mask << shifts[pass];
    }
    *equal = wanted;
    return found;
}

// Write the indices of codes of at least `least`, in order. places: capacity `count` + VW.
static int64_t at_least(const uint32_t *codes, int64_t count, uint32_t least, int32_t *places) {
    int64_t found = 0, c = 0;
#if VW == 16
    __m512i number = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (; c + VW <= count; c += VW) {
        __mmask16 in = _mm512_cmpge_epu32_mask(_mm512_loadu_si512(codes + c), _mm512_set1_epi32((int)least));
        if (in) _mm512_storeu_si512(places + found, _mm512_maskz_compress_epi32(in, number));
        found += __builtin_popcount(in);
        number = _mm512_add_epi32(number, _mm512_set1_epi32(VW));
    }
#endif
    for (; c < count; c++) {
        places[found] = c;
        found += codes[c] >= least;
    }
    return found;
}

// Write the indices of the `wanted` best codes (1 to count), in order; of equal ones the first. places, kept: capacity count + VW.
static __attribute__((unused)) void best_places(const uint32_t *codes, int64_t count, int64_t wanted, int32_t *places,
                                                uint32_t *kept, int64_t *out, int64_t first) {
    enum { STEP = 16 };
    int64_t candidates = 0, equal;
    if (count >= 4096 && wanted <= count / 4) {
        int64_t sampled = (count + STEP - 1) / STEP, share = wanted * 5 / 4 / STEP + 8;
        candidates = at_least(codes, count, threshold(codes, count, STEP, share < sampled ? share : sampled, &equal), places);
    }
    if (candidates < wanted) candidates = at_least(codes, count, 0, places);
    for (int64_t i = 0; i < candidates; i++) kept[i] = codes[places[i]];
    uint32_t least = threshold(kept, candidates, 1, wanted, &equal);
    for (int64_t i = 0; i < candidates; i++) {
        if (kept[i] < least || (kept[i] == least && equal-- <= 0)) continue;
        *out++ = places[i] + first;
    }
}

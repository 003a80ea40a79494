#pragma once

/* The tile units for bfloat16 of a processor (Intel's AMX), and the vectors around them.

   A tile has 16 rows of 64 bytes. What is multiplied from the left lies in tiles of 16 x 32 numbers; what is multiplied
   from the right lies in tiles of 32 x 16, in which pairs of rows are interleaved; the sums are 16 x 16 in float32. */

#include "kernels.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define HAS_TILES

#include <immintrin.h>

#define SIDE 16            /* rows of a tile, and its numbers of 32 bits a row */
#define TILE (SIDE * 32)   /* numbers of a tile */
#define BLOCK (2 * SIDE)   /* rows and columns of a result that are computed at once */
typedef uint16_t half;

static inline integer padded(integer size) { return (size + BLOCK - 1) / BLOCK * BLOCK; }

static inline void configure_tiles(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int n = 0; n < 8; n++) config.bytes[n] = 64, config.rows[n] = SIDE;
    _tile_loadconfig(&config);
}

/* Transposes 16 x 16 numbers of 32 bits. */
static inline void transpose(__m512i r[SIDE]) {
    __m512i s[SIDE];
    for (int n = 0; n < SIDE; n += 2) {
        s[n] = _mm512_unpacklo_epi32(r[n], r[n + 1]);
        s[n + 1] = _mm512_unpackhi_epi32(r[n], r[n + 1]);
    }
    for (int n = 0; n < SIDE; n += 4) {
        r[n] = _mm512_unpacklo_epi64(s[n], s[n + 2]);
        r[n + 1] = _mm512_unpackhi_epi64(s[n], s[n + 2]);
        r[n + 2] = _mm512_unpacklo_epi64(s[n + 1], s[n + 3]);
        r[n + 3] = _mm512_unpackhi_epi64(s[n + 1], s[n + 3]);
    }
    for (int n = 0; n < SIDE; n += 8)
        for (int m = 0; m < 4; m++) {
            s[n + m] = _mm512_shuffle_i32x4(r[n + m], r[n + m + 4], 0x88);
            s[n + m + 4] = _mm512_shuffle_i32x4(r[n + m], r[n + m + 4], 0xdd);
        }
    for (int m = 0; m < 8; m++) {
        r[m] = _mm512_shuffle_i32x4(s[m], s[m + 8], 0x88);
        r[m + 8] = _mm512_shuffle_i32x4(s[m], s[m + 8], 0xdd);
    }
}

/* The sums of 32 rows of `left`, of which the second 16 are `below` numbers further, by 32 columns of `right`, in
   `steps` of 32 numbers. `left` has rows at `stride` bytes; the tiles of the next step are `left_next` and `right_next`
   numbers further. */
static inline void sum_block(const half *left, integer below, integer stride, integer left_next, const half *right,
                             integer right_next, integer steps, float sums[4][SIDE * SIDE]) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (integer step = 0; step < steps; step++, left += left_next, right += right_next) {
        _tile_loadd(4, left, stride);
        _tile_loadd(6, right, 64);
        _tile_loadd(5, left + below, stride);
        _tile_loadd(7, right + TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
}

static inline __m512 widened(const half *x) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)x)), 16));
}
static inline void narrowed(__m512 value, half *to) {
    _mm256_storeu_si256((void *)to, (__m256i)_mm512_cvtneps_pbh(value));
}

static inline __mmask16 mask_of(integer left) { return left >= SIDE ? 0xffff : (__mmask16)((1u << left) - 1); }
#endif

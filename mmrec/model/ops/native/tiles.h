#pragma once

/* Products of tiles of bfloat16 with sums in float32: by the tile units of a processor (Intel's AMX), or by its vectors
   (AVX512_BF16, AMD's since Zen 4 among them).

   A tile has 16 rows of 64 bytes. What is multiplied from the left lies in tiles of 16 x 32 numbers; what is multiplied
   from the right lies in tiles of 32 x 16, in which pairs of rows are interleaved; the sums are 16 x 16 in float32. */

#include "kernels.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAS_TILES
#if defined(__AMX_BF16__) && defined(__linux__)
#define HAS_TILE_UNITS
#endif

#include <immintrin.h>

#define SIDE 16            /* rows of a tile, and its numbers of 32 bits a row */
#define TILE (SIDE * 32)   /* numbers of a tile */
#define BLOCK (2 * SIDE)   /* rows and columns of a result that are computed at once */
typedef uint16_t half;

static inline integer padded(integer size) { return (size + BLOCK - 1) / BLOCK * BLOCK; }

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
#ifdef HAS_TILE_UNITS
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

static inline void release_tiles(void) { _tile_release(); }
#else
#define CHUNK 8 /* steps whose right tiles the smallest cache holds beside the left ones */
#define ROWS 8  /* rows whose sums are in registers at once */

static inline void sum_block(const half *left, integer below, integer stride, integer left_next, const half *right,
                             integer right_next, integer steps, float sums[4][SIDE * SIDE]) {
    for (integer begin = 0; begin < steps; begin += CHUNK)
        for (integer row = 0; row < BLOCK; row += ROWS) {
            integer end = begin + CHUNK < steps ? begin + CHUNK : steps;
            const half *rows = left + begin * left_next + row / SIDE * below + row % SIDE * stride / 2;
            const half *columns = right + begin * right_next;
            float *to = sums[row / SIDE * 2] + row % SIDE * SIDE;
            __m512 sum[ROWS][2];
            for (int n = 0; n < ROWS; n++)
                for (int part = 0; part < 2; part++)
                    sum[n][part] = begin ? _mm512_load_ps(to + (part * SIDE + n) * SIDE) : _mm512_setzero_ps();
            for (integer step = begin; step < end; step++, rows += left_next, columns += right_next)
                for (int pair = 0; pair < SIDE; pair++) {
                    __m512bh first = (__m512bh)_mm512_loadu_si512(columns + pair * 32);
                    __m512bh second = (__m512bh)_mm512_loadu_si512(columns + TILE + pair * 32);
                    for (int n = 0; n < ROWS; n++) {
                        int32_t two;
                        memcpy(&two, rows + n * stride / 2 + pair * 2, sizeof two);
                        __m512bh both = (__m512bh)_mm512_set1_epi32(two);
                        sum[n][0] = _mm512_dpbf16_ps(sum[n][0], both, first);
                        sum[n][1] = _mm512_dpbf16_ps(sum[n][1], both, second);
                    }
                }
            for (int n = 0; n < ROWS; n++)
                for (int part = 0; part < 2; part++) _mm512_store_ps(to + (part * SIDE + n) * SIDE, sum[n][part]);
        }
}

static inline void configure_tiles(void) {}
static inline void release_tiles(void) {}
#endif

static inline __m512 widened(const half *x) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)x)), 16));
}
static inline void narrowed(__m512 value, half *to) {
    _mm256_storeu_si256((void *)to, (__m256i)_mm512_cvtneps_pbh(value));
}

static inline __mmask16 mask_of(integer left) { return left >= SIDE ? 0xffff : (__mmask16)((1u << left) - 1); }
#endif

/* Matrix products in bfloat16 with sums in float32: of tokens with a weight, and the weight's gradient.

   A weight [outputs, inputs] is packed once an update, for the product forwards and for that backwards, so that nothing
   is brought into another order while tokens are read: rows of tokens are tiles as they are. */

#define _GNU_SOURCE
#include "tiles.h"

#ifdef HAS_TILES

#ifdef HAS_TILE_UNITS
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define PANEL 4 /* blocks of rows that are multiplied by the same columns, one after the other */
#define SPAN 256 /* rows of tokens that a weight's gradient is added up of at a time */

/* Linux gives a process the tile units when it asks for them (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA). */
#ifdef HAS_TILE_UNITS
EXPORT int tiles_supported(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
#else
EXPORT int tiles_supported(void) { return 1; }
#endif

static inline __mmask32 mask_of_halves(integer left) {
    return left >= BLOCK ? 0xffffffffu : left <= 0 ? 0 : (1u << left) - 1;
}

/* Interleaves two rows of 32 numbers: the first 16 pairs and the others. */
static inline void interleave(__m512i even, __m512i odd, __m512i *first, __m512i *second) {
    static const half order[64] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                   8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47,
                                   16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                   24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    *first = _mm512_permutex2var_epi16(even, _mm512_loadu_si512(order), odd);
    *second = _mm512_permutex2var_epi16(even, _mm512_loadu_si512(order + 32), odd);
}

/* 32 numbers of a row, 0 where there are no more of them. */
static inline __m512i row_of_halves(const half *x, integer stride, integer row, integer rows, integer column,
                                    integer columns) {
    if (row >= rows) return _mm512_setzero_si512();
    return _mm512_maskz_loadu_epi16(mask_of_halves(columns - column), x + row * stride + column);
}

/* 32 x 32 numbers of x [rows, columns] as two right tiles. */
static inline void pack_block(const half *x, integer stride, integer row, integer rows, integer column,
                              integer columns, __m512i first[SIDE], __m512i second[SIDE]) {
    for (int n = 0; n < SIDE; n++)
        interleave(row_of_halves(x, stride, row + 2 * n, rows, column, columns),
                   row_of_halves(x, stride, row + 2 * n + 1, rows, column, columns), first + n, second + n);
}

static inline void write_tile(const __m512i r[SIDE], half *to) {
    for (int n = 0; n < SIDE; n++) _mm512_storeu_si512(to + n * 32, r[n]);
}

/* Right tiles of x [rows, columns]: those of 32 columns behind each other, two for each 32 rows. */
static void pack_right(const half *x, integer stride, integer rows, integer columns, half *right) {
    __m512i first[SIDE], second[SIDE];
    for (integer column = 0; column < columns; column += BLOCK)
        for (integer row = 0; row < rows; row += BLOCK, right += 2 * TILE) {
            pack_block(x, stride, row, rows, column, columns, first, second);
            write_tile(first, right);
            write_tile(second, right + TILE);
        }
}

/* Left tiles of the transpose of x [rows, columns]: those of 16 columns behind each other. */
static void pack_left_transposed(const half *x, integer stride, integer rows, integer columns, half *left) {
    __m512i first[SIDE], second[SIDE];
    integer steps = padded(rows) / BLOCK;
    for (integer column = 0; column < columns; column += BLOCK, left += steps * TILE)
        for (integer row = 0; row < rows; row += BLOCK, left += TILE) {
            pack_block(x, stride, row, rows, column, columns, first, second);
            transpose(first);
            transpose(second);
            write_tile(first, left);
            write_tile(second, left + steps * TILE);
        }
}

/* The right tiles of weight^T [inputs, outputs] and of weight [outputs, inputs], of which either may be NULL. */
EXPORT int pack_weight(integer outputs, integer inputs, const float *weight, half *forwards, half *backwards) {
    integer stride = padded(inputs);
    half *narrow = aligned_alloc(64, padded(outputs) * stride * sizeof(half));
    if (!narrow) return 1;
    for (integer row = 0; row < outputs; row++)
        for (integer column = 0; column < stride; column += SIDE)
            narrowed(_mm512_maskz_loadu_ps(column < inputs ? mask_of(inputs - column) : 0, weight + row * inputs + column),
                     narrow + row * stride + column);
    if (backwards) pack_right(narrow, stride, outputs, inputs, backwards);
    for (integer column = 0; forwards && column < outputs; column += SIDE)
        for (integer row = 0; row < inputs; row += BLOCK) {
            __m512i r[SIDE];
            for (int n = 0; n < SIDE; n++)
                r[n] = column + n < outputs ? _mm512_loadu_si512(narrow + (column + n) * stride + row)
                                            : _mm512_setzero_si512();
            transpose(r);
            write_tile(r, forwards + (column / BLOCK * (stride / BLOCK) + row / BLOCK) * 2 * TILE + column / SIDE % 2 * TILE);
        }
    if (forwards && padded(outputs) - outputs >= SIDE)
        for (integer row = 0; row < inputs; row += BLOCK)
            memset(forwards + (outputs / BLOCK * (stride / BLOCK) + row / BLOCK) * 2 * TILE + TILE, 0, TILE * sizeof(half));
    free(narrow);
    return 0;
}

static inline void add_to(float *to, __mmask16 mask, const float *sums) {
    _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), _mm512_load_ps(sums)));
}

/* y [rows, columns] <- x [rows, inner] times the matrix [inner, columns] whose right tiles are given. */
EXPORT int tile_product(integer rows, integer inner, integer columns, const half *x, integer x_stride,
                        const half *right, half *y, integer y_stride) {
    float sums[4][SIDE * SIDE] __attribute__((aligned(64)));
    integer width = padded(inner), steps = width / BLOCK;
    half *copied = NULL; /* of rows that are no whole tiles */
    if (width != inner || rows % BLOCK) {
        copied = aligned_alloc(64, PANEL * BLOCK * width * sizeof(half));
        if (!copied) return 1;
    }
    configure_tiles();
    for (integer top = 0; top < rows; top += PANEL * BLOCK) {
        integer count = rows - top < PANEL * BLOCK ? rows - top : PANEL * BLOCK;
        const half *left = x + top * x_stride;
        integer stride = x_stride;
        if (width != inner || count % BLOCK) {
            for (integer row = 0; row < padded(count); row++)
                for (integer column = 0; column < width; column += BLOCK)
                    _mm512_storeu_si512(copied + row * width + column,
                                        row_of_halves(left, x_stride, row, count, column, inner));
            left = copied, stride = width;
        }
        for (integer column = 0; column < columns; column += BLOCK) {
            __mmask32 mask = mask_of_halves(columns - column);
            for (integer row = 0; row < count; row += BLOCK) {
                sum_block(left + row * stride, SIDE * stride, 2 * stride, BLOCK, right + column * width, 2 * TILE, steps,
                          sums);
                integer last = count - row < BLOCK ? count - row : BLOCK;
                half *to = y + (top + row) * y_stride + column;
                for (integer n = 0; n < last; n++, to += y_stride) {
                    const float *of = sums[n / SIDE * 2] + n % SIDE * SIDE;
                    __m512 first = _mm512_load_ps(of), second = _mm512_load_ps(of + SIDE * SIDE);
                    _mm512_mask_storeu_epi16(to, mask, (__m512i)_mm512_cvtne2ps_pbh(second, first));
                }
            }
        }
    }
    release_tiles();
    free(copied);
    return 0;
}

/* to_weight [outputs, inputs] <- grad [rows, outputs]^T times x [rows, inputs]: SPAN rows at a time, packed in memory
   that the caches hold, are added to it. */
EXPORT int tile_weight_gradient(integer rows, integer outputs, integer inputs, const half *grad, integer grad_stride,
                                const half *x, integer x_stride, float *to_weight) {
    float sums[4][SIDE * SIDE] __attribute__((aligned(64)));
    half *left = aligned_alloc(64, SPAN * (padded(outputs) + padded(inputs)) * sizeof(half));
    if (!left) return 1;
    half *right = left + SPAN * padded(outputs);
    memset(to_weight, 0, outputs * inputs * sizeof(float));
    configure_tiles();
    for (integer top = 0; top < rows; top += SPAN) {
        integer count = rows - top < SPAN ? rows - top : SPAN, length = padded(count), steps = length / BLOCK;
        pack_left_transposed(grad + top * grad_stride, grad_stride, count, outputs, left);
        pack_right(x + top * x_stride, x_stride, count, inputs, right);
        for (integer row = 0; row < outputs; row += BLOCK)
            for (integer column = 0; column < inputs; column += BLOCK) {
                sum_block(left + row * length, steps * TILE, 64, TILE, right + column * length, 2 * TILE, steps,
                          sums);
                integer last = outputs - row < BLOCK ? outputs - row : BLOCK, rest = inputs - column;
                float *to = to_weight + row * inputs + column;
                for (integer n = 0; n < last; n++, to += inputs) {
                    const float *of = sums[n / SIDE * 2] + n % SIDE * SIDE;
                    add_to(to, mask_of(rest), of);
                    if (rest > SIDE) add_to(to + SIDE, mask_of(rest - SIDE), of + SIDE * SIDE);
                }
            }
    }
    release_tiles();
    free(left);
    return 0;
}

#else

EXPORT int tiles_supported(void) { return 0; }

#endif

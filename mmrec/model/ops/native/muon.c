/* Muon's update of a matrix: momentum, the Newton-Schulz iterations, and the step of the weights.

   The iterations need products of tiles: X <- a X + (b R + c R R) X with R = X X^T, in bfloat16 with sums in float32,
   each product rounded once. Matrices are padded to whole tiles with zeros, which stay zeros. */

#include "tiles.h"

static inline float averaged(float average, float grad, float momentum) {
    return average + (1.0f - momentum) * (grad - average);
}

/* The momentum's average of the gradients, for a matrix that another process orthogonalizes. */
static void bring_up_to_date(integer count, float momentum, const float *grad, float *average) {
    VECTORIZE for (integer n = 0; n < count; n++) average[n] = averaged(average[n], grad[n], momentum);
}

/* Each of the weights <- decay weight - rate update; `starts` says where its update is in `updates`. */
EXPORT int muon_apply(integer count, float **weights, const int64_t *sizes, const float *rates, float decay,
                      const int64_t *starts, const number *updates) {
    for (integer n = 0; n < count; n++) {
        float *weight = weights[n], rate = rates[n];
        const number *update = updates + starts[n];
        VECTORIZE for (integer i = 0; i < sizes[n]; i++) weight[i] = decay * weight[i] - rate * load(update[i]);
    }
    return 0;
}

#ifdef HAS_TILES

/* Right tiles of X^T from the left tiles of X [rows, columns]: tile (k, j) is the transpose of tile (j, k). */
static void right_of_transposed(integer rows, integer columns, const half *x, half *right) {
    for (integer j = 0; j < rows / SIDE; j++)
        for (integer k = 0; k < columns / BLOCK; k++) {
            __m512i r[SIDE];
            const half *from = x + (j * (columns / BLOCK) + k) * TILE;
            half *to = right + (k * (rows / SIDE) + j) * TILE;
            for (int n = 0; n < SIDE; n++) r[n] = _mm512_loadu_si512(from + n * 32);
            transpose(r);
            for (int n = 0; n < SIDE; n++) _mm512_storeu_si512(to + n * 32, r[n]);
        }
}

/* Right tiles of X from its left tiles: rows 2 n and 2 n + 1 are interleaved. */
static void right_of(integer rows, integer columns, const half *x, half *right) {
    static const half order[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                   8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i places = _mm512_loadu_si512(order);
    for (integer k = 0; k < rows / BLOCK; k++)
        for (integer j = 0; j < columns / SIDE; j++) {
            half *to = right + (k * (columns / SIDE) + j) * TILE;
            for (int n = 0; n < SIDE; n++) {
                const half *from = x + ((2 * k + n / 8) * (columns / BLOCK) + j / 2) * TILE + (2 * n % 16) * 32 + j % 2 * 16;
                __m512i first = _mm512_castsi256_si512(_mm256_loadu_si256((const void *)from));
                __m512i second = _mm512_castsi256_si512(_mm256_loadu_si256((const void *)(from + 32)));
                _mm512_storeu_si512(to + n * 32, _mm512_permutex2var_epi16(first, places, second));
            }
        }
}

/* result <- scale left right + share base, in left tiles; base may be NULL.
   left: rows x inner, right: inner x columns, base and result: rows x columns. Of a `symmetric` result the blocks above
   the diagonal are computed, to the same bits as those below would be. */
static void multiply(integer rows, integer inner, integer columns, const half *left, const half *right, float scale,
                     const half *base, float share, int symmetric, half *result) {
    float sums[4][SIDE * SIDE] __attribute__((aligned(64)));
    integer steps = inner / BLOCK, across = columns / SIDE;
    for (integer j = 0; j < across; j += 2)
        for (integer i = 0; i < (symmetric ? j + 2 : rows / SIDE); i += 2) {
            sum_block(left + i * steps * TILE, steps * TILE, 64, TILE, right + j * TILE, across * TILE, steps, sums);
            for (int part = 0; part < 4; part++) {
                integer row = i + part / 2, column = j + part % 2;
                integer place = (row * (across / 2) + column / 2) * TILE + part % 2 * SIDE;
                __m512i r[SIDE];
                for (int n = 0; n < SIDE; n++) {
                    __m512 value = _mm512_mul_ps(_mm512_load_ps(sums[part] + n * SIDE), _mm512_set1_ps(scale));
                    if (base) value = _mm512_fmadd_ps(_mm512_set1_ps(share), widened(base + place + n * 32), value);
                    narrowed(value, result + place + n * 32);
                    r[n] = _mm512_castps_si512(value);
                }
                if (!symmetric || i == j) continue;
                transpose(r);
                half *mirrored = result + (column * (across / 2) + row / 2) * TILE + part / 2 * SIDE;
                for (int n = 0; n < SIDE; n++) narrowed(_mm512_castsi512_ps(r[n]), mirrored + n * 32);
            }
        }
}

/* Left tiles of x [height, width] times `scale`, padded; of its transpose if it is `tall`. */
static void to_tiles(integer height, integer width, int tall, const float *x, float scale, half *tiles) {
    integer across = padded(tall ? height : width) / BLOCK;
    for (integer i = 0; i < padded(height); i += SIDE)
        for (integer j = 0; j < padded(width); j += SIDE) {
            __m512i r[SIDE];
            for (integer n = 0; n < SIDE; n++)
                r[n] = i + n < height && j < width
                           ? _mm512_castps_si512(_mm512_mul_ps(
                                 _mm512_set1_ps(scale), _mm512_maskz_loadu_ps(mask_of(width - j), x + (i + n) * width + j)))
                           : _mm512_setzero_si512();
            if (tall) transpose(r);
            integer row = (tall ? j : i) / SIDE, column = (tall ? i : j) / SIDE;
            half *to = tiles + (row * across + column / 2) * TILE + column % 2 * SIDE;
            for (int n = 0; n < SIDE; n++) narrowed(_mm512_castsi512_ps(r[n]), to + n * 32);
        }
}

/* The other way; nothing is rounded, as the tiles are bfloat16 already. */
static void from_tiles(integer height, integer width, int tall, const half *tiles, half *x) {
    integer across = padded(tall ? height : width) / BLOCK;
    for (integer i = 0; i < height; i += SIDE)
        for (integer j = 0; j < width; j += SIDE) {
            __m512i r[SIDE];
            integer row = (tall ? j : i) / SIDE, column = (tall ? i : j) / SIDE;
            const half *from = tiles + (row * across + column / 2) * TILE + column % 2 * SIDE;
            for (int n = 0; n < SIDE; n++) r[n] = _mm512_castps_si512(widened(from + n * 32));
            if (tall) transpose(r);
            for (integer n = 0; n < SIDE && i + n < height; n++)
                _mm256_mask_storeu_epi16(x + (i + n) * width + j, mask_of(width - j),
                                         (__m256i)_mm512_cvtneps_pbh(_mm512_castsi512_ps(r[n])));
        }
}

/* How averages are formed, and orthogonal matrices found. */
typedef struct {
    integer steps, nesterov;
    float a, b, c, eps, momentum;
} muon_rule;

/* update <- the orthogonal matrix nearest to the momentum of a matrix [height, width], nearly.

   `average` is the momentum's, which is brought up to date. */
static int orthogonalize(const muon_rule *rule, integer height, integer width, const float *grad, float *average,
                         half *update) {
    int tall = height > width;
    integer rows = padded(tall ? width : height), columns = padded(tall ? height : width);
    /* The direction fits into the padded matrix. Lines of the cache hold whole rows of tiles. */
    float *direction = aligned_alloc(64, rows * columns * sizeof(float)), squares = 0, momentum = rule->momentum;
    half *scratch = aligned_alloc(64, 3 * rows * (columns + rows) * sizeof(half));
    if (!direction || !scratch) return free(direction), free(scratch), 1;
    half *x = scratch, *next = x + rows * columns, *right = next + rows * columns;
    half *r = right + rows * columns, *r_right = r + rows * rows, *p = r_right + rows * rows;
    SUMS(omp simd reduction(+ : squares))
    for (integer n = 0; n < height * width; n++) {
        average[n] = averaged(average[n], grad[n], momentum);
        direction[n] = rule->nesterov ? grad[n] + momentum * (average[n] - grad[n]) : average[n];
        squares += direction[n] * direction[n];
    }
    float norm = sqrtf(squares);
    to_tiles(height, width, tall, direction, 1.0f / (norm > rule->eps ? norm : rule->eps), x);
    configure_tiles();
    for (integer step = 0; step < rule->steps; step++) {
        right_of_transposed(rows, columns, x, right);
        multiply(rows, columns, rows, x, right, 1.0f, NULL, 0, 1, r);
        right_of_transposed(rows, rows, r, r_right); /* r is its own transpose */
        multiply(rows, rows, rows, r, r_right, rule->c, r, rule->b, 1, p);
        right_of(rows, columns, x, right);
        multiply(rows, rows, columns, p, right, 1.0f, x, rule->a, 0, next);
        half *last = x;
        x = next, next = last;
    }
    release_tiles();
    from_tiles(height, width, tall, x, update);
    free(direction);
    free(scratch);
    return 0;
}

/* `averages` of the gradients of matrices are brought up to date. Where `starts` is not negative, the orthogonal matrix
   nearest to the momentum is written there in `updates`. */
EXPORT int muon_orthogonalize(const muon_rule *rule, integer count, const int64_t *heights, const int64_t *widths,
                              const float **grads, float **averages, const int64_t *starts, half *updates) {
    for (integer n = 0; n < count; n++)
        if (starts[n] < 0) bring_up_to_date(heights[n] * widths[n], rule->momentum, grads[n], averages[n]);
        else if (orthogonalize(rule, heights[n], widths[n], grads[n], averages[n], updates + starts[n])) return 1;
    return 0;
}

#endif

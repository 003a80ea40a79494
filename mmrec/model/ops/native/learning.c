#include "kernels.h"

/* Learning from a part of a text: the mixture of two predictions with the gradient of one, and the update of all
   weights, in float32. Their torch forms are in mmrec/inference/learning.py. */

/* What a block of tokens says of the mixture's weights: the slope of the log-likelihood, and how it bends. */
typedef struct {
    double slope[2], bend[3]; /* bend: of the first, of both, of the second */
} Newton;

/* The mixture y of the log-probabilities `first` and `second` of one token, by the weights `mix`. */
static void mix_row(integer size, const double *mix, const float *first, const float *second, integer target,
                    float *y, Newton *found) {
    float a = (float)mix[0], b = (float)mix[1];
    VECTORIZE for (integer c = 0; c < size; c++) y[c] = a * first[c] + b * second[c];
    normalize_row(size, y, y);
    float mean_first = 0, mean_second = 0;
    SUMS(omp simd reduction(+ : mean_first, mean_second))
    for (integer c = 0; c < size; c++) {
        float p = power_of(y[c]);
        mean_first += p * first[c];
        mean_second += p * second[c];
    }
    float bend_first = 0, bend_both = 0, bend_second = 0;
    SUMS(omp simd reduction(+ : bend_first, bend_both, bend_second))
    for (integer c = 0; c < size; c++) {
        float p = power_of(y[c]), u = first[c] - mean_first, v = second[c] - mean_second;
        bend_first += p * u * u;
        bend_both += p * u * v;
        bend_second += p * v * v;
    }
    found->slope[0] += first[target] - mean_first;
    found->slope[1] += second[target] - mean_second;
    found->bend[0] += bend_first;
    found->bend[1] += bend_both;
    found->bend[2] += bend_second;
}

typedef struct {
    integer block;
    double forgetting, ridge, least, most;
} Mixing;

/* A Newton step of the mixture's weights; what is not finite changes nothing, and forgets the curvature. */
static void newton_step(const Mixing *by, const Newton *found, double *mix, double *curvature) {
    double bend[4] = {found->bend[0], found->bend[1], found->bend[1], found->bend[2]};
    for (integer n = 0; n < 4; n++) curvature[n] = by->forgetting * curvature[n] + bend[n];
    double a = curvature[0] + by->ridge, b = curvature[1], d = curvature[3] + by->ridge, area = a * d - b * b;
    double moved[2] = {mix[0] + (d * found->slope[0] - b * found->slope[1]) / area,
                       mix[1] + (a * found->slope[1] - b * found->slope[0]) / area};
    if (!isfinite(moved[0]) || !isfinite(moved[1])) {
        memset(curvature, 0, 4 * sizeof(double));
        return;
    }
    for (integer n = 0; n < 2; n++)
        mix[n] = moved[n] < by->least ? by->least : moved[n] > by->most ? by->most : moved[n];
}

/* A part of `length` tokens. logits [2, length + 1, size] predict each token and the one after them, of the untouched
   model and of the one that learns; scores, of the same shape, are their log-probabilities; mixture [length, size];
   to_logits [length, size] is the gradient of the learning model's mean loss by its logits after each token. mix [2]
   and curvature [2, 2] are brought forward by the blocks of the part. */
EXPORT int learn_mixture(const Mixing *by, integer length, integer size, const float *logits, const int64_t *tokens,
                         double *mix, double *curvature, float *scores, float *mixture, float *to_logits) {
    for (integer n = 0; n < 2 * (length + 1); n++) normalize_row(size, logits + n * size, scores + n * size);
    const float *first = scores, *second = scores + (length + 1) * size;
    for (integer begin = 0; begin < length; begin += by->block) {
        integer end = begin + by->block < length ? begin + by->block : length;
        Newton found = {{0}, {0}};
        for (integer t = begin; t < end; t++)
            mix_row(size, mix, first + t * size, second + t * size, tokens[t], mixture + t * size, &found);
        if (end - begin == by->block) newton_step(by, &found, mix, curvature);
    }
    float share = 1.0f / length;
    for (integer t = 0; t < length - 1; t++) {
        const float *after = second + (t + 1) * size;
        float *to = to_logits + t * size;
        VECTORIZE for (integer c = 0; c < size; c++) to[c] = share * power_of(after[c]);
        to[tokens[t + 1]] -= share;
    }
    memset(to_logits + (length - 1) * size, 0, size * sizeof(float));
    return 0;
}

/* One parameter: a matrix with the running means of its rows' and of its columns' squares, or, where `columns` is 0, a
   vector with those of its numbers in the place of the rows'. */
typedef struct {
    integer rows, columns;
    const float *grad, *trained;
    const uint16_t *before; /* of the difference to the trained weights, float16 */
    const float *rows_before, *columns_before;
    float *weight;
    uint16_t *after;
    float *rows_after, *columns_after;
} Parameter;

typedef struct {
    integer count; /* of parameters */
    float rate, keep, one_minus_beta2, correction, largest_update, largest_mean, least_square, largest_square;
} Updating;

static inline float moved_mean(const Updating *by, float before, float square) {
    return before + by->one_minus_beta2 * (square + by->least_square - before);
}

static void vector_squares(const Updating *by, const Parameter *p) {
    VECTORIZE for (integer r = 0; r < p->rows; r++)
        p->rows_after[r] = moved_mean(by, p->rows_before[r], p->grad[r] * p->grad[r]);
}

static void matrix_squares(const Updating *by, const Parameter *p) {
    const float *grad = p->grad;
    float *columns = p->columns_after, by_row = 1.0f / p->columns, by_column = 1.0f / p->rows;
    memset(columns, 0, p->columns * sizeof(float));
    for (integer r = 0; r < p->rows; r++, grad += p->columns) {
        float sum = 0;
        SUMS(omp simd reduction(+ : sum))
        for (integer c = 0; c < p->columns; c++) {
            float square = grad[c] * grad[c];
            sum += square;
            columns[c] += square;
        }
        p->rows_after[r] = moved_mean(by, p->rows_before[r], sum * by_row);
    }
    VECTORIZE for (integer c = 0; c < p->columns; c++)
        columns[c] = moved_mean(by, p->columns_before[c], columns[c] * by_column);
}

/* Whether all means are below the largest; one that is no number is not. */
static int are_sound(const Updating *by, integer size, const float *means) {
    int sound = 1;
    for (integer n = 0; n < size; n++) sound &= means[n] < by->largest_square;
    return sound;
}

/* float16 as its bits, by whole numbers: numbers below its normal ones would be small enough for a float to be taken
   as 0. To the nearest, ties to even; |x| is below the largest. */
static inline uint16_t to_half(float x) {
    uint32_t bits, sign, fine;
    memcpy(&bits, &x, 4);
    sign = bits & 0x80000000u;
    bits ^= sign;
    float shifted; /* below 2^-14 its steps are 2^-24, as those of a float from 0.5 on */
    memcpy(&shifted, &bits, 4);
    shifted += 0.5f;
    memcpy(&fine, &shifted, 4);
    uint32_t coarse = (bits + 0xfffu + ((bits >> 13) & 1) - 0x38000000u) >> 13;
    return (uint16_t)((bits < 0x38800000u ? fine - 0x3f000000u : coarse) | sign >> 16);
}
static inline float of_half(uint16_t half) {
    uint32_t steps = half & 0x7fffu, sign = (uint32_t)(half & 0x8000u) << 16, bits;
    float x = (float)(int32_t)steps * 0x1p-24f;
    memcpy(&bits, &x, 4);
    bits = (steps < 0x400u ? bits : (steps << 13) + 0x38000000u) | sign;
    memcpy(&x, &bits, 4);
    return x;
}

static inline float bounded(float x, float most) { return x < -most ? -most : x > most ? most : x; }

/* Moves `size` weights from number `at` on; each gradient is scaled by `scale` and by one of `scales`. */
static inline void move_row(const Updating *by, const Parameter *p, integer at, integer size, float scale,
                            const float *scales) {
    const float *grad = p->grad + at, *trained = p->trained + at;
    const uint16_t *before = p->before + at;
    uint16_t *after = p->after + at;
    float *weight = p->weight + at, keep = by->keep, step = by->rate * keep, most = by->largest_update;
    VECTORIZE for (integer c = 0; c < size; c++) {
        float update = bounded(grad[c] * scale * scales[c], most);
        after[c] = to_half(of_half(before[c]) * keep - step * update);
        weight[c] = trained[c] + of_half(after[c]);
    }
}

static void root_scales(const Updating *by, integer size, const float *means, float *scales) {
    VECTORIZE for (integer c = 0; c < size; c++) scales[c] = 1.0f / sqrtf(means[c] / by->correction);
}

/* What an update is scaled by, so that the mean of its squares has a root of no more than the largest. */
static float bounding_scale(const Updating *by, double sum, integer count) {
    float mean = sqrtf((float)(sum / count));
    return mean > by->largest_mean ? by->largest_mean / mean : 1.0f;
}

/* The sum of the squares of a row's gradients, each scaled by one of `scales`. */
static float scaled_squares(integer size, const float *grad, const float *scales) {
    float sum = 0;
    SUMS(omp simd reduction(+ : sum))
    for (integer c = 0; c < size; c++) sum += grad[c] * scales[c] * (grad[c] * scales[c]);
    return sum;
}

static void move_matrix(const Updating *by, const Parameter *p, float *scales) {
    float sum = 0;
    SUMS(omp simd reduction(+ : sum))
    for (integer r = 0; r < p->rows; r++) sum += p->rows_after[r];
    float mean = sum / p->rows;
    double squares = 0;
    root_scales(by, p->columns, p->columns_after, scales);
    for (integer r = 0; r < p->rows; r++)
        squares += scaled_squares(p->columns, p->grad + r * p->columns, scales) * (mean / p->rows_after[r]);
    float scale = bounding_scale(by, squares, p->rows * p->columns);
    for (integer r = 0; r < p->rows; r++)
        move_row(by, p, r * p->columns, p->columns, scale / sqrtf(p->rows_after[r] / mean), scales);
}

/* Updates a parameter; returns 0, with no weight changed, where its gradient is too large or not finite. */
static int update_parameter(const Updating *by, const Parameter *p, float *scales) {
    if (p->columns) matrix_squares(by, p);
    else vector_squares(by, p);
    if (!are_sound(by, p->rows, p->rows_after) || !are_sound(by, p->columns, p->columns_after)) return 0;
    if (p->columns) {
        move_matrix(by, p, scales);
    } else {
        root_scales(by, p->rows, p->rows_after, scales);
        move_row(by, p, 0, p->rows, bounding_scale(by, scaled_squares(p->rows, p->grad, scales), p->rows), scales);
    }
    return 1;
}

static void undo_update(const Parameter *p) {
    integer count = p->rows * (p->columns ? p->columns : 1);
    VECTORIZE for (integer c = 0; c < count; c++) p->weight[c] = p->trained[c] + of_half(p->before[c]);
}

/* One update of all parameters. It is not sound, and changes no weight, where a gradient is too large or not finite.
   `scales` has room for the largest vector and for the most columns. */
EXPORT int learn_update(const Updating *by, const Parameter *parameters, float *scales, integer *is_sound) {
    integer done = 0;
    while (done < by->count && update_parameter(by, parameters + done, scales)) done++;
    *is_sound = done == by->count;
    if (!*is_sound)
        while (done--) undo_update(parameters + done);
    return 0;
}

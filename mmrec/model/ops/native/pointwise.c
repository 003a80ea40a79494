#include "kernels.h"

/* Root mean square normalization of `rows` vectors; `scale` [rows] is kept for the gradients. */
EXPORT int rms_norm(integer rows, integer dim, float eps, const float *x, const float *weight, number *y,
                    float *scale) {
    for (integer n = 0; n < rows; n++, x += dim, y += dim) {
        float sum = 0;
        SUMS(omp simd reduction(+ : sum))
        for (integer c = 0; c < dim; c++) sum += x[c] * x[c];
        float by = 1.0f / sqrtf(sum / dim + eps);
        scale[n] = by;
        VECTORIZE for (integer c = 0; c < dim; c++) y[c] = store(x[c] * by * weight[c]);
    }
    return 0;
}

/* The gradient of x is written, or added to what is there where `adds`. */
EXPORT int rms_norm_backward(integer rows, integer dim, const float *x, const float *weight, const float *scale,
                             const number *grad, integer adds, float *to_x, float *to_weight) {
    memset(to_weight, 0, dim * sizeof(float));
    for (integer n = 0; n < rows; n++, x += dim, grad += dim, to_x += dim) {
        float by = scale[n], along = 0;
        SUMS(omp simd reduction(+ : along))
        for (integer c = 0; c < dim; c++) {
            float product = load(grad[c]) * x[c] * by;
            to_weight[c] += product;
            along += product * weight[c];
        }
        along *= by * by / dim;
        if (adds) {
            VECTORIZE for (integer c = 0; c < dim; c++) to_x[c] += load(grad[c]) * weight[c] * by - x[c] * along;
        } else {
            VECTORIZE for (integer c = 0; c < dim; c++) to_x[c] = load(grad[c]) * weight[c] * by - x[c] * along;
        }
    }
    return 0;
}

/* y [width, height] <- the sum of `count` matrices [height, width], transposed. */
EXPORT int sum_transposed(integer count, integer height, integer width, const float *x, float *y) {
    for (integer i = 0; i < height; i++)
        for (integer j = 0; j < width; j++) {
            float sum = 0;
            for (integer n = 0; n < count; n++) sum += x[(n * height + i) * width + j];
            y[j * height + i] = sum;
        }
    return 0;
}

/* SwiGLU: x [rows, 2 dim], y [rows, dim]. */
EXPORT int swiglu(integer rows, integer dim, const number *x, number *y) {
    for (integer n = 0; n < rows; n++, x += 2 * dim, y += dim) {
        VECTORIZE for (integer c = 0; c < dim; c++) {
            float gate = load(x[dim + c]);
            y[c] = store(load(x[c]) * gate * sigmoid(gate));
        }
    }
    return 0;
}

EXPORT int swiglu_backward(integer rows, integer dim, const number *x, const number *grad, number *to_x) {
    for (integer n = 0; n < rows; n++, x += 2 * dim, to_x += 2 * dim, grad += dim) {
        VECTORIZE for (integer c = 0; c < dim; c++) {
            float gate = load(x[dim + c]), open = sigmoid(gate), g = load(grad[c]);
            to_x[c] = store(g * gate * open);
            to_x[dim + c] = store(g * load(x[c]) * open * (1.0f + gate * (1.0f - open)));
        }
    }
    return 0;
}

/* Whether a number is kept: from the seed of its row and its place, so that the gradients find the same again.
   The mixer is that of MurmurHash3's end (Appleby 2011), over a Weyl sequence. */
static inline uint32_t drawn(uint32_t seed, uint32_t place) {
    uint32_t bits = place * 0x9e3779b1u + seed;
    bits = (bits ^ bits >> 16) * 0x85ebca6bu;
    bits = (bits ^ bits >> 13) * 0xc2b2ae35u;
    return bits ^ bits >> 16;
}

/* sum = x + dropout(y): a number of y is left out where what is drawn is below `below`, and else grows by `scale`. */
EXPORT int dropout_add(integer count, integer below, float scale, const int64_t *seed, const float *x,
                       const number *y, float *sum) {
    uint32_t start = (uint32_t)*seed, bound = (uint32_t)below;
    VECTORIZE for (integer n = 0; n < count; n++) sum[n] =
        x[n] + (drawn(start, (uint32_t)n) >= bound ? load(y[n]) * scale : 0.0f);
    return 0;
}

EXPORT int dropout_add_backward(integer count, integer below, float scale, const int64_t *seed, const float *grad,
                                number *to_y) {
    uint32_t start = (uint32_t)*seed, bound = (uint32_t)below;
    VECTORIZE for (integer n = 0; n < count; n++) to_y[n] =
        store(drawn(start, (uint32_t)n) >= bound ? grad[n] * scale : 0.0f);
    return 0;
}

/* sum <- the sum of the squares of many tensors, added up in double precision part by part. */
EXPORT int sum_of_squares(integer count, const float **tensors, const int64_t *sizes, double *sum) {
    enum { PART = 4096 };
    *sum = 0;
    for (integer n = 0; n < count; n++)
        for (integer start = 0; start < sizes[n]; start += PART) {
            const float *x = tensors[n] + start;
            integer size = sizes[n] - start < PART ? sizes[n] - start : PART;
            float part = 0;
            SUMS(omp simd reduction(+ : part))
            for (integer c = 0; c < size; c++) part += x[c] * x[c];
            *sum += part;
        }
    return 0;
}

#pragma once

/* What the kernels share: numbers, the functions of gates, and the causal convolution.

   Each kernel gives the same results as its torch form, in fewer passes over memory.

   All sums and states are float32. Inputs and outputs of matrix products are `number`: float, or bfloat16 where the
   file is compiled with -DBFLOAT16. Matrices are stored row by row. Nothing is allocated for the caller: functions.py
   gives every buffer, and a row of the batch is read and written by one thread alone. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define VECTORIZE _Pragma("omp simd")
#define SUMS(...) _Pragma(#__VA_ARGS__)

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

typedef int64_t integer;

#ifdef BFLOAT16
typedef uint16_t number;
static inline float load(number x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline number store(float value) { /* to the nearest, ties to even, as torch */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return value == value ? (number)rounded : 0x7fc0;
}
#else
typedef float number;
static inline float load(number x) { return x; }
static inline number store(float value) { return value; }
#endif

/* e^x in two factors, of x between -87 and 88: a power of 2, and 1 more than what is returned. */
static inline float exp_series(float x, float *power) {
    float whole = x * 1.44269504f + 12582912.0f; /* its last bits are the nearest integer */
    uint32_t bits;
    memcpy(&bits, &whole, 4);
    whole -= 12582912.0f;
    float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float series = 1.9841270e-4f;
    series = series * rest + 1.3888889e-3f;
    series = series * rest + 8.3333333e-3f;
    series = series * rest + 4.1666667e-2f;
    series = series * rest + 1.6666667e-1f;
    series = series * rest + 0.5f;
    series = series * rest * rest + rest;
    bits = (bits + 127) << 23; /* the low bits of the sum hold the integer; the rest is shifted out */
    memcpy(power, &bits, 4);
    return series;
}

/* e^x - 1, to 2 units in the last place also where x is close to 0; from -64 down it is -1, and from 64 on what it is
   there. Bounds further out would make products of it subnormal, which take a processor a hundred times as long: a
   compiler multiplies by what is out of bounds, too, and chooses afterwards. */
static inline float expm1_of(float x) {
    x = x < -64.0f ? -64.0f : x > 64.0f ? 64.0f : x;
    float power, series = exp_series(x, &power);
    return power * series + (power - 1.0f);
}
static inline float exp_of(float x) { return expm1_of(x) + 1.0f; }

/* e^x to 2 units in the last place however small it is, where exp_of has the precision of a sum with 1; x at most 88,
   below -87 it is 0. */
static inline float power_of(float x) {
    float power, series = exp_series(x < -87.0f ? -87.0f : x, &power);
    return x < -87.0f ? 0.0f : power * series + power;
}
static inline float sigmoid(float x) { return 1.0f / (2.0f + expm1_of(-x)); }

static inline float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

/* Takes the logarithm of the sum of powers from a row, which are logarithms of probabilities then. */
static inline void normalize_row(integer size, const float *x, float *y) {
    float most = x[0], sum = 0;
    SUMS(omp simd reduction(max : most))
    for (integer c = 0; c < size; c++) most = x[c] > most ? x[c] : most;
    SUMS(omp simd reduction(+ : sum))
    for (integer c = 0; c < size; c++) sum += power_of(x[c] - most);
    float rest = logf(sum); /* of one sum with `most`, more digits would be lost than a certain token leaves */
    VECTORIZE for (integer c = 0; c < size; c++) y[c] = (x[c] - most) - rest;
}

/* The causal convolution reads the last `width` rows from a ring of `places`; row t of the text is in place
   (t + places) % places. `since` counts the tokens of the same document before this one: taps beyond them are left
   out. */
static inline float *slot(float *ring, integer t, integer places, integer channels) {
    return ring + (t + places) % places * channels;
}
static inline void fill_ring(float *ring, const float *past, integer width, integer channels) {
    for (integer t = 1 - width; t < 0; t++)
        memcpy(slot(ring, t, width, channels), past + (t + width - 1) * channels, channels * sizeof(float));
}
static inline void convolve(const float *weight, float *ring, integer places, integer t, integer since, integer width,
                            integer channels, float *y) {
    const float *now = slot(ring, t, places, channels), *tap = weight + (width - 1) * channels;
    VECTORIZE for (integer c = 0; c < channels; c++) y[c] = tap[c] * now[c];
    for (integer back = 1; back < width && back <= since; back++) {
        const float *then = slot(ring, t - back, places, channels);
        tap = weight + (width - 1 - back) * channels;
        VECTORIZE for (integer c = 0; c < channels; c++) y[c] += tap[c] * then[c];
    }
}
static inline void leave_ring(float *ring, integer length, integer since, integer width, integer channels,
                              float *past_after) {
    for (integer back = 0; back < width - 1; back++) {
        float *after = past_after + (width - 2 - back) * channels;
        if (back <= since) memcpy(after, slot(ring, length - 1 - back, width, channels), channels * sizeof(float));
        else memset(after, 0, channels * sizeof(float));
    }
}
static inline integer count_since(const uint8_t *reset, integer t, integer before) {
    return reset && reset[t] ? 0 : before + 1;
}

/* The value that row t (negative: from the past) had, as floats. */
static inline const float *row_of(const number *x, integer stride, const float *past, integer t, integer width,
                                  integer channels, float *buffer) {
    if (t < 0) return past + (t + width - 1) * channels;
    x += t * stride;
    VECTORIZE for (integer c = 0; c < channels; c++) buffer[c] = load(x[c]);
    return buffer;
}

/* Gradients of the convolution at token t, going backwards: `ring` holds the gradients of its outputs, that of row t
   among them. Adds to `to_weight`, and writes the gradient of input row t, for which all later rows are known. */
static inline void convolve_backward(const float *weight, float *ring, const integer *since, integer t,
                                     integer length, integer width, integer channels, float *to_input) {
    memset(to_input, 0, channels * sizeof(float));
    for (integer ahead = t < 0 ? -t : 0; ahead < width && t + ahead < length; ahead++) {
        if (ahead > since[t + ahead]) continue;
        const float *later = slot(ring, t + ahead, width, channels), *tap = weight + (width - 1 - ahead) * channels;
        VECTORIZE for (integer c = 0; c < channels; c++) to_input[c] += tap[c] * later[c];
    }
}
static inline void add_to_taps(const float *to_y, float *seen, integer places, integer t, integer since,
                               integer width, integer channels, float *to_weight) {
    for (integer back = 0; back < width && back <= since; back++) {
        const float *then = slot(seen, t - back, places, channels);
        float *to_tap = to_weight + (width - 1 - back) * channels;
        VECTORIZE for (integer c = 0; c < channels; c++) to_tap[c] += to_y[c] * then[c];
    }
}
static inline void add_rows_to_come(const float *to_past_after, integer last_since, integer t, integer length,
                                    integer width, integer channels, float *to_input) {
    integer back = length - 1 - t; /* what is handed on to the next call is an output, too */
    if (back >= width - 1 || back > last_since) return;
    const float *to_after = to_past_after + (width - 2 - back) * channels;
    VECTORIZE for (integer c = 0; c < channels; c++) to_input[c] += to_after[c];
}

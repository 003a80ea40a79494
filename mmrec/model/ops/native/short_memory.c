#include "kernels.h"

/* The short memory: convolution, gates, RG-LRU and output gate, one row of the batch.

   x [T, 4 D]: values, recurrence gate, input gate, output gate. weight [C, D]. states [T, D] are kept. */
EXPORT int short_memory(integer length, integer dim, integer width, const number *x, const float *past,
                        const float *state, const float *weight, const float *r_bias, const float *i_bias,
                        const float *rate, const uint8_t *reset, number *y, float *states, float *past_after) {
    float *scratch = malloc((width + 2) * dim * sizeof(float));
    if (!scratch) return 1;
    float *ring = scratch, *z = ring + width * dim, *zero = z + dim;
    memset(zero, 0, dim * sizeof(float));
    fill_ring(ring, past, width, dim);
    integer since = width;
    const float *before = state;
    for (integer t = 0; t < length; t++, x += 4 * dim, y += dim, states += dim) {
        since = count_since(reset, t, since);
        float *now = slot(ring, t, width, dim);
        VECTORIZE for (integer c = 0; c < dim; c++) now[c] = load(x[c]);
        convolve(weight, ring, width, t, since, width, dim, z);
        if (since == 0) before = zero;
        VECTORIZE for (integer c = 0; c < dim; c++) {
            float r = sigmoid(load(x[dim + c]) + r_bias[c]), i = sigmoid(load(x[2 * dim + c]) + i_bias[c]);
            float lost = expm1_of(-rate[c] * r), root = sqrtf(1e-8f - lost * (2.0f + lost));
            float h = (1.0f + lost) * before[c] + root * i * z[c];
            states[c] = h;
            y[c] = store(h * sigmoid(load(x[3 * dim + c])));
        }
        before = states;
    }
    leave_ring(ring, length, since, width, dim, past_after);
    free(scratch);
    return 0;
}

/* Gradients: to_state comes in as that of the last state and leaves as that of the first; to_weight [C, D],
   to_r_bias, to_i_bias, to_rate [D] are of this row alone. */
EXPORT int short_memory_backward(integer length, integer dim, integer width, const number *x, const float *past,
                                 const float *state, const float *weight, const float *r_bias, const float *i_bias,
                                 const float *rate, const uint8_t *reset, const float *states, const number *grad,
                                 const float *to_past_after, number *to_x, float *to_past, float *to_state,
                                 float *to_weight, float *to_r_bias, float *to_i_bias, float *to_rate) {
    float *scratch = malloc(((2 * width + 3) * dim) * sizeof(float));
    integer *since = malloc(length * sizeof(integer));
    if (!scratch || !since) return free(scratch), free(since), 1;
    float *ring = scratch, *z = ring + width * dim, *to_z, *to_input = z + dim, *zero = to_input + dim;
    float *seen = zero + dim; /* the inputs that the convolution saw at t, as a ring */
    memset(zero, 0, dim * sizeof(float));
    memset(to_weight, 0, width * dim * sizeof(float));
    memset(to_r_bias, 0, dim * sizeof(float));
    memset(to_i_bias, 0, dim * sizeof(float));
    memset(to_rate, 0, dim * sizeof(float));
    for (integer t = 0; t < length; t++) since[t] = count_since(reset, t, t ? since[t - 1] : width);
    for (integer t = length - width; t < length; t++)
        if (t >= 1 - width) {
            const float *row = row_of(x, 4 * dim, past, t, width, dim, z);
            memcpy(slot(seen, t, width, dim), row, dim * sizeof(float));
        }
    for (integer t = length - 1; t >= 0; t--) {
        integer first = t - width + 1; /* the row that comes into sight as t goes back */
        if (first >= 1 - width) {
            const float *row = row_of(x, 4 * dim, past, first, width, dim, z);
            memcpy(slot(seen, first, width, dim), row, dim * sizeof(float));
        }
        convolve(weight, seen, width, t, since[t], width, dim, z);
        to_z = slot(ring, t, width, dim);
        const number *gates = x + t * 4 * dim, *g = grad + t * dim;
        number *to_gates = to_x + t * 4 * dim;
        const float *h = states + t * dim;
        const float *before = since[t] == 0 ? zero : t ? h - dim : state;
        float kept = since[t] == 0 ? 0.0f : 1.0f;
        VECTORIZE for (integer c = 0; c < dim; c++) {
            float r = sigmoid(load(gates[dim + c]) + r_bias[c]), i = sigmoid(load(gates[2 * dim + c]) + i_bias[c]);
            float open = sigmoid(load(gates[3 * dim + c])), to_y = load(g[c]);
            float lost = expm1_of(-rate[c] * r), decay = 1.0f + lost, root = sqrtf(1e-8f - lost * (2.0f + lost));
            float flow = to_y * open + to_state[c];
            float to_log = decay * (before[c] * flow - flow * i * z[c] * decay / root);
            float to_r = -rate[c] * to_log * r * (1.0f - r), to_i = flow * root * z[c] * i * (1.0f - i);
            to_rate[c] -= to_log * r;
            to_r_bias[c] += to_r;
            to_i_bias[c] += to_i;
            to_z[c] = flow * root * i;
            to_state[c] = kept * decay * flow;
            to_gates[dim + c] = store(to_r);
            to_gates[2 * dim + c] = store(to_i);
            to_gates[3 * dim + c] = store(to_y * h[c] * open * (1.0f - open));
        }
        add_to_taps(to_z, seen, width, t, since[t], width, dim, to_weight);
        convolve_backward(weight, ring, since, t, length, width, dim, to_input);
        add_rows_to_come(to_past_after, since[length - 1], t, length, width, dim, to_input);
        VECTORIZE for (integer c = 0; c < dim; c++) to_gates[c] = store(to_input[c]);
    }
    for (integer t = -1; t >= 1 - width; t--) {
        float *to_row = to_past + (t + width - 1) * dim;
        convolve_backward(weight, ring, since, t, length, width, dim, to_row);
        add_rows_to_come(to_past_after, since[length - 1], t, length, width, dim, to_row);
    }
    free(scratch);
    free(since);
    return 0;
}

#include "kernels.h"

/* The long memory: convolution, SiLU, gated delta rule, norm of each head and output gate, one row of the batch. */
typedef struct {
    integer length, heads, size, width; /* tokens, H, K = V, C */
    integer stride;                     /* numbers of a row of x, of which 3 H K + 2 H are read here */
    integer span;                       /* tokens from one kept state to the next */
    float beta_max, query_scale, eps;
    integer silu;                               /* the output gate is SiLU, not a sigmoid */
    const float *weight;                        /* [C, 3 H K], of the convolution */
    const float *rate, *decay_bias, *beta_bias; /* [H]; the decay is exp(-rate softplus(x + decay_bias)) */
    const float *norm;                          /* [K] */
} LongMemory;

static inline float dot(integer size, const float *a, const float *b) {
    float sum = 0;
    SUMS(omp simd reduction(+ : sum))
    for (integer c = 0; c < size; c++) sum += a[c] * b[c];
    return sum;
}
static inline float inverse_length(integer size, const float *x) { return 1.0f / sqrtf(dot(size, x, x) + 1e-6f); }
static inline void multiply(integer size, float by, const float *x, float *y) {
    VECTORIZE for (integer c = 0; c < size; c++) y[c] = by * x[c];
}

/* States are held as rows of whole vectors: [K, lanes], where lanes is V rounded up to a multiple of LANES. */
#define LANES 16
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4)));
static inline integer lanes_of(integer size) { return (size + LANES - 1) / LANES * LANES; }
typedef float quarter __attribute__((vector_size(LANES), aligned(4)));
static inline float sum_of(const vector *x) {
    const quarter *parts = (const quarter *)x;
    quarter sum = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

/* The columns that one pass over the rows of a state takes: few enough for registers, and a number that the compiler
   knows. `first` is that of the first column. */
#define BY_COLUMNS(lanes, pass, ...)                                                                                 \
    for (integer first = 0, left = (lanes) / LANES; left > 0; first += 4 * LANES, left -= 4)                         \
    left == 1   ? pass(1, first, __VA_ARGS__)                                                                        \
    : left == 2 ? pass(2, first, __VA_ARGS__)                                                                        \
    : left == 3 ? pass(3, first, __VA_ARGS__)                                                                        \
                : pass(4, first, __VA_ARGS__)
#define INLINE static inline __attribute__((always_inline)) void

/* error = value - S^T k, where S is the state after its decay */
INLINE predict(const integer n, integer first, integer size, integer lanes, float decay, const float *k,
               const float *v, const float *state, float *error) {
    vector held[4] = {0};
    for (integer i = 0; i < size; i++)
        for (integer j = 0; j < n; j++) held[j] += k[i] * *(const vector *)(state + i * lanes + first + j * LANES);
    for (integer j = 0; j < n; j++) {
        vector *e = (vector *)(error + first + j * LANES);
        *e = *(const vector *)(v + first + j * LANES) - decay * held[j];
    }
}

/* after = decay * before + k (beta error)^T, and o = after^T q */
INLINE correct(const integer n, integer first, integer size, integer lanes, float decay, float beta, const float *q,
               const float *k, const float *error, const float *before, float *after, float *o) {
    vector read[4] = {0}, correction[4];
    for (integer j = 0; j < n; j++) correction[j] = beta * *(const vector *)(error + first + j * LANES);
    for (integer i = 0; i < size; i++)
        for (integer j = 0; j < n; j++) {
            integer at = i * lanes + first + j * LANES;
            vector row = decay * *(const vector *)(before + at) + k[i] * correction[j];
            *(vector *)(after + at) = row;
            read[j] += q[i] * row;
        }
    for (integer j = 0; j < n; j++) *(vector *)(o + first + j * LANES) = read[j];
}

/* One token of one head: the state decays, is corrected at the key, and is read by the query. */
static void delta_step(integer size, float decay, float beta, const float *q, const float *k, const float *v,
                       const float *before, float *after, float *error, float *o) {
    integer lanes = lanes_of(size);
    BY_COLUMNS(lanes, predict, size, lanes, decay, k, v, before, error);
    BY_COLUMNS(lanes, correct, size, lanes, decay, beta, q, k, error, before, after, o);
}

static void widen(integer rows, integer size, const float *state, float *wide) { /* [rows, V] to [rows, lanes] */
    integer lanes = lanes_of(size);
    for (integer i = 0; i < rows; i++) {
        memcpy(wide + i * lanes, state + i * size, size * sizeof(float));
        memset(wide + i * lanes + size, 0, (lanes - size) * sizeof(float));
    }
}
static void narrow(integer rows, integer size, const float *wide, float *state) {
    for (integer i = 0; i < rows; i++) memcpy(state + i * size, wide + i * lanes_of(size), size * sizeof(float));
}

/* What a head computes of one token before its step. */
typedef struct {
    float decay, beta;
} HeadGates;
static HeadGates prepare(const LongMemory *m, integer h, const number *x, integer since, const float *u, float *q,
                         float *k, float *v) {
    integer size = m->size, dim = m->heads * size;
    const float *query = u + h * size, *key = query + dim;
    float rates = m->rate[h] * softplus(load(x[3 * dim + h]) + m->decay_bias[h]);
    multiply(size, m->query_scale * inverse_length(size, query), query, q);
    multiply(size, inverse_length(size, key), key, k);
    memcpy(v, key + dim, size * sizeof(float));
    return (HeadGates){since == 0 ? 0.0f : exp_of(-rates),
                       m->beta_max * sigmoid(load(x[3 * dim + m->heads + h]) + m->beta_bias[h])};
}

/* y [T, H K]; `past` [C - 1, 3 H K] and `state` [H, K, V] are read and become those after the last token;
   `kept` (null: none are) gets the state before every span-th token. */
EXPORT int long_memory(const LongMemory *m, const number *x, const number *gate, const uint8_t *reset, float *past,
                       float *state, number *y, float *kept) {
    integer dim = m->heads * m->size, channels = 3 * dim, size = m->size, lanes = lanes_of(size), width = m->width;
    integer cells = dim * lanes;
    float *ring = calloc((width + 1) * channels + 5 * lanes + cells, sizeof(float));
    if (!ring) return 1;
    float *u = ring + width * channels, *q = u + channels, *k = q + lanes, *v = k + lanes, *error = v + lanes;
    float *o = error + lanes, *wide = o + lanes;
    fill_ring(ring, past, width, channels);
    widen(dim, size, state, wide);
    integer since = width;
    for (integer t = 0; t < m->length; t++, x += m->stride, gate += dim, y += dim) {
        since = count_since(reset, t, since);
        if (kept && t % m->span == 0) memcpy(kept + t / m->span * cells, wide, cells * sizeof(float));
        float *now = slot(ring, t, width, channels);
        VECTORIZE for (integer c = 0; c < channels; c++) now[c] = load(x[c]);
        convolve(m->weight, ring, width, t, since, width, channels, u);
        VECTORIZE for (integer c = 0; c < channels; c++) u[c] *= sigmoid(u[c]);
        for (integer h = 0; h < m->heads; h++) {
            float *head = wide + h * size * lanes;
            HeadGates by = prepare(m, h, x, since, u, q, k, v);
            delta_step(size, by.decay, by.beta, q, k, v, head, head, error, o);
            float scale = 1.0f / sqrtf(dot(size, o, o) / size + m->eps);
            VECTORIZE for (integer c = 0; c < size; c++) {
                float raw = load(gate[h * size + c]), open = sigmoid(raw);
                y[h * size + c] = store(o[c] * scale * m->norm[c] * (m->silu ? raw * open : open));
            }
        }
    }
    leave_ring(ring, m->length, since, width, channels, past);
    narrow(dim, size, wide, state);
    free(ring);
    return 0;
}

/* What one head needs of a span of tokens, for the gradients: computed once more, from the state that was kept. */
typedef struct {
    float *states;            /* [span + 1, K, lanes]: before each token, and after the last */
    float *q, *k, *error, *o; /* [span, lanes]; error is the value less what was held for the key */
    HeadGates *gates;         /* [span] */
} Head;

static void read_span(const LongMemory *m, integer h, integer first, integer tokens, const number *x, const float *u,
                      const integer *since, const float *entering, float *v, Head *s) {
    integer size = m->size, lanes = lanes_of(size), cells = size * lanes, channels = 3 * m->heads * size;
    memcpy(s->states, entering, cells * sizeof(float));
    for (integer n = 0; n < tokens; n++, x += m->stride, u += channels) {
        float *q = s->q + n * lanes, *k = s->k + n * lanes, *before = s->states + n * cells;
        s->gates[n] = prepare(m, h, x, since[first + n], u, q, k, v);
        delta_step(size, s->gates[n].decay, s->gates[n].beta, q, k, v, before, before + cells, s->error + n * lanes,
                   s->o + n * lanes);
    }
}

/* The gradient of `x / |x|`, times scale, added to nothing: to_x = scale (g / |x| - x (x g) / |x|^3). */
static void normalize_backward(integer size, float scale, const float *x, const float *to_y, float *to_x) {
    float by = inverse_length(size, x), along = dot(size, x, to_y) * by * by;
    VECTORIZE for (integer c = 0; c < size; c++) to_x[c] = scale * by * (to_y[c] - x[c] * along);
}

/* The gradient through the norm and the output gate of one head; to_o [V] is written, to_norm is added to. */
static void gate_backward(const LongMemory *m, const float *o, const number *gate, const number *grad, float *to_o,
                          number *to_gate, float *to_norm) {
    integer size = m->size;
    float by = 1.0f / sqrtf(dot(size, o, o) / size + m->eps), along = 0;
    SUMS(omp simd reduction(+ : along))
    for (integer c = 0; c < size; c++) {
        float raw = load(gate[c]), open = sigmoid(raw), g = load(grad[c]), normal = o[c] * by;
        float slope = m->silu ? open * (1.0f + raw * (1.0f - open)) : open * (1.0f - open);
        float through = g * (m->silu ? raw * open : open);
        to_gate[c] = store(g * normal * m->norm[c] * slope);
        to_norm[c] += through * normal;
        to_o[c] = through * m->norm[c];
        along += to_o[c] * normal;
    }
    along /= size;
    VECTORIZE for (integer c = 0; c < size; c++) to_o[c] = by * (to_o[c] - o[c] * by * along);
}

/* to_state += q to_o^T; to_error = to_state^T k; products [K, LANES] of to_state and the correction, summed later */
INLINE back_to_error(const integer n, integer first, integer size, integer lanes, float beta, const float *q,
                     const float *k, const float *error, const float *to_o, float *to_state, float *to_error,
                     vector *products) {
    vector sums[4] = {0}, correction[4], grad[4];
    for (integer j = 0; j < n; j++) {
        correction[j] = beta * *(const vector *)(error + first + j * LANES);
        grad[j] = *(const vector *)(to_o + first + j * LANES);
    }
    for (integer i = 0; i < size; i++)
        for (integer j = 0; j < n; j++) {
            vector *row = (vector *)(to_state + i * lanes + first + j * LANES);
            *row += q[i] * grad[j];
            sums[j] += k[i] * *row;
            products[i] += *row * correction[j];
        }
    for (integer j = 0; j < n; j++) *(vector *)(to_error + first + j * LANES) = sums[j];
}

/* to_state -= k to_value^T, where to_value is beta to_error, and then decays; products for q, k and the decay */
INLINE back_to_state(const integer n, integer first, integer size, integer lanes, float decay, const float *k,
                     const float *to_value, const float *to_o, const float *before, float *to_state,
                     vector *for_query, vector *for_key, vector *for_decay) {
    vector value[4], grad[4], sum = {0};
    for (integer j = 0; j < n; j++) {
        value[j] = *(const vector *)(to_value + first + j * LANES);
        grad[j] = decay * *(const vector *)(to_o + first + j * LANES);
    }
    for (integer i = 0; i < size; i++)
        for (integer j = 0; j < n; j++) {
            integer at = i * lanes + first + j * LANES;
            vector held = *(const vector *)(before + at), row = *(vector *)(to_state + at) - k[i] * value[j];
            for_query[i] += held * grad[j];
            for_key[i] -= decay * held * value[j];
            sum += row * held;
            *(vector *)(to_state + at) = decay * row;
        }
    *for_decay += sum;
}

/* One token of one head backwards. to_state [K, lanes] comes in as the gradient of the state after the token and
   leaves as that of the state before it; `products` [2 K] are room. */
static void delta_step_backward(integer size, const Head *s, integer n, const float *to_o, float *to_state,
                                float *to_q, float *to_k, float *to_v, vector *products, float *to_log_decay,
                                float *to_beta) {
    integer lanes = lanes_of(size);
    const float *q = s->q + n * lanes, *k = s->k + n * lanes, *error = s->error + n * lanes;
    const float *before = s->states + n * size * lanes;
    HeadGates by = s->gates[n];
    vector *for_query = products, *for_key = products + size, for_decay = {0};
    memset(products, 0, 2 * size * sizeof(vector));
    BY_COLUMNS(lanes, back_to_error, size, lanes, by.beta, q, k, error, to_o, to_state, to_v, for_key);
    *to_beta = dot(size, error, to_v);
    float read = by.beta * dot(size, error, to_o);
    multiply(size, by.beta, to_v, to_v);
    BY_COLUMNS(lanes, back_to_state, size, lanes, by.decay, k, to_v, to_o, before, to_state, for_query, for_key,
               &for_decay);
    for (integer i = 0; i < size; i++) {
        to_q[i] = sum_of(for_query + i) + k[i] * read;
        to_k[i] = sum_of(for_key + i);
    }
    *to_log_decay = by.decay * sum_of(&for_decay);
}

typedef struct {
    const number *x, *gate, *grad;
    const float *past, *kept, *to_past_after;
    number *to_x, *to_gate;
    float *to_past, *to_weight, *to_rate, *to_decay_bias, *to_beta_bias, *to_norm;
} LongGradients;

/* Room for one head at one token. */
typedef struct {
    float *v, *to_o, *to_q, *to_k, *to_v; /* [lanes]; beyond V they stay 0 */
    vector *products;                     /* [2 K] */
} Vectors;

/* Everything of one head in one span: the gradients of u, [tokens, 3 H K], and of what the gates are made of. */
static void head_backward(const LongMemory *m, const LongGradients *g, integer h, integer first, integer tokens,
                          const float *u, const integer *since, float *to_states, Head *s, const Vectors *w,
                          float *to_u) {
    integer size = m->size, lanes = lanes_of(size), dim = m->heads * size, channels = 3 * dim;
    const float *entering = g->kept + (first / m->span * dim + h * size) * lanes;
    read_span(m, h, first, tokens, g->x + first * m->stride, u, since, entering, w->v, s);
    for (integer n = tokens - 1; n >= 0; n--) {
        integer at = (first + n) * dim + h * size;
        const float *query = u + n * channels + h * size, *key = query + dim;
        float *to_query = to_u + n * channels + h * size, *to_key = to_query + dim, to_log_decay, to_beta;
        gate_backward(m, s->o + n * lanes, g->gate + at, g->grad + at, w->to_o, g->to_gate + at, g->to_norm);
        delta_step_backward(size, s, n, w->to_o, to_states + h * size * lanes, w->to_q, w->to_k, w->to_v, w->products,
                            &to_log_decay, &to_beta);
        normalize_backward(size, m->query_scale, query, w->to_q, to_query);
        normalize_backward(size, 1.0f, key, w->to_k, to_key);
        memcpy(to_key + dim, w->to_v, size * sizeof(float));

        const number *row = g->x + (first + n) * m->stride + channels + h;
        number *to_row = g->to_x + (first + n) * m->stride + channels + h;
        float raw = load(row[0]) + m->decay_bias[h], open = sigmoid(load(row[m->heads]) + m->beta_bias[h]);
        float to_raw = -m->rate[h] * to_log_decay * sigmoid(raw);
        to_beta *= m->beta_max * open * (1.0f - open);
        g->to_rate[h] -= to_log_decay * softplus(raw);
        g->to_decay_bias[h] += to_raw;
        g->to_beta_bias[h] += to_beta;
        to_row[0] = store(to_raw);
        to_row[m->heads] = store(to_beta);
    }
}

/* The gradients of the convolution and its SiLU in a span, from those of its outputs u. */
static void convolution_backward(const LongMemory *m, const LongGradients *g, integer first, integer tokens,
                                 float *seen, integer places, const float *z, const float *to_u, const integer *since,
                                 float *ring, float *to_row) {
    integer channels = 3 * m->heads * m->size, width = m->width;
    for (integer t = first + tokens - 1; t >= first; t--) {
        float *to_z = slot(ring, t, width, channels);
        const float *row = z + (t - first) * channels, *to_y = to_u + (t - first) * channels;
        VECTORIZE for (integer c = 0; c < channels; c++) {
            float open = sigmoid(row[c]);
            to_z[c] = to_y[c] * open * (1.0f + row[c] * (1.0f - open));
        }
        add_to_taps(to_z, seen, places, t, since[t], width, channels, g->to_weight);
        convolve_backward(m->weight, ring, since, t, m->length, width, channels, to_row);
        add_rows_to_come(g->to_past_after, since[m->length - 1], t, m->length, width, channels, to_row);
        number *to_x = g->to_x + t * m->stride;
        VECTORIZE for (integer c = 0; c < channels; c++) to_x[c] = store(to_row[c]);
    }
}

/* `to_state` comes in as the gradient of the last state and leaves as that of the first; what is a sum over tokens
   (to_rate to to_norm) is added to, but for to_weight, which is written. */
EXPORT int long_memory_backward(const LongMemory *m, const number *x, const number *gate, const uint8_t *reset,
                                const number *grad, const float *past, const float *kept, const float *to_past_after,
                                number *to_x, number *to_gate, float *to_past, float *to_state, float *to_weight,
                                float *to_rate, float *to_decay_bias, float *to_beta_bias, float *to_norm) {
    LongGradients all = {x,       gate,    grad,      past,    kept,          to_past_after, to_x,
                         to_gate, to_past, to_weight, to_rate, to_decay_bias, to_beta_bias,  to_norm};
    const LongGradients *g = &all;
    integer size = m->size, lanes = lanes_of(size), dim = m->heads * size, channels = 3 * dim, width = m->width;
    integer span = m->span, length = m->length, places = span + width, of_span = span * channels,
            cells = size * lanes;
    float *scratch = calloc(3 * of_span + (span + 1) * cells + dim * lanes + (4 * span + 5) * lanes +
                                2 * size * LANES + (places + width + 1) * channels,
                            sizeof(float));
    integer *since = malloc(length * sizeof(integer));
    HeadGates *gates = malloc(span * sizeof(HeadGates));
    if (!scratch || !since || !gates) return free(scratch), free(since), free(gates), 1;
    float *z = scratch, *u = z + of_span, *to_u = u + of_span, *to_states = to_u + of_span;
    Head s = {.states = to_states + dim * lanes, .gates = gates};
    s.q = s.states + (span + 1) * cells, s.k = s.q + span * lanes, s.error = s.k + span * lanes;
    s.o = s.error + span * lanes;
    Vectors w = {.v = s.o + span * lanes};
    w.to_o = w.v + lanes, w.to_q = w.to_o + lanes, w.to_k = w.to_q + lanes, w.to_v = w.to_k + lanes;
    w.products = (vector *)(w.to_v + lanes);
    float *seen = (float *)(w.products + 2 * size), *ring = seen + places * channels, *row = ring + width * channels;
    widen(dim, size, to_state, to_states);
    memset(g->to_weight, 0, width * channels * sizeof(float));
    for (integer t = 0; t < length; t++) since[t] = count_since(reset, t, t ? since[t - 1] : width);
    for (integer first = (length - 1) / span * span; first >= 0; first -= span) {
        integer tokens = length - first < span ? length - first : span;
        for (integer t = first - width + 1; t < first + tokens; t++) {
            const float *input = row_of(g->x, m->stride, g->past, t, width, channels, row);
            memcpy(slot(seen, t, places, channels), input, channels * sizeof(float));
            if (t < first) continue;
            float *before = z + (t - first) * channels, *after = u + (t - first) * channels;
            convolve(m->weight, seen, places, t, since[t], width, channels, before);
            VECTORIZE for (integer c = 0; c < channels; c++) after[c] = before[c] * sigmoid(before[c]);
        }
        for (integer h = 0; h < m->heads; h++)
            head_backward(m, g, h, first, tokens, u, since, to_states, &s, &w, to_u);
        convolution_backward(m, g, first, tokens, seen, places, z, to_u, since, ring, row);
    }
    for (integer t = -1; t >= 1 - width; t--) {
        float *to_row = g->to_past + (t + width - 1) * channels;
        convolve_backward(m->weight, ring, since, t, length, width, channels, to_row);
        add_rows_to_come(g->to_past_after, since[length - 1], t, length, width, channels, to_row);
    }
    narrow(dim, size, to_states, to_state);
    free(scratch);
    free(since);
    free(gates);
    return 0;
}

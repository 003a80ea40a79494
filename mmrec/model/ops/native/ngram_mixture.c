#include "ngrams.h"

/* A part's predictions by two models and by counts of n-grams, mixed by weights that are learned online. The plain form
   is mmrec/inference/mixing.py; the features are those there but for constants, which a mixture does not feel, and a
   token that an order does not know is the same to it as any other. */

typedef struct {
    double forgetting, damping;
} NgramMixing;

/* What a part says of a set of weights: the slope of the log-likelihood, and how it bends. */
typedef struct {
    int is_taken;
    double slope[MOST_MEMBERS], bend[MOST_MEMBERS][MOST_MEMBERS];
} Said;

/* One token's mixture in the making. The features of the models are rows; those of an order are 0 but for the tokens
   that it knows: the logarithm of what it expects, over what the one before expects, less that of all others. */
typedef struct {
    float first[MOST_TOKENS], apart[MOST_TOKENS], orders[MOST_ORDERS][MOST_TOKENS];
    float expected[MOST_TOKENS], before[MOST_TOKENS]; /* of the tokens that orders know, and the logarithm before */
} Features;

/* Each order expects its counts and, for as many observations as it has kinds of tokens, what was expected before. */
static void expect(const Found *found, Features *f) {
    for (integer n = 0; n < found->size; n++) {
        f->before[n] = f->first[found->tokens[n]];
        f->expected[n] = power_of(f->before[n]);
    }
    for (integer k = 0; k < found->known; k++) {
        const float *counts = found->counts[k];
        float kinds = found->kinds[k], all = found->totals[k] + kinds, others = logf(kinds / all);
        for (integer n = 0; n < found->size; n++) {
            f->expected[n] = (counts[n] + kinds * f->expected[n]) / all;
            float after = counts[n] == 0 ? f->before[n] + others : logf(f->expected[n]);
            f->orders[k][n] = counts[n] == 0 ? 0.0f : after - f->before[n] - others;
            f->before[n] = after;
        }
    }
}

/* The mixture y of one token by the weights of its set. */
static void mix_token(integer vocab, const double *weights, const Found *found, const Features *f, float *y) {
    float a = (float)weights[0], b = (float)weights[1];
    VECTORIZE for (integer c = 0; c < vocab; c++) y[c] = a * f->first[c] + b * f->apart[c];
    for (integer k = 0; k < found->known; k++)
        for (integer n = 0; n < found->size; n++)
            y[found->tokens[n]] += (float)weights[MODELS + k] * f->orders[k][n];
    normalize_row(vocab, y, y);
}

/* Adds what a token says of the weights that gave it the mixture y. */
static void say(integer vocab, integer target, const Found *found, const Features *f, const float *y, Said *said) {
    const float *first = f->first, *apart = f->apart;
    float means[MODELS] = {0}, bends[3] = {0};
    double rest = 1, mean[MOST_ORDERS];
    SUMS(omp simd reduction(+ : means[:MODELS]))
    for (integer c = 0; c < vocab; c++) {
        float p = power_of(y[c]);
        means[0] += p * first[c];
        means[1] += p * apart[c];
    }
    SUMS(omp simd reduction(+ : bends[:3]))
    for (integer c = 0; c < vocab; c++) {
        float p = power_of(y[c]), u = first[c] - means[0], v = apart[c] - means[1];
        bends[0] += p * u * u;
        bends[1] += p * u * v;
        bends[2] += p * v * v;
    }
    said->is_taken = 1;
    said->slope[0] += first[target] - means[0];
    said->slope[1] += apart[target] - means[1];
    said->bend[0][0] += bends[0];
    said->bend[1][0] += bends[1];
    said->bend[1][1] += bends[2];
    for (integer k = 0; k < found->known; k++) mean[k] = 0;
    for (integer n = 0; n < found->size; n++) {
        double p = power_of(y[found->tokens[n]]);
        rest -= p;
        for (integer k = 0; k < found->known; k++) mean[k] += p * f->orders[k][n];
    }
    if (rest < 0) rest = 0;
    for (integer k = 0; k < found->known; k++) {
        double *bend = said->bend[MODELS + k];
        for (integer n = 0; n < found->size; n++) {
            integer token = found->tokens[n];
            double p = power_of(y[token]), feature = f->orders[k][n] - mean[k];
            bend[0] += p * (first[token] - means[0]) * f->orders[k][n];
            bend[1] += p * (apart[token] - means[1]) * f->orders[k][n];
            for (integer other = 0; other <= k; other++)
                bend[MODELS + other] += p * feature * (f->orders[other][n] - mean[other]);
        }
        for (integer other = 0; other <= k; other++) bend[MODELS + other] += rest * mean[k] * mean[other];
        integer place = found->places[target];
        said->slope[MODELS + k] += (place ? f->orders[k][place - 1] : 0.0) - mean[k];
    }
}

/* Takes a Newton step of a set's weights: solves with the curvature by Cholesky's factors. Returns whether all is
   finite. */
static int newton(const NgramMixing *rule, integer members, const Said *said, double *weights, double *curvature) {
    double factors[MOST_MEMBERS][MOST_MEMBERS], step[MOST_MEMBERS];
    int sound = 1;
    for (integer r = 0; r < members; r++)
        for (integer c = 0; c <= r; c++) {
            double *one = curvature + r * members + c, damping = r == c ? rule->damping : 0;
            *one = rule->forgetting * *one + (1 - rule->forgetting) * damping + said->bend[r][c];
            curvature[c * members + r] = *one;
        }
    for (integer r = 0; r < members; r++) {
        step[r] = said->slope[r];
        for (integer c = 0; c <= r; c++) {
            double sum = curvature[r * members + c];
            for (integer n = 0; n < c; n++) sum -= factors[r][n] * factors[c][n];
            factors[r][c] = r == c ? sqrt(sum) : sum / factors[c][c];
            if (c < r) step[r] -= factors[r][c] * step[c];
        }
        step[r] /= factors[r][r];
    }
    for (integer r = members - 1; r >= 0; r--) {
        for (integer n = r + 1; n < members; n++) step[r] -= factors[n][r] * step[n];
        step[r] /= factors[r][r];
        weights[r] += step[r];
        sound &= isfinite(weights[r]) != 0;
    }
    return sound;
}

/* The mixture [length, vocab] of a part's tokens, as log-probabilities, of the logits [length, vocab] of two models and
   of the counts. The weights [orders + 1, members] and their curvature [orders + 1, members, members] are brought
   forward by the tokens from number `begin` on; where a number would not be finite, they stay. */
EXPORT int mix_ngrams(const Ngrams *by, const NgramMixing *rule, integer length, integer begin,
                      const int64_t *history, const int64_t *tokens, const float *first, const float *second,
                      double *weights, double *curvature, float *mixture) {
    integer members = MODELS + by->orders, sets = by->orders + 1, area = members * members, vocab = by->vocab;
    uint64_t *hashes;
    Found *found = ngrams_begin(by, length, history, tokens, &hashes);
    Features *f = malloc(sizeof(Features));
    Said *said = calloc(sets, sizeof(Said));
    double *moved = malloc(sets * (members + area) * sizeof(double)), *curved = moved + sets * members;
    int failed = !found || !f || !said || !moved, sound = 1;
    if (!failed) {
        for (integer t = 0; t < length; t++) {
            float *y = mixture + t * vocab;
            ngrams_look_up(by, length, hashes, tokens, t, found);
            normalize_row(vocab, first + t * vocab, f->first);
            normalize_row(vocab, second + t * vocab, f->apart);
            VECTORIZE for (integer c = 0; c < vocab; c++) f->apart[c] -= f->first[c];
            expect(found, f);
            mix_token(vocab, weights + found->known * members, found, f, y);
            if (t >= begin) say(vocab, tokens[t], found, f, y, said + found->known);
        }
        memcpy(moved, weights, sets * members * sizeof(double));
        memcpy(curved, curvature, sets * area * sizeof(double));
        for (integer set = 0; set < sets; set++)
            if (said[set].is_taken)
                sound &= newton(rule, members, said + set, moved + set * members, curved + set * area);
        if (sound) {
            memcpy(weights, moved, sets * members * sizeof(double));
            memcpy(curvature, curved, sets * area * sizeof(double));
        }
    }
    free(found ? hashes : NULL);
    free(found);
    free(f);
    free(said);
    free(moved);
    return failed;
}

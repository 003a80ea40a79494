#include "kernels.h"

/* The loss of predictions, and minus their entropy, in two passes over the logits and without a copy of them.

   Of each place there are `size` logits and a target, which is negative where nothing is scored. `kept` [places, 3] has
   what the gradients need: the largest logit, the logarithm of the sum of powers below it, and minus the entropy. */
EXPORT int token_losses(integer places, integer size, const number *logits, const int64_t *targets, float *kept,
                        float *sums) {
    double nll = 0, confident = 0;
    for (integer n = 0; n < places; n++, logits += size, kept += 3) {
        kept[0] = kept[1] = kept[2] = 0;
        if (targets[n] < 0) continue;
        float most = load(logits[0]), sum = 0, weighted = 0;
        SUMS(omp simd reduction(max : most))
        for (integer c = 0; c < size; c++) most = load(logits[c]) > most ? load(logits[c]) : most;
        SUMS(omp simd reduction(+ : sum, weighted))
        for (integer c = 0; c < size; c++) {
            float below = load(logits[c]) - most, power = power_of(below);
            sum += power;
            weighted += power * (below < -87.0f ? -87.0f : below); /* 0 times what is endless is none */
        }
        float rest = logf(sum);
        kept[0] = most, kept[1] = rest, kept[2] = weighted / sum - rest;
        nll += (double)(rest - (load(logits[targets[n]]) - most));
        confident += (double)kept[2];
    }
    sums[0] = (float)nll, sums[1] = (float)confident;
    return 0;
}

/* The gradient of a logit that is not the target's. */
static inline float of_logit(float logit, const float *kept, float of_nll, float of_confident) {
    float below = logit - kept[0] - kept[1], along = (below < -87.0f ? -87.0f : below) - kept[2];
    return power_of(below) * (of_nll + of_confident * along);
}

/* to_logits <- the gradients of the two sums, times `to_nll` and `to_confident`. */
EXPORT int token_losses_backward(integer places, integer size, const number *logits, const int64_t *targets,
                                 const float *kept, const float *to_nll, const float *to_confident,
                                 number *to_logits) {
    float of_nll = *to_nll, of_confident = *to_confident;
    for (integer n = 0; n < places; n++, logits += size, kept += 3, to_logits += size) {
        if (targets[n] < 0) {
            memset(to_logits, 0, size * sizeof(number));
            continue;
        }
        VECTORIZE for (integer c = 0; c < size; c++)
            to_logits[c] = store(of_logit(load(logits[c]), kept, of_nll, of_confident));
        to_logits[targets[n]] = store(of_logit(load(logits[targets[n]]), kept, of_nll, of_confident) - of_nll);
    }
    return 0;
}

/* AdamW's update of many tensors (Loshchilov and Hutter 2019) in one call, as torch.optim.AdamW computes it. */

#include "kernels.h"

typedef struct {
    double rate, decay, beta1, beta2, epsilon;
} adamw_rule;

/* weights <- after the update by `grads`. `means` and `squares` are the running means of gradients and of their squares,
   and `steps` count the updates of each tensor; they are brought up to date, too. */
EXPORT int adamw_update(const adamw_rule *rule, integer count, float **weights, const int64_t *sizes,
                        const float **grads, float **means, float **squares, float **steps) {
    const float beta2 = (float)rule->beta2, new1 = (float)(1 - rule->beta1), new2 = (float)(1 - rule->beta2);
    const float keep = (float)(1 - rule->rate * rule->decay), epsilon = (float)rule->epsilon;
    for (integer n = 0; n < count; n++) {
        double step = *steps[n] += 1.0f;
        const float rate = (float)(rule->rate / (1 - pow(rule->beta1, step)));
        const float root = (float)sqrt(1 - pow(rule->beta2, step));
        float *weight = weights[n], *mean = means[n], *square = squares[n];
        const float *grad = grads[n];
        VECTORIZE for (integer i = 0; i < sizes[n]; i++) {
            mean[i] += new1 * (grad[i] - mean[i]);
            square[i] = beta2 * square[i] + new2 * grad[i] * grad[i];
            weight[i] = keep * weight[i] - rate * mean[i] / (sqrtf(square[i]) / root + epsilon);
        }
    }
    return 0;
}

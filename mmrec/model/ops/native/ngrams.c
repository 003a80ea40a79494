#include "ngrams.h"

/* Counts of the n-grams that were read, in a hash table. The plain form is mmrec/inference/ngram_cache.py; counts and
   tables are the same to the bit. */

static inline uint64_t scattered(uint64_t x) {
    x *= 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

/* Hashes [orders, length + 1] of the contexts before each token and before the next one. */
static void hash_contexts(const Ngrams *by, integer length, const int64_t *history, const int64_t *tokens,
                          uint64_t *hashes) {
    integer longest = by->lengths[by->orders - 1];
    for (integer t = 0; t <= length; t++) {
        uint64_t sum = 0;
        for (integer back = 0, k = 0; back < longest; back++) {
            integer at = t - 1 - back;
            sum += (uint64_t)((at < 0 ? history[longest + at] : tokens[at]) + 1) * by->factors[back];
            if (back + 1 == by->lengths[k]) hashes[k * (length + 1) + t] = scattered(sum + by->salts[k]), k++;
        }
    }
}

/* Where the tokens after a context begin in the table, and its check. */
static inline integer start_of(const Ngrams *by, integer order, uint64_t hash) {
    return (hash >> 16) % by->spans[order] + by->begins[order];
}
static inline uint32_t check_of(uint64_t hash) { return hash % LARGEST_CHECK; }
static inline uint16_t entry_of(uint32_t check, integer token) {
    return (uint16_t)(((check + 37 * token) % LARGEST_CHECK + 1) << COUNT_BITS);
}

/* The count that the slots of an entry hold, 0 where they do not hold it. */
static inline uint16_t held_count(const uint16_t *slots, uint16_t entry) {
    uint16_t least = 0xffff;
    for (integer probe = 0; probe < PROBES; probe++) {
        uint16_t count = slots[probe] ^ entry;
        least = count < least ? count : least;
    }
    return least > LARGEST_COUNT ? 0 : least;
}

static void append(Found *found, integer token, uint16_t held) {
    found->tokens[found->size] = (uint16_t)token;
    found->held[found->size] = held;
    found->counts[0][found->size] = 0;
    found->places[token] = (uint16_t)++found->size;
}

/* Lists the tokens that the table has after a context of the first order. */
static void scan_row(const Ngrams *by, uint64_t hash, Found *found) {
    const uint16_t *slots = by->table + start_of(by, 0, hash);
    uint16_t check = (uint16_t)check_of(hash), *row = found->row;
    VECTORIZE for (integer n = 0; n < by->vocab; n++) {
        uint16_t sum = check + found->offsets[n];
        uint16_t entry = (uint16_t)((sum - (sum >= LARGEST_CHECK ? LARGEST_CHECK : 0) + 1) << COUNT_BITS);
        uint16_t least = 0xffff;
        for (integer probe = 0; probe < PROBES; probe++) {
            uint16_t count = slots[n + probe] ^ entry;
            least = count < least ? count : least;
        }
        row[n] = least > LARGEST_COUNT ? 0 : least;
    }
    for (integer n = 0; n < by->vocab; n++)
        if (row[n]) append(found, n, row[n]);
}

void ngrams_look_up(const Ngrams *by, integer length, const uint64_t *hashes, const int64_t *tokens, integer t,
                    Found *found) {
    for (integer n = 0; n < found->size; n++) found->places[found->tokens[n]] = 0;
    found->known = found->size = 0;
    for (integer k = 0; k < by->orders; k++) {
        const uint64_t *of_order = hashes + k * (length + 1), hash = of_order[t];
        float *counts = found->counts[k], total = 0, kinds = 0;
        if (k == 0) {
            scan_row(by, hash, found);
        } else {
            const uint16_t *slots = by->table + start_of(by, k, hash);
            uint32_t check = check_of(hash);
            for (integer n = 0; n < found->size; n++)
                if (found->held[n])
                    found->held[n] = held_count(slots + found->tokens[n], entry_of(check, found->tokens[n]));
        }
        for (integer n = 0; n < found->size; n++) counts[n] = found->held[n];
        for (integer before = 0; before < t; before++) {
            if (of_order[before] != hash) continue;
            integer token = tokens[before];
            if (k == 0 && !found->places[token]) append(found, token, 0);
            if (found->places[token]) counts[found->places[token] - 1]++;
        }
        for (integer n = 0; n < found->size; n++) total += counts[n], kinds += counts[n] > 0;
        if (total == 0) return;
        found->totals[k] = total;
        found->kinds[k] = kinds;
        found->known++;
    }
}

Found *ngrams_begin(const Ngrams *by, integer length, const int64_t *history, const int64_t *tokens,
                         uint64_t **hashes) {
    Found *found = calloc(1, sizeof(Found));
    *hashes = malloc(by->orders * (length + 1) * sizeof(uint64_t));
    if (!found || !*hashes) {
        free(found);
        free(*hashes);
        return NULL;
    }
    for (integer n = 0; n < by->vocab; n++) found->offsets[n] = (uint16_t)(37 * n % LARGEST_CHECK);
    hash_contexts(by, length, history, tokens, *hashes);
    return found;
}

/* Counts [orders, length + 1, vocab], which are 0 before. */
EXPORT int look_up_ngrams(const Ngrams *by, integer length, const int64_t *history, const int64_t *tokens,
                          float *counts) {
    uint64_t *hashes;
    Found *found = ngrams_begin(by, length, history, tokens, &hashes);
    if (!found) return 1;
    for (integer t = 0; t <= length; t++) {
        ngrams_look_up(by, length, hashes, tokens, t, found);
        for (integer k = 0; k < found->known; k++)
            for (integer n = 0; n < found->size; n++)
                counts[(k * (length + 1) + t) * by->vocab + found->tokens[n]] = found->counts[k][n];
    }
    free(found);
    free(hashes);
    return 0;
}

/* An entry that is counted, and how: `index` is the place of its first token among all orders' tokens. */
typedef struct {
    uint64_t slot, entry;
    integer index, times, target;
    uint16_t value;
    int is_full;
} Counted;

static int by_slot(const void *one, const void *other) {
    const Counted *a = one, *b = other;
    if (a->slot != b->slot) return a->slot < b->slot ? -1 : 1;
    if (a->entry != b->entry) return a->entry < b->entry ? -1 : 1;
    return a->index < b->index ? -1 : a->index > b->index;
}

/* Chooses the slot that has the entry, else the one with the lowest count, of those the first. */
static void choose_slot(const uint16_t *table, Counted *c) {
    integer best = 0, least = LARGEST_COUNT + 1, is_known = 0;
    for (integer probe = 0; probe < PROBES && !is_known; probe++) {
        uint16_t slot = table[c->slot + probe];
        is_known = (slot ^ c->entry) <= LARGEST_COUNT;
        if (is_known || (slot & LARGEST_COUNT) < least) best = probe, least = slot & LARGEST_COUNT;
    }
    integer sum = is_known ? least + c->times : c->times, is_taken = is_known || least <= c->times;
    if (sum > LARGEST_COUNT) sum = LARGEST_COUNT;
    c->target = (integer)c->slot + best;
    c->value = (uint16_t)(is_taken ? c->entry | (uint64_t)sum : table[c->target] - 1u);
    c->is_full = is_taken && sum == LARGEST_COUNT;
}

/* Counts entries, sorted by their slots. Of those that choose one slot the first has it, and the others look again. */
static void count_entries(uint16_t *table, integer size, Counted **left) {
    while (size) {
        integer kept = 0;
        for (integer n = 0; n < size; n++) choose_slot(table, left[n]);
        for (integer n = size - 1; n >= 0; n--) { /* from the last on: the table is read by nobody meanwhile */
            integer other = n - 1;
            while (other >= 0 && left[other]->slot + PROBES > left[n]->slot && left[other]->target != left[n]->target)
                other--;
            int is_first = other < 0 || left[other]->slot + PROBES <= left[n]->slot;
            if (is_first) table[left[n]->target] = left[n]->value;
            left[n]->times = is_first ? -left[n]->times : left[n]->times;
        }
        for (integer n = 0; n < size; n++)
            if (left[n]->times > 0) left[kept++] = left[n];
        size = kept;
    }
}

static void halve(const Ngrams *by, integer start, uint32_t check) {
    for (integer n = 0; n < by->vocab; n++) {
        uint16_t entry = entry_of(check, n), *slots = by->table + start + n;
        for (integer probe = 0; probe < PROBES; probe++) {
            uint16_t count = slots[probe] ^ entry;
            if (count <= LARGEST_COUNT) slots[probe] = entry | (uint16_t)((count + 1) >> 1);
        }
    }
}

/* Counts the tokens of a part after the contexts before them. */
EXPORT int count_ngrams(const Ngrams *by, integer length, const int64_t *history, const int64_t *tokens) {
    integer all = by->orders * length, size = 0;
    uint64_t *hashes = malloc(by->orders * (length + 1) * sizeof(uint64_t));
    Counted *counted = malloc((all + 1) * sizeof(Counted)), **left = malloc((all + 1) * sizeof(Counted *));
    int failed = !hashes || !counted || !left;
    if (!failed) {
        hash_contexts(by, length, history, tokens, hashes);
        for (integer n = 0; n < all; n++) {
            integer k = n / length, t = n % length;
            uint64_t hash = hashes[k * (length + 1) + t];
            counted[n] = (Counted){(uint64_t)(start_of(by, k, hash) + tokens[t]), entry_of(check_of(hash), tokens[t]), n,
                                   1, 0, 0, 0};
        }
        qsort(counted, all, sizeof(Counted), by_slot);
        for (integer n = 0; n < all; n++) {
            Counted *last = size ? left[size - 1] : NULL;
            if (last && last->slot == counted[n].slot && last->entry == counted[n].entry) last->times++;
            else left[size++] = counted + n;
        }
        count_entries(by->table, size, left);
        for (integer n = 0; n < all; n++) {
            if (!counted[n].is_full) continue;
            integer k = counted[n].index / length, t = counted[n].index % length;
            uint64_t hash = hashes[k * (length + 1) + t];
            halve(by, start_of(by, k, hash), check_of(hash));
        }
    }
    free(hashes);
    free(counted);
    free(left);
    return failed;
}

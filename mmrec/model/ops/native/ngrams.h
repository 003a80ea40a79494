#pragma once

#include "kernels.h"

/* The n-grams that were read: what ngrams.c looks up and ngram_mixture.c mixes. */

enum {
    PROBES = 8, /* of a token after a context, as ngram_cache.py has it; so the next three */
    COUNT_BITS = 6,
    LARGEST_COUNT = 63,
    LARGEST_CHECK = 1023,
    MOST_TOKENS = 4096, /* of a vocabulary; the caller has checked that, and the number of orders */
    MOST_ORDERS = 8,
    MODELS = 2,
    MOST_MEMBERS = MODELS + MOST_ORDERS
};

typedef struct {
    uint16_t *table;
    integer vocab, orders;
    const integer *lengths;                             /* [orders] of the contexts, from short to long */
    const uint64_t *factors, *salts, *begins, *spans; /* of a hash; where the contexts of an order lie */
} Ngrams;

/* What followed the contexts before one token. */
typedef struct {
    integer known, size;                     /* the orders that know their context; the tokens that the first does */
    uint16_t tokens[MOST_TOKENS];            /* [size] */
    uint16_t held[MOST_TOKENS];              /* [size], what the table has of the order that is looked up */
    float counts[MOST_ORDERS][MOST_TOKENS];  /* [known, size] */
    float totals[MOST_ORDERS], kinds[MOST_ORDERS];
    uint16_t places[MOST_TOKENS];            /* of each token in `tokens`, from 1 on; 0 elsewhere */
    uint16_t row[MOST_TOKENS], offsets[MOST_TOKENS]; /* offsets: of each token, what its entry adds to the check */
} Found;

/* A part's hashes and room for a look-up, both to be freed; NULL where there is no memory. */
Found *ngrams_begin(const Ngrams *by, integer length, const int64_t *history, const int64_t *tokens, uint64_t **hashes);

/* Looks up the contexts before token t: what the table has, and the tokens of this part before t. A longer context
   knows the tokens alone that the shorter ones know. */
void ngrams_look_up(const Ngrams *by, integer length, const uint64_t *hashes, const int64_t *tokens, integer t, Found *found);

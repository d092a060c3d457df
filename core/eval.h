/* SPDX-License-Identifier: Apache-2.0
 * eval.h - one policy, machine or metric on one input, no scenario: doc/eval.md has the formats. */
#ifndef EVAL_H
#define EVAL_H

#include "err.h"
#include "moelab.h"
#include <jansson.h>
#include <stdbool.h>

/* The kinds of policies keep their numbers; machines and metrics come after them. */
enum eval_kind { EVAL_MACHINE = MOE_N_KINDS, EVAL_METRIC, N_EVAL_KINDS };
extern const char *const eval_kind_name[N_EVAL_KINDS];

enum eval_type {
    EVAL_WHOLE, EVAL_REAL, EVAL_FLAG, EVAL_TEXT,
    EVAL_ARRAY, /* nested lists or the path of a .npy */
    EVAL_INPUT, /* a table, the path of a .json, or "-" */
    EVAL_TABLE
};

/* One row per option: what the command line parses and explains, and what eval() checks. */
struct eval_option {
    const char *name;            /* "top_k"; --top-k on the command line */
    enum eval_type type;
    uint32_t kinds;              /* 1 << kind for every kind that takes it */
    double min, max;             /* EVAL_WHOLE, EVAL_REAL */
    const char *argument, *help;
};
const struct eval_option *eval_options(void); /* ends with a NULL name */

/* options: an object of the options above. Returns the result, or NULL with the error set; every message names the
 * input and the element, unless the input is a file and `quote` is false: then the message says nothing of what is in
 * it. Writes nothing. */
json_t *eval(const char *kind, const char *name, const json_t *options, bool quote, struct err *);

#endif

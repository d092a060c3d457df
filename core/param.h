/* SPDX-License-Identifier: Apache-2.0
 * param.h - a plugin's parameter table against JSON values (from Lua, --set or a file). */
#ifndef PARAM_H
#define PARAM_H

#include "err.h"
#include "moelab.h"
#include <jansson.h>

struct param_set { /* one plugin's filled-in conf struct and what it holds on to */
    void *conf;
    json_t *values;  /* every parameter, defaults filled in: for the manifest */
    void **owned;    /* strings and tensors that conf points at */
    int n_owned;
};

/* `given`: JSON object or NULL. `who` starts every message ("scenario.lua:12: placement eplb"). Unknown keys (with
 * the nearest known one), wrong types, NaN, out of range and unreadable tensors are ERR_INPUT. */
int param_fill(struct param_set *, const struct moe_plugin *, const json_t *given, const char *who, struct err *);
void param_free(struct param_set *);
/* A value as messages show what was found: a number or a short string as it is, else its kind. Returns `text`, or a
 * constant. */
enum { PARAM_FOUND = 64 };
const char *param_found(const json_t *, char text[PARAM_FOUND]);
/* A table as JSON: [{"name","type","default","min","max","choices","unit","help"}]. */
json_t *param_describe(const struct moe_plugin *);
/* The table itself: names present, types known, defaults within range, offsets inside conf. For registration. */
int param_check_table(const struct moe_plugin *, const char *path, struct err *);

#endif

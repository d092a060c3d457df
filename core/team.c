/* SPDX-License-Identifier: Apache-2.0
 * team.c - see team.h. */
#include "config.h"

#include "team.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Nobody can be told any more: the first to notice says why. */
static int lose(struct team *t, const struct err *why, struct err *e)
{
    t->lost = true;
    if (!e->code)
        *e = *why;
    return e->code;
}

int team_agree(struct team *t, struct err *e)
{
    struct err why = { 0 };
    int first = -1, n = 0;
    if (!t || t->lost)
        return e->code;
    if (t->ops->gather(t, e, sizeof *e, t->told, &why) < 0)
        return lose(t, &why, e);
    for (int i = t->size - 1; i >= 0; i--)
        if (t->told[i].code) {
            first = i;
            n++;
        }
    if (first < 0)
        return 0;
    *e = t->told[first];
    if (n < t->size && strncmp(e->text, "rank ", strlen("rank ")) != 0)
        err_prefix(e, "rank %d", first);
    t->agreed = true;
    return e->code;
}

enum { TEXT = 128 };

int team_same(struct team *t, const char *what, const char *text, struct err *e)
{
    char mine[TEXT] = "", *all = t ? malloc((size_t)t->size * TEXT) : NULL;
    struct err why = { 0 };
    if (!t)
        return e->code;
    snprintf(mine, sizeof mine, "%s", text);
    if (!all)
        err_set(e, ERR_MEMORY, "out of memory for %d ranks", t->size);
    if (team_agree(t, e) < 0) {
        free(all);
        return e->code;
    }
    if (t->ops->gather(t, mine, TEXT, all, &why) < 0)
        lose(t, &why, e);
    for (int i = 1; i < t->size && !e->code; i++)
        if (memcmp(all, all + (size_t)i * TEXT, TEXT) != 0) {
            err_set(e, ERR_INPUT, "rank %d has another %s than rank 0: found %.16s, expected %.16s", i, what,
                    all + (size_t)i * TEXT, all);
            t->agreed = true;
        }
    free(all);
    return e->code;
}

int team_same_graph(struct team *t, uint64_t hash, struct err *e)
{
    uint64_t *all = t ? malloc((size_t)t->size * sizeof *all) : NULL;
    struct err why = { 0 };
    if (!t)
        return e->code;
    if (!all)
        err_set(e, ERR_MEMORY, "out of memory for %d ranks", t->size);
    if (team_agree(t, e) == 0 && t->ops->gather(t, &hash, sizeof hash, all, &why) < 0)
        lose(t, &why, e);
    for (int i = 1; i < t->size && !e->code; i++)
        if (all[i] != all[0]) {
            err_set(e, ERR_RUN, "rank %d decided otherwise than rank 0 (task graphs %016llx and %016llx): a policy "
                    "depends on more than its inputs and the seed", i, (unsigned long long)all[i],
                    (unsigned long long)all[0]);
            t->agreed = true;
        }
    free(all);
    return e->code;
}

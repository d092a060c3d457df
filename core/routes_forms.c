/* SPDX-License-Identifier: Apache-2.0
 * routes_forms.c - routes that are not "these experts for this token": slots, merged experts, halves of a layer left
 * out or gone through once more. What has to hold of them beside what routes.c checks of all. */
#include "config.h"

#include "policy.h"

#include <stdlib.h>
#include <string.h>

const char *routes_form_name(enum moe_form form)
{
    static const char *const name[] = { [MOE_TOKENS] = "tokens", [MOE_SLOTS] = "slots", [MOE_MERGED] = "merged" };
    return name[form];
}

/* A slot is one row of one expert: all its routes name that expert. */
static int check_slots(const struct moe_routes *r, int32_t *owner, const char *who, struct err *e)
{
    for (int64_t i = 0; i < r->n; i++) {
        int32_t *o = &owner[r->slot[i]];
        if (*o >= 0 && *o != r->expert[i])
            return err_set(e, ERR_RUN, "%s: slot %d has experts %d and %d, expected one", who, r->slot[i], *o,
                           r->expert[i]);
        *o = r->expert[i];
    }
    return 0;
}

/* Where a token's next merged expert begins after route i. */
static int64_t merged_end(const struct moe_routes *r, int64_t i, int64_t end)
{
    const int32_t slot = r->slot[i];
    while (i < end && r->slot[i] == slot)
        i++;
    return i;
}

/* A merged expert has one set of weights: each of its tokens lists the same experts, in the same order, as heavy.
 * at: [n_slots] where it was first listed, or -1; length: [n_slots] how many experts. */
static int check_merged(const struct moe_routes *r, int64_t *at, int64_t *length, const char *who, struct err *e)
{
    for (int32_t s = 0; s < r->n_slots; s++)
        at[s] = -1;
    for (int32_t t = 0; t < r->n_tokens; t++)
        for (int64_t i = r->offset[t], next; i < r->offset[t + 1]; i = next) {
            const int32_t s = r->slot[i];
            next = merged_end(r, i, r->offset[t + 1]);
            if (at[s] < 0) {
                at[s] = i;
                length[s] = next - i;
            }
            bool same = next - i == length[s];
            for (int64_t j = 0; same && j < length[s]; j++)
                same = r->expert[i + j] == r->expert[at[s] + j] && r->weight[i + j] >= r->weight[at[s] + j] &&
                       r->weight[i + j] <= r->weight[at[s] + j];
            if (!same)
                return err_set(e, ERR_RUN, "%s: token %d: merged expert %d is not what another token says it is", who,
                               t, s);
        }
    return 0;
}

static int check_halves(const struct moe_routes *r, const char *who, struct err *e)
{
    const int all = MOE_HALF_ATTENTION | MOE_HALF_EXPERTS;
    for (int32_t t = 0; t < r->n_tokens; t++) {
        const int skip = r->skip ? r->skip[t] : 0, again = r->again ? r->again[t] : 0;
        if (skip > all || again > all)
            return err_set(e, ERR_RUN, "%s: token %d: halves %d of a layer, expected bits up to %d", who, t,
                           skip > all ? skip : again, all);
        if (skip & again)
            return err_set(e, ERR_RUN, "%s: token %d: leaves out and repeats the same half of the layer", who, t);
        if ((skip & MOE_HALF_EXPERTS) && r->offset[t + 1] > r->offset[t])
            return err_set(e, ERR_RUN, "%s: token %d: leaves experts out, and has %lld", who, t,
                           (long long)(r->offset[t + 1] - r->offset[t]));
    }
    return 0;
}

int routes_check_forms(const struct moe_routes *r, const char *who, struct err *e)
{
    if ((unsigned)r->form > MOE_MERGED)
        return err_set(e, ERR_RUN, "%s: routes of form %d, expected 0 to %d", who, (int)r->form, MOE_MERGED);
    if (check_halves(r, who, e) < 0)
        return e->code;
    if (r->form == MOE_TOKENS)
        return r->slot || r->n_slots
                   ? err_set(e, ERR_RUN, "%s: routes with tokens and slots at once (slot)", who) : 0;
    if (r->n_slots < 0 || (r->n > 0 && !r->slot))
        return err_set(e, ERR_RUN, "%s: routes with %d slots%s", who, r->n_slots,
                       r->slot ? "" : ", and none says which is whose (slot)");
    for (int64_t i = 0; i < r->n; i++)
        if (r->slot[i] < 0 || r->slot[i] >= r->n_slots)
            return err_set(e, ERR_RUN, "%s: route %lld: slot %d, expected 0 to %d", who, (long long)i, r->slot[i],
                           r->n_slots - 1);
    const size_t n = (size_t)r->n_slots + 1;
    int64_t *room = malloc(2 * n * sizeof *room);
    if (!room)
        return err_set(e, ERR_MEMORY, "out of memory for %d slots", r->n_slots);
    if (r->form == MOE_SLOTS) {
        memset(room, 0xff, n * sizeof *room); /* -1: no expert yet */
        check_slots(r, (int32_t *)room, who, e);
    } else {
        check_merged(r, room, room + n, who, e);
    }
    free(room);
    return e->code;
}

int routes_rows(const struct moe_routes *r, int32_t n_experts, int64_t *rows, struct err *e)
{
    uint8_t *seen = calloc((size_t)r->n_slots + 1, 1);
    if (!seen)
        return err_set(e, ERR_MEMORY, "out of memory for %d slots", r->n_slots);
    for (int64_t i = 0; r->form == MOE_TOKENS && i < r->n; i++)
        if (r->expert[i] < n_experts) /* the others cost nothing */
            rows[r->expert[i]]++;
    for (int64_t i = 0; r->form == MOE_SLOTS && i < r->n; i++)
        if (r->expert[i] < n_experts && !seen[r->slot[i]]++)
            rows[r->expert[i]]++;
    for (int32_t t = 0; r->form == MOE_MERGED && t < r->n_tokens; t++)
        for (int64_t i = r->offset[t]; i < r->offset[t + 1]; i = merged_end(r, i, r->offset[t + 1]))
            rows[r->slot[i]]++;
    free(seen);
    return 0;
}

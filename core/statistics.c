/* SPDX-License-Identifier: Apache-2.0
 * statistics.c - counts of routed tokens. */
#include "config.h"

#include "statistics.h"

#include <stdlib.h>
#include <string.h>

static const double MAX_PAIRS = 1 << 28; /* 2 GiB of them */

int statistics_open(struct statistics *s, const struct moe_model *m, uint32_t needs, const char *who, struct err *e)
{
    const size_t n_layers = (size_t)m->n_layers, n_experts = (size_t)m->n_experts;
    const bool between = needs & MOE_NEEDS_TRANSITIONS, within = needs & MOE_NEEDS_COACTIVATION;
    memset(s, 0, sizeof *s);
    s->n_layers = m->n_layers;
    s->n_experts = m->n_experts;
    if ((between || within) && (double)n_layers * (double)n_experts * (double)n_experts > MAX_PAIRS)
        return err_set(e, ERR_INPUT, "%s: needs counts of pairs of experts, and %zu layers of %zu experts have more of "
                       "them than are kept (%.3g)", who, n_layers, n_experts, MAX_PAIRS);
    s->load = calloc(n_layers * n_experts, sizeof *s->load);
    if (between)
        s->transitions = calloc((n_layers - 1) * n_experts * n_experts + 1, sizeof *s->transitions);
    if (within)
        s->coactivation = calloc(n_layers * n_experts * n_experts, sizeof *s->coactivation);
    if (!s->load || (between && !s->transitions) || (within && !s->coactivation))
        return err_set(e, ERR_MEMORY, "out of memory for counts of %zu layers of %zu experts", n_layers, n_experts);
    return 0;
}

void statistics_free(struct statistics *s)
{
    free(s->load);
    free(s->transitions);
    free(s->coactivation);
    memset(s, 0, sizeof *s);
}

void statistics_reset(struct statistics *s)
{
    const size_t n_layers = (size_t)s->n_layers, n_experts = (size_t)s->n_experts;
    memset(s->load, 0, sizeof *s->load * n_layers * n_experts);
    if (s->transitions)
        memset(s->transitions, 0, sizeof *s->transitions * (n_layers - 1) * n_experts * n_experts);
    if (s->coactivation)
        memset(s->coactivation, 0, sizeof *s->coactivation * n_layers * n_experts * n_experts);
}

void statistics_add(struct statistics *s, int32_t layer, const int32_t *now, int64_t n_now, const int32_t *before,
                    int64_t n_before)
{
    const int32_t n_experts = s->n_experts;
    const size_t n = (size_t)n_experts, l = (size_t)layer;
    for (int64_t i = 0; i < n_now; i++) {
        if (now[i] >= n_experts)
            continue;
        s->load[l * n + (size_t)now[i]]++;
        for (int64_t j = 0; s->coactivation && j < n_now; j++)
            if (j != i && now[j] < n_experts)
                s->coactivation[(l * n + (size_t)now[i]) * n + (size_t)now[j]]++;
        for (int64_t j = 0; s->transitions && before && j < n_before; j++)
            if (before[j] < n_experts)
                s->transitions[((l - 1) * n + (size_t)before[j]) * n + (size_t)now[i]]++;
    }
}

void statistics_view(const struct statistics *s, struct moe_stats *out)
{
    out->load = s->load;
    out->transitions = s->transitions;
    out->coactivation = s->coactivation;
}

/* SPDX-License-Identifier: Apache-2.0
 * llep.c - experts with more tokens than their device can take spill to the least loaded devices, weights included.
 *
 * Source:  Least-Loaded Expert Parallelism: Load Balancing an Imbalanced Mixture-of-Experts, 2026, arXiv 2601.17111;
 *          the authors' SalesforceAIResearch/LeastLoadedEP (compute_llep_lpt_plan)
 * Differs: tokens are whole numbers throughout, where the published code compares real ones and ships residues of 1e-9
 *          tokens; ties go to the lower device
 * Cost:    O(E log E + E D) per layer; one move of weights for each device that an expert spills to
 *
 *   If max / mean of the loads (of experts, or of devices) is below lambda, all stays at home. Else each device should
 *   take alpha * sum / D tokens: m. For experts by falling load, with l tokens at home on device h:
 *     pending[h] -= l;  room = m - assigned[h] - pending[h]
 *     h keeps min(l, max(room, 0)); the rest r spills, to the other devices by rising assigned + pending: the first
 *     whose share c = min(r, m - assigned - pending) is positive and not less than min_rows (unless c = r) takes c, and
 *     so on; when none fits the least loaded takes all of r. */
#include <moelab.h>

#include <stdlib.h>
#include <string.h>

enum { TRIGGER_EXPERT, TRIGGER_DEVICE };

struct conf {
    double lambda, alpha;
    int64_t min_rows;
    int32_t trigger;
};

static const struct moe_param params[] = {
    { "lambda", MOE_REAL, offsetof(struct conf, lambda), 1.3, 0, 1e6, NULL, "", "max / mean from which it acts" },
    { "alpha", MOE_REAL, offsetof(struct conf, alpha), 1, 1, 1e6, NULL, "", "of the mean that a device should take" },
    { "min_rows", MOE_INT, offsetof(struct conf, min_rows), 1024, 0, INT32_MAX, NULL, "rows",
      "a spill of fewer is made only where it is all that is left" },
    { "trigger", MOE_ENUM, offsetof(struct conf, trigger), TRIGGER_EXPERT, 0, 0, "expert|device", "",
      "whose loads lambda is about: experts' as in the paper, devices' as in the code" },
    MOE_PARAM_END,
};

struct state {
    const struct moe_env *env;
    const struct conf *conf;
};

static int init(void *self, const void *conf, const struct moe_env *env)
{
    *(struct state *)self = (struct state){ .env = env, .conf = conf };
    return MOE_OK;
}

struct work {
    const int64_t *load;
    int32_t n_experts, n_devices;
    int32_t *home;               /* [E] */
    int64_t *assigned, *pending; /* [D] */
    int64_t most;                /* m, rounded down */
    struct moe_plan *plan;
};

struct by_load {
    int64_t load;
    int32_t expert;
};

static int compare(const void *left, const void *right)
{
    const struct by_load *a = left, *b = right;
    if (a->load != b->load)
        return a->load > b->load ? -1 : 1;
    return (a->expert > b->expert) - (a->expert < b->expert);
}

static int64_t busy(const struct work *w, int32_t d)
{
    return w->assigned[d] + w->pending[d];
}

/* The device for the next share of r tokens of an expert that live at `home`; *share: how many. */
static int32_t next_device(const struct work *w, int32_t home, int64_t r, int64_t min_rows, int64_t *share)
{
    int32_t least = -1, fits = -1;
    for (int32_t d = 0; d < w->n_devices; d++) {
        if (d == home)
            continue;
        const int64_t room = w->most - busy(w, d), c = room < r ? room : r;
        if (least < 0 || busy(w, d) < busy(w, least))
            least = d;
        if (c > 0 && (c >= min_rows || c == r) && (fits < 0 || busy(w, d) < busy(w, fits)))
            fits = d;
    }
    *share = r;
    if (fits >= 0 && w->most - busy(w, fits) < r)
        *share = w->most - busy(w, fits);
    return fits >= 0 ? fits : least;
}

static void give(struct work *w, int32_t expert, int32_t device, int64_t from, int64_t to)
{
    struct moe_plan *p = w->plan;
    w->assigned[device] += to - from;
    if (device == w->home[expert] || to == from)
        return;
    for (int32_t i = p->n_splits - 1; i >= 0 && p->split[i].expert == expert; i--)
        if (p->split[i].device == device && p->split[i].to == from) {
            p->split[i].to = to; /* the same device takes more */
            return;
        }
    p->split[p->n_splits++] = (struct moe_split){ expert, device, from, to };
    for (int32_t i = p->n_moves - 1; i >= 0 && p->move[i].expert == expert; i--)
        if (p->move[i].dst == device)
            return;
    p->move[p->n_moves++] = (struct moe_weight_move){ expert, w->home[expert], device };
}

static void plan_expert(struct work *w, int32_t e, int64_t min_rows)
{
    const int32_t h = w->home[e];
    const int64_t l = w->load[e];
    w->pending[h] -= l;
    int64_t room = w->most - busy(w, h), at = room < 0 ? 0 : room < l ? room : l;
    give(w, e, h, 0, at);
    while (at < l && w->n_devices > 1) {
        int64_t share;
        const int32_t d = next_device(w, h, l - at, min_rows, &share);
        give(w, e, d, at, at + share);
        at += share;
    }
    if (at < l) /* there is no other device */
        give(w, e, h, at, l);
}

static int read_homes(const struct state *s, int32_t layer, const struct moe_placement *placement, struct work *w)
{
    const struct moe_env *env = s->env;
    for (int32_t e = 0; e < w->n_experts; e++) {
        const int64_t at = (int64_t)layer * env->model->n_experts + e;
        const int32_t first = placement->expert_first[at];
        if (placement->expert_first[at + 1] != first + 1 ||
            placement->replica[placement->by_expert[first]].fraction < 1)
            return env->host->fail(env, MOE_EUNSUPPORTED,
                                   "layer %d: expert %d has %d replicas or shards, expected one: "
                                   "a placement without copies",
                                   layer, e, placement->expert_first[at + 1] - first);
        w->home[e] = placement->replica[placement->by_expert[first]].device;
        w->pending[w->home[e]] += w->load[e];
    }
    return MOE_OK;
}

static bool uneven(const struct conf *c, const struct work *w, int64_t sum)
{
    const bool experts = c->trigger == TRIGGER_EXPERT;
    const int64_t *x = experts ? w->load : w->pending;
    const int32_t n = experts ? w->n_experts : w->n_devices;
    int64_t most = 0;
    for (int32_t i = 0; i < n; i++)
        most = x[i] > most ? x[i] : most;
    return sum > 0 && (double)most * n / (double)sum >= c->lambda;
}

static int plan(void *self, int32_t layer, const int64_t *load, const struct moe_placement *placement,
                struct moe_plan *out, struct moe_cost *own)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    const int32_t n = moe_experts_of(env->model, layer), n_devices = env->topology->n_devices;
    struct work w = { .load = load, .n_experts = n, .n_devices = n_devices, .plan = out };
    struct by_load *order = env->host->scratch(env, (size_t)n * sizeof *order);
    w.home = env->host->scratch(env, (size_t)n * sizeof *w.home);
    w.assigned = env->host->scratch(env, (size_t)n_devices * sizeof *w.assigned);
    w.pending = env->host->scratch(env, (size_t)n_devices * sizeof *w.pending);
    if (!order || !w.home || !w.assigned || !w.pending)
        return MOE_ENOMEM;
    memset(w.assigned, 0, (size_t)n_devices * sizeof *w.assigned);
    memset(w.pending, 0, (size_t)n_devices * sizeof *w.pending);
    out->n_splits = out->n_moves = 0;
    int rc = read_homes(s, layer, placement, &w);
    int64_t sum = 0;
    for (int32_t e = 0; e < n; e++) {
        order[e] = (struct by_load){ load[e], e };
        sum += load[e];
    }
    if (rc < 0 || !uneven(s->conf, &w, sum))
        return rc;
    w.most = (int64_t)(s->conf->alpha * (double)sum / n_devices);
    qsort(order, (size_t)n, sizeof *order, compare);
    for (int32_t i = 0; i < n; i++)
        plan_expert(&w, order[i].expert, s->conf->min_rows);
    own->flops = (double)n * n_devices;
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_BALANCER,
    .needs = MOE_CROSS_BATCH, /* where a row is computed depends on all loads; which expert, never */
    .name = "llep",
    .summary = "overloaded experts spill to the least loaded devices, weights included",
    .source = "Least-Loaded Expert Parallelism 2026, arXiv 2601.17111",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.balancer = { .plan = plan },
};

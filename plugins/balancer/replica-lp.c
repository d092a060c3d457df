/* SPDX-License-Identifier: Apache-2.0
 * replica-lp.c - splits each expert's tokens over its replicas so that the largest device load is as small as can be.
 *
 * Source:  field standard: linear programming over replicated experts; no paper's code is followed
 * Differs: solved exactly in whole tokens, by bisection and augmenting paths, where a solver would round shares
 * Cost:    O(log max load) flows per layer; each augmentation visits every replica at most once per device
 *
 *   minimise M subject to  sum over replicas of x[e][d] = load[e],  sum over e of x[e][d] <= M,  x >= 0
 *
 * The constraints are those of a flow, so the smallest whole M is the linear program's rounded up. Rows start in even
 * shares; what a device has above M moves along shortest chains of replicas to devices below M. */
#include <moelab.h>

#include <string.h>

struct state {
    const struct moe_env *env;
};

static int init(void *self, const void *conf, const struct moe_env *env)
{
    (void)conf;
    *(struct state *)self = (struct state){ .env = env };
    return MOE_OK;
}

struct work {
    const struct moe_placement *placement;
    const int32_t *expert_first; /* of this layer: [E+1] into placement->by_expert */
    int32_t first, n, n_devices; /* replicas first to first + n - 1 are this layer's */
    int64_t *rows, *kept;        /* [n] rows on each replica; kept: of the smallest M found */
    int64_t *on;                 /* [D] */
    int32_t *from, *to;          /* [D] replicas that rows leave and reach to get to a device; from -1: not reached */
    int32_t *queue;              /* [D] */
    double steps;
};

/* The nearest device with room below M that rows of an overloaded one can reach, or -1. */
static int32_t search(struct work *w, int64_t most)
{
    int32_t head = 0, tail = 0;
    for (int32_t d = 0; d < w->n_devices; d++) {
        w->from[d] = w->on[d] > most ? -2 : -1; /* -2: a chain starts here */
        if (w->on[d] > most)
            w->queue[tail++] = d;
    }
    while (head < tail) {
        const int32_t d = w->queue[head++];
        w->steps += w->n;
        for (int32_t i = 0; i < w->n; i++) {
            const struct moe_replica *r = &w->placement->replica[w->first + i];
            if (r->device != d || w->rows[i] == 0)
                continue;
            for (int32_t at = w->expert_first[r->expert]; at < w->expert_first[r->expert + 1]; at++) {
                const int32_t j = w->placement->by_expert[at], other = w->placement->replica[j].device;
                if (w->from[other] != -1)
                    continue;
                w->from[other] = i;
                w->to[other] = j - w->first;
                if (w->on[other] < most)
                    return other;
                w->queue[tail++] = other;
            }
        }
    }
    return -1;
}

static int32_t device_before(const struct work *w, int32_t d)
{
    return w->placement->replica[w->first + w->from[d]].device;
}

static void push(struct work *w, int32_t end, int64_t most)
{
    int64_t amount = most - w->on[end];
    int32_t d = end;
    for (; w->from[d] >= 0; d = device_before(w, d))
        amount = w->rows[w->from[d]] < amount ? w->rows[w->from[d]] : amount;
    amount = w->on[d] - most < amount ? w->on[d] - most : amount;
    w->on[d] -= amount;
    w->on[end] += amount;
    for (d = end; w->from[d] >= 0; d = device_before(w, d)) {
        w->rows[w->from[d]] -= amount;
        w->rows[w->to[d]] += amount;
    }
}

/* Whether no device needs more than `most`; rows are then such a split. */
static bool fits(struct work *w, int64_t most)
{
    for (;;) {
        bool over = false;
        for (int32_t d = 0; d < w->n_devices; d++)
            over = over || w->on[d] > most;
        if (!over)
            return true;
        const int32_t end = search(w, most);
        if (end < 0)
            return false;
        push(w, end, most);
    }
}

static int start(const struct state *s, struct work *w, int32_t layer, const int64_t *load, int32_t n_experts)
{
    const struct moe_env *env = s->env;
    for (int32_t i = 0; i < w->n; i++)
        if (w->placement->replica[w->first + i].fraction < 1)
            return env->host->fail(env, MOE_EUNSUPPORTED, "layer %d: expert %d is in shards, expected whole replicas",
                                   layer, w->placement->replica[w->first + i].expert);
    for (int32_t e = 0; e < n_experts; e++) {
        const int32_t n = w->expert_first[e + 1] - w->expert_first[e];
        if (n == 0 && load[e] > 0)
            return env->host->fail(env, MOE_EINVAL, "layer %d: expert %d has %lld tokens and no replica", layer, e,
                                   (long long)load[e]);
        for (int32_t i = 0; i < n; i++) {
            const int32_t r = w->placement->by_expert[w->expert_first[e] + i];
            w->rows[r - w->first] = load[e] / n + (i < load[e] % n);
            w->on[w->placement->replica[r].device] += w->rows[r - w->first];
        }
    }
    return MOE_OK;
}

static void solve(struct work *w)
{
    int64_t sum = 0, low, high = 0; /* high is possible, nothing below low is */
    for (int32_t d = 0; d < w->n_devices; d++) {
        sum += w->on[d];
        high = w->on[d] > high ? w->on[d] : high;
    }
    memcpy(w->kept, w->rows, (size_t)w->n * sizeof *w->kept);
    low = (sum + w->n_devices - 1) / w->n_devices;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (fits(w, middle)) {
            memcpy(w->kept, w->rows, (size_t)w->n * sizeof *w->kept);
            high = middle;
        } else {
            low = middle + 1;
        }
    }
}

static void put(const struct work *w, int32_t n_experts, struct moe_plan *out)
{
    for (int32_t e = 0; e < n_experts; e++) {
        int64_t row = 0;
        if (w->expert_first[e + 1] - w->expert_first[e] < 2)
            continue;
        for (int32_t at = w->expert_first[e]; at < w->expert_first[e + 1]; at++) {
            const int32_t r = w->placement->by_expert[at], device = w->placement->replica[r].device;
            const int64_t rows = w->kept[r - w->first];
            struct moe_split *last = row > 0 ? &out->split[out->n_splits - 1] : NULL;
            if (rows == 0)
                continue;
            if (last != NULL && last->device == device) /* two replicas on one device */
                last->to += rows;
            else
                out->split[out->n_splits++] = (struct moe_split){ e, device, row, row + rows };
            row += rows;
        }
    }
}

static int plan(void *self, int32_t layer, const int64_t *load, const struct moe_placement *placement,
                struct moe_plan *out, struct moe_cost *own)
{
    const struct state *s = self;
    const struct moe_host *host = s->env->host;
    const int32_t n_experts = moe_experts_of(s->env->model, layer), first = placement->layer_first[layer];
    struct work w = { .placement = placement, .first = first, .n = placement->layer_first[layer + 1] - first };
    w.expert_first = placement->expert_first + (int64_t)layer * s->env->model->n_experts;
    w.n_devices = s->env->topology->n_devices;
    w.rows = host->scratch(s->env, (size_t)w.n * sizeof *w.rows);
    w.kept = host->scratch(s->env, (size_t)w.n * sizeof *w.kept);
    w.on = host->scratch(s->env, (size_t)w.n_devices * sizeof *w.on);
    w.from = host->scratch(s->env, (size_t)w.n_devices * sizeof *w.from);
    w.to = host->scratch(s->env, (size_t)w.n_devices * sizeof *w.to);
    w.queue = host->scratch(s->env, (size_t)w.n_devices * sizeof *w.queue);
    if (!w.rows || !w.kept || !w.on || !w.from || !w.to || !w.queue)
        return MOE_ENOMEM;
    memset(w.rows, 0, (size_t)w.n * sizeof *w.rows);
    memset(w.on, 0, (size_t)w.n_devices * sizeof *w.on);
    out->n_splits = out->n_moves = 0;
    const int rc = start(s, &w, layer, load, n_experts);
    if (rc < 0)
        return rc;
    solve(&w);
    put(&w, n_experts, out);
    own->flops = w.steps;
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_BALANCER,
    .needs = MOE_CROSS_BATCH, /* where a row is computed depends on all loads; which expert, never */
    .name = "replica-lp",
    .summary = "splits tokens over replicas so that the fullest device has as few as possible",
    .source = "field standard",
    .state_size = sizeof(struct state),
    .init = init,
    .ops.balancer = { .plan = plan },
};

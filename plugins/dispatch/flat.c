/* SPDX-License-Identifier: Apache-2.0
 * flat.c - one all-to-all for dispatch, one for combine, nothing overlapped.
 *
 * Source:  field practice: expert parallelism over alltoallv, after D. Lepikhin et al. 2020, GShard, arXiv 2006.16668
 * Differs: nothing; a token with several experts on one device is sent once for each (no deduplication)
 * Cost:    O(n + E + D) for n routes, scratch only
 *
 *   entry[d] -> permute[d] --.                                            .-> combine[d] -> exit[d]
 *                             dispatch -> experts[d] --.                 /
 *   (every d with tokens)    (one exchange; experts[d]  combine exchange
 *                             waits for what d gets)   (waits for all experts)
 *
 * A part that stays on its device carries its items, because a real machine needs them, and 0 bytes, because nothing
 * travels. A device without tokens has exit = entry; routes that cost nothing (to = -1) appear nowhere. */
#include <moelab.h>

#include <string.h>

struct conf {
    int32_t messages; /* PER_PAIR, PER_ROW */
};
enum { PER_PAIR, PER_ROW };

struct state {
    const struct moe_env *env;
    const struct conf *conf;
};

/* One layer's routes, sorted once. n_sent routes have a device to go to. */
struct layout {
    const struct moe_traffic *in;
    const int32_t *expert; /* [n] */
    int32_t *from;         /* [n] device of the route's token */
    int64_t n_sent;
    int64_t *by_pair;      /* [n_sent] routes by (from, to) */
    int64_t *by_expert;    /* [n_sent] routes by (to, expert) */
    int64_t *to_first;     /* [D + 1] into by_expert */
    int64_t *from_first;   /* [D + 1] into by_pair */
    int32_t n_experts;     /* largest expert id + 1 */
};

/* Stable: in[0..n) by key[in[i]] into out; first: [n_keys + 1], where each key begins. */
static void sort_by(const int32_t *key, int32_t n_keys, const int64_t *in, int64_t n, int64_t *out, int64_t *first)
{
    memset(first, 0, ((size_t)n_keys + 1) * sizeof *first);
    for (int64_t i = 0; i < n; i++)
        first[key[in[i]] + 1]++;
    for (int32_t k = 0; k < n_keys; k++)
        first[k + 1] += first[k];
    for (int64_t i = 0; i < n; i++)
        out[first[key[in[i]]]++] = in[i];
    memmove(first + 1, first, (size_t)n_keys * sizeof *first); /* filling moved every start to its end */
    first[0] = 0;
}

static int sort_routes(const struct moe_env *env, const struct moe_traffic *in, struct layout *l)
{
    size_t n = (size_t)in->routes->n, n_devices = (size_t)env->topology->n_devices;
    *l = (struct layout){.in = in, .expert = in->routes->expert};
    for (size_t i = 0; i < n; i++)
        if (in->to[i] >= 0 && l->expert[i] >= l->n_experts)
            l->n_experts = l->expert[i] + 1;
    int64_t *wide = env->host->scratch(env, (4 * n + 2 * (n_devices + 1) + (size_t)l->n_experts + 1) * sizeof *wide);
    l->from = env->host->scratch(env, (n + 1) * sizeof *l->from);
    if (wide == NULL || l->from == NULL)
        return MOE_ENOMEM;
    int64_t *sent = wide, *half = wide + n, *first = wide + 4 * n + 2 * (n_devices + 1);
    l->by_pair = wide + 2 * n;
    l->by_expert = wide + 3 * n;
    l->to_first = wide + 4 * n;
    l->from_first = l->to_first + n_devices + 1;
    for (int32_t t = 0; t < in->routes->n_tokens; t++) {
        for (int64_t i = in->routes->offset[t]; i < in->routes->offset[t + 1]; i++) {
            if (in->to[i] == MOE_SHARDED)
                return env->host->fail(env, MOE_EUNSUPPORTED, "layer %d: expert %d is sharded; this layout sends each "
                                       "route to one device", in->layer, l->expert[i]);
            l->from[i] = in->device[t];
            if (in->to[i] >= 0)
                sent[l->n_sent++] = i;
        }
    }
    sort_by(l->expert, l->n_experts, sent, l->n_sent, half, first);
    sort_by(in->to, (int32_t)n_devices, half, l->n_sent, l->by_expert, l->to_first);
    sort_by(in->to, (int32_t)n_devices, sent, l->n_sent, half, l->from_first);
    sort_by(l->from, (int32_t)n_devices, half, l->n_sent, l->by_pair, l->from_first);
    return MOE_OK;
}

/* One exchange over all pairs: token to expert (out), or back. Returns its task. */
static int32_t exchange(const struct state *s, const struct layout *l, bool out, struct moe_graph *g)
{
    const struct moe_env *env = s->env;
    struct moe_part *part = env->host->scratch(env, ((size_t)l->n_sent + 1) * sizeof *part);
    double row_bytes = out ? l->in->dispatch_bytes : l->in->combine_bytes;
    int32_t n_parts = 0;
    if (part == NULL)
        return MOE_ENOMEM;
    for (int64_t i = 0, end; i < l->n_sent; i = end) {
        int32_t from = l->from[l->by_pair[i]], to = l->in->to[l->by_pair[i]];
        for (end = i + 1; end < l->n_sent; end++)
            if (l->from[l->by_pair[end]] != from || l->in->to[l->by_pair[end]] != to)
                break;
        part[n_parts++] = (struct moe_part){
            .src = out ? from : to,
            .dst = out ? to : from,
            .bytes = from == to ? 0 : (double)(end - i) * row_bytes,
            .n_items = end - i,
            .items = l->by_pair + i,
        };
    }
    return env->host->task_exchange(env, g,
                                    &(struct moe_exchange){.payload = out ? MOE_PAY_HIDDEN : MOE_PAY_OUTPUT,
                                                           .n_parts = n_parts, .part = part,
                                                           .message_bytes = s->conf->messages == PER_ROW ? row_bytes
                                                                                                         : 0});
}

/* The experts of one device; starts when its tokens are there. Returns its task. */
static int32_t experts(const struct moe_env *env, const struct layout *l, int32_t device, int32_t dispatch,
                       struct moe_graph *g)
{
    int64_t begin = l->to_first[device], end = l->to_first[device + 1];
    int32_t *expert = env->host->scratch(env, (size_t)(end - begin) * sizeof *expert);
    int64_t *rows = env->host->scratch(env, (size_t)(end - begin) * sizeof *rows);
    int32_t n = 0;
    if (expert == NULL || rows == NULL)
        return MOE_ENOMEM;
    for (int64_t i = begin; i < end; i++) {
        int32_t e = l->expert[l->by_expert[i]];
        if (n == 0 || expert[n - 1] != e) {
            expert[n] = e;
            rows[n++] = 0;
        }
        rows[n - 1]++;
    }
    int32_t task = env->host->task_experts(env, g,
                                           &(struct moe_expert_work){.device = device, .layer = l->in->layer, .n = n,
                                                                     .expert = expert, .rows = rows,
                                                                     .items = l->by_expert + begin, .fraction = 1});
    int32_t arrival = task < 0 ? task : env->host->task_arrival(env, g, dispatch, device);
    int rc = arrival < 0 ? arrival : env->host->task_after(env, g, task, arrival);
    return rc < 0 ? rc : task;
}

/* A task on one device after `before` (if that is a task). Returns the task. */
static int32_t compute(const struct moe_env *env, struct moe_graph *g, enum moe_op op, int32_t device, double flops,
                       double bytes, int32_t before)
{
    int32_t task = env->host->task_compute(env, g,
                                           &(struct moe_work){.device = device, .op = op, .flops = flops,
                                                              .bytes = bytes});
    int rc = task < 0 || before < 0 ? MOE_OK : env->host->task_after(env, g, task, before);
    return rc < 0 ? rc : task;
}

/* Dispatch: permute on every device that sends, one exchange after all of them, the experts where their tokens have
 * arrived. Returns the exchange that brings the outputs back, which waits for all experts. */
static int32_t there_and_back(const struct state *s, const struct layout *l, struct moe_graph *g)
{
    const struct moe_env *env = s->env;
    int32_t out = exchange(s, l, true, g), back = out < 0 ? out : exchange(s, l, false, g);
    for (int32_t d = 0; back >= 0 && d < env->topology->n_devices; d++) {
        int64_t sends = l->from_first[d + 1] - l->from_first[d];
        int32_t task = 0;
        int rc = MOE_OK;
        if (sends > 0) { /* rows are read and written once */
            task = compute(env, g, MOE_OP_PERMUTE, d, 0, 2 * (double)sends * l->in->dispatch_bytes, l->in->entry[d]);
            rc = task < 0 ? task : env->host->task_after(env, g, out, task);
        }
        if (rc >= 0 && l->to_first[d + 1] > l->to_first[d]) {
            task = experts(env, l, d, out, g);
            rc = task < 0 ? task : env->host->task_after(env, g, back, task);
        }
        if (rc < 0)
            return rc;
    }
    return back;
}

static int lay_out(void *self, const struct moe_traffic *in, struct moe_graph *g)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    int32_t n_devices = env->topology->n_devices;
    const struct moe_placement *placement = in->placement;
    struct layout l;
    for (int32_t i = placement->layer_first[in->layer]; i < placement->layer_first[in->layer + 1]; i++)
        if (placement->replica[i].fraction < 1)
            return env->host->fail(env, MOE_EUNSUPPORTED,
                                   "layer %d: expert %d is sharded, and dispatch \"flat\" sends a row to one device",
                                   in->layer, placement->replica[i].expert);
    int64_t *n_tokens = env->host->scratch(env, (size_t)n_devices * sizeof *n_tokens);
    if (n_tokens == NULL || sort_routes(env, in, &l) < 0)
        return MOE_ENOMEM;
    int32_t back = l.n_sent > 0 ? there_and_back(s, &l, g) : 0;
    if (back < 0)
        return back;
    memset(n_tokens, 0, (size_t)n_devices * sizeof *n_tokens);
    for (int32_t t = 0; t < in->routes->n_tokens; t++)
        n_tokens[in->device[t]]++;
    for (int32_t d = 0; d < n_devices; d++) {
        int64_t rows = l.from_first[d + 1] - l.from_first[d];
        int32_t before = in->entry[d];
        in->exit[d] = in->entry[d];
        if (n_tokens[d] == 0)
            continue;
        if (rows > 0 && (before = env->host->task_arrival(env, g, back, d)) < 0)
            return before;
        /* a multiply and an add per element; outputs read, tokens written */
        in->exit[d] = compute(env, g, MOE_OP_COMBINE, d, 2.0 * (double)rows * env->model->d_model,
                              (double)(rows + n_tokens[d]) * in->combine_bytes, before);
        if (in->exit[d] < 0)
            return in->exit[d];
    }
    return MOE_OK;
}

static int init(void *self, const void *conf, const struct moe_env *env)
{
    struct state *s = self;
    s->env = env;
    s->conf = conf;
    return MOE_OK;
}

static const struct moe_param params[] = {
    {"messages", MOE_ENUM, offsetof(struct conf, messages), PER_PAIR, 0, 0, "pair|row", "", "what is sent at once: all "
     "rows of a pair of devices, or each row as it is ready (DeepEP's low-latency kernels)"},
    MOE_PARAM_END
};

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_DISPATCH,
    .name = "flat",
    .summary = "one all-to-all for dispatch, one for combine",
    .source = "field practice; D. Lepikhin et al. 2020, arXiv 2006.16668",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.dispatch = {.lay_out = lay_out},
};

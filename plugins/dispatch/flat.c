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
 * Experts in shards, after Megatron-LM's alltoall dispatcher: a row goes to the holder whose place among the shards is
 * its home's, device % n_shards (to its home, if that is one), and from there to the others; each computes its share of
 * every row; the parts of a row's sum go back to where it came in, which adds them up and sends one row home:
 *
 *   dispatch -> gather (an exchange per set of holders) -> experts[d] -> scatter (likewise) -> sum[d] -> combine
 *
 * Expert-data-parallel groups do all this by themselves: an exchange waits for its own group alone.
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

/* One layer's routes, sorted once. n_sent: those that have a device to go to. */
struct layout {
    const struct moe_traffic *in;
    int64_t *by_pair;      /* [n_sent] routes by (from, to) */
    int64_t *by_expert;    /* [n_sent] routes by (to, expert) */
    int64_t *to_first;     /* [D + 1] into by_expert; `to` is where a row comes in, if holders of shards are several */
    int64_t *from_first;   /* [D + 1] into by_pair */
    struct moe_part *part; /* [n_parts] one for each pair, as dispatch sends it */
    int32_t n_parts;
    int32_t *part_first;   /* [D + 1] into part: those that a device sends */
    int32_t n_shards;      /* of every expert; 1: whole */
    struct moe_part *near; /* [n_shards^2] scratch: between the holders of one expert */
    int64_t *near_item;    /* [n_sent] their routes, by_expert's order */
    int32_t *sum;          /* [D] task that adds up what a device's rows came to elsewhere; -1: none */
    int32_t *expert;       /* [E] scratch: experts of one device, */
    int64_t *rows;         /* [E] and what they compute */
};

/* Routes are sorted as (key, route) in one word: millions of them, and a key that lies elsewhere is a cache miss. Keys
 * are devices and experts, of which a run has fewer than 2^24. */
enum { ROUTE_BITS = 40 };

static int64_t word_of(int32_t key, int64_t route)
{
    return (int64_t)key << ROUTE_BITS | route;
}

static int32_t key_of(int64_t word)
{
    return (int32_t)(word >> ROUTE_BITS);
}

static int64_t route_of(int64_t word)
{
    return word & (((int64_t)1 << ROUTE_BITS) - 1);
}

/* Stable sort of word[0..n) by key, a byte at a time: few at once, which stay in the cache. other: [n]. */
static void sort_words(int64_t *word, int64_t n, int64_t *other)
{
    int64_t *from = word, *to = other;
    int32_t differ = 0;
    for (int64_t i = 1; i < n; i++)
        differ |= key_of(word[i]) ^ key_of(word[0]);
    for (int shift = 0; differ >> shift != 0; shift += 8) {
        int64_t at[257] = {0};
        if ((differ >> shift & 255) == 0)
            continue;
        for (int64_t i = 0; i < n; i++)
            at[(key_of(from[i]) >> shift & 255) + 1]++;
        for (int b = 0; b < 256; b++)
            at[b + 1] += at[b];
        for (int64_t i = 0; i < n; i++)
            to[at[key_of(from[i]) >> shift & 255]++] = from[i];
        int64_t *swap = from;
        from = to;
        to = swap;
    }
    if (from != word)
        memcpy(word, from, (size_t)n * sizeof *word);
}

/* Where each device's routes begin, from counts at first[device + 1]. */
static void add_up(int64_t *first, int32_t n_devices)
{
    for (int32_t d = 0; d < n_devices; d++)
        first[d + 1] += first[d];
}

/* After filling, which moved every start to its end. */
static void back_to_start(int64_t *first, int32_t n_devices)
{
    memmove(first + 1, first, (size_t)n_devices * sizeof *first);
    first[0] = 0;
}

/* Where the row of a route goes: to[i], or the holder whose place is the home's. */
static int32_t entry_of(const struct layout *l, int64_t route, int32_t home)
{
    const struct moe_traffic *in = l->in;
    if (in->to[route] != MOE_SHARDED)
        return in->to[route];
    return in->placement->replica[in->holders[route]].device + home % l->n_shards;
}

/* The parts of one device's routes, which are sorted by where they go. */
static void add_parts(struct layout *l, int32_t from)
{
    l->part_first[from] = l->n_parts;
    int64_t *word = l->by_pair, last = l->from_first[from + 1];
    for (int64_t i = l->from_first[from], end; i < last; i = end) {
        int32_t to = key_of(word[i]);
        for (end = i; end < last && key_of(word[end]) == to; end++)
            word[end] = route_of(word[end]);
        l->part[l->n_parts++] = (struct moe_part){
            .src = from,
            .dst = to,
            .bytes = from == to ? 0 : (double)(end - i) * l->in->dispatch_bytes,
            .n_items = end - i,
            .items = word + i,
        };
    }
}

static int sort_routes(const struct moe_env *env, const struct moe_traffic *in, struct layout *l)
{
    const struct moe_routes *routes = in->routes;
    size_t n = (size_t)routes->n, n_experts = (size_t)env->model->n_experts;
    int32_t n_devices = env->topology->n_devices;
    size_t n_firsts = 2 * ((size_t)n_devices + 1);
    *l = (struct layout){.in = in, .n_shards = in->holders != NULL ? in->n_shards : 1};
    const size_t n_shards = (size_t)l->n_shards;
    int64_t *wide = env->host->scratch(env, (3 * n + n_firsts + n_experts) * sizeof *wide);
    l->part = env->host->scratch(env, (n + 1) * sizeof *l->part);
    l->expert = env->host->scratch(env, n_experts * sizeof *l->expert);
    l->part_first = env->host->scratch(env, 2 * ((size_t)n_devices + 1) * sizeof *l->part_first);
    l->near = env->host->scratch(env, n_shards * n_shards * sizeof *l->near);
    if (wide == NULL || l->part == NULL || l->expert == NULL || l->part_first == NULL || l->near == NULL)
        return MOE_ENOMEM;
    l->sum = l->part_first + n_devices + 1;
    int64_t *other = l->near_item = wide + 2 * n;
    l->by_pair = wide;
    l->by_expert = wide + n;
    l->from_first = wide + 3 * n;
    l->to_first = l->from_first + n_devices + 1;
    l->rows = l->from_first + n_firsts;
    memset(l->from_first, 0, n_firsts * sizeof *l->from_first);
    for (int32_t t = 0; t < routes->n_tokens; t++) {
        for (int64_t i = routes->offset[t]; i < routes->offset[t + 1]; i++) {
            if (in->to[i] == MOE_SHARDED && in->holders == NULL)
                return env->host->fail(env, MOE_EINVAL, "layer %d: expert %d is sharded, and nothing says who holds it",
                                       in->layer, routes->expert[i]);
            if (in->to[i] == MOE_NOWHERE)
                continue;
            l->from_first[in->device[t] + 1]++;
            l->to_first[entry_of(l, i, in->device[t]) + 1]++;
        }
    }
    add_up(l->from_first, n_devices);
    add_up(l->to_first, n_devices);
    for (int32_t t = 0; t < routes->n_tokens; t++) {
        for (int64_t i = routes->offset[t]; i < routes->offset[t + 1]; i++) {
            if (in->to[i] == MOE_NOWHERE)
                continue;
            const int32_t to = entry_of(l, i, in->device[t]);
            l->by_pair[l->from_first[in->device[t]]++] = word_of(to, i);
            l->by_expert[l->to_first[to]++] = word_of(routes->expert[i], i);
        }
    }
    back_to_start(l->from_first, n_devices);
    back_to_start(l->to_first, n_devices);
    for (int32_t d = 0; d < n_devices; d++) {
        sort_words(l->by_pair + l->from_first[d], l->from_first[d + 1] - l->from_first[d], other);
        sort_words(l->by_expert + l->to_first[d], l->to_first[d + 1] - l->to_first[d], other);
        l->sum[d] = -1;
        add_parts(l, d);
    }
    l->part_first[n_devices] = l->n_parts;
    return MOE_OK;
}

struct group { int32_t first, end; }; /* devices */

/* One exchange over all pairs: token to expert (out), or back, which is asked for second. Returns its task. */
static int32_t exchange(const struct state *s, struct layout *l, struct group of, bool out, struct moe_graph *g)
{
    const struct moe_env *env = s->env;
    const double row_bytes = out ? l->in->dispatch_bytes : l->in->combine_bytes;
    const int32_t begin = l->part_first[of.first], end = l->part_first[of.end];
    for (int32_t i = begin; !out && i < end; i++) {
        struct moe_part *p = &l->part[i];
        int32_t from = p->src;
        p->src = p->dst;
        p->dst = from;
        p->bytes = p->src == p->dst ? 0 : (double)p->n_items * row_bytes;
    }
    return env->host->task_exchange(env, g,
                                    &(struct moe_exchange){.payload = out ? MOE_PAY_HIDDEN : MOE_PAY_OUTPUT,
                                                           .n_parts = end - begin, .part = l->part + begin,
                                                           .message_bytes = s->conf->messages == PER_ROW ? row_bytes
                                                                                                         : 0});
}

/* Experts and rows of what lies in by_expert, sorted, which turns from words to routes. Returns how many experts. */
static int32_t list_experts(struct layout *l, int64_t begin, int64_t end)
{
    int32_t n = 0;
    for (int64_t i = begin; i < end; i++) {
        int32_t e = key_of(l->by_expert[i]);
        if (n == 0 || l->expert[n - 1] != e) {
            l->expert[n] = e;
            l->rows[n++] = 0;
        }
        l->rows[n - 1]++;
        l->by_expert[i] = route_of(l->by_expert[i]);
    }
    return n;
}

/* The n experts listed, on one device; starts when `exchange` has brought it what it brings. Returns the task. */
static int32_t experts(const struct moe_env *env, const struct layout *l, int32_t device, int32_t n, int64_t begin,
                       int32_t brings, struct moe_graph *g)
{
    int32_t task = env->host->task_experts(env, g,
                                           &(struct moe_expert_work){.device = device, .layer = l->in->layer, .n = n,
                                                                     .expert = l->expert, .rows = l->rows,
                                                                     .items = l->by_expert + begin,
                                                                     .fraction = 1.0f / (float)l->n_shards});
    int32_t arrival = task < 0 ? task : env->host->task_arrival(env, g, brings, device);
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

/* Between the holders from device `first` on: every row from where it came in to all others (out), or every part of a
 * sum to there. Returns the exchange. */
static int32_t exchange_near(const struct moe_env *env, struct layout *l, int32_t first, bool out, struct moe_graph *g)
{
    const double row_bytes = out ? l->in->dispatch_bytes : l->in->combine_bytes;
    int32_t n = 0;
    for (int32_t at = first; at < first + l->n_shards; at++) {
        const int64_t begin = l->to_first[at], rows = l->to_first[at + 1] - begin;
        for (int32_t d = first; rows > 0 && d < first + l->n_shards; d++)
            if (d != at)
                l->near[n++] = (struct moe_part){.src = out ? at : d, .dst = out ? d : at,
                                                 .bytes = (double)rows * row_bytes, .n_items = rows,
                                                 .items = l->near_item + begin};
    }
    return env->host->task_exchange(env, g, &(struct moe_exchange){.payload = out ? MOE_PAY_HIDDEN : MOE_PAY_OUTPUT,
                                                                   .n_parts = n, .part = l->near});
}

/* The experts that the devices from `first` on hold in shards, with all between dispatch, `out`, and `back`. */
static int sharded_experts(const struct moe_env *env, struct layout *l, int32_t first, int32_t out, int32_t back,
                           struct moe_graph *g)
{
    const int32_t n_shards = l->n_shards;
    const int64_t begin = l->to_first[first], end = l->to_first[first + n_shards];
    if (begin == end)
        return MOE_OK;
    for (int64_t i = begin; i < end; i++)
        l->near_item[i] = route_of(l->by_expert[i]);
    int32_t gather = exchange_near(env, l, first, true, g);
    int32_t scatter = gather < 0 ? gather : exchange_near(env, l, first, false, g);
    int64_t *swap = env->host->scratch(env, (size_t)(end - begin) * sizeof *swap);
    if (scatter < 0 || swap == NULL)
        return scatter < 0 ? scatter : MOE_ENOMEM;
    sort_words(l->by_expert + begin, end - begin, swap);
    const int32_t n = list_experts(l, begin, end);
    for (int32_t d = first; d < first + n_shards; d++) {
        int32_t here = env->host->task_arrival(env, g, out, d);
        int rc = here < 0 ? here : env->host->task_after(env, g, gather, here);
        int32_t task = rc < 0 ? rc : experts(env, l, d, n, begin, gather, g);
        if (task < 0 || (rc = env->host->task_after(env, g, scatter, task)) < 0)
            return task < 0 ? task : rc;
        const double rows = (double)(l->to_first[d + 1] - l->to_first[d]);
        if (rows == 0)
            continue;
        /* n_shards parts of a row read, the row written */
        here = env->host->task_arrival(env, g, scatter, d);
        l->sum[d] = here < 0 ? here : compute(env, g, MOE_OP_COMBINE, d, rows * (n_shards - 1) * env->model->d_model,
                                              rows * (n_shards + 1) * l->in->combine_bytes, here);
        if (l->sum[d] < 0 || (rc = env->host->task_after(env, g, back, l->sum[d])) < 0)
            return l->sum[d] < 0 ? l->sum[d] : rc;
        if (l->in->entry[d] >= 0 && (rc = env->host->task_after(env, g, l->sum[d], l->in->entry[d])) < 0)
            return rc; /* it may be all that a device without tokens does */
    }
    return MOE_OK;
}

/* Dispatch in one group: permute on every device that sends, one exchange after all of them, the experts where their
 * tokens have arrived. Returns the exchange that brings the outputs back, which waits for all experts. */
static int32_t there_and_back(const struct state *s, struct layout *l, struct group of, struct moe_graph *g)
{
    const struct moe_env *env = s->env;
    int32_t out = exchange(s, l, of, true, g), back = out < 0 ? out : exchange(s, l, of, false, g);
    for (int32_t d = of.first; back >= 0 && d < of.end; d++) {
        int64_t sends = l->from_first[d + 1] - l->from_first[d];
        int32_t task = 0;
        int rc = MOE_OK;
        if (sends > 0) { /* rows are read and written once */
            task = compute(env, g, MOE_OP_PERMUTE, d, 0, 2 * (double)sends * l->in->dispatch_bytes, l->in->entry[d]);
            rc = task < 0 ? task : env->host->task_after(env, g, out, task);
        }
        if (rc >= 0 && l->n_shards > 1 && d % l->n_shards == 0) {
            rc = sharded_experts(env, l, d, out, back, g);
        } else if (rc >= 0 && l->n_shards == 1 && l->to_first[d + 1] > l->to_first[d]) {
            task = experts(env, l, d, list_experts(l, l->to_first[d], l->to_first[d + 1]), l->to_first[d], out, g);
            rc = task < 0 ? task : env->host->task_after(env, g, back, task);
        }
        if (rc < 0)
            return rc;
    }
    return back;
}

/* What is left to do on a device once outputs are back; n_tokens: that live there. Sets its exit. */
static int combine(const struct moe_env *env, const struct layout *l, int32_t device, int64_t n_tokens, int32_t back,
                   struct moe_graph *g)
{
    const struct moe_traffic *in = l->in;
    const int64_t rows = l->from_first[device + 1] - l->from_first[device];
    int32_t before = in->entry[device];
    in->exit[device] = l->sum[device] < 0 ? before : l->sum[device];
    if (n_tokens == 0)
        return MOE_OK;
    if (rows > 0 && (before = env->host->task_arrival(env, g, back, device)) < 0)
        return before;
    /* a multiply and an add per element; outputs read, tokens written */
    in->exit[device] = compute(env, g, MOE_OP_COMBINE, device, 2.0 * (double)rows * env->model->d_model,
                               (double)(rows + n_tokens) * in->combine_bytes, before);
    if (in->exit[device] < 0)
        return in->exit[device];
    return l->sum[device] < 0 ? MOE_OK : env->host->task_after(env, g, in->exit[device], l->sum[device]);
}

static int lay_out(void *self, const struct moe_traffic *in, struct moe_graph *g)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    const int32_t n_devices = env->topology->n_devices, n_groups = in->n_groups > 1 ? in->n_groups : 1;
    struct layout l;
    int64_t *n_tokens = env->host->scratch(env, (size_t)n_devices * sizeof *n_tokens);
    if (n_tokens == NULL)
        return MOE_ENOMEM;
    int rc = sort_routes(env, in, &l);
    if (rc < 0)
        return rc;
    memset(n_tokens, 0, (size_t)n_devices * sizeof *n_tokens);
    for (int32_t t = 0; t < in->routes->n_tokens; t++)
        n_tokens[in->device[t]]++;
    for (int32_t i = 0; i < n_groups; i++) {
        const struct group of = {i * (n_devices / n_groups), (i + 1) * (n_devices / n_groups)};
        int32_t back = l.part_first[of.end] > l.part_first[of.first] ? there_and_back(s, &l, of, g) : 0;
        rc = back;
        for (int32_t d = of.first; rc >= 0 && d < of.end; d++)
            rc = combine(env, &l, d, n_tokens[d], back, g);
        if (rc < 0)
            return rc;
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

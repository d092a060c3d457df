/* SPDX-License-Identifier: Apache-2.0
 * node-dedup.c - a token crosses the network once per node that needs it, and is passed on over NVLink there.
 *
 * Source:  DeepEP, normal kernels (C. Zhao et al. 2025, github.com/deepseek-ai/DeepEP); DeepSeek-V3 technical report,
 *          arXiv 2412.19437, section 3.2.2
 * Differs: queues and their flow control are a pipeline of `chunks` equal slices of every device's tokens; outputs are
 *          summed on each device and each node before they travel, as there. Experts in shards (fraction < 1) are
 *          refused; groups of devices that hold all experts each share one kernel, so each waits for the slowest
 * Cost:    O(n k + D) for n routes of k per token, scratch only
 *
 *   permute none (kernels read tokens where they lie); per slice i of `chunks`, one after another:
 *     across i   token -> the device of its own rail (index within the node) on each other node that computes it
 *     within i   from there, and from its home, to each device of that node that computes it
 *   experts[d] once all slices are there, after a permute into the order of experts; then back the same way:
 *     reduce[d], within i (summed per device), across i (summed per node), combine[d] -> exit[d]
 *
 * `within i` waits for `across i` and runs beside `across i + 1`: with equal slices the two take
 * max(across, within) + min(across, within) / chunks. What stays on its device goes through the same queues as what
 * leaves it, so it takes their time (a part from a device to itself). One kernel of `sms` SMs does it all, half of them
 * for each of the two hops. */
#include <moelab.h>

#include <string.h>

struct conf {
    int64_t chunks, sms;
};

struct state {
    const struct moe_env *env;
    const struct conf *conf;
    int32_t *local;      /* [D] index within the node */
    int32_t *node_first; /* [N + 1] into by_node */
    int32_t *by_node;    /* [D] */
};

struct hop { /* one row, or one more route whose output is in a row that another hop stands for */
    int32_t chunk, src, dst, rows;
    int64_t item;
};

struct hops {
    int64_t n;
    struct hop *hop; /* in order of (chunk, src, dst) once sorted */
};

struct layout {
    const struct moe_traffic *in;
    struct hops across, within;           /* hidden states */
    struct hops back_within, back_across; /* outputs */
    int32_t *n_tokens;                    /* [D] that live there */
    int64_t *received;                    /* [D] distinct rows that experts get */
    int64_t *returned[2];                 /* [D] rows summed for its own tokens: from its node, from others */
    int64_t *route, *first;               /* routes by (device, expert); [D + 1] */
};

/* Stable sort of hop[0..n) by dst, a byte at a time: few at once, which stay in the cache. other: [n]. */
static void sort_by_dst(struct hop *hop, int64_t n, struct hop *other)
{
    struct hop *from = hop, *to = other;
    int32_t differ = 0;
    for (int64_t i = 1; i < n; i++)
        differ |= hop[i].dst ^ hop[0].dst;
    for (int shift = 0; differ >> shift != 0; shift += 8) {
        int64_t at[257] = {0};
        if ((differ >> shift & 255) == 0)
            continue;
        for (int64_t i = 0; i < n; i++)
            at[(from[i].dst >> shift & 255) + 1]++;
        for (int b = 0; b < 256; b++)
            at[b + 1] += at[b];
        for (int64_t i = 0; i < n; i++)
            to[at[from[i].dst >> shift & 255]++] = from[i];
        struct hop *swap = from;
        from = to;
        to = swap;
    }
    if (from != hop)
        memcpy(hop, from, (size_t)n * sizeof *hop);
}

/* Sorts by (chunk, src, dst), stable. *spare: as long; it and h->hop change places. */
static int order(const struct moe_env *env, struct hops *h, int32_t chunks, struct hop **spare)
{
    const int64_t n_devices = env->topology->n_devices, n_keys = chunks * n_devices;
    struct hop *to = *spare, *from = h->hop;
    int64_t *first = env->host->scratch(env, ((size_t)n_keys + 2) * sizeof *first);
    if (first == NULL)
        return MOE_ENOMEM;
    memset(first, 0, ((size_t)n_keys + 2) * sizeof *first);
    for (int64_t i = 0; i < h->n; i++)
        first[from[i].chunk * n_devices + from[i].src + 2]++;
    for (int64_t k = 2; k < n_keys + 2; k++)
        first[k] += first[k - 1];
    for (int64_t i = 0; i < h->n; i++)
        to[first[from[i].chunk * n_devices + from[i].src + 1]++] = from[i];
    for (int64_t k = 0; k < n_keys; k++)
        sort_by_dst(to + first[k], first[k + 1] - first[k], from);
    h->hop = to;
    *spare = from;
    return MOE_OK;
}

static void add(struct hops *h, int32_t chunk, int32_t src, int32_t dst, int32_t rows, int64_t item)
{
    h->hop[h->n++] = (struct hop){chunk, src, dst, rows, item};
}

/* Where a token of `home` enters node `node`: on its own rail. */
static int32_t relay(const struct state *s, int32_t home, int32_t node)
{
    if (s->env->topology->node[home] == node)
        return home;
    int32_t n = s->node_first[node + 1] - s->node_first[node];
    return s->by_node[s->node_first[node] + s->local[home] % n];
}

/* The hops of one token: a row to each node and each device at its first route there, outputs from every route. */
static void hops_of(const struct state *s, struct layout *l, int32_t token, int32_t chunk)
{
    const int32_t *node = s->env->topology->node, *to = l->in->to, home = l->in->device[token];
    const int64_t begin = l->in->routes->offset[token], end = l->in->routes->offset[token + 1];
    for (int64_t i = begin; i < end; i++) {
        if (to[i] < 0)
            continue;
        bool new_device = true, new_node = true;
        for (int64_t j = begin; j < i; j++) {
            new_device &= to[j] != to[i];
            new_node &= to[j] < 0 || node[to[j]] != node[to[i]];
        }
        const int32_t via = relay(s, home, node[to[i]]);
        const bool away = node[to[i]] != node[home];
        if (away && new_node)
            add(&l->across, chunk, home, via, 1, i);
        if (new_device)
            add(&l->within, chunk, via, to[i], 1, i);
        add(&l->back_within, chunk, to[i], via, new_device, i);
        if (away)
            add(&l->back_across, chunk, via, home, new_node, i);
        l->received[to[i]] += new_device;
        l->returned[away][home] += away ? new_node : new_device;
    }
}

/* Routes by (device, expert), for the experts tasks. */
static int sort_routes(const struct moe_env *env, struct layout *l)
{
    const int64_t n = l->in->routes->n;
    const int32_t n_devices = env->topology->n_devices, n_experts = env->model->n_experts;
    int64_t *half = env->host->scratch(env, ((size_t)n + 1) * sizeof *half), n_sent = 0;
    int64_t *count = env->host->scratch(env, ((size_t)n_experts + 1) * sizeof *count);
    l->route = env->host->scratch(env, ((size_t)n + 1) * sizeof *l->route);
    l->first = env->host->scratch(env, ((size_t)n_devices + 2) * sizeof *l->first);
    if (half == NULL || count == NULL || l->route == NULL || l->first == NULL)
        return MOE_ENOMEM;
    memset(count, 0, ((size_t)n_experts + 1) * sizeof *count);
    memset(l->first, 0, ((size_t)n_devices + 2) * sizeof *l->first);
    for (int64_t i = 0; i < n; i++)
        if (l->in->to[i] >= 0) {
            count[l->in->routes->expert[i] + 1]++;
            l->first[l->in->to[i] + 2]++;
        }
    for (int32_t e = 0; e < n_experts; e++)
        count[e + 1] += count[e];
    for (int32_t d = 0; d < n_devices; d++)
        l->first[d + 2] += l->first[d + 1];
    for (int64_t i = 0; i < n; i++)
        if (l->in->to[i] >= 0) {
            half[count[l->in->routes->expert[i]]++] = i;
            n_sent++;
        }
    for (int64_t i = 0; i < n_sent; i++)
        l->route[l->first[l->in->to[half[i]] + 1]++] = half[i];
    return MOE_OK;
}

static int find_hops(const struct state *s, const struct moe_traffic *in, struct layout *l)
{
    const struct moe_env *env = s->env;
    const size_t n = (size_t)in->routes->n + 1, n_devices = (size_t)env->topology->n_devices;
    const int32_t chunks = (int32_t)s->conf->chunks;
    struct hops *const all[] = {&l->across, &l->within, &l->back_within, &l->back_across};
    *l = (struct layout){.in = in, .n_tokens = env->host->scratch(env, n_devices * sizeof *l->n_tokens),
                         .received = env->host->scratch(env, n_devices * sizeof *l->received),
                         .returned = {env->host->scratch(env, n_devices * sizeof(int64_t)),
                                      env->host->scratch(env, n_devices * sizeof(int64_t))}};
    int32_t *seen = env->host->scratch(env, n_devices * sizeof *seen);
    if (l->n_tokens == NULL || l->received == NULL || l->returned[0] == NULL || l->returned[1] == NULL || seen == NULL)
        return MOE_ENOMEM;
    for (int i = 0; i < 4; i++)
        if ((all[i]->hop = env->host->scratch(env, n * sizeof *all[i]->hop)) == NULL)
            return MOE_ENOMEM;
    memset(l->n_tokens, 0, n_devices * sizeof *l->n_tokens);
    memset(l->received, 0, n_devices * sizeof *l->received);
    memset(l->returned[0], 0, n_devices * sizeof(int64_t));
    memset(l->returned[1], 0, n_devices * sizeof(int64_t));
    memset(seen, 0, n_devices * sizeof *seen);
    for (int32_t t = 0; t < in->routes->n_tokens; t++)
        l->n_tokens[in->device[t]]++;
    for (int32_t t = 0; t < in->routes->n_tokens; t++) {
        int32_t home = in->device[t];
        hops_of(s, l, t, (int32_t)((int64_t)seen[home]++ * chunks / l->n_tokens[home]));
    }
    struct hop *spare = env->host->scratch(env, n * sizeof *spare);
    for (int i = 0; i < 4; i++)
        if (spare == NULL || order(env, all[i], chunks, &spare) < 0)
            return MOE_ENOMEM;
    return sort_routes(env, l);
}

/* The hops of one chunk, from *at on, as one exchange: *task, or -1 if there are none. */
static int exchange(const struct state *s, const struct hops *h, int64_t *at, int32_t chunk, bool out, double bytes,
                    int32_t sms, bool fused, struct moe_graph *g, int32_t *task)
{
    const struct moe_env *env = s->env;
    int64_t begin = *at, end = begin, n_parts = 0;
    while (end < h->n && h->hop[end].chunk == chunk)
        end++;
    *at = end;
    *task = -1;
    if (begin == end)
        return MOE_OK;
    struct moe_part *part = env->host->scratch(env, (size_t)(end - begin) * sizeof *part);
    int64_t *item = env->host->scratch(env, (size_t)(end - begin) * sizeof *item);
    if (part == NULL || item == NULL)
        return MOE_ENOMEM;
    for (int64_t i = begin; i < end; i++) {
        const struct hop *p = &h->hop[i];
        if (i == begin || p->src != p[-1].src || p->dst != p[-1].dst)
            part[n_parts++] = (struct moe_part){.src = p->src, .dst = p->dst, .items = item + (i - begin)};
        part[n_parts - 1].bytes += p->rows * bytes;
        part[n_parts - 1].n_items++;
        item[i - begin] = p->item;
    }
    *task = env->host->task_exchange(env, g,
                                     &(struct moe_exchange){.payload = out ? MOE_PAY_HIDDEN : MOE_PAY_OUTPUT,
                                                            .n_parts = (int32_t)n_parts, .part = part,
                                                            .sms = sms, .fused = fused});
    return *task < 0 ? *task : MOE_OK;
}

struct stage { /* one way: two exchanges per chunk */
    int32_t task[2][64]; /* first and second hop of each chunk; -1: nothing travels */
    int32_t start[2];    /* tasks that may start at once: the first of either kind */
    int n_start;
};

/* The chunks of one way, chained: the second hop of each after its first, each kind in order. */
static int lay_way(const struct state *s, const struct hops *const hops[2], bool out, double bytes,
                   struct moe_graph *g, struct stage *w)
{
    const struct moe_env *env = s->env;
    const int32_t all = (int32_t)s->conf->sms, half = hops[0]->n > 0 && hops[1]->n > 0 ? all / 2 : 0;
    const int32_t sms[2] = {all - half, half > 0 ? half : all};
    int64_t at[2] = {0, 0};
    int32_t last[2] = {-1, -1};
    bool running = false;
    *w = (struct stage){.n_start = 0};
    for (int32_t c = 0; c < s->conf->chunks; c++) {
        for (int k = 0; k < 2; k++) {
            int rc = exchange(s, hops[k], &at[k], c, out, bytes, sms[k], running, g, &w->task[k][c]);
            const int32_t x = w->task[k][c];
            if (rc < 0)
                return rc;
            if (x < 0)
                continue;
            running = true;
            if (last[k] >= 0 && env->host->task_after(env, g, x, last[k]) < 0)
                return MOE_EFAIL;
            if (k == 1 && w->task[0][c] >= 0 && env->host->task_after(env, g, x, w->task[0][c]) < 0)
                return MOE_EFAIL;
            if (last[k] < 0 && (k == 0 || w->task[0][c] < 0))
                w->start[w->n_start++] = x;
            last[k] = x;
        }
    }
    return MOE_OK;
}

static int32_t compute(const struct moe_env *env, struct moe_graph *g, enum moe_op op, int32_t device, double flops,
                       double bytes)
{
    return env->host->task_compute(env, g, &(struct moe_work){.device = device, .op = op, .flops = flops,
                                                              .bytes = bytes});
}

/* `task` waits for all that the exchanges bring to a device. */
static int after_arrivals(const struct moe_env *env, struct moe_graph *g, int32_t task, const int32_t *exchange_of,
                          int64_t chunks, int32_t device)
{
    for (int64_t c = 0; c < chunks; c++) {
        if (exchange_of[c] < 0)
            continue;
        int32_t arrival = env->host->task_arrival(env, g, exchange_of[c], device);
        int rc = arrival < 0 ? arrival : env->host->task_after(env, g, task, arrival);
        if (rc < 0)
            return rc;
    }
    return MOE_OK;
}

static int start_after(const struct moe_env *env, struct moe_graph *g, const struct stage *w, int32_t before)
{
    for (int i = 0; i < w->n_start; i++)
        if (env->host->task_after(env, g, w->start[i], before) < 0)
            return MOE_EFAIL;
    return MOE_OK;
}

/* Rows into the order of experts, the experts, and their outputs summed per token; `back` starts after the last. */
static int lay_experts(const struct state *s, const struct layout *l, int32_t device, const struct stage *there,
                       const struct stage *back, struct moe_graph *g)
{
    const struct moe_env *env = s->env;
    const int64_t begin = l->first[device], end = l->first[device + 1];
    if (begin == end)
        return MOE_OK;
    int32_t *expert = env->host->scratch(env, (size_t)(end - begin) * sizeof *expert), n = 0;
    int64_t *rows = env->host->scratch(env, (size_t)(end - begin) * sizeof *rows);
    if (expert == NULL || rows == NULL)
        return MOE_ENOMEM;
    for (int64_t i = begin; i < end; i++) {
        int32_t e = l->in->routes->expert[l->route[i]];
        if (n == 0 || expert[n - 1] != e) {
            expert[n] = e;
            rows[n++] = 0;
        }
        rows[n - 1]++;
    }
    const double all = (double)(end - begin), distinct = (double)l->received[device];
    int32_t permute = compute(env, g, MOE_OP_PERMUTE, device, 0, (all + distinct) * l->in->dispatch_bytes);
    int32_t task = permute < 0 ? permute
                               : env->host->task_experts(env, g,
                                                         &(struct moe_expert_work){.device = device,
                                                                                   .layer = l->in->layer, .n = n,
                                                                                   .expert = expert, .rows = rows,
                                                                                   .items = l->route + begin,
                                                                                   .fraction = 1});
    int32_t reduce = task < 0 ? task : compute(env, g, MOE_OP_COMBINE, device, 2 * all * env->model->d_model,
                                               (all + distinct) * l->in->combine_bytes);
    if (reduce < 0)
        return reduce;
    int rc = after_arrivals(env, g, permute, there->task[1], s->conf->chunks, device);
    if (rc < 0 || (rc = env->host->task_after(env, g, task, permute)) < 0 ||
        (rc = env->host->task_after(env, g, reduce, task)) < 0)
        return rc;
    return start_after(env, g, back, reduce);
}

static int lay_layer(const struct state *s, const struct layout *l, struct moe_graph *g)
{
    const struct moe_env *env = s->env;
    const struct hops *const out[2] = {&l->across, &l->within}, *const in[2] = {&l->back_within, &l->back_across};
    struct stage there, back;
    int rc = lay_way(s, out, true, l->in->dispatch_bytes, g, &there);
    if (rc < 0 || (rc = lay_way(s, in, false, l->in->combine_bytes, g, &back)) < 0)
        return rc;
    for (int32_t d = 0; d < env->topology->n_devices; d++) {
        if (l->n_tokens[d] > 0 && (rc = start_after(env, g, &there, l->in->entry[d])) < 0)
            return rc;
        if ((rc = lay_experts(s, l, d, &there, &back, g)) < 0)
            return rc;
        const double rows = (double)(l->returned[0][d] + l->returned[1][d]);
        if (rows == 0)
            continue;
        /* outputs of other nodes and of its own are added up; the token is written */
        int32_t combine = compute(env, g, MOE_OP_COMBINE, d, rows * env->model->d_model,
                                  (rows + l->n_tokens[d]) * l->in->combine_bytes);
        for (int k = 0; k < 2 && combine >= 0; k++)
            if (l->returned[k][d] > 0 && (rc = after_arrivals(env, g, combine, back.task[k], s->conf->chunks, d)) < 0)
                return rc;
        if (combine < 0)
            return combine;
        l->in->exit[d] = combine;
    }
    return MOE_OK;
}

static int lay_out(void *self, const struct moe_traffic *in, struct moe_graph *g)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    struct layout l;
    for (int32_t t = 0; t < in->routes->n_tokens; t++)
        for (int64_t i = in->routes->offset[t]; i < in->routes->offset[t + 1]; i++)
            if (in->to[i] == MOE_SHARDED)
                return env->host->fail(env, MOE_EUNSUPPORTED, "layer %d: expert %d is sharded; this layout sends each "
                                       "route to one device", in->layer, in->routes->expert[i]);
    for (int32_t d = 0; d < env->topology->n_devices; d++)
        in->exit[d] = in->entry[d];
    if (find_hops(s, in, &l) < 0)
        return MOE_ENOMEM;
    return l.within.n > 0 ? lay_layer(s, &l, g) : MOE_OK;
}

static int init(void *self, const void *conf, const struct moe_env *env)
{
    struct state *s = self;
    const struct moe_topology *t = env->topology;
    s->env = env;
    s->conf = conf;
    s->local = env->host->alloc(env, (size_t)t->n_devices, sizeof *s->local);
    s->by_node = env->host->alloc(env, (size_t)t->n_devices, sizeof *s->by_node);
    s->node_first = env->host->alloc(env, (size_t)t->n_nodes + 2, sizeof *s->node_first);
    if (s->local == NULL || s->by_node == NULL || s->node_first == NULL)
        return MOE_ENOMEM;
    for (int32_t d = 0; d < t->n_devices; d++)
        s->local[d] = s->node_first[t->node[d] + 1]++;
    for (int32_t n = 0; n < t->n_nodes; n++)
        s->node_first[n + 1] += s->node_first[n];
    for (int32_t d = 0; d < t->n_devices; d++)
        s->by_node[s->node_first[t->node[d]] + s->local[d]] = d;
    return MOE_OK;
}

static const struct moe_param params[] = {
    {"chunks", MOE_INT, offsetof(struct conf, chunks), 4, 1, 64, NULL, "", "slices of a batch that follow each other "
     "through network and node"},
    {"sms", MOE_INT, offsetof(struct conf, sms), 24, 0, 1024, NULL, "", "SMs that the kernel takes from computing"},
    MOE_PARAM_END
};

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_DISPATCH,
    .name = "node-dedup",
    .summary = "once per node over the network, passed on over NVLink",
    .source = "DeepEP (C. Zhao et al. 2025), normal kernels; DeepSeek-V3, arXiv 2412.19437",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.dispatch = {.lay_out = lay_out},
};

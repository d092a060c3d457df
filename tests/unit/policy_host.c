/* SPDX-License-Identifier: Apache-2.0
 * policy_host.c - see policy_host.h. */
#include "policy_host.h"

#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct policy_block {
    struct policy_block *next;
    max_align_t data[];
};

static void *must(void *p)
{
    if (p == NULL) {
        fprintf(stderr, "policy_host: out of memory\n");
        abort();
    }
    return p;
}

static void *grow(void *p, int64_t n, int32_t *room, size_t size)
{
    if (n <= *room)
        return p;
    *room = (int32_t)(n * 2 + 16);
    return must(realloc(p, (size_t)*room * size));
}

static void *copy_of(const void *p, size_t bytes)
{
    void *out = must(malloc(bytes + 1));
    if (bytes > 0)
        memcpy(out, p, bytes);
    return out;
}

static struct policy_host *host_of(const struct moe_env *env)
{
    return env->core;
}

/* ---- services ---- */

static int host_fail(const struct moe_env *env, int code, const char *fmt, ...)
{
    struct policy_host *h = host_of(env);
    if (h->n_failures++ == 0) {
        va_list args;
        va_start(args, fmt);
        vsnprintf(h->failure, sizeof h->failure, fmt, args);
        va_end(args);
    }
    return code;
}

static void host_warn(const struct moe_env *env, const char *fmt, ...)
{
    (void)fmt;
    host_of(env)->n_warnings++;
}

static void *take_block(struct policy_block **list, size_t bytes)
{
    struct policy_block *b = must(malloc(sizeof *b + bytes));
    b->next = *list;
    *list = b;
    return b->data;
}

static void free_blocks(struct policy_block **list)
{
    while (*list != NULL) {
        struct policy_block *b = *list;
        *list = b->next;
        free(b);
    }
}

static void *host_alloc(const struct moe_env *env, size_t n, size_t size)
{
    void *p = take_block(&host_of(env)->memory, n * size);
    memset(p, 0, n * size);
    return p;
}

static void *host_scratch(const struct moe_env *env, size_t bytes)
{
    void *p = take_block(&host_of(env)->scratch, bytes);
    memset(p, 0xa5, bytes); /* contents are undefined: let a policy that relies on them fail */
    return p;
}

static int host_routes_reserve(const struct moe_env *env, struct moe_routes *r, int64_t n)
{
    (void)env;
    if (n > r->capacity) {
        r->expert = must(realloc(r->expert, (size_t)n * sizeof *r->expert));
        r->weight = must(realloc(r->weight, (size_t)n * sizeof *r->weight));
        r->capacity = n;
    }
    return MOE_OK;
}

static int host_routes_transpose(const struct moe_env *env, int32_t n_tokens, int32_t n_experts, const int64_t *first,
                                 const int32_t *token, const float *weight, struct moe_routes *out)
{
    host_routes_reserve(env, out, first[n_experts]);
    memset(out->offset, 0, ((size_t)n_tokens + 1) * sizeof *out->offset);
    for (int64_t i = 0; i < first[n_experts]; i++)
        out->offset[token[i] + 1]++;
    for (int32_t t = 0; t < n_tokens; t++)
        out->offset[t + 1] += out->offset[t];
    int64_t *at = copy_of(out->offset, ((size_t)n_tokens + 1) * sizeof *at);
    for (int32_t e = 0; e < n_experts; e++) {
        for (int64_t i = first[e]; i < first[e + 1]; i++) {
            out->expert[at[token[i]]] = e;
            out->weight[at[token[i]]++] = weight[i];
        }
    }
    free(at);
    out->n_tokens = n_tokens;
    out->n = first[n_experts];
    return MOE_OK;
}

/* No policy of this tree leaves experts out; one that does brings the check of what it left. */
static int host_leave_out(const struct moe_env *env, struct moe_placement *out, int32_t layer, int32_t expert,
                          int32_t instead)
{
    (void)out;
    return env->host->fail(env, MOE_EUNSUPPORTED, "leaves out expert %d of layer %d for %d", expert, layer, instead);
}

static int32_t host_n_paths(const struct moe_env *env, int32_t src, int32_t dst)
{
    (void)env, (void)src, (void)dst;
    return 1;
}

static int host_place(const struct moe_env *env, struct moe_placement *out, int32_t layer, int32_t expert,
                      int32_t device, float fraction)
{
    struct policy_placement *p = (struct policy_placement *)out;
    if (layer < 0 || layer >= env->model->n_layers || expert < 0 || expert >= moe_experts_of(env->model, layer) ||
        device < 0 || device >= env->topology->n_devices || !(fraction > 0 && fraction <= 1))
        return host_fail(env, MOE_EINVAL, "placed layer %d expert %d on device %d, fraction %g", layer, expert, device,
                         (double)fraction);
    p->replica = grow(p->replica, p->view.n + 1, &p->room, sizeof *p->replica);
    p->replica[p->view.n++] = (struct moe_replica){layer, expert, device, fraction};
    return MOE_OK;
}

static double host_bandwidth(const struct moe_env *env, int32_t src, int32_t dst)
{
    return env->topology->node[src] == env->topology->node[dst] ? 450e9 : 50e9;
}

static double host_latency(const struct moe_env *env, int32_t src, int32_t dst)
{
    return env->topology->node[src] == env->topology->node[dst] ? 1e-6 : 5e-6;
}

static int32_t add_task(struct moe_graph *g, struct policy_task task)
{
    g->task = grow(g->task, g->n + 1, &g->room, sizeof *g->task);
    g->task[g->n] = task;
    return g->n++;
}

static int32_t host_compute(const struct moe_env *env, struct moe_graph *g, const struct moe_work *work)
{
    if (work->device < 0 || work->device >= env->topology->n_devices || !(work->flops >= 0) || !(work->bytes >= 0))
        return host_fail(env, MOE_EINVAL, "compute task on device %d: %g FLOPs, %g bytes", work->device, work->flops,
                         work->bytes);
    return add_task(g, (struct policy_task){.kind = TASK_COMPUTE, .work = *work, .device = work->device});
}

static int32_t host_experts(const struct moe_env *env, struct moe_graph *g, const struct moe_expert_work *work)
{
    int64_t rows = 0;
    if (work->device < 0 || work->device >= env->topology->n_devices || work->n < 0)
        return host_fail(env, MOE_EINVAL, "experts task of %d on device %d", work->n, work->device);
    for (int32_t i = 0; i < work->n; i++)
        rows += work->rows[i];
    struct policy_task task = {.kind = TASK_EXPERTS, .experts = *work, .device = work->device};
    task.experts.expert = copy_of(work->expert, (size_t)work->n * sizeof *work->expert);
    task.experts.rows = copy_of(work->rows, (size_t)work->n * sizeof *work->rows);
    if (work->items != NULL)
        task.experts.items = copy_of(work->items, (size_t)rows * sizeof *work->items);
    return add_task(g, task);
}

static int32_t host_exchange(const struct moe_env *env, struct moe_graph *g, const struct moe_exchange *x)
{
    struct moe_part *part = copy_of(x->part, (size_t)x->n_parts * sizeof *part);
    for (int32_t i = 0; i < x->n_parts; i++) {
        if (part[i].src < 0 || part[i].src >= env->topology->n_devices || part[i].dst < 0 ||
            part[i].dst >= env->topology->n_devices || !(part[i].bytes >= 0))
            host_fail(env, MOE_EINVAL, "exchange part %d: %d to %d, %g bytes", i, part[i].src, part[i].dst,
                      part[i].bytes);
        if (part[i].items != NULL)
            part[i].items = copy_of(part[i].items, (size_t)part[i].n_items * sizeof *part[i].items);
    }
    struct policy_task task = {.kind = TASK_EXCHANGE, .exchange = *x, .device = -1};
    task.exchange.part = part;
    return add_task(g, task);
}

static int32_t host_arrival(const struct moe_env *env, struct moe_graph *g, int32_t exchange, int32_t device)
{
    if (exchange < 0 || exchange >= g->n || g->task[exchange].kind != TASK_EXCHANGE || device < 0 ||
        device >= env->topology->n_devices)
        return host_fail(env, MOE_EINVAL, "arrival of task %d on device %d", exchange, device);
    return add_task(g, (struct policy_task){.kind = TASK_ARRIVAL, .of = exchange, .device = device});
}

static int host_after(const struct moe_env *env, struct moe_graph *g, int32_t task, int32_t before)
{
    if (task < 0 || task >= g->n || before < 0 || before >= g->n || task == before)
        return host_fail(env, MOE_EINVAL, "task %d after task %d of %d", task, before, g->n);
    g->edge = grow(g->edge, g->n_edges + 1, &g->edge_room, sizeof *g->edge);
    g->edge[g->n_edges++] = (struct policy_edge){task, before};
    return MOE_OK;
}

static struct moe_graph *host_graph_try(const struct moe_env *env)
{
    struct moe_graph *g = must(calloc(1, sizeof *g));
    g->next = host_of(env)->tries;
    host_of(env)->tries = g;
    for (int32_t d = 0; d < env->topology->n_devices; d++) /* after which device d's tokens are ready */
        add_task(g, (struct policy_task){.kind = TASK_COMPUTE, .device = d});
    return g;
}

static int host_estimate(const struct moe_env *env, struct moe_graph *g, double *seconds)
{
    (void)env;
    *seconds = 0; /* any deterministic opinion will do: a microsecond per task, and the bytes at 50 GB/s */
    for (int32_t i = 0; i < g->n; i++) {
        *seconds += 1e-6;
        for (int32_t p = 0; g->task[i].kind == TASK_EXCHANGE && p < g->task[i].exchange.n_parts; p++)
            *seconds += g->task[i].exchange.part[p].bytes / 50e9;
    }
    return MOE_OK;
}

/* ---- a run ---- */

void policy_host_open(struct policy_host *h, const struct policy_shape *shape)
{
    int32_t n = shape->n_devices;
    memset(h, 0, sizeof *h);
    h->host = (struct moe_host){
        .abi = MOE_ABI, .size = sizeof h->host, .fail = host_fail, .warn = host_warn, .alloc = host_alloc,
        .scratch = host_scratch, .routes_reserve = host_routes_reserve, .routes_transpose = host_routes_transpose,
        .place = host_place, .leave_out = host_leave_out, .bandwidth = host_bandwidth, .latency = host_latency,
        .n_paths = host_n_paths, .task_compute = host_compute,
        .task_experts = host_experts, .task_exchange = host_exchange, .task_arrival = host_arrival,
        .task_after = host_after, .graph_try = host_graph_try, .estimate = host_estimate,
    };
    h->model = (struct moe_model){
        .n_layers = shape->n_layers, .n_experts = shape->n_experts, .top_k = shape->top_k, .d_model = 64,
        .d_expert = 32, .weight_bytes = 2, .act_bytes = 2, .combine_bytes = 2,
    };
    h->node = must(calloc((size_t)n, sizeof *h->node));
    h->figures = must(calloc((size_t)n * 5, sizeof *h->figures));
    for (int32_t d = 0; d < n; d++) {
        h->node[d] = d / (n / shape->n_nodes);
        h->figures[d] = 80e9;
        h->figures[n + d] = 1e15;
        h->figures[2 * n + d] = 3.35e12;
        h->figures[3 * n + d] = 64e9;
        h->figures[4 * n + d] = 60e9;
    }
    h->topology = (struct moe_topology){
        .n_devices = n, .n_nodes = shape->n_nodes, .node = h->node, .memory = h->figures, .flops = h->figures + n,
        .mem_bandwidth = h->figures + 2 * n, .host_bandwidth = h->figures + 3 * n,
        .expert_room = h->figures + 4 * n,
    };
    h->env = (struct moe_env){
        .host = &h->host, .model = &h->model, .topology = &h->topology, .seed = shape->seed,
        .n_objects = (uint32_t)(shape->n_layers * shape->n_experts), .cache_objects = shape->cache_objects, .core = h,
    };
}

void policy_host_end_hook(struct policy_host *h)
{
    free_blocks(&h->scratch);
    while (h->tries != NULL) {
        struct moe_graph *g = h->tries;
        h->tries = g->next;
        policy_graph_free(g);
        free(g);
    }
}

void policy_host_close(struct policy_host *h)
{
    policy_host_end_hook(h);
    free_blocks(&h->memory);
    free(h->node);
    free(h->figures);
}

/* ---- plugins ---- */

const struct moe_plugin *policy_load(const char *path, char why[512])
{
    void *dl = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    const struct moe_plugin *plugin = dl != NULL ? dlsym(dl, "moe_plugin") : NULL;
    if (plugin == NULL)
        snprintf(why, 512, "%s", dlerror());
    else if (plugin->abi != MOE_ABI || plugin->size != sizeof *plugin) {
        snprintf(why, 512, "%s: built for ABI %u, size %u; expected %u, %zu", path, plugin->abi, plugin->size, MOE_ABI,
                 sizeof *plugin);
        plugin = NULL;
    }
    return plugin;
}

const struct moe_plugin *policy_find(const char *kind, const char *name)
{
    const char *dir = getenv("MOELAB_PLUGIN_PATH");
    char path[1024], why[512] = "";
    for (dir = dir != NULL ? dir : "plugins"; *dir != '\0';) {
        size_t n = strcspn(dir, ":");
        snprintf(path, sizeof path, "%.*s/%s/%s.so", (int)n, dir, kind, name);
        FILE *there = fopen(path, "rb");
        if (there != NULL) {
            fclose(there);
            const struct moe_plugin *plugin = policy_load(path, why);
            if (plugin == NULL)
                fprintf(stderr, "%s\n", why);
            return plugin;
        }
        dir += n + (dir[n] == ':');
    }
    return NULL;
}

static int32_t choice_of(const char *choices, const char *value)
{
    size_t n = strlen(value);
    for (int32_t i = 0; choices != NULL; i++) {
        if (strncmp(choices, value, n) == 0 && (choices[n] == '|' || choices[n] == '\0'))
            return i;
        choices = strchr(choices, '|');
        choices += choices != NULL;
    }
    return -1;
}

static void set_param(const struct policy_host *h, void *conf, const struct moe_param *p, const char *value)
{
    char *field = (char *)conf + p->offset;
    double number = value != NULL ? strtod(value, NULL) : p->def;
    if (p->type == MOE_INT)
        *(int64_t *)(void *)field = (int64_t)number;
    else if (p->type == MOE_REAL)
        *(double *)(void *)field = number;
    else if (p->type == MOE_BOOL)
        *(bool *)(void *)field = value != NULL ? strcmp(value, "true") == 0 : p->def != 0;
    else if (p->type == MOE_ENUM)
        *(int32_t *)(void *)field = value != NULL ? choice_of(p->def_text, value) : (int32_t)p->def;
    else if (p->type == MOE_STRING)
        *(const char **)(void *)field = p->def_text;
    else if (p->type == MOE_TENSOR && value != NULL && *value == '#' && strtol(value + 1, NULL, 10) < h->n_tensors)
        *(struct moe_tensor *)(void *)field = h->tensor[strtol(value + 1, NULL, 10)];
}

int policy_start(struct policy *policy, struct policy_host *h, const struct moe_plugin *plugin, const char *settings)
{
    char text[256];
    policy->plugin = plugin;
    policy->host = h;
    policy->conf = must(calloc(1, plugin->conf_size + 1));
    policy->state = must(calloc(1, plugin->state_size + 1));
    for (const struct moe_param *p = plugin->params; p != NULL && p->name != NULL; p++)
        set_param(h, policy->conf, p, NULL);
    snprintf(text, sizeof text, "%s", settings != NULL ? settings : "");
    for (char *next = text, *word; (word = strsep(&next, " ")) != NULL;) {
        char *value = strchr(word, '=');
        const struct moe_param *p = plugin->params;
        if (value == NULL)
            continue;
        *value++ = '\0';
        while (p != NULL && p->name != NULL && strcmp(p->name, word) != 0)
            p++;
        if (p == NULL || p->name == NULL)
            return host_fail(&h->env, MOE_EINVAL, "%s has no parameter %s", plugin->name, word);
        set_param(h, policy->conf, p, value);
    }
    int rc = plugin->init != NULL ? plugin->init(policy->state, policy->conf, &h->env) : MOE_OK;
    policy_host_end_hook(h);
    return rc;
}

void policy_stop(struct policy *policy)
{
    if (policy->plugin->fini != NULL)
        policy->plugin->fini(policy->state);
    free(policy->conf);
    free(policy->state);
}

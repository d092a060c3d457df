/* SPDX-License-Identifier: Apache-2.0
 * policy.c - life of a policy, and the services behind struct moe_host. */
#include "config.h"

#include "exchange.h"
#include "memory.h"
#include "policy.h"
#include "registry.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static volatile struct policy_note *note;

/* ---- arenas ---- */

struct arena_block { struct arena_block *next; size_t used, room; _Alignas(16) unsigned char data[]; };

void *arena_take(struct arena *a, size_t bytes)
{
    if (bytes > SIZE_MAX / 4)
        return NULL;
    bytes = (bytes + 15) & ~(size_t)15;
    while (a->current && a->current->room - a->current->used < bytes) {
        if (!a->current->next)
            break;
        a->current = a->current->next;
        a->current->used = 0;
    }
    if (!a->current || a->current->room - a->current->used < bytes) {
        size_t room = a->current ? 2 * a->current->room : 4096;
        if (room < bytes)
            room = bytes;
        struct arena_block *b = memory_large(malloc(sizeof *b + room), sizeof *b + room);
        if (!b)
            return NULL;
        b->next = NULL;
        b->used = 0;
        b->room = room;
        if (a->current)
            a->current->next = b;
        else
            a->first = b;
        a->current = b;
    }
    void *p = a->current->data + a->current->used;
    a->current->used += bytes;
    return p;
}

void arena_reset(struct arena *a)
{
    a->current = a->first;
    if (a->first)
        a->first->used = 0;
}

void arena_free(struct arena *a)
{
    for (struct arena_block *b = a->first, *next; b; b = next) {
        next = b->next;
        free(b);
    }
    a->first = a->current = NULL;
}

/* ---- services ---- */

static struct policy *of_env(const struct moe_env *env)
{
    return env->core;
}

static struct err *err_of(const struct moe_env *env)
{
    return of_env(env)->context->err;
}

static int host_fail(const struct moe_env *env, int code, const char *fmt, ...)
{
    char text[800];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    const struct policy *p = of_env(env);
    err_set(p->context->err, ERR_RUN, "%s %s: %s", kind_name[p->plugin->kind], p->plugin->name, text);
    return code < 0 ? code : MOE_EFAIL;
}

static void host_warn(const struct moe_env *env, const char *fmt, ...)
{
    char text[800];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    const struct policy *p = of_env(env);
    fprintf(stderr, "moelab: warning: %s %s: %s\n", kind_name[p->plugin->kind], p->plugin->name, text);
}

static void *host_alloc(const struct moe_env *env, size_t n, size_t size)
{
    size_t bytes;
    void *p = NULL;
    if (!__builtin_mul_overflow(n, size, &bytes))
        p = arena_take(&of_env(env)->run, bytes);
    if (!p)
        host_fail(env, MOE_ENOMEM, "out of memory for %zu x %zu bytes", n, size);
    else
        memset(p, 0, bytes);
    return p;
}

static void *host_scratch(const struct moe_env *env, size_t bytes)
{
    void *p = arena_take(&of_env(env)->scratch, bytes);
    if (!p)
        host_fail(env, MOE_ENOMEM, "out of memory for %zu bytes", bytes);
    return p;
}

static int host_routes_reserve(const struct moe_env *env, struct moe_routes *out, int64_t n)
{
    return routes_reserve(out, n, err_of(env)) < 0 ? MOE_ENOMEM : 0;
}

static int host_routes_transpose(const struct moe_env *env, int32_t n_tokens, int32_t n_experts,
                                 const int64_t *first, const int32_t *token, const float *weight,
                                 struct moe_routes *out)
{
    int64_t n = first[n_experts];
    if (n_tokens != out->n_tokens)
        return host_fail(env, MOE_EINVAL, "picks of %d tokens, expected %d", n_tokens, out->n_tokens);
    for (int32_t e = 0; e < n_experts; e++)
        if (first[0] != 0 || first[e] > first[e + 1])
            return host_fail(env, MOE_EINVAL, "picks of expert %d run from %lld to %lld", e, (long long)first[e],
                             (long long)first[e + 1]);
    if (routes_reserve(out, n, err_of(env)) < 0)
        return MOE_ENOMEM;
    memset(out->offset, 0, sizeof *out->offset * ((size_t)n_tokens + 1));
    for (int64_t i = 0; i < n; i++) {
        if (token[i] < 0 || token[i] >= n_tokens)
            return host_fail(env, MOE_EINVAL, "pick %lld is token %d, expected 0 to %d", (long long)i, token[i],
                             n_tokens - 1);
        out->offset[token[i] + 1]++;
    }
    for (int32_t t = 0; t < n_tokens; t++)
        out->offset[t + 1] += out->offset[t];
    /* offset[t] walks through token t's routes and ends at offset[t + 1]; moved back one place afterwards. */
    for (int32_t e = 0; e < n_experts; e++)
        for (int64_t i = first[e]; i < first[e + 1]; i++) {
            int64_t at = out->offset[token[i]]++;
            out->expert[at] = e;
            out->weight[at] = weight[i];
        }
    memmove(out->offset + 1, out->offset, sizeof *out->offset * (size_t)n_tokens);
    out->offset[0] = 0;
    out->n = n;
    return 0;
}

static int host_place(const struct moe_env *env, struct moe_placement *view, int32_t layer, int32_t expert,
                      int32_t device, float fraction)
{
    struct placement *p = (struct placement *)view;
    const struct moe_model *m = env->model;
    if (layer < 0 || layer >= m->n_layers)
        return host_fail(env, MOE_EINVAL, "placed in layer %d, expected 0 to %d", layer, m->n_layers - 1);
    if (expert < 0 || expert >= moe_experts_of(m, layer))
        return host_fail(env, MOE_EINVAL, "layer %d: placed expert %d, expected 0 to %d", layer, expert,
                         moe_experts_of(m, layer) - 1);
    if (device < 0 || device >= env->topology->n_devices)
        return host_fail(env, MOE_EINVAL, "layer %d, expert %d: placed on device %d, expected 0 to %d", layer, expert,
                         device, env->topology->n_devices - 1);
    if (!(fraction > 0 && fraction <= 1))
        return host_fail(env, MOE_EINVAL, "layer %d, expert %d: fraction %g, expected within (0, 1]", layer, expert,
                         (double)fraction);
    if (view->n == p->room) {
        int32_t room = p->room ? 2 * p->room : 1024;
        struct moe_replica *grown = realloc(p->replica, sizeof *grown * (size_t)room);
        if (!grown)
            return host_fail(env, MOE_ENOMEM, "out of memory for the placement");
        p->replica = grown;
        p->room = room;
    }
    p->replica[view->n++] = (struct moe_replica){ layer, expert, device, fraction };
    view->replica = p->replica;
    return 0;
}

static int host_leave_out(const struct moe_env *env, struct moe_placement *view, int32_t layer, int32_t expert,
                          int32_t instead)
{
    struct placement *p = (struct placement *)view;
    const struct moe_model *m = env->model;
    if (layer < 0 || layer >= m->n_layers || expert < 0 || expert >= moe_experts_of(m, layer))
        return host_fail(env, MOE_EINVAL, "left out expert %d of layer %d, expected 0 to %d of 0 to %d", expert, layer,
                         m->n_experts - 1, m->n_layers - 1);
    if (instead < -1 || instead >= moe_experts_of(m, layer) || instead == expert)
        return host_fail(env, MOE_EINVAL, "layer %d: left out expert %d for %d, expected another or -1", layer, expert,
                         instead);
    if (!p->instead) {
        const int32_t n = m->n_layers * m->n_experts;
        p->instead = malloc(sizeof *p->instead * (size_t)n);
        if (!p->instead)
            return host_fail(env, MOE_ENOMEM, "out of memory for the placement");
        for (int32_t i = 0; i < n; i++)
            p->instead[i] = i % m->n_experts;
    }
    p->instead[layer * m->n_experts + expert] = instead;
    return 0;
}

/* The topology's number of a device as the policy counts them. */
static int32_t device_of(const struct moe_env *env, int32_t device)
{
    const int32_t stride = of_env(env)->context->stride;
    return stride > 1 ? device * stride : device;
}

static double host_bandwidth(const struct moe_env *env, int32_t src, int32_t dst)
{
    const struct topology *t = of_env(env)->context->topology;
    int32_t link[TOPOLOGY_MAX_HOPS];
    int n = topology_route(t, device_of(env, src), device_of(env, dst), 0, link, NULL);
    double least = INFINITY;
    for (int i = 0; i < n; i++)
        least = fmin(least, t->link[link[i]].bandwidth);
    return n < 0 ? 0 : least;
}

static double host_latency(const struct moe_env *env, int32_t src, int32_t dst)
{
    int32_t link[TOPOLOGY_MAX_HOPS];
    double latency = 0;
    const struct topology *t = of_env(env)->context->topology;
    return topology_route(t, device_of(env, src), device_of(env, dst), 0, link, &latency) < 0 ? INFINITY : latency;
}

static int32_t host_n_paths(const struct moe_env *env, int32_t src, int32_t dst)
{
    return topology_paths(of_env(env)->context->topology, device_of(env, src), device_of(env, dst));
}

/* Runs a builder of the graph; what it refuses is this policy's fault, and says so. */
#define BUILD(env, call)                                                                                              \
    do {                                                                                                              \
        struct err *err_ = err_of(env);                                                                               \
        const int before_ = err_->code;                                                                               \
        const int32_t id_ = (call);                                                                                   \
        if (id_ < 0 && !before_)                                                                                      \
            err_prefix(err_, "%s %s", kind_name[of_env(env)->plugin->kind], of_env(env)->plugin->name);               \
        return id_ >= 0 ? id_ : MOE_EINVAL;                                                                           \
    } while (0)

static int32_t host_task_compute(const struct moe_env *env, struct moe_graph *g, const struct moe_work *w)
{
    BUILD(env, graph_compute(g, w, err_));
}

static int32_t host_task_experts(const struct moe_env *env, struct moe_graph *g, const struct moe_expert_work *w)
{
    if (g == &of_env(env)->trial && w->layer >= 0 && w->layer < env->model->n_layers)
        g->layer = w->layer; /* of any layer, even of several */
    BUILD(env, graph_experts(g, w, err_));
}

static int32_t build_exchange(const struct moe_env *env, struct moe_graph *g, const struct moe_exchange *x,
                              struct err *e)
{
    const struct policy_context *c = of_env(env)->context;
    const int32_t task = c->tally && g != &of_env(env)->trial ? tally_exchange(c->tally, g, x, e)
                                                              : graph_exchange(g, x, e);
    for (int32_t i = 0; task >= 0 && g->names_paths && i < x->n_parts; i++) {
        const struct moe_part *p = &x->part[i];
        const int32_t n_paths = p->path > 1 ? topology_paths(c->topology, p->src, p->dst) : 0;
        if (p->path > 1 && p->path > n_paths)
            return err_set(e, ERR_RUN, "exchange from %d to %d on path %d, expected 0 to %d", p->src, p->dst, p->path,
                           n_paths);
    }
    return task;
}

static int32_t host_task_exchange(const struct moe_env *env, struct moe_graph *g, const struct moe_exchange *x)
{
    BUILD(env, build_exchange(env, g, x, err_));
}

static int32_t host_task_arrival(const struct moe_env *env, struct moe_graph *g, int32_t exchange, int32_t device)
{
    BUILD(env, graph_arrival(g, exchange, device, err_));
}

static int host_task_after(const struct moe_env *env, struct moe_graph *g, int32_t task, int32_t before)
{
    BUILD(env, graph_after(g, task, before, err_));
}

static struct moe_graph *host_graph_try(const struct moe_env *env)
{
    struct policy *p = of_env(env);
    graph_reset(&p->trial);
    p->trial.n_devices = env->topology->n_devices;
    for (int32_t d = 0; d < p->trial.n_devices; d++) /* what entry[d] is in the layer's graph */
        if (graph_join(&p->trial, err_of(env)) < 0)
            return NULL;
    return &p->trial;
}

static int host_estimate(const struct moe_env *env, struct moe_graph *g, double *seconds)
{
    struct policy_context *c = of_env(env)->context;
    struct machine *m = c->machine;
    if (!m || (strcmp(m->ops->name, "flow") && strcmp(m->ops->name, "simgrid")) ||
        c->view.n_devices != c->topology->n_devices) /* one group's placement: others' traffic is not in its graph */
        return MOE_EUNSUPPORTED; /* an answer: a policy may go on without */
    struct machine trial;
    if (machine_open_sim(&trial, c->topology, c->model, m->precision, NET_FLOW, c->err) < 0)
        return MOE_EFAIL;
    const bool changes = c->topology->n_changes > 0 || c->topology->n_slow > 0;
    const double from = trial.now = changes ? m->now : 0; /* on the machine as it is now */
    int code = machine_run(&trial, g, c->err);
    *seconds = trial.now - from;
    machine_close(&trial);
    return code < 0 ? MOE_EFAIL : 0;
}

static const struct moe_host host = {
    .abi = MOE_ABI, .size = sizeof(struct moe_host),
    .fail = host_fail, .warn = host_warn, .alloc = host_alloc, .scratch = host_scratch,
    .routes_reserve = host_routes_reserve, .routes_transpose = host_routes_transpose, .place = host_place,
    .leave_out = host_leave_out, .bandwidth = host_bandwidth, .latency = host_latency, .n_paths = host_n_paths,
    .task_compute = host_task_compute, .task_experts = host_task_experts, .task_exchange = host_task_exchange,
    .task_arrival = host_task_arrival, .task_after = host_task_after,
    .graph_try = host_graph_try, .estimate = host_estimate,
};

/* ---- contexts and policies ---- */

int policy_context_init(struct policy_context *c, const struct moe_model *model, const struct topology *t,
                        enum precision precision, double fixed_bytes, uint64_t seed, struct err *e)
{
    memset(c, 0, sizeof *c);
    c->model = model;
    c->topology = t;
    c->seed = seed;
    c->err = e;
    c->n_objects = (uint32_t)model->n_layers * (uint32_t)model->n_experts;
    c->cache_objects = c->n_objects;
    size_t n = (size_t)t->n_devices;
    int32_t *node = malloc(sizeof *node * n);
    double *figures = malloc(sizeof *figures * n * 5);
    if (!node || !figures) {
        free(node);
        free(figures);
        return err_set(e, ERR_MEMORY, "out of memory");
    }
    for (int32_t d = 0; d < t->n_devices; d++) {
        int32_t link[TOPOLOGY_MAX_HOPS];
        node[d] = t->node[d];
        figures[d] = t->device[d].memory;
        figures[n + (size_t)d] = t->device[d].peak[precision];
        figures[2 * n + (size_t)d] = t->device[d].mem_bandwidth;
        double least = INFINITY;
        int hops = topology_route(t, topology_host(t, node[d]), d, 0, link, NULL);
        for (int i = 0; i < hops; i++)
            least = fmin(least, t->link[link[i]].bandwidth);
        figures[3 * n + (size_t)d] = hops > 0 ? least : 0;
        figures[4 * n + (size_t)d] = fmax(0, ROOM_SHARE * t->device[d].memory - fixed_bytes);
    }
    c->view = (struct moe_topology){ .n_devices = t->n_devices, .n_nodes = t->n_nodes, .node = node, .memory = figures,
                                     .flops = figures + n, .mem_bandwidth = figures + 2 * n,
                                     .host_bandwidth = figures + 3 * n, .expert_room = figures + 4 * n };
    return 0;
}

void policy_context_free(struct policy_context *c)
{
    free((void *)(uintptr_t)c->view.node);
    free((void *)(uintptr_t)c->view.memory);
    memset(c, 0, sizeof *c);
}

/* Runs of one seed give different policies different streams. */
static uint64_t seed_for(uint64_t seed, const struct moe_plugin *p)
{
    uint64_t h = UINT64_C(0xcbf29ce484222325) ^ (uint64_t)p->kind;
    for (const char *c = p->name; *c; c++)
        h = (h ^ (unsigned char)*c) * UINT64_C(0x100000001b3);
    return moe_mix(seed ^ moe_mix(h));
}

/* Sizes that a tensor declares and the model or a number fixes; H is the gate's own width, which the model of a run
 * need not share with the network whose routing it replays. */
static int check_tensors(const struct policy *p, const char *who, struct err *e)
{
    const struct moe_model *m = p->context->model;
    for (const struct moe_param *q = p->plugin->params; q && q->name; q++) {
        if (q->type != MOE_TENSOR)
            continue;
        const struct moe_tensor *x = (const void *)((const char *)p->params.conf + q->offset);
        const char *letter = q->def_text;
        for (int32_t i = 0; x->data && i < x->n_dims; i++, letter += strcspn(letter, ",") + 1) {
            int64_t size = *letter == 'L' ? m->n_layers : *letter == 'E' ? m->n_experts : *letter == 'K' ? m->top_k
                         : strtoll(letter, NULL, 10);
            if (size > 0 && x->shape[i] != size)
                return err_set(e, ERR_INPUT, "%s: %s: dimension %d is %lld, expected %lld ([%s])", who, q->name, i,
                               (long long)x->shape[i], (long long)size, q->def_text);
        }
    }
    return 0;
}

int policy_open(struct policy *p, struct policy_context *c, const struct moe_plugin *plugin, const json_t *params,
                const char *who, struct err *e)
{
    memset(p, 0, sizeof *p);
    p->plugin = plugin;
    p->context = c;
    if (param_fill(&p->params, plugin, params, who, e) < 0 || check_tensors(p, who, e) < 0)
        return e->code;
    p->env = (struct moe_env){ .host = &host, .model = c->model, .topology = &c->view,
                               .seed = seed_for(c->seed, plugin), .n_objects = c->n_objects,
                               .cache_objects = c->cache_objects,
                               .cache_bytes = (double)c->cache_objects * moe_expert_bytes(c->model), .core = p };
    p->self = calloc(1, plugin->state_size ? plugin->state_size : 1);
    if (!p->self)
        return err_set(e, ERR_MEMORY, "out of memory for %s", plugin->name);
    if (plugin->init) {
        policy_enter(p, "init");
        policy_leave(p, "init", plugin->init(p->self, p->params.conf, &p->env));
    }
    if (e->code) {
        free(p->self);
        p->self = NULL; /* fini is not owed to a policy whose init failed */
    }
    return e->code;
}

void policy_close(struct policy *p)
{
    if (p->self && p->plugin->fini) {
        policy_enter(p, "fini");
        p->plugin->fini(p->self);
        if (note)
            note->hook[0] = '\0';
    }
    free(p->self);
    param_free(&p->params);
    arena_free(&p->run);
    arena_free(&p->scratch);
    graph_free(&p->trial);
    memset(p, 0, sizeof *p);
}

void policy_note_to(volatile struct policy_note *n)
{
    note = n;
}

static void note_text(volatile char *to, size_t room, const char *from)
{
    size_t i = 0;
    for (; i + 1 < room && from[i]; i++)
        to[i] = from[i];
    to[i] = '\0';
}

void policy_enter(struct policy *p, const char *hook)
{
    arena_reset(&p->scratch);
    if (note) {
        note_text(note->kind, sizeof note->kind, kind_name[p->plugin->kind]);
        note_text(note->name, sizeof note->name, p->plugin->name);
        note_text(note->hook, sizeof note->hook, hook);
    }
}

int policy_leave(struct policy *p, const char *hook, int code)
{
    if (note)
        note->hook[0] = '\0';
    if (code < 0)
        err_set(p->context->err, ERR_RUN, "%s %s: %s returned %d without saying why", kind_name[p->plugin->kind],
                p->plugin->name, hook, code);
    if (code > 0)
        err_set(p->context->err, ERR_RUN, "%s %s: %s returned %d, expected 0 or a negative error",
                kind_name[p->plugin->kind], p->plugin->name, hook, code);
    return p->context->err->code;
}

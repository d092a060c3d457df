/* SPDX-License-Identifier: Apache-2.0
 * offload_stage.c - which experts are resident, and what a layer waits for when they are not.
 *
 * Dispatch lays out one experts task per device as if everything were there. Here each is split: experts that are
 * resident compute at once, the others when their weights have arrived. A load starts as soon as the layer's experts
 * are known (every device's gate has spoken) and the slot it goes to is free: after the last task of this step that
 * used the expert it replaces. Loads of one device queue behind each other on its copy stream. */
#include "config.h"

#include "run.h"

#include <stdlib.h>
#include <string.h>

int offload_open(struct run *r)
{
    size_t n_devices = (size_t)r->topology->n_devices, n_objects = r->context.n_objects;
    r->offloading = r->offload.plugin->ops.offload.insert != NULL;
    if (!r->offloading && r->cache_share > 0)
        return err_set(r->err, ERR_INPUT, "%s: cache: offload %s keeps every expert resident and has none", r->where,
                       r->offload.plugin->name);
    if (!r->offloading)
        return 0;
    int32_t link[TOPOLOGY_MAX_HOPS];
    if (!r->graph.keep_items && /* machines that really compute say themselves what they cannot do */
        topology_route(r->topology, topology_host(r->topology, 0), 0, 0, link, NULL) < 0)
        return err_set(r->err, ERR_INPUT, "%s: offload %s: machine %s has no way from host memory to its devices "
                       "(pcie and host in its file)", r->where, r->offload.plugin->name, r->topology->name);
    r->cache = calloc(n_devices, sizeof *r->cache);
    r->sequence = calloc(n_devices, sizeof *r->sequence);
    r->last_use = malloc(sizeof *r->last_use * n_devices * n_objects);
    if (!r->cache || !r->sequence || !r->last_use)
        return err_set(r->err, ERR_MEMORY, "out of memory for %zu caches", n_devices);
    for (size_t d = 0; d < n_devices; d++)
        if (cache_open(&r->cache[d], &r->offload, (int32_t)d, r->context.cache_objects, true, r->err) < 0)
            return r->err->code;
    return 0;
}

void offload_close(struct run *r)
{
    for (int32_t d = 0; r->topology && d < r->topology->n_devices; d++) {
        if (r->cache)
            cache_close(&r->cache[d]);
        if (r->sequence) {
            free(r->sequence[d].key);
            free(r->sequence[d].next);
        }
    }
    free(r->cache);
    free(r->sequence);
    free(r->last_use);
    r->cache = NULL;
    r->sequence = NULL;
    r->last_use = NULL;
}

int offload_restart(struct run *r)
{
    for (int32_t d = 0; d < r->topology->n_devices; d++) {
        struct sequence *s = &r->sequence[d];
        free(s->next);
        s->next = malloc(sizeof *s->next * (size_t)(s->n + 1));
        if (!s->next)
            return err_set(r->err, ERR_MEMORY, "out of memory for %lld accesses", (long long)s->n);
        if (cache_next_use(s->key, s->n, r->context.n_objects, s->next, r->err) < 0)
            return r->err->code;
        s->at = 0;
    }
    return 0;
}

static int record(struct run *r, struct sequence *s, uint32_t object)
{
    if (s->n == s->room) {
        int64_t room = s->room ? 2 * s->room : 1024;
        uint32_t *key = realloc(s->key, sizeof *key * (size_t)room);
        if (!key)
            return err_set(r->err, ERR_MEMORY, "out of memory for recorded accesses");
        s->key = key;
        s->room = room;
    }
    s->key[s->n++] = object;
    return 0;
}

/* What splitting a layer's experts tasks needs: what comes before each, fixed once dispatch has returned. */
struct split {
    int32_t first_task;
    int32_t *first;  /* [tasks + 1] into before */
    int32_t *before;
    int32_t known;   /* task after which the layer's routes are known everywhere; -1: not made yet */
    struct served { double weight; int64_t rows; } *served; /* [D*E] gate weights of the rows an expert gets */
};

/* What each device's experts are asked for, by the gate: one pass over the layer's routes. */
static int weigh(struct run *r, struct split *s)
{
    const size_t n_experts = (size_t)r->model.n_experts;
    s->served = calloc((size_t)r->topology->n_devices * n_experts, sizeof *s->served);
    if (!s->served)
        return err_set(r->err, ERR_MEMORY, "out of memory for the layer's accesses");
    for (int64_t i = 0; i < r->routes.n; i++)
        if (r->to[i] >= 0) {
            struct served *x = &s->served[(size_t)r->to[i] * n_experts + (size_t)r->routes.expert[i]];
            x->weight += r->routes.weight[i];
            x->rows++;
        }
    return 0;
}

/* Sum of the gate weights of `rows` rows of an expert; a layout that cuts them does not say which: their share. */
static float score_of(const struct run *r, const struct split *s, int32_t device, int32_t expert, int64_t rows)
{
    const struct served *x = &s->served[(size_t)device * (size_t)r->model.n_experts + (size_t)expert];
    return (float)(rows < x->rows ? x->weight * (double)rows / (double)x->rows : x->weight);
}

/* Predecessors of the tasks from first_task on, in the order of their edges, by counting. */
static int list_predecessors(struct run *r, struct split *s, int64_t first_edge)
{
    const struct moe_graph *g = &r->graph;
    const size_t n = (size_t)(g->n_tasks - s->first_task);
    s->first = calloc(n + 2, sizeof *s->first);
    s->before = malloc(sizeof *s->before * (size_t)(g->n_edges - first_edge + 1));
    if (!s->first || !s->before)
        return err_set(r->err, ERR_MEMORY, "out of memory for the task graph");
    for (int64_t i = first_edge; i < g->n_edges; i++)
        if (g->edge[i].task >= s->first_task)
            s->first[g->edge[i].task - s->first_task + 2]++;
    for (size_t t = 2; t < n + 2; t++)
        s->first[t] += s->first[t - 1];
    for (int64_t i = first_edge; i < g->n_edges; i++)
        if (g->edge[i].task >= s->first_task)
            s->before[s->first[g->edge[i].task - s->first_task + 1]++] = g->edge[i].before;
    return 0;
}

/* Which experts a device needs is known when the gates of all devices have spoken. */
static int32_t routes_known(struct run *r, struct split *s)
{
    if (r->topology->n_devices == 1)
        return r->entry[0];
    if (s->known >= 0)
        return s->known;
    s->known = graph_join(&r->graph, r->err);
    for (int32_t d = 0; s->known >= 0 && d < r->topology->n_devices; d++)
        if (graph_after(&r->graph, s->known, r->entry[d], r->err) < 0)
            return r->err->code;
    return s->known;
}

/* One access in the device's sequence; *load becomes the task after which the weights are there, -1 if they are. */
static int fetch(struct run *r, struct split *split, const struct moe_batch *b, int32_t device, int32_t expert,
                 int64_t rows, int32_t *load)
{
    struct sequence *s = &r->sequence[device];
    struct cache *c = &r->cache[device];
    uint32_t object = (uint32_t)(b->layer * r->model.n_experts + expert), victim;
    if (s->next && (s->at >= s->n || s->key[s->at] != object))
        return err_set(r->err, ERR_RUN, "offload %s: step %d, layer %d: device %d uses other experts than in the first "
                       "pass, which next uses come from; a policy decides by what was timed",
                       r->offload.plugin->name, b->step, b->layer, device);
    struct moe_access a = { .index = s->at, .next_use = s->next ? s->next[s->at] : -1, .step = b->step,
                            .layer = b->layer, .expert = expert, .n_tokens = (int32_t)rows,
                            .phase = b->phase, .bytes = run_expert_bytes(r),
                            .score = score_of(r, split, device, expert, rows) };
    s->at++;
    enum cache_result hit = cache_access(c, object, &a, &victim);
    if (hit == CACHE_ERROR)
        return r->err->code;
    r->metrics.accesses++;
    r->metrics.hits += hit == CACHE_HIT;
    int32_t *last = r->last_use + (size_t)device * r->context.n_objects;
    *load = -1;
    if (hit == CACHE_HIT) {
        *load = last[object]; /* used in this step before: those weights may have been on their way then */
        return 0;
    }
    double bytes = run_expert_bytes(r);
    r->metrics.loaded_bytes += bytes;
    int32_t host = topology_host(r->topology, r->context.view.node[device]);
    int32_t known = routes_known(r, split);
    *load = known < 0 ? known : graph_load(&r->graph, device, host, object, bytes, r->err);
    if (*load < 0 || graph_after(&r->graph, *load, known, r->err) < 0)
        return r->err->code;
    r->graph.task[*load].victim = victim;
    r->graph.task[*load].passes = hit == CACHE_BYPASSED;
    if (victim != NO_OBJECT && last[victim] >= 0)
        graph_after(&r->graph, *load, last[victim], r->err);
    return r->err->code;
}

/* A task for those experts of task `whole`, which was `t`, that `which` lists (ascending); after what `t` was after. */
static int32_t add_part(struct run *r, const struct split *s, int32_t whole, struct task t, const int32_t *which,
                        int32_t n)
{
    struct moe_graph *g = &r->graph;
    int32_t expert[n];
    int64_t rows[n], n_items = 0;
    for (int32_t i = 0; i < n; i++) {
        expert[i] = g->expert[t.first + which[i]];
        rows[i] = g->rows[t.first + which[i]];
        n_items += rows[i];
    }
    int64_t *items = NULL;
    if (t.n_items > 0 && n_items > 0) {
        items = malloc(sizeof *items * (size_t)n_items);
        if (!items)
            return err_set(r->err, ERR_MEMORY, "out of memory for the task graph");
        int64_t at = 0, from = t.first_item;
        for (int32_t i = 0, j = 0; i < t.n && j < n; i++) {
            if (which[j] == i) {
                memcpy(items + at, g->item + from, sizeof *items * (size_t)g->rows[t.first + i]);
                at += g->rows[t.first + i];
                j++;
            }
            from += g->rows[t.first + i];
        }
    }
    int32_t id = graph_experts(g, &(struct moe_expert_work){ t.device, t.stream, t.layer, n, expert, rows, items,
                                                             t.fraction, false }, r->err);
    free(items);
    const int32_t *first = s->first + (whole - s->first_task);
    for (int32_t i = first[0]; id >= 0 && i < first[1]; i++)
        if (graph_after(g, id, s->before[i], r->err) < 0)
            return r->err->code;
    int32_t *last = r->last_use + (size_t)t.device * r->context.n_objects;
    for (int32_t i = 0; id >= 0 && i < n; i++)
        last[t.layer * r->model.n_experts + expert[i]] = id;
    return id;
}

static int expand(struct run *r, const struct moe_batch *b, struct split *s, int32_t task)
{
    const struct task t = r->graph.task[task];
    struct cache *c = &r->cache[t.device];
    int32_t resident[t.n + 1], late[t.n + 1], load[t.n + 1], n_resident = 0, n_late = 0;
    cache_unpin(c);
    for (int32_t i = 0; i < t.n; i++)
        if (r->graph.rows[t.first + i] > 0)
            cache_pin(c, (uint32_t)(t.layer * r->model.n_experts + r->graph.expert[t.first + i]));
    for (int32_t i = 0; i < t.n; i++) {
        int64_t rows = r->graph.rows[t.first + i];
        if (rows == 0)
            continue;
        int32_t loaded = -1;
        if (fetch(r, s, b, t.device, r->graph.expert[t.first + i], rows, &loaded) < 0)
            return r->err->code;
        if (loaded < 0) {
            resident[n_resident++] = i;
        } else {
            late[n_late] = i;
            load[n_late++] = loaded;
        }
    }
    /* The task that dispatch knows becomes the end of its parts, so edges after it hold as they are. */
    r->graph.task[task] = (struct task){ .kind = TASK_JOIN, .layer = t.layer, .micro = t.micro };
    int32_t part;
    if (n_resident > 0 && ((part = add_part(r, s, task, t, resident, n_resident)) < 0 ||
                           graph_after(&r->graph, task, part, r->err) < 0))
        return r->err->code;
    for (int32_t i = 0; i < n_late; i++)
        if ((part = add_part(r, s, task, t, &late[i], 1)) < 0 || graph_after(&r->graph, part, load[i], r->err) < 0 ||
            graph_after(&r->graph, task, part, r->err) < 0)
            return r->err->code;
    return 0;
}

static int record_task(struct run *r, const struct task *t)
{
    for (int32_t i = 0; i < t->n; i++)
        if (r->graph.rows[t->first + i] > 0 &&
            record(r, &r->sequence[t->device],
                   (uint32_t)(t->layer * r->model.n_experts + r->graph.expert[t->first + i])) < 0)
            return r->err->code;
    return 0;
}

int offload_expand(struct run *r, const struct moe_batch *b, int32_t first_task, int64_t first_edge)
{
    struct split s = { .first_task = first_task, .known = -1 };
    int32_t n_tasks = r->graph.n_tasks;
    if (b->layer == 0) /* tasks of the step before are over: any slot is free */
        memset(r->last_use, 0xff,
               sizeof *r->last_use * (size_t)r->topology->n_devices * (size_t)r->context.n_objects);
    struct moe_cost own = { 0, 0, 0 };
    if (!r->recording && r->offload.plugin->ops.offload.observe) {
        if (HOOK(&r->offload, offload, observe, b, r->gate_scores, &r->routes, &own) < 0)
            return r->err->code;
        if (own.flops != 0 || own.bytes != 0 || own.gathered != 0)
            return err_set(r->err, ERR_RUN, "offload %s: its predictor costs %g FLOPs and %g bytes, which this "
                           "version's pipeline does not charge", r->offload.plugin->name, own.flops, own.bytes);
    }
    if (!r->recording && (list_predecessors(r, &s, first_edge) < 0 || weigh(r, &s) < 0))
        n_tasks = first_task;
    for (int32_t t = first_task; t < n_tasks && !r->err->code; t++) {
        if (r->graph.task[t].kind != TASK_EXPERTS)
            continue;
        if (r->recording)
            record_task(r, &r->graph.task[t]);
        else
            expand(r, b, &s, t);
    }
    free(s.first);
    free(s.before);
    free(s.served);
    return r->err->code;
}

/* SPDX-License-Identifier: Apache-2.0
 * sim.c - runs a task graph under a virtual clock: streams in order, transfers on a net that shares links.
 *
 * A task is ready when everything before it has ended. Tasks of one (device, stream) run one at a time in the order
 * in which they became ready, ties by id. At equal times arrivals are handled before ends of computation. */
#include "config.h"

#include "energy.h"
#include "event.h"
#include "graph.h"
#include "sharing.h"
#include "task_cost.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct queue { int32_t *task; int32_t head, n, room; bool busy; int32_t running; };

struct arrival { int32_t exchange, device, task; };

struct sim {
    struct net *net;
    struct message_count *sends; /* [D] */
    struct queue *stream;       /* [D * N_STREAMS] */
    struct sharing *sharing;   /* of devices by kernels */
    struct energy_meter *meter; /* or NULL */
    struct event_queue events;  /* ends of kernels by slot; what shares a device later may make one stale */
    struct net_flow *flow;
    size_t room_flows;
    struct net_done *done;
    size_t room_done;
    struct net_load **load;     /* of exchanges whose parts need not be there, by task.load; NULL once started */
    int32_t n_loads, room_loads;
};

struct walk { /* one run of one graph */
    struct machine *m;
    struct sim *s;
    struct moe_graph *g;
    struct graph_order order;
    struct arrival *arrival;    /* sorted by (exchange, device) */
    int32_t n_arrivals, n_left;
    int32_t *receivers;         /* [tasks] devices that an exchange still has to deliver to */
    struct timed_list *timed;   /* [n_kernels] of the list that begins there */
    int32_t *root, n_roots;     /* tasks that wait for nothing */
    int32_t lost;               /* a device that failed under a task, or -1 */
    double now;
    struct err *e;
};

static void finish(struct walk *w, int32_t id);

/* The flows of so many parts; their number. */
static size_t list_parts(const struct topology *topology, const struct moe_part *part, size_t n_parts,
                         struct net_flow *flow)
{
    int32_t link[TOPOLOGY_MAX_HOPS];
    size_t n = 0;
    for (size_t i = 0; i < n_parts; i++) {
        const struct moe_part *p = &part[i];
        const bool loop = p->src == p->dst;
        if (p->bytes > 0 && (!loop || topology_loop(topology, p->src, link) > 0))
            flow[n++] = (struct net_flow){ .src = p->src, .dst = p->dst, .bytes = p->bytes,
                                           .payload = loop ? 0 : p->bytes, .path = p->path, .loop = loop };
    }
    return n;
}

/* The flows of an exchange in s->flow, with what messages cost, or that of a load; their number. */
static size_t list_flows(const struct topology *topology, struct sim *s, const struct moe_graph *g,
                         const struct task *t, struct err *e)
{
    size_t n = 0, n_parts = t->kind == TASK_LOAD ? 1 : (size_t)t->n;
    if (n_parts > s->room_flows) {
        struct net_flow *flow = realloc(s->flow, sizeof *flow * n_parts);
        if (!flow) {
            err_set(e, ERR_MEMORY, "out of memory for an exchange");
            return 0;
        }
        s->flow = flow;
        s->room_flows = n_parts;
    }
    if (t->kind == TASK_LOAD) {
        if (t->bytes > 0)
            s->flow[n++] = (struct net_flow){ t->source, t->device, t->bytes };
        return n;
    }
    n = list_parts(topology, g->part + t->first, n_parts, s->flow);
    message_costs(topology, s->flow, n, t->message_bytes, t->fused, s->sends);
    return n;
}

/* Starts what task `id` transfers; marks whom something is sent to, and counts them. */
static int start_net(struct walk *w, int32_t id, uint8_t *waits)
{
    const struct task *t = &w->g->task[id];
    struct sim *s = w->s;
    if (t->kind == TASK_EXCHANGE && t->load >= 0) {
        if (t->load >= s->n_loads || !s->load[t->load]) /* the graph of another machine, or for the second time */
            return err_set(w->e, ERR_RUN, "the parts of task %d (layer %d) have been given back", id, t->layer);
        struct net_load *load = s->load[t->load];
        s->load[t->load] = NULL;
        w->receivers[id] = net_load_receivers(load, waits);
        return net_start_load(s->net, w->now, id, load, w->e);
    }
    const size_t n = list_flows(w->m->topology, s, w->g, t, w->e);
    w->receivers[id] = 0;
    for (size_t i = 0; i < n; i++)
        if (!waits[s->flow[i].dst]) {
            waits[s->flow[i].dst] = 1;
            w->receivers[id]++;
        }
    return w->e->code || n == 0 ? w->e->code : net_start(s->net, w->now, id, s->flow, n, w->e);
}

static void start_transfer(struct walk *w, int32_t id)
{
    uint8_t *waits = calloc((size_t)w->m->topology->n_devices, 1);
    if (!waits) {
        err_set(w->e, ERR_MEMORY, "out of memory for an exchange");
        return;
    }
    w->g->task[id].start = w->now;
    if (start_net(w, id, waits) < 0) {
        free(waits);
        return;
    }
    const bool nothing = w->receivers[id] == 0;
    /* Devices that nothing is sent to have nothing to wait for. */
    for (int64_t i = w->order.first[id]; i < w->order.first[id + 1]; i++) {
        int32_t next = w->order.next[i];
        const struct task *a = &w->g->task[next];
        if (a->kind == TASK_ARRIVAL && a->exchange == id && !waits[a->device]) {
            w->g->task[next].start = w->now;
            finish(w, next);
        }
    }
    free(waits);
    if (nothing)
        finish(w, id);
}

static void push_ends(struct walk *w, const struct kernel_end *end, int n)
{
    double at;
    for (int i = 0; i < n; i++)
        if (isinf(end[i].time) && topology_device_failed(w->m->topology, end[i].slot / N_STREAMS, &at))
            w->lost = end[i].slot / N_STREAMS; /* the stream stays busy for ever */
        else if (!event_push(&w->s->events, end[i].time, end[i].slot))
            err_set(w->e, ERR_MEMORY, "out of memory for events");
}

/* The SMs that an exchange's kernel holds (sign 1), or gives back (-1), on every device that it names. */
static void take_sms(struct walk *w, const struct task *t, int sign)
{
    const int32_t n_devices = w->m->topology->n_devices;
    const int32_t sms = t->collective ? (int32_t)w->m->topology->exchange.collective_sms : t->sms;
    uint8_t *takes = sms > 0 ? calloc((size_t)n_devices, 1) : NULL;
    if (sms > 0 && !takes)
        err_set(w->e, ERR_MEMORY, "out of memory for an exchange");
    if (takes && t->sum >= 0) { /* the parts have been given back */
        const struct exchange_sum *sum = &w->g->sum[t->sum];
        for (int64_t i = sum->first_side; i < sum->first_side + sum->n_sides; i++)
            takes[w->g->side[i].device] = 1;
    } else {
        for (int32_t i = t->first; takes && i < t->first + t->n; i++)
            takes[w->g->part[i].src] = takes[w->g->part[i].dst] = 1;
    }
    for (int32_t d = 0, n; takes && d < n_devices; d++)
        if (takes[d]) {
            const struct kernel_end *end = sharing_take(w->s->sharing, w->now, d, sign * sms, &n);
            push_ends(w, end, n);
        }
    free(takes);
}

static void start_stream_task(struct walk *w, int32_t id)
{
    struct task *t = &w->g->task[id];
    t->start = w->now;
    if (t->kind == TASK_LOAD) {
        start_transfer(w, id);
        return;
    }
    const struct kernel_cost cost = task_cost(w->m, w->g, t, w->timed);
    int n;
    if (w->s->meter)
        energy_start(w->s->meter, w->now, t->device, &cost);
    w->s->stream[t->device * N_STREAMS + t->stream].running = id;
    const struct kernel_end *end = sharing_start(w->s->sharing, w->now, t->device, t->stream, &cost, &n);
    push_ends(w, end, n);
}

static void ready(struct walk *w, int32_t id)
{
    struct task *t = &w->g->task[id];
    switch (t->kind) {
    case TASK_JOIN:
        t->start = w->now;
        finish(w, id);
        return;
    case TASK_EXCHANGE:
        take_sms(w, t, 1);
        start_transfer(w, id);
        return;
    case TASK_ARRIVAL: /* released by its exchange's receivers, never by counting */
        return;
    case TASK_COMPUTE:
    case TASK_EXPERTS:
    case TASK_LOAD:
        break;
    }
    struct queue *q = &w->s->stream[t->device * N_STREAMS + t->stream];
    if (!q->busy) {
        q->busy = true;
        start_stream_task(w, id);
        return;
    }
    if (q->head > 0 && q->head + q->n == q->room && q->head >= q->n) { /* else grow: n moves need n pops before */
        memmove(q->task, q->task + q->head, sizeof *q->task * (size_t)q->n);
        q->head = 0;
    }
    if (q->head + q->n == q->room) {
        int32_t room = q->room ? 2 * q->room : 16;
        int32_t *grown = realloc(q->task, sizeof *grown * (size_t)room);
        if (!grown) {
            err_set(w->e, ERR_MEMORY, "out of memory for streams");
            return;
        }
        q->task = grown;
        q->room = room;
    }
    q->task[q->head + q->n++] = id;
}

static void finish(struct walk *w, int32_t id)
{
    struct task *t = &w->g->task[id];
    t->end = w->now;
    w->n_left--;
    if (t->kind == TASK_EXCHANGE)
        take_sms(w, t, -1);
    for (int64_t i = w->order.first[id]; i < w->order.first[id + 1] && !w->e->code; i++) {
        int32_t next = w->order.next[i];
        if (w->g->task[next].kind != TASK_ARRIVAL && --w->order.n_before[next] == 0)
            ready(w, next);
    }
    if (t->kind == TASK_COMPUTE || t->kind == TASK_EXPERTS || t->kind == TASK_LOAD) {
        struct queue *q = &w->s->stream[t->device * N_STREAMS + t->stream];
        q->busy = false;
        if (q->n > 0 && !w->e->code) {
            int32_t next = q->task[q->head++];
            q->n--;
            q->busy = true;
            start_stream_task(w, next);
        }
    }
}

static int by_exchange(const void *a, const void *b)
{
    const struct arrival *x = a, *y = b;
    if (x->exchange != y->exchange)
        return x->exchange < y->exchange ? -1 : 1;
    if (x->device != y->device)
        return x->device < y->device ? -1 : 1;
    return (x->task > y->task) - (x->task < y->task);
}

static void deliver(struct walk *w, const struct net_done *d)
{
    int32_t id = (int32_t)d->exchange;
    struct task *t = &w->g->task[id];
    if (t->kind == TASK_EXCHANGE) {
        /* First arrival of (exchange, device); there may be several. */
        int32_t low = 0, high = w->n_arrivals;
        while (low < high) {
            int32_t mid = low + (high - low) / 2;
            const struct arrival *a = &w->arrival[mid];
            if (a->exchange < id || (a->exchange == id && a->device < d->dst))
                low = mid + 1;
            else
                high = mid;
        }
        for (; low < w->n_arrivals && w->arrival[low].exchange == id && w->arrival[low].device == d->dst; low++) {
            w->g->task[w->arrival[low].task].start = t->start;
            finish(w, w->arrival[low].task);
        }
    }
    if (--w->receivers[id] == 0)
        finish(w, id);
}

/* Nothing happens any more, and tasks are left. */
static void report_stuck(const struct walk *w)
{
    double at;
    if (w->lost >= 0 && topology_device_failed(w->m->topology, w->lost, &at))
        err_set(w->e, ERR_RUN, "machine %s: device %d failed at %.9g s: %d tasks wait for what never ends",
                w->m->topology->name, w->lost, at, w->n_left);
    else
        err_set(w->e, ERR_RUN, "%d tasks wait for something that never ends", w->n_left);
}

static int walk_loop(struct walk *w)
{
    struct sim *s = w->s;
    /* Listed before any is started: a join ends at once, and what it lets start is no root. */
    for (int32_t t = 0; t < w->g->n_tasks; t++)
        if (w->order.n_before[t] == 0 && w->g->task[t].kind != TASK_ARRIVAL)
            w->root[w->n_roots++] = t;
    for (int32_t i = 0; i < w->n_roots && !w->e->code; i++)
        ready(w, w->root[i]);
    while (w->n_left > 0 && !w->e->code) {
        double until = event_next(&s->events);
        size_t n = 0;
        if (net_advance(s->net, until, s->done, s->room_done, &n, w->e) < 0)
            break;
        if (n > 0) {
            w->now = s->done[0].time;
            for (size_t i = 0; i < n && !w->e->code; i++)
                deliver(w, &s->done[i]);
            continue;
        }
        struct event ev;
        if (!event_pop(&s->events, &ev)) {
            report_stuck(w);
            break;
        }
        const struct kernel_end *end;
        int n_ends;
        if (!sharing_finish(s->sharing, ev.time, ev.what, &end, &n_ends))
            continue; /* it ends at another time */
        w->now = ev.time;
        push_ends(w, end, n_ends);
        if (s->meter)
            energy_end(s->meter, w->now, ev.what / N_STREAMS);
        finish(w, s->stream[ev.what].running);
    }
    return w->e->code;
}

static void forget_loads(struct sim *s)
{
    for (int32_t i = 0; i < s->n_loads; i++)
        net_load_free(s->load[i]);
    s->n_loads = 0;
}

/* Flows of an exchange, a few at a time. */
struct part_flows {
    const struct topology *topology;
    const struct task *task;
    const struct moe_part *part; /* what is left */
    size_t n_parts;
    const struct message_count *sends;
};

static size_t next_flows(void *from, struct net_flow *flow, size_t room)
{
    struct part_flows *f = from;
    size_t n = 0;
    while (n == 0 && f->n_parts > 0) { /* some parts are no flows */
        size_t some = f->n_parts < room ? f->n_parts : room;
        n = list_parts(f->topology, f->part, some, flow);
        f->part += some;
        f->n_parts -= some;
    }
    message_apply(f->topology, flow, n, f->task->message_bytes, f->task->fused, f->sends);
    return n;
}

static int sim_reduce(struct machine *m, struct moe_graph *g, int32_t task, const struct moe_exchange *x,
                      const struct message_count *sends, double *link_bytes, struct err *e)
{
    struct sim *s = m->priv;
    struct task *t = &g->task[task];
    if (s->n_loads == s->room_loads) {
        int32_t room = s->room_loads ? 2 * s->room_loads : 64;
        struct net_load **load = realloc(s->load, sizeof(struct net_load *) * (size_t)room);
        if (!load)
            return err_set(e, ERR_MEMORY, "out of memory for an exchange");
        s->load = load;
        s->room_loads = room;
    }
    struct part_flows f = { m->topology, t, x->part, (size_t)x->n_parts, sends };
    if (net_reduce(s->net, task, next_flows, &f, &s->load[s->n_loads], e) < 0)
        return e->code;
    memset(link_bytes, 0, sizeof *link_bytes * (size_t)m->topology->n_links);
    net_load_payload(s->load[s->n_loads], link_bytes);
    t->load = s->n_loads++;
    return 0;
}

static int sim_run(struct machine *m, struct moe_graph *g, struct err *e)
{
    struct sim *s = m->priv;
    struct walk w = { .m = m, .s = s, .g = g, .n_left = g->n_tasks, .now = m->now, .lost = -1, .e = e };
    if (graph_order(g, &w.order, e) < 0)
        return e->code;
    w.receivers = calloc((size_t)g->n_tasks + 1, sizeof *w.receivers);
    w.arrival = malloc(sizeof *w.arrival * ((size_t)g->n_tasks + 1));
    w.root = malloc(sizeof *w.root * ((size_t)g->n_tasks + 1));
    w.timed = malloc(sizeof *w.timed * ((size_t)g->n_kernels + 1));
    if (!w.receivers || !w.arrival || !w.root || !w.timed) {
        err_set(e, ERR_MEMORY, "out of memory for the task graph");
        goto out;
    }
    for (int32_t i = 0; i < g->n_kernels; i++)
        w.timed[i].device = -1;
    for (int32_t t = 0; t < g->n_tasks; t++)
        if (g->task[t].kind == TASK_ARRIVAL)
            w.arrival[w.n_arrivals++] = (struct arrival){ g->task[t].exchange, g->task[t].device, t };
    qsort(w.arrival, (size_t)w.n_arrivals, sizeof *w.arrival, by_exchange);
    if (walk_loop(&w) < 0)
        goto out;
    const double *bytes = s->meter ? net_link_bytes(s->net) : NULL;
    if (s->meter && !bytes)
        err_set(e, ERR_MEMORY, "out of memory for energy");
    else if (s->meter)
        m->joules = energy_read(s->meter, w.now - m->now, bytes);
    m->now = w.now;
out:
    forget_loads(s);
    graph_order_free(&w.order);
    free(w.receivers);
    free(w.arrival);
    free(w.root);
    free(w.timed);
    return e->code;
}

static void sim_close(struct machine *m)
{
    struct sim *s = m->priv;
    if (!s)
        return;
    for (int32_t i = 0; s->stream && i < m->topology->n_devices * N_STREAMS; i++)
        free(s->stream[i].task);
    free(s->stream);
    event_free(&s->events);
    free(s->flow);
    free(s->done);
    free(s->sends);
    sharing_close(s->sharing);
    energy_close(s->meter);
    forget_loads(s);
    free(s->load);
    if (s->net)
        net_close(s->net);
    free(s);
    m->priv = NULL;
}

static const struct machine_ops bound_ops = { .name = "flow", .run = sim_run, .reduce = sim_reduce,
                                              .close = sim_close };
static const struct machine_ops flow_ops = { .name = "flow", .run = sim_run, .close = sim_close };
static const struct machine_ops simgrid_ops = { .name = "simgrid", .run = sim_run, .close = sim_close };

int machine_open_sim(struct machine *m, const struct topology *t, const struct moe_model *model, enum precision p,
                     enum net_tier tier, struct err *e)
{
    memset(m, 0, sizeof *m);
    /* Which paths flows take may depend on when they start, and on each other. */
    m->ops = tier == NET_SIMGRID ? &simgrid_ops : tier == NET_BOUND && !topology_splits(t) ? &bound_ops : &flow_ops;
    m->topology = t;
    m->model = model;
    m->precision = p;
    struct sim *s = m->priv = calloc(1, sizeof *s);
    if (s) {
        s->room_done = (size_t)t->n_devices * 64 + 64;
        s->done = malloc(sizeof *s->done * s->room_done);
        s->stream = calloc((size_t)t->n_devices * N_STREAMS, sizeof *s->stream);
        s->sends = calloc((size_t)t->n_devices, sizeof *s->sends);
        s->sharing = sharing_open(t, N_STREAMS);
    }
    if (!s || !s->done || !s->stream || !s->sends || !s->sharing)
        err_set(e, ERR_MEMORY, "out of memory for the machine");
    else if (energy_open(&s->meter, t, e) == 0)
        net_open(&s->net, t, tier, e);
    if (e->code)
        sim_close(m);
    return e->code;
}

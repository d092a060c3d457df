/* SPDX-License-Identifier: Apache-2.0
 * cuda_rows.c - which rows a task reads and writes on a rank: the same walk as host_tasks.c, but nothing is computed;
 * what would be is listed. A row that is not there when it is needed is an error before anything has run. */
#include "config.h"

#include "cuda_rank.h"
#include "host_need.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Where the task at hand is planned. */
struct at { struct cuda *c; const struct moe_graph *g; struct cuda_rank *r; int32_t task, op; struct err *e; };

static void need(struct at *a, int32_t op)
{
    if (op < 0 || op == a->op)
        return;
    int32_t *most = &a->c->plan.need[a->c->plan.op[op].stream];
    *most = op > *most ? op : *most;
}

/* n more entries of the index; their first, or -1. */
static int64_t add_index(struct at *a, int64_t n)
{
    struct cuda_plan *p = &a->c->plan;
    if (!cuda_grow(&p->index, &p->room_index, p->n_index + n, sizeof *p->index, a->e))
        return -1;
    p->n_index += n;
    return p->n_index - n;
}

static int add_act(struct at *a, struct cuda_act act)
{
    struct cuda_plan *p = &a->c->plan;
    if (cuda_grow(&p->act, &p->room_act, p->n_act + 1, sizeof *p->act, a->e))
        p->act[p->n_act++] = act;
    return a->e->code;
}

/* n more rows, which this operation writes; the first, or -1. */
static int64_t add_rows(struct at *a, int64_t n)
{
    struct cuda_rank *r = a->r;
    if (r->n_rows + n > INT32_MAX) {
        err_set(a->e, ERR_INPUT, "rank %d: more than %d rows in one step", r->rank, INT32_MAX);
        return -1;
    }
    if (!cuda_grow(&r->row_op, &r->room_rows, r->n_rows + n, sizeof *r->row_op, a->e))
        return -1;
    for (int64_t i = 0; i < n; i++)
        r->row_op[r->n_rows + i] = a->op;
    r->n_rows += n;
    return r->n_rows - n;
}

static bool *packed(const struct at *a, int32_t task);

/* ---- combine ---- */

static bool outputs_here(const struct at *a, int32_t layer, int32_t token)
{
    for (int64_t i = route_of(a->c, a->g, layer, token); i < route_of(a->c, a->g, layer, token + 1); i++)
        if (a->g->route[i].expert < a->c->model->n_experts && a->r->route_row[i] < 0)
            return false;
    return true;
}

/* Own tokens whose state after a layer can be had and is not there; before they enter the layer, those of the one
 * below. */
static int combine(struct at *a, int32_t layer)
{
    struct cuda_rank *r = a->r;
    const struct moe_graph *g = a->g;
    int32_t *token = malloc(sizeof *token * ((size_t)r->n_own + 1)), n = 0;
    int64_t m = 0;
    bool below = false;
    if (!token)
        return err_set(a->e, ERR_MEMORY, "rank %d: out of memory for %d tokens", r->rank, r->n_own);
    for (int32_t i = 0; layer > 0 && i < r->n_own; i++)
        below |= *token_row(r, g, layer, r->own[i]) < 0;
    if (below)
        combine(a, layer - 1);
    for (int32_t i = 0; i < r->n_own; i++) {
        const int32_t t = r->own[i];
        if (*token_row(r, g, layer + 1, t) >= 0 || *token_row(r, g, layer, t) < 0 || !outputs_here(a, layer, t))
            continue;
        token[n++] = t;
        for (int64_t j = route_of(a->c, g, layer, t); j < route_of(a->c, g, layer, t + 1); j++)
            m += g->route[j].expert < a->c->model->n_experts;
    }
    if (n > 0)
        m = (int64_t)cuda_pad(&a->c->pad, g, a->task, PAD_COMBINE, r->rank, layer, (double)m, a->e);
    const int64_t at = n > 0 ? add_index(a, 2 * (int64_t)n + 1 + 2 * m) : -1, row = at < 0 ? -1 : add_rows(a, n);
    if (row >= 0 && add_act(a, (struct cuda_act){ CUDA_COMBINE, n, (int32_t)m, at, row }) == 0) {
        int32_t *before = a->c->plan.index + at, *first = before + n, *from = first + n + 1, *weight = from + m, k = 0;
        for (int32_t i = 0; i < n; i++) {
            first[i] = k;
            before[i] = (int32_t)*token_row(r, g, layer, token[i]);
            need(a, r->row_op[before[i]]);
            for (int64_t j = route_of(a->c, g, layer, token[i]); j < route_of(a->c, g, layer, token[i] + 1); j++) {
                if (g->route[j].expert >= a->c->model->n_experts)
                    continue;
                memcpy(&weight[k], &g->route[j].weight, sizeof *weight);
                from[k++] = (int32_t)r->route_row[j];
                need(a, r->row_op[r->route_row[j]]);
            }
            *token_row(r, g, layer + 1, token[i]) = row + i;
        }
        first[n] = k;
        for (; k < m; k++) /* of no token */
            from[k] = weight[k] = 0;
    }
    free(token);
    return a->e->code;
}

/* ---- exchanges ---- */

static int64_t row_of(const struct at *a, const struct task *t, int64_t item)
{
    const int64_t route = a->g->route_first[t->layer] + item;
    return t->kind == TASK_EXCHANGE && t->payload == MOE_PAY_OUTPUT ? a->r->route_row[route]
                                   : *token_row(a->r, a->g, t->layer, a->g->route[route].token);
}

/* Rows that a rank sends to each, `out` (those that stay are not sent), and gets from each, `in`: [n_ranks]; padded,
 * where they are. */
static void count_rows(const struct at *a, int32_t id, int64_t *out, int64_t *in)
{
    const struct task *t = &a->g->task[id];
    const int32_t me = a->r->rank;
    for (int32_t i = 0; i < a->c->n_ranks; i++)
        out[i] = in[i] = 0;
    for (int32_t i = t->first; i < t->first + t->n; i++) {
        const struct moe_part *p = &a->g->part[i];
        if (p->src == p->dst)
            continue;
        out[p->dst] += p->src == me ? p->n_items : 0;
        in[p->src] += p->dst == me ? p->n_items : 0;
    }
    for (int32_t i = 0; i < a->c->n_ranks && a->c->pad.on; i++) { /* a pair's, whoever of the two asks */
        out[i] = (int64_t)cuda_pad(&a->c->pad, a->g, id, PAD_ROWS, me, i, (double)out[i], a->e);
        in[i] = (int64_t)cuda_pad(&a->c->pad, a->g, id, PAD_ROWS, i, me, (double)in[i], a->e);
    }
}

/* Rows of an exchange that stay where they are; padded, where they are. */
static int64_t count_stay(const struct at *a, int32_t id)
{
    const struct task *t = &a->g->task[id];
    int64_t stay = 0;
    for (int32_t i = t->first; i < t->first + t->n; i++) {
        const struct moe_part *p = &a->g->part[i];
        stay += p->src == a->r->rank && p->dst == p->src ? p->n_items : 0;
    }
    return (int64_t)cuda_pad(&a->c->pad, a->g, id, PAD_STAY, a->r->rank, 0, (double)stay, a->e);
}

int cuda_plan_sends(struct cuda *c, const struct moe_graph *g, struct cuda_rank *r, struct err *e)
{
    int64_t out[c->n_ranks], in[c->n_ranks];
    r->send_rows = 0;
    for (int32_t id = 0; id < g->n_tasks && !e->code; id++) {
        const struct at a = { c, g, r, id, -1, e };
        if (g->task[id].kind != TASK_EXCHANGE || g->task[id].payload == MOE_PAY_BYTES)
            continue;
        count_rows(&a, id, out, in);
        r->send_at[id] = r->send_rows;
        for (int32_t i = 0; i < c->n_ranks; i++)
            r->send_rows += (size_t)out[i];
        r->send_rows += (size_t)count_stay(&a, id);
    }
    return e->code;
}

/* What went before from where this will be put has to have left. */
static void need_room(struct at *a, size_t from, size_t to)
{
    const struct cuda_rank *r = a->r;
    for (int64_t i = r->n_sent - 1; i >= 0; i--)
        if (r->sent[i].from < to && from < r->sent[i].to) {
            need(a, r->sent[i].op);
            return; /* those before were on the same stream */
        }
}

/* Lists what exchange `id` sends, in order of destination and between two ranks of parts and items; behind it, as host
 * does, what stays. The first route whose row is not here, -1: it is all here, -2: an error. */
static int64_t pack(struct at *a, int32_t id)
{
    const struct task *t = &a->g->task[id];
    int64_t out[a->c->n_ranks], in[a->c->n_ranks], at[a->c->n_ranks], n = 0;
    const int64_t stay = count_stay(a, id);
    count_rows(a, id, out, in);
    for (int32_t i = 0; i < a->c->n_ranks; i++) {
        at[i] = n;
        n += out[i];
    }
    for (int32_t i = t->first; i < t->first + t->n; i++) {
        const struct moe_part *p = &a->g->part[i];
        for (int64_t j = 0; p->src == a->r->rank && j < p->n_items; j++)
            if (row_of(a, t, a->g->item[a->g->part_item[i] + j]) < 0)
                return a->g->item[a->g->part_item[i] + j];
    }
    at[a->r->rank] = n;
    n += stay;
    const int64_t index = add_index(a, n);
    if (index < 0)
        return -2;
    for (int64_t i = 0; i < n && a->c->pad.on; i++) /* padding sends any row */
        a->c->plan.index[index + i] = 0;
    for (int32_t i = t->first; i < t->first + t->n; i++) {
        const struct moe_part *p = &a->g->part[i];
        for (int64_t j = 0; p->src == a->r->rank && j < p->n_items; j++) {
            const int64_t row = row_of(a, t, a->g->item[a->g->part_item[i] + j]);
            a->c->plan.index[index + at[p->dst]++] = (int32_t)row;
            need(a, a->r->row_op[row]);
        }
    }
    const size_t to = a->r->send_at[id];
    need_room(a, to, to + (size_t)n);
    *packed(a, id) = true;
    if (n > 0)
        add_act(a, (struct cuda_act){ CUDA_PACK, (int32_t)n, 0, index, (int64_t)to });
    return a->e->code ? -2 : -1;
}

static int add_transfer(struct at *a, struct cuda_transfer x)
{
    struct cuda_plan *p = &a->c->plan;
    if (cuda_grow(&p->transfer, &p->room_transfer, p->n_transfer + 1, sizeof *p->transfer, a->e))
        p->transfer[p->n_transfer++] = x;
    return a->e->code;
}

static int exchange_rows(struct at *a, int32_t id)
{
    const struct task *t = &a->g->task[id];
    struct cuda_rank *r = a->r;
    const int32_t n = a->c->n_ranks;
    const int64_t bytes = (int64_t)row_bytes(a->c);
    int64_t out[n], in[n], in_at[n], sent = 0, got = 0;
    const int64_t missing = *packed(a, id) ? -1 : pack(a, id);
    if (missing >= 0)
        return err_set(a->e, ERR_RUN, "rank %d, layer %d: route %lld is sent before its %s is here", r->rank, t->layer,
                       (long long)missing, t->payload == MOE_PAY_OUTPUT ? "output" : "token");
    count_rows(a, id, out, in);
    for (int32_t i = 0; i < n; i++)
        got += in[i];
    const int64_t row = a->e->code ? -1 : add_rows(a, got);
    if (row < 0)
        return a->e->code;
    got = row;
    for (int32_t i = 0; i < n; i++) {
        if (out[i] > 0)
            add_transfer(a, (struct cuda_transfer){ i, 0, true, ((int64_t)r->send_at[id] + sent) * bytes,
                                                    (size_t)(out[i] * bytes) });
        if (in[i] > 0)
            add_transfer(a, (struct cuda_transfer){ i, 0, false, got * bytes, (size_t)(in[i] * bytes) });
        in_at[i] = got;
        sent += out[i];
        got += in[i];
    }
    for (int32_t i = t->first; i < t->first + t->n; i++) {
        const struct moe_part *p = &a->g->part[i];
        for (int64_t j = 0; p->dst == r->rank && p->src != r->rank && j < p->n_items; j++) {
            const int64_t route = a->g->route_first[t->layer] + a->g->item[a->g->part_item[i] + j];
            if (t->payload == MOE_PAY_OUTPUT)
                r->route_row[route] = in_at[p->src]++;
            else
                *token_row(r, a->g, t->layer, a->g->route[route].token) = in_at[p->src]++;
        }
    }
    if (!cuda_grow(&r->sent, &r->room_sent, r->n_sent + 1, sizeof *r->sent, a->e))
        return a->e->code;
    r->sent[r->n_sent++] = (struct cuda_sent){ a->op, r->send_at[id], r->send_at[id] + (size_t)sent };
    return 0;
}

/* As many bytes as the parts of each pair say, in rounds of at most one piece each. */
static int exchange_bytes(struct at *a, const struct task *t)
{
    const int32_t n = a->c->n_ranks, me = a->r->rank;
    double out[n], in[n];
    for (int32_t i = 0; i < n; i++)
        out[i] = in[i] = 0;
    for (int32_t i = t->first; i < t->first + t->n; i++) {
        const struct moe_part *p = &a->g->part[i];
        out[p->dst] += p->src == me && p->dst != me ? p->bytes : 0;
        in[p->src] += p->dst == me && p->src != me ? p->bytes : 0;
    }
    for (int32_t i = 0; i < n; i++)
        for (int sends = 1; sends >= 0; sends--) {
            double left = floor(sends ? out[i] : in[i]);
            for (int32_t round = 0; left > 0 && !a->e->code; round++, left -= HOST_PIECE)
                add_transfer(a, (struct cuda_transfer){ i, round, sends, 0, (size_t)fmin(left, HOST_PIECE) });
        }
    return a->e->code;
}

/* Puts in order what the exchanges that wait for a task send, as far as it is here; false: there is nothing. */
static bool permute(struct at *a, int32_t id)
{
    const struct graph_order *o = &a->c->plan.order;
    bool any = false;
    for (int64_t i = o->first[id]; i < o->first[id + 1]; i++) {
        const struct task *x = &a->g->task[o->next[i]];
        if (x->kind == TASK_EXCHANGE && x->payload != MOE_PAY_BYTES && !*packed(a, o->next[i]))
            any |= pack(a, o->next[i]) == -1;
    }
    return any;
}

/* ---- experts and loads ---- */

static int32_t *used_by(const struct at *a, int32_t slot)
{
    return a->r->slot_ops[slot];
}

static void use_slot(struct at *a, int32_t slot)
{
    used_by(a, slot)[a->c->plan.op[a->op].stream % RANK_STREAMS] = a->op;
}

/* The experts of a task that have rows, and how many rows they take together; each begins at a multiple of `step`. */
static int64_t add_experts(struct at *a, const struct task *t, int64_t step)
{
    struct cuda_plan *p = &a->c->plan;
    int64_t n = 0, item = 0;
    if (!cuda_grow(&p->experts, &p->room_experts, p->n_experts + 1, sizeof *p->experts, a->e) ||
        !cuda_grow(&p->expert, &p->room_expert, p->n_expert + t->n, sizeof *p->expert, a->e))
        return -1;
    struct cuda_experts *own = &p->experts[p->n_experts];
    *own = (struct cuda_experts){ (int32_t)p->n_expert, 0, -1, 0 };
    for (int32_t i = t->first; i < t->first + t->n; item += a->g->rows[i], i++) {
        if (a->g->rows[i] == 0)
            continue;
        if (a->g->rows[i] > INT32_MAX || p->n_expert >= INT32_MAX)
            return err_set(a->e, ERR_INPUT, "rank %d: more than %d rows of experts in one step", a->r->rank, INT32_MAX);
        const int32_t rows = (int32_t)a->g->rows[i];
        p->expert[p->n_expert++] = (struct cuda_expert){ i, rows, 0, rows, item };
        own->n++;
    }
    if (a->c->pad.on && cuda_pad_experts(a->c, a->g, a->r->rank, a->task, own, a->e) < 0)
        return -1;
    for (struct cuda_expert *x = p->expert + own->first; x < p->expert + own->first + own->n; x++) {
        n = (n + step - 1) / step * step;
        if (n + x->n > INT32_MAX)
            return err_set(a->e, ERR_INPUT, "rank %d: more than %d rows of experts in one step", a->r->rank, INT32_MAX);
        x->first = (int32_t)n;
        n += x->n;
    }
    p->n_experts += n > 0;
    return n;
}

static int experts(struct at *a, int32_t id)
{
    const struct task *t = &a->g->task[id];
    const struct cuda_plan *p = &a->c->plan;
    const int64_t step = cuda_row_step(a->c);
    const int64_t all = add_experts(a, t, step), blank = (step - a->r->n_rows % step) % step;
    const int64_t index = all < 0 || add_rows(a, blank) < 0 ? -1 : add_index(a, all), row = add_rows(a, all);
    if (a->e->code)
        return a->e->code;
    const struct cuda_experts none = { 0 }, *x = all > 0 ? &p->experts[p->n_experts - 1] : &none;
    for (const struct cuda_expert *own = p->expert + x->first; own < p->expert + x->first + x->n; own++) {
        const int64_t *item = a->g->item + t->first_item + own->item;
        int64_t at = own->first, from = 0;
        for (int32_t j = 0; j < own->real; j++, item++, at++) {
            from = row_of(a, t, *item);
            if (from < 0)
                return err_set(a->e, ERR_RUN, "rank %d, layer %d: route %lld is computed before its token is here",
                               a->r->rank, t->layer, (long long)*item);
            p->index[index + at] = (int32_t)from;
            need(a, a->r->row_op[from]);
            a->r->route_row[a->g->route_first[t->layer] + *item] = row + at;
        }
        const int64_t end = own + 1 < p->expert + x->first + x->n ? own[1].first : all;
        for (; at < end; at++) /* rows that mean nothing */
            p->index[index + at] = (int32_t)from;
        for (int32_t s = 0; s < a->r->n_slots; s++)
            if (a->r->slot[s].weights == a->r->expert_weights[own->entry]) {
                need(a, used_by(a, s)[STREAM_COPY]);
                use_slot(a, s);
            }
    }
    if (all > 0)
        add_act(a, (struct cuda_act){ CUDA_EXPERTS, (int32_t)all, (int32_t)p->n_experts - 1, index, row });
    permute(a, id);
    const struct graph_order *o = &a->c->plan.order;
    int32_t *left = a->c->plan.experts_left + (a->r - a->c->rank) * (int64_t)a->g->n_tasks;
    for (int64_t i = o->first[id]; i < o->first[id + 1]; i++)
        if (a->g->task[o->next[i]].kind == TASK_JOIN && --left[o->next[i]] == 0)
            permute(a, o->next[i]);
    return a->e->code;
}

/* Into a slot that whoever used it so far has left. */
static int load(struct at *a, int32_t id)
{
    const int32_t number = a->r->load_of[id], slot = a->r->load[number].slot;
    for (int32_t s = 0; s < RANK_STREAMS; s++)
        need(a, used_by(a, slot)[s]);
    use_slot(a, slot);
    return add_act(a, (struct cuda_act){ CUDA_LOAD, 1, number, 0, 0 });
}

static int compute(struct at *a, int32_t id)
{
    const struct task *t = &a->g->task[id];
    if (t->op == MOE_OP_COMBINE)
        return combine(a, t->layer);
    if (t->op == MOE_OP_PERMUTE && permute(a, id))
        return a->e->code;
    const bool chooses = t->op == MOE_OP_GATE && cuda_chooses(a->c, a->g) && a->r->n_own > 0;
    if (chooses)
        add_act(a, (struct cuda_act){ CUDA_CHOOSE, a->r->n_own, t->layer, 0, 0 });
    for (int32_t i = t->first; t->listed && i < t->first + t->n; i++)
        if (!chooses || a->g->kernel[i].key.op != LATENCY_TOP_K)
            add_act(a, (struct cuda_act){ CUDA_KERNEL, 1, i, 0, 0 });
    struct cuda_plan *p = &a->c->plan;
    if (!t->listed && (t->flops > 0 || t->bytes > 0) &&
        cuda_grow(&p->plain, &p->room_plain, p->n_plain + 1, sizeof *p->plain, a->e)) {
        struct cuda_pad *pad = &a->c->pad;
        p->plain[p->n_plain] = (struct cuda_plain){ cuda_pad(pad, a->g, id, PAD_FLOPS, a->r->rank, 0, t->flops, a->e),
                                                    cuda_pad(pad, a->g, id, PAD_BYTES, a->r->rank, 0, t->bytes, a->e) };
        add_act(a, (struct cuda_act){ CUDA_PLAIN, 1, (int32_t)p->n_plain++, 0, 0 });
    }
    return a->e->code;
}

static bool *packed(const struct at *a, int32_t task)
{
    return a->c->plan.packed + (a->r - a->c->rank) * (int64_t)a->g->n_tasks + task;
}

int cuda_plan_task(struct cuda *c, const struct moe_graph *g, struct cuda_rank *r, int32_t id, int32_t op,
                   struct err *e)
{
    struct at a = { c, g, r, id, op, e };
    const struct task *t = &g->task[id];
    switch (t->kind) {
    case TASK_EXPERTS:
        return experts(&a, id);
    case TASK_EXCHANGE: /* a layout may leave out combining tokens that went nowhere */
        if (t->payload == MOE_PAY_HIDDEN && t->layer > 0 && !*packed(&a, id))
            combine(&a, t->layer - 1);
        return e->code ? e->code : t->payload == MOE_PAY_BYTES ? exchange_bytes(&a, t) : exchange_rows(&a, id);
    case TASK_COMPUTE:
        return compute(&a, id);
    case TASK_LOAD:
        return load(&a, id);
    case TASK_ARRIVAL:
    case TASK_JOIN:
        break;
    }
    return 0;
}

int cuda_plan_end(struct cuda *c, const struct moe_graph *g, struct cuda_rank *r, int32_t op, struct err *e)
{
    struct at a = { c, g, r, g->n_tasks - 1, op, e };
    const int32_t last = g->n_route_layers;
    combine(&a, last - 1);
    for (int32_t i = 0; i < r->n_own && !e->code; i++)
        if (*token_row(r, g, last, r->own[i]) < 0)
            err_set(e, ERR_RUN, "rank %d: token %d did not get all its outputs", r->rank, r->own[i]);
    return e->code;
}

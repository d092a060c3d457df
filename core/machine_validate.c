/* SPDX-License-Identifier: Apache-2.0
 * machine_validate.c - moelab machine validate: published measurements against what the models say.
 *
 * A table is a CSV file with comments (hw/published/): `# source:`, `# machine:` and `# fitted:` (which rows gave which
 * parameter). Its header says which model it tests:
 *   layout,groups,m_per_group,n,k,tflops,GBps               FP8 matrix products (compute_gemm)
 *   kernel,phase,ep,latency_us,bandwidth_GBps,column        DeepEP's dispatch and combine (layouts on a network)
 * Rates beside a product's TFLOP/s or an exchange's latency are compared as well.
 * DeepEP's tests draw experts at random; so does this, and the whole layout runs on the machine, tier flow. */
#include "config.h"

#include "csv.h"
#include "eval.h"
#include "machine.h"
#include "machine_validate.h"
#include "registry.h"
#include "script.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct table {
    struct csv csv;
    char name[128], machine[64], fitted[600], source[300];
    struct topology *topology;
    json_t *rows;
    struct err *err;
};

/* A row as it is written; `rate`, in GB/s, 0 where the table has none beside what it is about. */
struct row {
    int line, layout, kernel, phase, column;
    double groups, m, n, k, tflops; /* of a matrix product */
    double ep, x;                   /* of an exchange; x: us or GB/s */
    double rate;
};

/* bytes: what the rate counts. */
static int put_row(struct table *t, const struct row *r, const char *text, const char *unit, double measured,
                   double modelled, double error, const char *binds, double bytes)
{
    json_t *o = json_pack("{s:s, s:s, s:i, s:s, s:f, s:f, s:f, s:s*}", "table", t->name, "row", text, "line", r->line,
                          "unit", unit, "measured", measured, "modelled", modelled, "error", error, "binds", binds);
    if (o && r->rate > 0 && bytes > 0)
        json_object_update_new(o, json_pack("{s:f, s:f}", "measured_GBps", r->rate, "modelled_GBps",
                                            bytes / modelled * 1e-3)); /* of microseconds */
    if (!o || json_array_append_new(t->rows, o))
        return err_set(t->err, ERR_MEMORY, "out of memory");
    return 0;
}

/* The rate of a row may be left out. What it says has to be what the row's time and its bytes make, up to whole units
 * that were cut and a few percent of counting. */
static int read_rate(struct table *t, int i, const char *column, double bytes, double seconds, double *rate)
{
    int c = 0;
    while (strcmp(t->csv.column[c], column))
        c++;
    *rate = 0;
    if (!*t->csv.row[i].cell[c])
        return 0;
    if (csv_number(&t->csv, i, column, 1e-3, 1e6, rate, t->err) < 0)
        return t->err->code;
    if (!t->rows && fabs(bytes / seconds * 1e-9 - *rate) > 1 + 0.05 * *rate)
        fprintf(stderr, "moelab: warning: %s:%d: %s: found %g, but %g us and %g bytes make %.4g\n", t->csv.file,
                t->csv.row[i].line, column, *rate, seconds * 1e6, bytes, bytes / seconds * 1e-9);
    return 0;
}

/* ---- matrix products ---- */

static const char *const gemm_columns[] = { "layout", "groups", "m_per_group", "n", "k", "tflops", "GBps", NULL };

static const char *const layouts[] = { "dense", "contiguous", "masked", NULL };
static const struct gemm_bytes fp8_bytes = { 1, 1, 2 }; /* FP8 in, BF16 out */

static double gemm_groups(const struct row *r)
{
    return r->groups < 1 ? 1 : floor(r->groups);
}

static double gemm_seconds(const struct row *r)
{
    return 2 * gemm_groups(r) * r->m * r->n * r->k / (r->tflops * 1e12);
}

static double gemm_traffic(const struct row *r)
{
    return gemm_groups(r) * (r->m * r->k * fp8_bytes.in + r->n * r->k * fp8_bytes.weight + r->m * r->n * fp8_bytes.out);
}

static int gemm_read(struct table *t, int i, struct row *r)
{
    if (csv_word(&t->csv, i, "layout", layouts, &r->layout, t->err) < 0 ||
        csv_number(&t->csv, i, "groups", 0, 4096, &r->groups, t->err) < 0 ||
        csv_number(&t->csv, i, "m_per_group", 1, 1 << 24, &r->m, t->err) < 0 ||
        csv_number(&t->csv, i, "n", 1, 1 << 24, &r->n, t->err) < 0 ||
        csv_number(&t->csv, i, "k", 1, 1 << 24, &r->k, t->err) < 0 ||
        csv_number(&t->csv, i, "tflops", 1e-3, 1e6, &r->tflops, t->err) < 0)
        return t->err->code;
    if ((r->layout == 0) != (r->groups < 1))
        return err_set(t->err, ERR_INPUT, "%s:%d: groups: found %g, expected %s", t->csv.file, r->line, r->groups,
                       r->layout == 0 ? "0, as the product is dense" : "1 or more");
    if (t->topology->device[0].peak[PREC_FP8] <= 0)
        return err_set(t->err, ERR_INPUT, "%s: machine %s has no figure for precision fp8, in which these products are",
                       t->csv.file, t->machine);
    return read_rate(t, i, "GBps", gemm_traffic(r), gemm_seconds(r), &r->rate);
}

static int gemm_model(struct table *t, const struct row *r)
{
    const int32_t n_groups = (int32_t)gemm_groups(r);
    struct gemm_group group[n_groups];
    char text[80];
    for (int32_t g = 0; g < n_groups; g++)
        group[g] = (struct gemm_group){ (int64_t)r->m, (int64_t)r->n, (int64_t)r->k };
    const double measured = gemm_seconds(r);
    const double modelled = compute_gemm(&t->topology->device[0], PREC_FP8, n_groups, group, &fp8_bytes);
    snprintf(text, sizeof text, "%s %d x %g, %g x %g", layouts[r->layout], n_groups, r->m, r->n, r->k);
    return put_row(t, r, text, "us", measured * 1e6, modelled * 1e6, modelled / measured - 1, NULL, gemm_traffic(r));
}

/* ---- DeepEP ---- */

static const char *const deepep_columns[] = { "kernel", "phase", "ep", "latency_us", "bandwidth_GBps", "column", NULL };
static const char *const kernels[] = { "low_latency", "normal", NULL };
static const char *const phases[] = { "dispatch", "combine", NULL };

enum { LOW_LATENCY, NORMAL };
enum { HIDDEN = 7168, EXPERTS = 256, TOP_K = 8, PER_NODE = 8, TOP_GROUPS = 4 };

struct traffic { /* of one kernel at one size: what its routes come to, and what the model says */
    int kernel, ep;
    double seconds[2];
    char binds[2][64];
    double rank_rows, node_rows; /* per rank: distinct (token, rank), (token, node), its own included */
};

/* The TOP_K best of 256 random scores, in the TOP_GROUPS nodes with the best of them where there are more nodes. */
static void draw_experts(uint64_t seed, int64_t token, int n_nodes, int32_t *expert)
{
    float score[EXPERTS];
    const int per_node = EXPERTS / n_nodes;
    for (int e = 0; e < EXPERTS; e++)
        score[e] = (float)moe_unit(moe_mix(seed + UINT64_C(0x9E3779B97F4A7C15) * (uint64_t)(token * EXPERTS + e + 1)));
    if (n_nodes > TOP_GROUPS) {
        float best[EXPERTS];
        int32_t kept[TOP_GROUPS];
        for (int n = 0; n < n_nodes; n++) {
            best[n] = score[n * per_node];
            for (int e = 1; e < per_node; e++)
                best[n] = fmaxf(best[n], score[n * per_node + e]);
        }
        moe_top_k(best, n_nodes, TOP_GROUPS, kept);
        for (int e = 0; e < EXPERTS; e++) {
            bool in = false;
            for (int i = 0; i < TOP_GROUPS; i++)
                in |= kept[i] == e / per_node;
            score[e] = in ? score[e] : -1;
        }
    }
    moe_top_k(score, EXPERTS, TOP_K, expert);
}

static json_t *traffic_input(struct traffic *w, const char *machine, uint64_t seed)
{
    const int n_nodes = w->ep / PER_NODE, per_rank = w->kernel == NORMAL ? 4096 : 128;
    json_t *offsets = json_array(), *experts = json_array(), *device = json_array();
    int64_t at = 0, rank_rows = 0, node_rows = 0;
    json_array_append_new(offsets, json_integer(0));
    for (int64_t t = 0; t < (int64_t)w->ep * per_rank; t++) {
        int32_t expert[TOP_K];
        draw_experts(seed, t, w->kernel == NORMAL ? n_nodes : 1, expert);
        for (int i = 0; i < TOP_K; i++) {
            const int per = EXPERTS / w->ep;
            bool new_rank = true, new_node = true;
            for (int j = 0; j < i; j++) {
                new_rank &= expert[j] / per != expert[i] / per;
                new_node &= expert[j] / per / PER_NODE != expert[i] / per / PER_NODE;
            }
            rank_rows += new_rank;
            node_rows += new_node;
            json_array_append_new(experts, json_integer(expert[i]));
        }
        json_array_append_new(offsets, json_integer(at += TOP_K));
        json_array_append_new(device, json_integer(t / per_rank));
    }
    w->rank_rows = (double)rank_rows / w->ep;
    w->node_rows = (double)node_rows / w->ep;
    return json_pack("{s:{s:o, s:o}, s:o, s:i, s:i, s:i, s:s, s:{s:i, s:i}, s:f, s:f}", "routes", "offsets", offsets,
                     "experts", experts, "device", device, "devices", w->ep, "nodes", n_nodes, "n_experts", EXPERTS,
                     "machine", machine, "expert", "d_model", HIDDEN, "d_expert", 2048, "dispatch_bytes",
                     HIDDEN + HIDDEN / 128 * 4.0 + (w->kernel == NORMAL ? 0 : 16), "combine_bytes", HIDDEN * 2.0);
}

static int run_traffic(struct table *t, struct traffic *w)
{
    static const char *const phase_of[2] = { "dispatch_a2a", "combine_a2a" };
    const int n_seeds = w->kernel == NORMAL ? 1 : 8; /* 4096 tokens per rank average by themselves */
    for (int seed = 1; seed <= n_seeds && !t->err->code; seed++) {
        json_t *options = json_pack("{s:o?, s:s}", "input", traffic_input(w, t->machine, (uint64_t)seed), "tier",
                                    "flow");
        if (w->kernel == LOW_LATENCY)
            json_object_set_new(options, "set", json_pack("{s:s}", "messages", "row"));
        json_t *out = eval("dispatch", w->kernel == NORMAL ? "node-dedup" : "flat", options, true, t->err), *phase;
        size_t i;
        json_array_foreach(json_object_get(out, "phases"), i, phase)
            for (int p = 0; p < 2; p++)
                if (!strcmp(json_string_value(json_object_get(phase, "phase")), phase_of[p])) {
                    w->seconds[p] += json_number_value(json_object_get(phase, "seconds")) / n_seeds;
                    snprintf(w->binds[p], sizeof w->binds[p], "%s",
                             json_string_value(json_object_get(phase, "busiest_link")));
                }
        json_decref(out);
        json_decref(options);
    }
    return t->err->code;
}

/* "gpu3.nvlink.out" to "nvlink": what kind of link it is. */
static const char *kind_of_link(const char *name)
{
    return strstr(name, "nvlink") ? "NVLink" : strstr(name, "nic") ? "NIC" : name;
}

static const char *const counted[] = { "as above", "NVLink", "RDMA", NULL };

/* What a low-latency kernel's rate counts: every selected copy, with scales and a header on the way out. */
static double selected_bytes(const struct row *r)
{
    return 128.0 * TOP_K * (r->phase == 0 ? HIDDEN + HIDDEN / 128 * 4.0 + 16 : HIDDEN * 2.0);
}

static int deepep_read(struct table *t, int i, struct row *r)
{
    if (csv_word(&t->csv, i, "kernel", kernels, &r->kernel, t->err) < 0 ||
        csv_word(&t->csv, i, "phase", phases, &r->phase, t->err) < 0 ||
        csv_word(&t->csv, i, "column", counted, &r->column, t->err) < 0 ||
        csv_number(&t->csv, i, "ep", PER_NODE, EXPERTS, &r->ep, t->err) < 0 ||
        csv_number(&t->csv, i, r->kernel == NORMAL ? "bandwidth_GBps" : "latency_us", 1e-3, 1e6, &r->x, t->err) < 0)
        return t->err->code;
    if (fmod(r->ep, PER_NODE) != 0 || EXPERTS % (int)r->ep != 0)
        return err_set(t->err, ERR_INPUT, "%s:%d: ep: found %g, expected 8, 16, 32, 64, 128 or 256", t->csv.file,
                       r->line, r->ep);
    if (t->topology->first_device[1] != PER_NODE)
        return err_set(t->err, ERR_INPUT, "%s: machine %s has %d devices per node, and these kernels ran with %d",
                       t->csv.file, t->machine, t->topology->first_device[1], PER_NODE);
    if ((r->kernel == NORMAL) != (r->column > 0))
        return err_set(t->err, ERR_INPUT, "%s:%d: column: found \"%s\", expected %s", t->csv.file, r->line,
                       counted[r->column], r->kernel == NORMAL ? "NVLink or RDMA" : "as above");
    return r->kernel == NORMAL ? 0 : read_rate(t, i, "bandwidth_GBps", selected_bytes(r), r->x * 1e-6, &r->rate);
}

static int deepep_model(struct table *t, const struct row *r, struct traffic *w)
{
    char text[80];
    if (w->kernel != r->kernel || w->ep != (int)r->ep) {
        *w = (struct traffic){ .kernel = r->kernel, .ep = (int)r->ep };
        if (run_traffic(t, w) < 0)
            return t->err->code;
    }
    snprintf(text, sizeof text, "%s %s, EP %g", kernels[r->kernel], phases[r->phase], r->ep);
    const double seconds = w->seconds[r->phase];
    const char *binds = kind_of_link(w->binds[r->phase]);
    if (r->kernel == LOW_LATENCY)
        return put_row(t, r, text, "us", r->x, seconds * 1e6, seconds * 1e6 / r->x - 1, binds, selected_bytes(r));
    double row = r->phase == 0 ? HIDDEN + HIDDEN / 128 * 4.0 : HIDDEN * 2.0;
    double rate = (r->column == 1 ? w->rank_rows : w->node_rows) * row / seconds / 1e9;
    snprintf(text + strlen(text), sizeof text - strlen(text), " (%s)", counted[r->column]);
    return put_row(t, r, text, "GB/s", r->x, rate, r->x / rate - 1, binds, 0);
}

/* ---- tables ---- */

static int open_machine(struct table *t)
{
    char file[1024];
    json_t *description = NULL;
    if (script_machine(t->machine, &description, file, sizeof file, t->err) == 0)
        topology_build(&t->topology, description, file, t->err);
    json_decref(description);
    return t->err->code;
}

int machine_validate_table(const char *file, const char *machine, json_t *rows, struct err *e)
{
    struct table t = { .rows = rows, .err = e };
    struct traffic w = { .ep = 0 };
    if (csv_read(&t.csv, file, e) < 0)
        return e->code;
    const char *slash = strrchr(file, '/');
    snprintf(t.name, sizeof t.name, "%s", slash ? slash + 1 : file);
    csv_note(&t.csv, "machine", t.machine, sizeof t.machine);
    csv_note(&t.csv, "fitted", t.fitted, sizeof t.fitted);
    csv_note(&t.csv, "source", t.source, sizeof t.source);
    if (machine || !*t.machine)
        snprintf(t.machine, sizeof t.machine, "%s", machine ? machine : "h800-ib");
    const bool gemm = csv_is(&t.csv, gemm_columns), deepep = csv_is(&t.csv, deepep_columns);
    if (!gemm && !deepep)
        err_set(e, ERR_INPUT, "%s: the header is that of no table known: see hw/published/", file);
    else if (open_machine(&t) == 0)
        /* All that can be wrong is found before anything is computed. */
        for (int pass = 0; pass < (rows ? 2 : 1); pass++)
            for (int i = 0; i < t.csv.n_rows && !e->code; i++) {
                struct row r = { .line = t.csv.row[i].line };
                if ((gemm ? gemm_read(&t, i, &r) : deepep_read(&t, i, &r)) == 0 && pass == 1)
                    gemm ? gemm_model(&t, &r) : deepep_model(&t, &r, &w);
            }
    for (size_t i = 0; rows && i < json_array_size(rows); i++) {
        json_t *o = json_array_get(rows, i);
        if (json_object_get(o, "machine") || strcmp(json_string_value(json_object_get(o, "table")), t.name))
            continue;
        json_object_set_new(o, "machine", json_string(t.machine));
        json_object_set_new(o, "fitted", json_string(t.fitted));
        json_object_set_new(o, "source", json_string(t.source));
    }
    topology_free(t.topology);
    csv_free(&t.csv);
    return e->code;
}

/* SPDX-License-Identifier: Apache-2.0
 * calibrate_gpu.c - the machine file of a calibrated GPU. What one GPU cannot measure, links to others, is what another
 * machine file says, or is not there; virtual ranks have copies within memory in their place. */
#include "config.h"

#include "calibrate.h"

#include <math.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* ---- tables of another machine ---- */

static void write_text(const char *text, FILE *f)
{
    fputc('"', f);
    for (; *text; text++)
        if (*text == '"' || *text == '\\')
            fprintf(f, "\\%c", *text);
        else if ((unsigned char)*text < ' ')
            fprintf(f, "\\%03d", *text);
        else
            fputc(*text, f);
    fputc('"', f);
}

/* A value in Lua. */
static void write_value(const json_t *v, int indent, FILE *f)
{
    const char *key;
    json_t *inner;
    size_t i;
    if (json_is_string(v)) {
        write_text(json_string_value(v), f);
    } else if (json_is_boolean(v)) {
        fputs(json_is_true(v) ? "true" : "false", f);
    } else if (json_is_number(v)) {
        fprintf(f, "%.17g", json_number_value(v));
    } else {
        fputs("{\n", f);
        json_array_foreach(v, i, inner) {
            fprintf(f, "%*s", indent + 2, "");
            write_value(inner, indent + 2, f);
            fputs(",\n", f);
        }
        json_object_foreach((json_t *)(uintptr_t)v, key, inner) {
            fprintf(f, "%*s%s = ", indent + 2, "", key);
            write_value(inner, indent + 2, f);
            fputs(",\n", f);
        }
        fprintf(f, "%*s}", indent, "");
    }
}

/* ---- what was measured ---- */

static const struct host_sample *find(const struct calibration *c, enum host_what what)
{
    for (int i = 0; i < c->n; i++)
        if (c->sample[i].what == what)
            return &c->sample[i];
    return NULL;
}

static const struct host_sample *find_gemm(const struct calibration *c, enum precision p, int32_t groups, int64_t rows)
{
    for (int i = 0; i < c->n; i++) {
        const struct host_sample *s = &c->sample[i];
        if (s->what == HOST_GEMM && s->precision == p && s->groups == groups && s->shape.rows == rows)
            return s;
    }
    return NULL;
}

/* In %. */
static double spread_of(const struct host_sample *s)
{
    return 100 * (s->high - s->low) / s->seconds;
}

void calibration_say_gpu(const struct calibration *c, const char *indent, FILE *f)
{
    const struct host_sample *launch = find(c, GPU_LAUNCH), *events = find(c, GPU_EVENTS), *queue = find(c, GPU_QUEUE);
    for (int i = 0; i < c->n; i++) {
        const struct host_sample *s = &c->sample[i];
        if (s->what == GPU_KERNEL)
            fprintf(f, "%s%s, %.0f tokens x %lld: %.4g GB/s, %.1f %% of copies, spread %.1f %%\n", indent,
                    s->key.op == LATENCY_PERMUTE ? "permute" : s->key.op == LATENCY_COMBINE ? "unpermute" : "top-k",
                    s->key.rows, (long long)s->key.n, s->bytes / s->seconds / 1e9,
                    100 * s->bytes / s->seconds / c->copy_bandwidth, spread_of(s));
    }
    for (int p = 0; p < N_PRECISIONS; p++) {
        const struct host_sample *one = find_gemm(c, (enum precision)p, 1, 4096),
                                 *groups = find_gemm(c, (enum precision)p, 8, 512);
        if (one && groups)
            fprintf(f, "%s8 products of 512 rows in %s: %.4g TFLOP/s, %.1f %% of one with 4096 rows, spread %.1f %%\n",
                    indent, precision_name[p],
                    2 * 4096.0 * (double)one->shape.n * (double)one->shape.k / groups->seconds / 1e12,
                    100 * one->seconds / groups->seconds, fmax(spread_of(one), spread_of(groups)));
    }
    if (launch && events && queue)
        fprintf(f, "%sa kernel: %.3g us back to back (spread %.1f %%), %.3g us alone between two events (%.1f %%); "
                "queueing one takes the host %.3g us (%.1f %%)\n", indent, launch->seconds * 1e6, spread_of(launch),
                events->seconds * 1e6, spread_of(events), queue->seconds * 1e6, spread_of(queue));
    if (c->gpu.note[0])
        fprintf(f, "%s%s\n", indent, c->gpu.note);
}

static void say(const struct calibration *c, enum host_what what, const char *name, const char *model, FILE *f)
{
    const struct fit_quality *q = &c->quality[what];
    fprintf(f, "--   %-10s %-62s %4d  %5.1f %%  %5.1f %%  %5.1f %%\n", name, model, q->n, 100 * q->spread,
            100 * q->median, 100 * q->largest);
}

static void write_head(const struct calibration *c, const char *date, const char *like_name, FILE *f)
{
    fprintf(f, "-- Measured by `moelab calibrate --gpu` on %s: ", date);
    if (c->n_ranks > 1)
        fprintf(f, "%d virtual ranks of one GPU at once.\n", c->n_ranks);
    else
        fprintf(f, "one GPU.\n");
    fprintf(f,
            "-- %s\n"
            "--\n"
            "--   measured   model%58s sizes  spread  error median and largest\n",
            c->versions, "");
    say(c, HOST_GEMM, "products", "gemm, from 1 to 16 in a task: tiles, memory, launch; peak", f);
    say(c, HOST_MOVE, "bytes", "mem_bandwidth x mem_efficiency, launch_s", f);
    say(c, GPU_SQUARES, "squares", "peak x flops_efficiency: what attention's core is here", f);
    if (c->n_ranks == 1)
        say(c, GPU_KERNEL, "rows", "as bytes: permute, unpermute, top-k; not fitted", f);
    say(c, HOST_READ, "loads", "pcie: from pinned memory of the host", f);
    if (c->n_ranks > 1)
        say(c, HOST_EXCHANGE, "exchanges", "nvlink, nic (parts of copies within memory), exchange.startup", f);
    say(c, GPU_COPY, "copies", "not in this file", f);
    say(c, GPU_WRITE, "writes", "not in this file: to pinned memory of the host", f);
    fprintf(f, "--\n"
               "-- spread: median over sizes of how far tries of three passes lie apart, from the least lower\n"
               "-- quartile to the largest upper one, over the median; error: |modelled / measured - 1|.\n"
               "-- Copies: %.4g GB/s read and written, after %.3g us; to the host %.4g GB/s after %.3g us.\n",
            c->copy_bandwidth / 1e9, c->copy_s * 1e6, c->write_bandwidth / 1e9, c->write_s * 1e6);
    calibration_say_gpu(c, "-- ", f);
    if (like_name)
        fprintf(f, "-- Not measured, but as machine \"%s\" has it: everything except `device` and `pcie`, so all links "
                   "between GPUs.\n", like_name);
    else if (c->n_ranks > 1)
        fprintf(f, "-- Not measured: links between GPUs, which this machine does not have: what virtual ranks exchange "
                   "is copied\n-- within one GPU's memory.\n");
    else
        fprintf(f, "-- Not measured: links between GPUs: there are none in this machine.\n");
}

static void write_device(const struct calibration *c, const char *date, FILE *f)
{
    const struct device_spec *d = &c->device;
    fprintf(f,
            "  device = {\n"
            "    name          = \"%.40s%s\",\n"
            "    memory        = \"%.5g GB\",\n"
            "    mem_bandwidth = \"%.5g GB/s\",\n"
            "    peak = {",
            c->gpu.name, c->n_ranks > 1 ? ", a virtual rank's part" : "", d->memory / 1e9, d->mem_bandwidth / 1e9);
    for (int p = 0, n = 0; p < N_PRECISIONS; p++)
        if (d->peak[p] > 0)
            fprintf(f, "%s %s = \"%.5g TFLOP/s\"", n++ ? "," : "", precision_name[p], d->peak[p] / 1e12);
    fprintf(f,
            " },\n"
            "    source        = \"moelab calibrate --gpu, %s\",\n\n"
            "    launch_s         = %.4g,\n"
            "    flops_efficiency = %.4g,\n"
            "    mem_efficiency   = %.4g,\n"
            "    gemm = {\n"
            "      sms = %.0f, mma_efficiency = %.4g, port_bandwidth = \"%.5g GB/s\",\n"
            "      store_bandwidth = \"%.5g GB/s\",\n"
            "      mem_efficiency = %.4g, launch_s = %.4g, overlap = %.4g,\n"
            "    },\n"
            "    assumed = \"%speak: 1.05 of what products tend to; other precisions were not measured\",\n"
            "  },\n\n",
            date, fmax(d->launch_s, 1e-9), d->flops_efficiency, d->mem_efficiency, d->gemm.sms,
            d->gemm.mma_efficiency, d->gemm.port_bandwidth / 1e9, d->gemm.store_bandwidth / 1e9, d->gemm.mem_efficiency,
            fmax(d->gemm.launch_s, 1e-9), d->gemm.overlap,
            c->gpu.mem_bandwidth > 0 ? "mem_bandwidth: of memory's clock and width, as the driver has them; "
                                     : "mem_bandwidth: 1.05 of the best that was reached; ");
}

/* The other's keys, but for what was measured. */
static void write_pcie(const struct calibration *c, const char *date, const json_t *like, FILE *f)
{
    json_t *pcie = json_is_object(like) ? json_deep_copy(like) : json_object();
    char text[100];
    snprintf(text, sizeof text, "%.5g GB/s", c->read_bandwidth / 1e9);
    json_object_set_new(pcie, "bandwidth", json_string(text));
    snprintf(text, sizeof text, "%.4g us", c->read_s * 1e6);
    json_object_set_new(pcie, "latency", json_string(text));
    json_object_del(pcie, "efficiency");
    json_object_del(pcie, "assumed");
    snprintf(text, sizeof text, "moelab calibrate --gpu, %s: loads from pinned memory", date);
    json_object_set_new(pcie, "source", json_string(text));
    fputs("  pcie = ", f);
    write_value(pcie, 2, f);
    fputs(",\n\n", f);
    json_decref(pcie);
}

static void write_host(const struct calibration *c, const char *date, FILE *f)
{
    const double memory = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
    fprintf(f,
            "  host = {\n"
            "    memory        = \"%.4g GB\",\n"
            "    mem_bandwidth = \"%.5g GB/s\",\n"
            "    flops         = \"1 TFLOP/s\",\n"
            "    source  = \"moelab calibrate --gpu, %s\",\n"
            "    assumed = \"bandwidth: what copies both ways at once take, so that it limits none; flops: no figure, "
            "nothing computes there\",\n"
            "  },\n",
            memory / 1e9 / c->n_nodes, c->n_ranks / c->n_nodes * (c->read_bandwidth + c->write_bandwidth) / 1e9, date);
}

/* All copies share one memory. Links within nodes and between them have parts of what there is, so that an even
 * exchange among all takes as long as it did. */
static void write_links(const struct calibration *c, const char *date, FILE *f)
{
    static const char *const link[] = { "nvlink", "nic" };
    const double within = (double)(c->n_ranks / c->n_nodes - 1) / (c->n_ranks - 1), part[] = { within, 1 - within };
    for (int i = 0; i < 2; i++)
        if (part[i] > 0)
            fprintf(f,
                    "\n  %s = {\n"
                    "    bandwidth = \"%.5g GB/s\",\n"
                    "    latency   = \"1 ns\",\n"
                    "    source    = \"moelab calibrate --gpu, %s: copies between virtual ranks, all at once\",\n"
                    "    assumed   = \"%slatency: within exchange.startup\",\n"
                    "  },\n",
                    link[i], part[i] * c->link_bandwidth / 1e9, date,
                    within > 0 && within < 1 ? "bandwidth: a part of all copies', as an even exchange has them; " : "");
    fprintf(f,
            "\n  exchange = {\n"
            "    startup = \"%.4g us\",\n"
            "    source  = \"moelab calibrate --gpu, %s\",\n"
            "  },\n",
            c->exchange_s * 1e6, date);
}

void calibration_write_gpu(const struct calibration *c, const char *name, const json_t *like, const char *like_name,
                           FILE *f)
{
    const time_t now = time(NULL);
    const char *key;
    const json_t *v;
    char date[20];
    struct tm tm;
    strftime(date, sizeof date, "%Y-%m-%d", gmtime_r(&now, &tm));
    write_head(c, date, like_name, f);
    fprintf(f, "return {\n  name    = \"%s\",\n  summary = \"", name);
    if (c->n_ranks > 1)
        fprintf(f, "%d virtual ranks on one %.40s", c->n_ranks, c->gpu.name);
    else
        fprintf(f, "%.40s%s%.60s", c->gpu.name, like_name ? ", links as " : "", like_name ? like_name : "");
    fprintf(f, "\",\n");
    if (!like)
        fprintf(f, "  nodes   = %d,\n  devices = %d,\n\n", c->n_nodes, c->n_ranks / c->n_nodes);
    write_device(c, date, f);
    write_pcie(c, date, json_object_get(like, "pcie"), f);
    json_object_foreach((json_t *)(uintptr_t)like, key, v) {
        if (!strcmp(key, "name") || !strcmp(key, "summary") || !strcmp(key, "device") || !strcmp(key, "pcie"))
            continue;
        fprintf(f, "  %s = ", key);
        write_value(v, 2, f);
        fputs(",\n", f);
    }
    if (!json_object_get(like, "host"))
        write_host(c, date, f);
    if (c->n_ranks > 1)
        write_links(c, date, f);
    fprintf(f, "}\n");
}

/* SPDX-License-Identifier: Apache-2.0
 * calibrate_write.c - the machine file of a calibrated computer. */
#include "config.h"

#include "calibrate.h"
#include "memory.h"

#include <string.h>
#include <time.h>
#include <unistd.h>

/* As sources name it; "a processor" where nothing says. */
static void processor(char *name, size_t room)
{
    char line[300];
    FILE *f = fopen("/proc/cpuinfo", "r");
    snprintf(name, room, "a processor");
    while (f && fgets(line, sizeof line, f)) {
        char *value = strchr(line, ':');
        if (strncmp(line, "model name", 10) || !value)
            continue;
        value += 1 + strspn(value + 1, " \t");
        value[strcspn(value, "\n")] = '\0';
        for (char *c = value; *c; c++) /* into a Lua string */
            *c = *c == '"' || *c == '\\' || (unsigned char)*c < ' ' ? ' ' : *c;
        snprintf(name, room, "%s", value);
        break;
    }
    if (f)
        fclose(f);
}

static void say(FILE *f, const char *what, const char *model, const struct fit_quality *q)
{
    fprintf(f, "--   %-10s %-62s %4d  %5.1f %%  %5.1f %%  %5.1f %%\n", what, model, q->n, 100 * q->spread,
            100 * q->median, 100 * q->largest);
}

void calibration_write(const struct calibration *c, const char *name, FILE *f)
{
    const struct device_spec *d = &c->device;
    const double memory = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
    const time_t now = time(NULL);
    char cpu[200], date[20];
    struct tm tm;
    processor(cpu, sizeof cpu);
    strftime(date, sizeof date, "%Y-%m-%d", gmtime_r(&now, &tm));
    fprintf(f,
            "-- Measured by `moelab calibrate` on %s: %d rank%s at once, each on one thread.\n"
            "-- %s\n"
            "--\n"
            "--   measured   model%58s sizes  spread  error median and largest\n",
            date, c->n_ranks, c->n_ranks == 1 ? "" : "s", c->versions, "");
    say(f, "products", "gemm: tiles, memory, launch", &c->quality[HOST_GEMM]);
    say(f, "bytes", "mem_bandwidth x mem_efficiency, launch_s", &c->quality[HOST_MOVE]);
    say(f, "sums", "mem_bandwidth x combine_efficiency", &c->quality[HOST_SUM]);
    say(f, "attention", "peak x flops_, decode_efficiency; bytes: read_efficiency", &c->quality[HOST_ATTENTION]);
    if (c->n_ranks > 1)
        say(f, "exchanges", "nvlink (memory that ranks share), exchange.startup", &c->quality[HOST_EXCHANGE]);
    say(f, "reads", "pcie (files), latency", &c->quality[HOST_READ]);
    fprintf(f,
            "--\n"
            "-- spread: median over sizes of how far tries of three passes lie apart, from the least lower\n"
            "-- quartile to the largest upper one, over the median; error: |modelled / measured - 1|.\n"
            "return {\n"
            "  name    = \"%s\",\n"
            "  summary = \"%d rank%s of machine host on %s\",\n"
            "  nodes   = 1,\n"
            "  devices = %d,\n"
            "  probe_s = %.4g, -- of machine host's probe, when nobody disturbed it\n\n"
            "  device = {\n"
            "    name          = \"one thread of %s\",\n"
            "    memory        = \"%.4g GB\",\n"
            "    mem_bandwidth = \"%.4g GB/s\",\n"
            "    peak = { fp32 = \"%.4g GFLOP/s\" },\n"
            "    source        = \"moelab calibrate, %s\",\n\n"
            "    launch_s         = %.3g,\n"
            "    flops_efficiency = %.3g,\n"
            "    mem_efficiency   = %.3g,\n"
            "    read_efficiency  = %.3g,\n"
            "    decode_efficiency = %.3g,\n"
            "    combine_efficiency = %.3g,\n"
            "    gemm = {\n"
            "      sms = 1, tile_m = %.0f, rest = %.3g, mma_efficiency = %.3g, port_bandwidth = \"10000 TB/s\", "
            "store_bandwidth = \"10000 TB/s\",\n"
            "      mem_efficiency = %.3g, vector_efficiency = %.3g, launch_s = %.3g, overlap = %.3g,\n"
            "    },\n"
            "    assumed = \"memory: the computer's over its ranks; peak: 1.05 of what products tend to\",\n"
            "  },\n\n",
            name, c->n_ranks, c->n_ranks == 1 ? "" : "s", cpu, c->n_ranks, c->probe_s, cpu,
            memory / c->n_ranks / 1e9, d->mem_bandwidth / 1e9, d->peak[PREC_FP32] / 1e9, date, fmax(d->launch_s, 1e-9),
            d->flops_efficiency, d->mem_efficiency, d->read_efficiency, d->decode_efficiency, d->combine_efficiency,
            d->gemm.tile_m, d->gemm.rest, d->gemm.mma_efficiency, d->gemm.mem_efficiency, d->gemm.vector_efficiency,
            fmax(d->gemm.launch_s, 1e-9), d->gemm.overlap);
    if (c->n_ranks > 1)
        fprintf(f,
                "  nvlink = {\n"
                "    bandwidth = \"%.4g GB/s\",\n"
                "    latency   = \"1 ns\",\n"
                "    source    = \"moelab calibrate, %s: what a rank sends and gets over MPI in shared memory\",\n"
                "    assumed   = \"latency: within exchange.startup\",\n"
                "  },\n\n",
                c->link_bandwidth / 1e9, date);
    fprintf(f,
            "  pcie = {\n"
            "    name      = \"files\",\n"
            "    bandwidth = \"%.4g GB/s\",\n"
            "    latency   = \"%.4g us\",\n"
            "    source    = \"moelab calibrate, %s: reading a file that is not in memory, all ranks at once\",\n"
            "  },\n\n"
            "  host = {\n"
            "    memory        = \"%.4g GB\",\n"
            "    mem_bandwidth = \"%.4g GB/s\",\n"
            "    flops         = \"%.4g GFLOP/s\",\n"
            "    source  = \"moelab calibrate, %s\",\n"
            "    assumed = \"bandwidth: all ranks' reads together; flops: all ranks'\",\n"
            "  },\n",
            c->read_bandwidth / 1e9, c->read_s * 1e6, date, memory / 1e9, c->n_ranks * c->read_bandwidth / 1e9,
            c->n_ranks * d->peak[PREC_FP32] / 1e9, date);
    if (c->n_ranks > 1)
        fprintf(f,
                "\n  exchange = {\n"
                "    startup = \"%.4g us\",\n"
                "    source  = \"moelab calibrate, %s\",\n"
                "  },\n",
                c->exchange_s * 1e6, date);
    fprintf(f, "}\n");
}

/* SPDX-License-Identifier: Apache-2.0
 * cmd_calibrate.c - moelab calibrate: measures the computer it runs on and writes a machine file. */
#include "config.h"

#include "calibrate.h"
#include "cmd.h"
#include "rank.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct ask { const char *name, *out, *raw; int n_ranks; };

static void help(void)
{
    printf("usage: moelab calibrate [NAME] [--ranks N] [--out FILE] [--samples FILE]\n\n"
           "Measures this computer as machine host uses it, on all ranks at once: products of matrices, copies,\n"
           "attention, exchanges, reads of files in $TMPDIR; fits a machine file to that, and writes it with the\n"
           "date, versions and how well each model fits. Takes some seconds; nothing else should run.\n\n"
           "  NAME            what the machine is called (cpu-localhost)\n"
           "  --ranks N       as many ranks as later runs have (one per processor)\n"
           "  --out FILE      where to (NAME.lua)\n"
           "  --samples FILE  what was measured, as JSON, too\n\n"
           "Example:\n  moelab calibrate cpu-localhost --ranks 2\n"
           "  moelab run scenarios/validation.lua --machine host --against flow\n");
}

static int read_ranks(const char *text, int *n)
{
    char *end;
    const long value = strtol(text, &end, 10);
    if (*end || end == text || value < 1 || value > 256)
        return cmd_usage("calibrate", "--ranks %s: expected 1 to 256", text);
    *n = (int)value;
    return 0;
}

static int parse(int argc, char **argv, struct ask *a)
{
    static const char *const known[] = { "--ranks", "--out", "--samples", "--help", NULL };
    for (int i = 1; i < argc; i++) {
        const char **to = !strcmp(argv[i], "--out") ? &a->out : !strcmp(argv[i], "--samples") ? &a->raw : NULL;
        const bool ranks = !strcmp(argv[i], "--ranks");
        if ((to || ranks) && i + 1 == argc)
            return cmd_usage("calibrate", "%s: expected a value", argv[i]);
        if (ranks && read_ranks(argv[i + 1], &a->n_ranks) != 0)
            return 2;
        if (to)
            *to = argv[i + 1];
        if (to || ranks)
            i++;
        else if (cmd_is_option(argv[i]))
            return cmd_unknown_option("calibrate", argv[i], known);
        else if (a->name)
            return cmd_usage("calibrate", "%s: expected one name", argv[i]);
        else
            a->name = argv[i];
    }
    return 0;
}

static int check_name(const char *name)
{
    const size_t n = strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.");
    if (n == 0 || name[n] || n > 60)
        return cmd_usage("calibrate", "%s: expected a name of letters, digits, '-', '_' and '.'", name);
    return 0;
}

/* Whole or not at all. */
static int write_file(const struct calibration *c, const char *name, const char *path, struct err *e)
{
    char own[1024];
    snprintf(own, sizeof own, "%s.%ld", path, (long)getpid());
    FILE *f = fopen(own, "w");
    if (!f)
        return err_set(e, ERR_INPUT, "%s: %s", path, strerror(errno));
    calibration_write(c, name, f);
    if (fclose(f) != 0 || rename(own, path) < 0) {
        err_set(e, ERR_IO, "%s: %s", path, strerror(errno));
        unlink(own);
    }
    return e->code;
}

/* Before measuring, not after. */
static int check_writable(const char *path, struct err *e)
{
    char dir[1024];
    snprintf(dir, sizeof dir, "%s", path);
    char *slash = strrchr(dir, '/');
    if (slash)
        slash[slash == dir] = '\0';
    if (access(slash ? dir : ".", W_OK) < 0)
        return err_set(e, ERR_INPUT, "%s: %s", path, strerror(errno));
    return 0;
}

static void summary(const struct calibration *c, const char *path)
{
    static const char *const what[N_HOST_WHATS] = { "products", "bytes moved", "attention", "exchanges", "reads" };
    printf("  %-12s %6s  %8s  %14s  %s\n", "measured", "sizes", "spread", "error, median", "largest");
    for (int i = 0; i < N_HOST_WHATS; i++)
        if (c->n_ranks > 1 || i != HOST_EXCHANGE)
            printf("  %-12s %6d  %6.1f %%  %12.1f %%  %5.1f %%\n", what[i], c->quality[i].n, 100 * c->quality[i].spread,
                   100 * c->quality[i].median, 100 * c->quality[i].largest);
    printf("\n  %.3g GFLOP/s, %.3g GB/s of memory, %.3g GB/s between ranks after %.3g us, %.3g GB/s from files\n"
           "  written: %s\n",
           c->device.peak[PREC_FP32] / 1e9, c->device.mem_bandwidth * c->device.mem_efficiency / 1e9,
           c->link_bandwidth / 1e9, c->exchange_s * 1e6, c->read_bandwidth / 1e9, path);
}

int cmd_calibrate(int argc, char **argv)
{
    if (argc > 1 && (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h"))) {
        help();
        return 0;
    }
    struct ask a = { .n_ranks = (int)sysconf(_SC_NPROCESSORS_ONLN) };
    if (parse(argc, argv, &a) != 0)
        return 2;
    a.name = a.name ? a.name : "cpu-localhost";
    if (check_name(a.name) != 0)
        return 2;
    char path[200];
    snprintf(path, sizeof path, "%s.lua", a.name);
    const char *out = a.out ? a.out : path;
    struct calibration c = { 0 };
    struct err e = { 0 };
    if (check_writable(out, &e) < 0)
        return cmd_fail(&e);
    json_t *samples = rank_calibrate(a.n_ranks, &e);
    if (samples && a.raw && json_dump_file(samples, a.raw, JSON_INDENT(1) | JSON_REAL_PRECISION(9)) < 0)
        err_set(&e, ERR_INPUT, "%s: %s", a.raw, strerror(errno));
    if (!e.code && calibration_read(&c, samples, &e) == 0 && calibration_fit(&c, &e) == 0 &&
        write_file(&c, a.name, out, &e) == 0)
        summary(&c, out);
    calibration_free(&c);
    json_decref(samples);
    return e.code ? cmd_fail(&e) : 0;
}

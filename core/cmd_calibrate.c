/* SPDX-License-Identifier: Apache-2.0
 * cmd_calibrate.c - moelab calibrate: measures the computer it runs on, or its GPU, and writes a machine file. */
#include "config.h"

#include "calibrate.h"
#include "cmd.h"
#include "rank.h"
#include "script.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct ask { const char *name, *out, *raw, *like; int n_ranks, n_nodes; bool gpu; };

static void help(void)
{
    printf("usage: moelab calibrate [NAME] [--ranks N] [--out FILE] [--samples FILE]\n"
           "       moelab calibrate [NAME] --gpu [--ranks N | --like MACHINE] [--out FILE] [--samples FILE]\n\n"
           "Measures this computer as machine host uses it, on all ranks at once: products of matrices, copies,\n"
           "attention, exchanges, reads of files in $TMPDIR; fits a machine file to that, and writes it with the\n"
           "date, versions and how well each model fits. Takes some seconds; nothing else should run.\n\n"
           "With --gpu it measures GPU 0 as machine cuda uses it: products of matrices, alone and in groups, copies\n"
           "within its memory and from and to pinned memory, kernels of its own, what starting one takes.\n\n"
           "  NAME            what the machine is called (cpu-localhost, or gpu-localhost)\n"
           "  --ranks N       as many ranks as later runs have (one per processor); with --gpu as many virtual ranks\n"
           "                  of one GPU, which then are the machine's devices (1), or 2x4: four on each of two nodes\n"
           "  --gpu           measure a GPU\n"
           "  --like MACHINE  where links between GPUs come from, which one GPU cannot measure (there are none)\n"
           "  --out FILE      where to (NAME.lua)\n"
           "  --samples FILE  what was measured, as JSON, too\n\n"
           "Examples:\n  moelab calibrate cpu-localhost --ranks 2\n"
           "  moelab run scenarios/validation.lua --machine host --against flow\n"
           "  moelab calibrate gpu-localhost --gpu\n"
           "  moelab run scenarios/gpu/offload.lua --machine cuda --against flow \\\n"
           "      --set machine=gpu-localhost.lua\n");
}

/* "8", or "2x4": on each of two nodes. */
static int read_ranks(const char *text, struct ask *a)
{
    char *end;
    long each = strtol(text, &end, 10), nodes = 1;
    bool ok = end != text && each >= 1 && each <= 256;
    if (ok && *end == 'x') {
        const char *second = end + 1;
        nodes = each;
        each = strtol(second, &end, 10);
        ok = end != second && each >= 1 && each <= 256 && nodes * each <= 256;
    }
    if (!ok || *end)
        return cmd_usage("calibrate", "--ranks %s: expected 1 to 256", text);
    a->n_ranks = (int)(nodes * each);
    a->n_nodes = (int)nodes;
    return 0;
}

static int parse(int argc, char **argv, struct ask *a)
{
    static const char *const known[] = { "--gpu", "--ranks", "--like", "--out", "--samples", "--help", NULL };
    for (int i = 1; i < argc; i++) {
        const char **to = !strcmp(argv[i], "--out") ? &a->out : !strcmp(argv[i], "--samples") ? &a->raw
                          : !strcmp(argv[i], "--like") ? &a->like : NULL;
        const bool ranks = !strcmp(argv[i], "--ranks");
        if ((to || ranks) && i + 1 == argc)
            return cmd_usage("calibrate", "%s: expected a value", argv[i]);
        if (ranks && read_ranks(argv[i + 1], a) != 0)
            return 2;
        if (to)
            *to = argv[i + 1];
        if (to || ranks)
            i++;
        else if (!strcmp(argv[i], "--gpu"))
            a->gpu = true;
        else if (cmd_is_option(argv[i]))
            return cmd_unknown_option("calibrate", argv[i], known);
        else if (a->name)
            return cmd_usage("calibrate", "%s: expected one name", argv[i]);
        else
            a->name = argv[i];
    }
    if (a->like && !a->gpu)
        return cmd_usage("calibrate", "--like %s: expected with --gpu", a->like);
    if (a->n_nodes > 1 && !a->gpu)
        return cmd_usage("calibrate", "--ranks %dx%d: expected nodes with --gpu alone", a->n_nodes,
                         a->n_ranks / a->n_nodes);
    if (a->like && a->n_ranks > 1)
        return cmd_usage("calibrate", "--like %s, --ranks %d: expected one of them: virtual ranks have no links "
                         "between GPUs", a->like, a->n_ranks);
    if (a->n_ranks == 0)
        a->n_ranks = a->gpu ? 1 : (int)sysconf(_SC_NPROCESSORS_ONLN);
    a->name = a->name ? a->name : a->gpu ? "gpu-localhost" : "cpu-localhost";
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
static int write_file(const struct calibration *c, const struct ask *a, const json_t *like, const char *path,
                      struct err *e)
{
    char own[1024];
    snprintf(own, sizeof own, "%s.%ld", path, (long)getpid());
    FILE *f = fopen(own, "w");
    if (!f)
        return err_set(e, ERR_INPUT, "%s: %s", path, strerror(errno));
    if (a->gpu)
        calibration_write_gpu(c, a->name, like, a->like, f);
    else
        calibration_write(c, a->name, f);
    const bool bad = ferror(f) != 0;
    if ((fclose(f) != 0) | bad || rename(own, path) < 0) {
        err_set(e, ERR_IO, "%s: %s", path, strerror(errno));
        unlink(own);
    }
    return e->code;
}

/* Likewise. */
static int write_samples(const json_t *samples, const char *path, struct err *e)
{
    char own[1024];
    snprintf(own, sizeof own, "%s.%ld", path, (long)getpid());
    if (json_dump_file(samples, own, JSON_INDENT(1) | JSON_REAL_PRECISION(9)) < 0 || rename(own, path) < 0) {
        err_set(e, ERR_IO, "%s: %s", path, strerror(errno));
        unlink(own);
    }
    return e->code;
}

/* Before measuring, not after. */
static int check_writable(const char *option, const char *path, struct err *e)
{
    char dir[1024];
    struct stat st;
    if (stat(path, &st) == 0 && S_ISDIR(st.st_mode))
        return err_set(e, ERR_INPUT, "%s %s: is a directory, expected a file", option, path);
    if (!*path)
        return err_set(e, ERR_INPUT, "%s: is empty, expected the name of a file", option);
    snprintf(dir, sizeof dir, "%s", path);
    char *slash = strrchr(dir, '/');
    if (slash)
        slash[slash == dir] = '\0';
    if (access(slash ? dir : ".", W_OK) < 0)
        return err_set(e, ERR_INPUT, "%s %s: %s", option, path, strerror(errno));
    return 0;
}

/* Two names of one file, whether it is there yet or not. */
static bool is_same(const char *a, const char *b)
{
    struct stat x, y;
    if (stat(a, &x) == 0 && stat(b, &y) == 0)
        return x.st_dev == y.st_dev && x.st_ino == y.st_ino;
    const char *const name[2] = { a, b };
    const char *base[2];
    char dir[2][1024];
    for (int i = 0; i < 2; i++) {
        snprintf(dir[i], sizeof dir[i], "%s", name[i]);
        char *slash = strrchr(dir[i], '/');
        base[i] = slash ? name[i] + (slash + 1 - dir[i]) : name[i];
        snprintf(slash ? slash + 1 : dir[i], 2, ".");
    }
    return !strcmp(base[0], base[1]) && stat(dir[0], &x) == 0 && stat(dir[1], &y) == 0 && x.st_dev == y.st_dev &&
           x.st_ino == y.st_ino;
}

static void summary(const struct calibration *c, const char *path)
{
    static const char *const what[N_HOST_WHATS] = { "products", "bytes moved", "sums of rows", "attention",
                                                     "exchanges", "reads", "probe" };
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

/* ---- a GPU ---- */

static void summary_gpu(const struct calibration *c, const char *path)
{
    static const char *const what[N_WHATS] = {
        [HOST_GEMM] = "products", [HOST_MOVE] = "bytes moved", [GPU_SQUARES] = "squares", [GPU_KERNEL] = "kernels",
        [GPU_COPY] = "copies", [HOST_READ] = "loads", [GPU_WRITE] = "to the host", [HOST_EXCHANGE] = "exchanges",
    };
    const struct device_spec *d = &c->device;
    printf("  %-12s %6s  %8s  %14s  %s\n", "measured", "sizes", "spread", "error, median", "largest");
    for (int i = 0; i < N_WHATS; i++)
        if (what[i] && c->quality[i].n > 0)
            printf("  %-12s %6d  %6.1f %%  %12.1f %%  %5.1f %%\n", what[i], c->quality[i].n, 100 * c->quality[i].spread,
                   100 * c->quality[i].median, 100 * c->quality[i].largest);
    printf("\n  %s\n  %.4g TFLOP/s in bf16, %.4g in fp32", c->versions,
           d->peak[PREC_BF16] * d->gemm.mma_efficiency / 1e12, d->peak[PREC_FP32] * d->gemm.mma_efficiency / 1e12);
    if (d->peak[PREC_FP8] > 0)
        printf(", %.4g in fp8", d->peak[PREC_FP8] * d->gemm.mma_efficiency / 1e12);
    printf("; %.4g GB/s of copies, %.4g GB/s from the host after %.3g us\n", c->copy_bandwidth / 1e9,
           c->read_bandwidth / 1e9, c->read_s * 1e6);
    calibration_say_gpu(c, "  ", stdout);
    printf("  written: %s\n", path);
}

static void take(void *self, const struct host_sample *s)
{
    json_array_append_new(self, calibration_sample(s));
}

static void show_size(void *self, int done, int of)
{
    (void)self;
    if (isatty(STDERR_FILENO))
        fprintf(stderr, done < of ? "\rcalibrating a GPU: %d of %d sizes" : "\r\033[K", done, of);
}

/* Samples and versions, as rank_calibrate() has them. */
static json_t *measure_gpu(const struct ask *a, struct err *e)
{
    json_t *samples = json_array();
    struct cuda_calibration c = { .n_ranks = a->n_ranks, .take = take, .step = show_size, .taker = samples };
    if (machine_calibrate_cuda(&c, e) == 0)
        return json_pack("{s:o, s:s, s:i, s:i, s:s, s:s, s:i, s:f, s:f}", "samples", samples, "versions", c.versions,
                         "ranks", a->n_ranks, "nodes", a->n_nodes, "gpu", c.name, "note", c.note, "sms", (int)c.sms,
                         "memory", c.memory, "mem_bandwidth", c.mem_bandwidth);
    err_prefix(e, "calibrate");
    json_decref(samples);
    return NULL;
}

/* The machine whose links are taken over. */
static json_t *read_like(const char *name, struct err *e)
{
    json_t *o = NULL;
    char file[600];
    if (!name || script_machine(name, &o, file, sizeof file, e) < 0)
        return NULL;
    if (!json_is_object(json_object_get(o, "device")))
        err_set(e, ERR_INPUT, "--like %s: found a machine without a table `device`, expected one node or several that "
                "are alike", name);
    return o;
}

int cmd_calibrate(int argc, char **argv)
{
    if (argc > 1 && (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h"))) {
        help();
        return 0;
    }
    struct ask a = { 0 };
    if (parse(argc, argv, &a) != 0 || check_name(a.name) != 0)
        return 2;
    char path[200];
    snprintf(path, sizeof path, "%s.lua", a.name);
    const char *out = a.out ? a.out : path;
    if (a.raw && is_same(a.raw, out))
        return cmd_usage("calibrate", "--samples %s: is what --out names, expected another file", a.raw);
    struct calibration c = { 0 };
    struct err e = { 0 };
    json_t *like = read_like(a.like, &e), *samples = NULL;
    if (!e.code && check_writable("--out", out, &e) == 0 && (!a.raw || check_writable("--samples", a.raw, &e) == 0))
        samples = a.gpu ? measure_gpu(&a, &e) : rank_calibrate(a.n_ranks, &e);
    if (samples && a.raw)
        write_samples(samples, a.raw, &e);
    if (!e.code && calibration_read(&c, samples, &e) == 0 &&
        (a.gpu ? calibration_fit_gpu : calibration_fit)(&c, &e) == 0 && write_file(&c, &a, like, out, &e) == 0)
        (a.gpu ? summary_gpu : summary)(&c, out);
    calibration_free(&c);
    json_decref(samples);
    json_decref(like);
    return e.code ? cmd_fail(&e) : 0;
}

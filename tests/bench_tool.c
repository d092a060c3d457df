/* SPDX-License-Identifier: Apache-2.0
 * bench_tool inputs DIR - writes what tests/bench.sh measures on: zipf.npy (the standard request stream of
 *   tests/unit/zipf.h), eplb.json (58 layers x 256 experts with log-normal loads, 288 replicas, 32 devices) and
 *   logits.npy (8,192 tokens x 256 experts; logits64.npy and half64.npy: 64 experts, and half as many tokens); prints
 *   how many ns a token's logits take to be read and added up.
 * bench_tool cost COMMAND... - runs the command; prints how many seconds it took and the most memory that one of its
 *   processes held at a time, in MB. */
#include "config.h"

#include "moelab.h"
#include "npy.h"
#include "unit/zipf.h"

#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static int write_zipf(const char *dir, struct err *e)
{
    char path[600];
    int64_t n = ZIPF_REQUESTS;
    uint32_t *key = malloc(sizeof *key * (size_t)n);
    uint16_t *id = malloc(sizeof *id * (size_t)n);
    if (!key || !id || zipf_fill(key, (size_t)n, ZIPF_OBJECTS, ZIPF_ALPHA, ZIPF_SEED, ZIPF_SHUFFLE_SEED) < 0)
        err_set(e, ERR_MEMORY, "out of memory for %lld requests", (long long)n);
    for (int64_t i = 0; i < n && !e->code; i++)
        id[i] = (uint16_t)key[i];
    snprintf(path, sizeof path, "%s/zipf.npy", dir);
    if (!e->code)
        npy_write(path, "u2", 1, &n, id, e);
    free(key);
    free(id);
    return e->code;
}

/* Sum of uniforms is near enough to a normal for a load that only has to be uneven. */
static double load_of(uint64_t i)
{
    double sum = 0;
    for (uint64_t j = 0; j < 12; j++)
        sum += moe_unit(moe_mix(i * 12 + j + 1));
    return floor(1000 * exp(sum - 6));
}

static int write_eplb(const char *dir, struct err *e)
{
    char path[600];
    snprintf(path, sizeof path, "%s/eplb.json", dir);
    FILE *f = fopen(path, "w");
    if (!f)
        return err_set(e, ERR_IO, "cannot write %s", path);
    fprintf(f, "{\"replicas\": 288, \"groups\": 8, \"nodes\": 4, \"devices\": 32, \"load\": [");
    for (uint64_t l = 0; l < 58; l++)
        for (uint64_t x = 0; x < 256; x++)
            fprintf(f, "%s%.0f%s", x ? "," : l ? ",[" : "[", load_of(l * 256 + x), x == 255 ? "]" : "");
    fprintf(f, "]}\n");
    return fclose(f) == 0 ? 0 : err_set(e, ERR_IO, "cannot write %s", path);
}

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

enum { TOKENS = 8192, EXPERTS = 256 };

/* DIR/NAME: so many rows of `logit`, 64 wide. */
static int write_narrow(const char *dir, const char *name, int64_t rows, const float *logit, struct err *e)
{
    char path[600];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    npy_write(path, "f4", 2, (const int64_t[]){ rows, 64 }, logit, e);
    return e->code;
}

static int write_logits(const char *dir, struct err *e)
{
    const int64_t shape[2] = { TOKENS, EXPERTS }, n = TOKENS * EXPERTS;
    char path[600];
    float *logit = malloc(sizeof *logit * (size_t)n), sum = 0;
    double best = INFINITY;
    if (!logit)
        return err_set(e, ERR_MEMORY, "out of memory for %d x %d logits", TOKENS, EXPERTS);
    for (int64_t i = 0; i < n; i++)
        logit[i] = (float)log(load_of((uint64_t)i) + 1);
    snprintf(path, sizeof path, "%s/logits.npy", dir);
    npy_write(path, "f4", 2, shape, logit, e);
    write_narrow(dir, "logits64.npy", TOKENS, logit, e);
    write_narrow(dir, "half64.npy", TOKENS / 2, logit, e);
    for (int i = 0; i < 5; i++) {
        const double began = now_s();
        float part[16] = { 0 };
        for (int64_t j = 0; j < n; j += 16)
            for (int l = 0; l < 16; l++)
                part[l] += logit[j + l];
        sum += part[i];
        best = fmin(best, now_s() - began);
    }
    printf("%.4g\n", sum > 0 ? 1e9 * best / TOKENS : 0);
    free(logit);
    return e->code;
}

static int print_cost(char **command)
{
    const double began = now_s();
    pid_t pid = fork();
    if (pid == 0) {
        if (freopen("/dev/null", "w", stdout))
            execvp(command[0], command);
        _exit(127);
    }
    int status = 1;
    struct rusage used = { 0 };
    if (pid < 0 || wait4(pid, &status, 0, &used) < 0 || status != 0) {
        fprintf(stderr, "bench_tool: %s failed\n", command[0]);
        return 2;
    }
    printf("%.3f %.1f\n", now_s() - began, (double)used.ru_maxrss * 1024 / 1e6); /* Linux counts KiB */
    return 0;
}

int main(int argc, char **argv)
{
    struct err e = { 0 };
    if (argc > 2 && !strcmp(argv[1], "cost"))
        return print_cost(argv + 2);
    if (argc != 3 || strcmp(argv[1], "inputs")) {
        fprintf(stderr, "usage: bench_tool inputs DIR | cost COMMAND...\n");
        return 2;
    }
    if (write_zipf(argv[2], &e) < 0 || write_eplb(argv[2], &e) < 0 || write_logits(argv[2], &e) < 0) {
        fprintf(stderr, "bench_tool: %s\n", e.text);
        return 2;
    }
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0
 * cmd_eval.c - moelab eval KIND NAME: the command line over eval(), which runs in a process of its own. */
#include "config.h"

#include "child.h"
#include "cmd.h"
#include "eval.h"
#include "npy.h"
#include "record.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const char *const examples[N_EVAL_KINDS] = {
    [MOE_ROUTER] = "moelab eval router softmax-top-k --logits logits.npy --top-k 8 --out routes",
    [MOE_BALANCER] = "echo '{\"logits\": [[2, 1], [3, 0]], \"capacity_factor\": 1}' |\n"
                     "      moelab eval balancer capacity --input - --top-k 1 --set drop=position",
    [MOE_PLACEMENT] = "echo '{\"load\": [[90, 132, 40, 61]], \"replicas\": 6, \"nodes\": 1, \"devices\": 2}' |\n"
                      "      moelab eval placement eplb --input -",
    [MOE_DISPATCH] = "echo '{\"bytes\": [[0, 1e6], [2e6, 0]], \"machine\": \"star-50GBps\"}' |\n"
                     "      moelab eval dispatch flat --input - --tier exact",
    [MOE_OFFLOAD] = "moelab eval offload lru --trace scenarios/traces/tiny-moe --capacity 64",
    [EVAL_MACHINE] = "moelab eval machine star-50GBps --pattern alltoall --bytes-per-rank 16777216 --n 64 --tier bound",
    [EVAL_METRIC] = "moelab eval metric srp --trace scenarios/traces/tiny-moe --segment 16",
};

static int kind_of_name(const char *name)
{
    for (int k = 0; k < N_EVAL_KINDS; k++)
        if (!strcmp(name, eval_kind_name[k]))
            return k;
    return -1;
}

/* "top_k" as --top-k */
static void flag_of(const char *name, char flag[40])
{
    snprintf(flag, 40, "--%s", name);
    for (char *c = flag; *c; c++)
        *c = *c == '_' ? '-' : *c;
}

static void help(int kind)
{
    printf("usage: moelab eval %s NAME%s [OPTION...]\n\n"
           "One policy, machine or metric on one input, no scenario. Prints one JSON object (doc/eval.md).\n\n",
           kind < 0 ? "KIND" : eval_kind_name[kind], kind == EVAL_MACHINE ? "_OR_FILE" : "");
    if (kind < 0)
        puts("KIND is router, balancer, placement, dispatch, offload, machine or metric;\n"
             "moelab eval KIND --help lists the options of one kind.\n");
    for (const struct eval_option *o = eval_options(); o->name; o++) {
        char flag[40], left[64];
        flag_of(o->name, flag);
        snprintf(left, sizeof left, "%s %s", flag, o->argument ? o->argument : "");
        if (kind < 0 || (o->kinds & 1u << kind))
            printf("  %-26s %s\n", left, o->help);
    }
    if (kind < 0 || kind == MOE_ROUTER)
        printf("  %-26s %s\n", "--out DIR", "router: write the arrays there as .npy, print the rest");
    printf("  %-26s %s\n", "--run-timeout S", "seconds after which it is ended (default: 600; 0: never)");
    printf("\nExample%s:\n", kind < 0 ? "s" : "");
    for (int k = 0; k < N_EVAL_KINDS; k++)
        if (kind < 0 || kind == k)
            printf("  %s\n", examples[k]);
    puts("\nExit code: 0 done, 1 the policy crashed, ended the process or took too long, 2 bad usage or input.");
}

/* ---- the command line ---- */

static int bad(struct err *e, const char *flag, const char *text, const char *expected)
{
    return err_set(e, ERR_INPUT, "%s: found \"%s\", expected %s", flag, text, expected);
}

/* KEY=VALUE; a value that reads as JSON is that, anything else a string. */
static int add_parameter(json_t *set, const char *pair, struct err *e)
{
    const char *eq = strchr(pair, '=');
    char key[200];
    if (!eq || eq == pair || (size_t)(eq - pair) >= sizeof key)
        return bad(e, "--set", pair, "KEY=VALUE");
    snprintf(key, sizeof key, "%.*s", (int)(eq - pair), pair);
    if (json_object_get(set, key))
        return err_set(e, ERR_INPUT, "--set %s: given twice", key);
    json_t *v = json_loads(eq + 1, JSON_DECODE_ANY, NULL);
    json_object_set_new(set, key, v ? v : json_string(eq + 1));
    return 0;
}

static int add_option(json_t *options, const struct eval_option *o, const char *flag, const char *text, struct err *e)
{
    char *end = NULL;
    json_t *v = NULL;
    errno = 0;
    if (o->type == EVAL_TABLE) {
        json_t *set = json_object_get(options, o->name);
        if (!set)
            json_object_set_new(options, o->name, set = json_object());
        return add_parameter(set, text, e);
    }
    if (json_object_get(options, o->name))
        return err_set(e, ERR_INPUT, "%s: given twice", flag);
    if (o->type == EVAL_WHOLE) {
        long long x = strtoll(text, &end, 10);
        if (end == text || *end || errno)
            return bad(e, flag, text, "a whole number");
        v = json_integer(x);
    } else if (o->type == EVAL_REAL) {
        double x = strtod(text, &end);
        if (end == text || *end || !(v = json_real(x))) /* not of NaN and infinities */
            return bad(e, flag, text, "a number");
    } else {
        v = o->type == EVAL_FLAG ? json_true() : json_string(text);
    }
    if (!v)
        return bad(e, flag, text, "UTF-8 text");
    json_object_set_new(options, o->name, v);
    return 0;
}

static int unknown_flag(const char *flag, struct err *e)
{
    enum { N_OWN = 3 };
    const char *names[64] = { "--out", "--run-timeout", "--help" };
    char flags[64 - N_OWN][40];
    int n = N_OWN;
    for (const struct eval_option *o = eval_options(); o->name && n < 64; o++, n++) {
        flag_of(o->name, flags[n - N_OWN]);
        names[n] = flags[n - N_OWN];
    }
    const char *near = cmd_nearest_option(flag, names, n);
    return err_set(e, ERR_INPUT, "unknown option %s%s%s%s (see: moelab eval --help)", flag,
                   near ? "; did you mean " : "", near ? near : "", near ? "?" : "");
}

struct line {
    const char *kind, *name, *out;
    char dir[500], part[520]; /* `out` without final slashes; where it is built */
    double timeout_s;
    bool help, building;
};

static int read_timeout(struct line *line, const char *text, struct err *e)
{
    char *end;
    line->timeout_s = strtod(text, &end);
    if (end == text || *end || !(line->timeout_s >= 0) || line->timeout_s > 1e9)
        return bad(e, "--run-timeout", text, "seconds, 0 or more");
    return 0;
}

static int parse(int argc, char **argv, struct line *line, json_t *options, struct err *e)
{
    for (int i = 1; i < argc; i++) {
        char flag[40];
        const char *text = argv[i], *value = NULL;
        if (!cmd_is_option(text)) {
            if (line->kind && line->name)
                return err_set(e, ERR_INPUT, "unexpected argument \"%s\": expected one KIND and one NAME", text);
            *(line->kind ? &line->name : &line->kind) = text;
            continue;
        }
        if (!strcmp(text, "--help")) {
            line->help = true;
            continue;
        }
        size_t n = strcspn(text, "=");
        const struct eval_option *o = eval_options();
        for (; o->name; o++) {
            flag_of(o->name, flag);
            if (strlen(flag) == n && !memcmp(flag, text, n))
                break;
        }
        bool out = n == 5 && !memcmp(text, "--out", 5), timeout = n == 13 && !memcmp(text, "--run-timeout", 13);
        if (!o->name && !out && !timeout)
            return unknown_flag(text, e);
        if (!o->name || o->type != EVAL_FLAG) {
            value = text[n] ? text + n + 1 : i + 1 < argc ? argv[++i] : NULL;
            if (!value)
                return err_set(e, ERR_INPUT, "%s needs a value: %s", text,
                               out ? "DIR" : timeout ? "S" : o->argument);
        } else if (text[n]) {
            return err_set(e, ERR_INPUT, "%s takes no value", flag);
        }
        if (out)
            line->out = value;
        else if (timeout)
            read_timeout(line, value, e);
        else
            add_option(options, o, flag, value, e);
        if (e->code)
            return e->code;
    }
    return 0;
}

/* ---- arrays as files ---- */

static const struct { const char *key, *dtype; } arrays[] = {
    { "offsets", "i8" }, { "experts", "i4" }, { "weights", "f4" }, { "load", "i8" },
    { "slots", "i4" }, { "combine", "f4" }, { "skip", "i4" }, { "again", "i4" }, /* which few routers have */
};
enum { N_ARRAYS = sizeof arrays / sizeof *arrays };

/* Nothing there, or a directory with nothing in it but arrays like these, whole or half written. */
static bool is_ours(const char *path)
{
    DIR *d = opendir(path);
    bool ours = d || errno == ENOENT;
    for (struct dirent *f; d && (f = readdir(d));) {
        bool known = !strcmp(f->d_name, ".") || !strcmp(f->d_name, "..");
        for (int i = 0; i < N_ARRAYS; i++) {
            size_t n = strlen(arrays[i].key);
            const char *rest = strncmp(f->d_name, arrays[i].key, n) ? "" : f->d_name + n;
            known |= !strcmp(rest, ".npy") || !strcmp(rest, ".npy.part");
        }
        ours &= known;
    }
    if (d)
        closedir(d);
    return ours;
}

static int open_out(struct line *line, struct err *e)
{
    size_t n = strlen(line->out);
    if (n >= sizeof line->dir)
        return err_set(e, ERR_INPUT, "--out %s: the path is too long", line->out);
    memcpy(line->dir, line->out, n + 1);
    while (n > 1 && line->dir[n - 1] == '/')
        line->dir[--n] = '\0';
    const char *last = record_base_name(line->dir);
    if (!*last || !strcmp(last, ".") || !strcmp(last, ".."))
        return err_set(e, ERR_INPUT, "--out \"%s\": expected the name of a directory to make", line->out);
    snprintf(line->part, sizeof line->part, "%s.part", line->dir);
    if (!is_ours(line->dir))
        return err_set(e, ERR_INPUT, "%s: exists and is no directory of arrays that moelab eval wrote; choose another "
                       "--out", line->dir);
    if (!is_ours(line->part))
        return err_set(e, ERR_INPUT, "%s: exists and was not left by moelab; arrays are built there: remove it or "
                       "choose another --out", line->part);
    record_discard(line->part);
    if (mkdir(line->part, 0777) < 0)
        return err_set(e, ERR_IO, "cannot make %s: %s", line->part, strerror(errno));
    line->building = true;
    return 0;
}

static int write_array(json_t *result, const char *key, const char *dtype, const char *dir, struct err *e)
{
    const json_t *list = json_object_get(result, key);
    char path[600];
    int64_t n = (int64_t)json_array_size(list);
    size_t bytes = (size_t)(dtype[1] - '0');
    char *data = malloc((size_t)n * bytes + 1);
    if (!data)
        return err_set(e, ERR_MEMORY, "out of memory");
    for (int64_t i = 0; i < n; i++) {
        const json_t *v = json_array_get(list, (size_t)i);
        int64_t wide = json_integer_value(v);
        int32_t whole = (int32_t)wide;
        float real = (float)json_number_value(v);
        const void *from = dtype[0] == 'f' ? (const void *)&real : bytes == 8 ? (const void *)&wide : &whole;
        memcpy(data + (size_t)i * bytes, from, bytes);
    }
    snprintf(path, sizeof path, "%s/%s.npy", dir, key);
    npy_write(path, dtype, 1, &n, data, e);
    free(data);
    json_object_del(result, key);
    return e->code;
}

/* Arrays of an earlier call give way in one step where the file system can do that. */
static int put_in_place(const struct line *line, struct err *e)
{
    if (rename(line->part, line->dir) == 0)
        return 0;
    if (errno != ENOTEMPTY && errno != EEXIST)
        return err_set(e, ERR_IO, "cannot rename %s to %s: %s", line->part, line->dir, strerror(errno));
    if (renameat2(AT_FDCWD, line->part, AT_FDCWD, line->dir, RENAME_EXCHANGE) == 0) {
        record_discard(line->part);
        return 0;
    }
    record_discard(line->dir);
    if (rename(line->part, line->dir) < 0)
        return err_set(e, ERR_IO, "cannot rename %s to %s: %s", line->part, line->dir, strerror(errno));
    return 0;
}

/* ---- a process of its own: a policy may crash it, end it or never leave it ---- */

struct shared { struct policy_note note; struct err err; };

static void child(const struct line *line, json_t *options, struct shared *shared, int fd)
{
    struct err e = { 0 };
    char *text = NULL;
    child_begin(&shared->note);
    json_t *result = eval(line->kind, line->name, options, true, &e);
    for (int i = 0; result && line->out && !e.code && i < N_ARRAYS; i++)
        if (json_object_get(result, arrays[i].key))
            write_array(result, arrays[i].key, arrays[i].dtype, line->part, &e);
    if (!e.code && !(text = json_dumps(result, JSON_COMPACT | JSON_REAL_PRECISION(17))))
        err_set(&e, ERR_MEMORY, "out of memory for the result");
    if (text)
        child_write(fd, text, strlen(text));
    shared->err = e;
    free(text);
    json_decref(result);
    json_decref(options); /* nothing of the parent's is left for sanitizers to report */
}

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Until the child has ended, and its end of the pipe with it; false: it did not within timeout_s. */
static bool read_answer(int fd, double timeout_s, FILE *to)
{
    const double deadline = timeout_s > 0 ? now_s() + timeout_s : INFINITY;
    static char piece[65536];
    for (;;) {
        double left = deadline - now_s();
        struct pollfd p = { .fd = fd, .events = POLLIN };
        if (left <= 0)
            return false;
        if (poll(&p, 1, isinf(left) ? -1 : left > 3600 ? 3600000 : (int)(left * 1000) + 1) <= 0)
            continue;
        ssize_t n = read(fd, piece, sizeof piece);
        if (n == 0 || (n < 0 && errno != EINTR))
            return true;
        if (n > 0)
            fwrite(piece, 1, (size_t)n, to);
    }
}

/* Stays in the process group: a terminal's input and its Ctrl-C are for the child too. */
static int eval_apart(const struct line *line, json_t *options, char **text, size_t *n, struct err *e)
{
    int fd[2], status = 0;
    struct shared *s = mmap(NULL, sizeof *s, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (s == MAP_FAILED || pipe2(fd, O_CLOEXEC) < 0)
        return err_set(e, ERR_IO, "cannot make a pipe: %s", strerror(errno));
    fflush(NULL);
    pid_t pid = fork();
    if (pid < 0)
        return err_set(e, ERR_IO, "cannot start a process: %s", strerror(errno));
    if (pid == 0) {
        close(fd[0]);
        child(line, options, s, fd[1]);
        exit(0); /* through atexit: sanitizers report leaks there */
    }
    close(fd[1]);
    FILE *to = open_memstream(text, n);
    bool ended = to && read_answer(fd[0], line->timeout_s, to);
    if (!ended)
        kill(pid, SIGKILL);
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    close(fd[0]);
    bool whole = to && fclose(to) == 0;
    if (!whole) {
        err_set(e, ERR_MEMORY, "out of memory for the result");
    } else if (ended && status == 0 && s->err.code) {
        *e = s->err;
    } else if (!ended || status != 0 || *n == 0) {
        char why[400];
        child_fault(&s->note, status, ended ? 0 : line->timeout_s, why, sizeof why);
        err_set(e, ERR_RUN, "%s", why);
    }
    munmap(s, sizeof *s);
    return e->code;
}

int cmd_eval(int argc, char **argv)
{
    struct err e = { 0 };
    struct line line = { .timeout_s = 600 };
    json_t *options = json_object();
    char *text = NULL;
    size_t n = 0;
    if (parse(argc, argv, &line, options, &e) == 0 && line.help) {
        help(line.kind ? kind_of_name(line.kind) : -1);
    } else if (!e.code) {
        if (!line.kind || !line.name)
            err_set(&e, ERR_INPUT, "eval: expected a kind and a name (see: moelab eval --help)");
        else if (line.out && strcmp(line.kind, eval_kind_name[MOE_ROUTER]) != 0)
            err_set(&e, ERR_INPUT, "--out: only routers write arrays");
        else if (!line.out || open_out(&line, &e) == 0)
            eval_apart(&line, options, &text, &n, &e);
        if (!e.code && (!line.out || put_in_place(&line, &e) == 0))
            puts(text); /* whether that arrived is seen at the end, as for every command */
        if (e.code && line.building)
            record_discard(line.part);
    }
    free(text);
    json_decref(options);
    return e.code ? cmd_fail(&e) : 0;
}

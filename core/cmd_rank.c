/* SPDX-License-Identifier: Apache-2.0
 * cmd_rank.c - moelab rank SPEC RESULT: one rank of a run on real hardware, started as rank.c says.
 *
 * Every rank opens the same run from the same specification and takes the same decisions; rank 0 writes the result. A
 * failure is written by whichever rank it happens to. */
#include "config.h"

#include "calibrate.h"
#include "cmd.h"
#include "machine.h"
#include "rank.h"
#include "team.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

/* The first to write wins; whole or not at all. */
static int write_result(const json_t *o, const char *path)
{
    char own[1024];
    snprintf(own, sizeof own, "%s.%ld", path, (long)getpid());
    int code = json_dump_file(o, own, JSON_COMPACT | JSON_REAL_PRECISION(17));
    if (code == 0 && link(own, path) < 0 && errno != EEXIST)
        code = -1;
    if (code < 0)
        fprintf(stderr, "moelab rank: cannot write %s: %s\n", path, strerror(errno));
    unlink(own);
    return code;
}

/* ---- calibration ---- */

struct taker { json_t *samples; const char *progress; };

static void take(void *self, const struct host_sample *s)
{
    struct taker *t = self;
    json_array_append_new(t->samples, calibration_sample(s));
}

static void show_step(void *self)
{
    const struct taker *t = self;
    FILE *f = fopen(t->progress, "a");
    if (f) {
        fputc('.', f);
        fclose(f);
    }
}

static int calibrate(const struct team *team, const json_t *ask, const char *path)
{
    char progress[1024];
    snprintf(progress, sizeof progress, "%s.progress", path);
    struct taker t = { json_array(), progress };
    struct host_calibration c = { .dir = json_string_value(json_object_get(ask, "dir")), .take = take,
                                  .step = show_step, .taker = &t };
    struct err e = { 0 };
    int code = 0;
    json_t *result = NULL;
    if (machine_calibrate_host(&c, &e) < 0) {
        result = json_pack("{s:s, s:i}", "error", e.text, "code", e.code);
        write_result(result, path);
        fflush(stderr);
        _exit(err_exit_code(e.code));
    }
    if (team->rank == 0) {
        result = json_pack("{s:O, s:s, s:i}", "samples", t.samples, "versions", c.versions, "ranks", team->size);
        code = write_result(result, path) < 0 ? 2 : 0;
    }
    json_decref(result);
    json_decref(t.samples);
    return code;
}

int cmd_rank(int argc, char **argv)
{
    if (argc > 1 && cmd_is_option(argv[1]))
        return cmd_unknown_option("rank", argv[1], (const char *const[]){ NULL });
    if (argc != 3)
        return cmd_usage("rank", "expected SPEC RESULT; `moelab run` starts ranks, nobody else needs to");
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* ends with mpirun, however that ends */
    json_error_t at;
    json_t *spec = json_load_file(argv[1], 0, &at), *result = NULL;
    struct team *team = NULL;
    struct err e = { 0 };
    int code = 0;
    if (!spec) {
        err_set(&e, ERR_INPUT, "%s:%d: %s", argv[1], at.line, at.text);
        return cmd_fail(&e);
    }
    if (team_open(&team, &e) == 0 && !team)
        err_set(&e, ERR_INPUT, "moelab rank: this is none of several processes; `moelab run` starts those");
    if (!e.code && json_object_get(spec, "calibrate"))
        code = calibrate(team, json_object_get(spec, "calibrate"), argv[2]);
    else if (!e.code)
        rank_go(team, spec, &result, &e);
    if (e.code) {
        result = json_pack("{s:s, s:i}", "error", e.text, "code", e.code);
        write_result(result, argv[2]);
        /* Not a word to MPI: leaving it would wait for the others, ending without having left it makes mpirun end
         * them. */
        fflush(stderr);
        _exit(err_exit_code(e.code));
    }
    if (result && write_result(result, argv[2]) < 0)
        code = 2;
    team_leave(team);
    json_decref(result);
    json_decref(spec);
    return code;
}

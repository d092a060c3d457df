/* SPDX-License-Identifier: Apache-2.0
 * rank_go.c - one run in a process that is a rank: as anywhere, but that the ranks first make sure that they are the
 * same, and that what fails on one of them fails on all. */
#include "config.h"

#include "rank.h"
#include "registry.h"
#include "run.h"
#include "sha256.h"
#include "team.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A file that is read by every rank, where it is. */
static int same_file(struct team *t, const char *what, const char *path, struct err *e)
{
    char digest[65];
    struct err unreadable = { 0 };
    if (sha256_file(path, digest, &unreadable) < 0)
        snprintf(digest, sizeof digest, "nothing readable");
    return team_same(t, what, digest, e);
}

/* The file that an object of the program or of a module is from. */
static int same_source(struct team *t, const char *what, const void *object, struct err *e)
{
    Dl_info info;
    return dladdr(object, &info) && info.dli_fname && strchr(info.dli_fname, '/')
               ? same_file(t, what, info.dli_fname, e) : e->code;
}

static int same_policy(struct team *t, const struct policy *p, struct err *e)
{
    char what[100];
    snprintf(what, sizeof what, "%s %s", kind_name[p->plugin->kind], p->plugin->name);
    return same_source(t, what, p->plugin, e);
}

/* Of what they have been started with; what they decide is compared in every step. */
static int same_run(struct team *t, const struct run *r, const json_t *spec, struct err *e)
{
    const struct policy *const one[] = { &r->router, &r->placement, &r->dispatch, &r->offload };
    char digest[65], *text = json_dumps(spec, JSON_COMPACT | JSON_SORT_KEYS | JSON_REAL_PRECISION(17));
    struct sha256 sum;
    if (!text)
        err_set(e, ERR_MEMORY, "out of memory for the specification");
    sha256_init(&sum);
    sha256_update(&sum, text ? text : "", text ? strlen(text) : 0);
    sha256_final(&sum, digest);
    free(text);
    same_file(t, "moelab", "/proc/self/exe", e);
    team_same(t, "scenario", digest, e);
    same_source(t, "machine module", r->machine.ops, e);
    for (size_t i = 0; i < sizeof one / sizeof *one && !e->code; i++)
        same_policy(t, one[i], e);
    for (int i = 0; i < r->n_balancers && !e->code; i++)
        same_policy(t, &r->balancer[i], e);
    return e->code;
}

int rank_go(struct team *t, json_t *spec, json_t **result, struct err *e)
{
    struct run run;
    *result = NULL;
    t->agreed = false;
    run_open_rank(&run, spec, t, e);
    if (team_agree(t, e) == 0 && same_run(t, &run, spec, e) == 0)
        run_go(&run);
    if (!t->agreed)
        team_agree(t, e);
    if (t->lost)
        return e->code; /* the process ends, and what the machine has under way never would */
    if (!e->code && t->rank == 0) {
        *result = run_result(&run);
        json_object_set_new(*result, "spec", run_resolve(&run));
    }
    run_close(&run);
    return e->code;
}

/* ---- ranks that mpirun has started with `moelab run` ---- */

int rank_lead(struct team *t, json_t *spec, json_t **result, struct err *e)
{
    char *text = json_dumps(spec, JSON_COMPACT | JSON_REAL_PRECISION(17));
    *result = NULL;
    if (!text)
        return err_set(e, ERR_MEMORY, "out of memory for the specification");
    if (t->ops->tell(t, &text, e) == 0)
        rank_go(t, spec, result, e);
    free(text);
    return e->code;
}

void rank_dismiss(struct team *t)
{
    char none[] = "", *text = none;
    struct err ignored = { 0 };
    if (!t->lost)
        t->ops->tell(t, &text, &ignored);
}

int rank_follow(struct team *t, struct err *e)
{
    for (;;) {
        char *text = NULL;
        struct err failed = { 0 }; /* rank 0 says so */
        json_t *none;
        if (t->ops->tell(t, &text, e) < 0)
            return e->code;
        json_t *spec = *text ? json_loads(text, 0, NULL) : NULL;
        const bool last = !*text;
        free(text);
        if (last)
            return 0;
        if (!spec) {
            t->lost = true;
            return err_set(e, ERR_MEMORY, "rank %d: out of memory for the specification", t->rank);
        }
        rank_go(t, spec, &none, &failed);
        json_decref(spec);
        if (t->lost)
            return err_set(e, failed.code, "%s", failed.text);
    }
}

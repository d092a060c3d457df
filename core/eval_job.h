/* SPDX-License-Identifier: Apache-2.0
 * eval_job.h - what the files eval_*.c share: the job, its input as arrays, and a lone policy's surroundings. */
#ifndef EVAL_JOB_H
#define EVAL_JOB_H

#include "eval.h"
#include "policy.h"

struct eval_job {
    int kind;                   /* enum moe_kind or eval_kind */
    const char *name;
    const json_t *options;      /* checked: known names, right types */
    json_t *input;              /* an object, maybe empty */
    char file[512];             /* what messages call the input */
    char dir[512];              /* with a final slash, or "": where relative paths in the input start */
    char who[128];              /* "router softmax-top-k" */
    struct arena memory;        /* of everything that is read; lives as long as the job */
    const struct moe_plugin *plugin;
    json_t *params;             /* from `set`, and what the input says under other names */
    struct moe_model model;
    struct topology *topology;
    struct policy_context context;
    bool context_open;
    uint64_t seed;
    int32_t n_repeats;
    struct err *err;
};

/* One per kind: fills `out`. 0 or an error. */
int eval_router(struct eval_job *, json_t *out);
int eval_balancer(struct eval_job *, json_t *out);
int eval_placement(struct eval_job *, json_t *out);
int eval_dispatch(struct eval_job *, json_t *out);
int eval_offload(struct eval_job *, json_t *out);
int eval_machine(struct eval_job *, json_t *out);
int eval_metric(struct eval_job *, json_t *out);

/* ---- options (eval.c) ---- */

const char *job_option_text(const struct eval_job *, const char *name); /* NULL: not given */
double job_option_real(const struct eval_job *, const char *name, double def);
int64_t job_option_whole(const struct eval_job *, const char *name, int64_t def);

/* ---- the input (eval_input.c) ---- */

/* Reads the input's JSON; what options give under the same name ("logits") joins it. */
int job_read_input(struct eval_job *);
bool job_has(const struct eval_job *, const char *key);
/* "FILE: KEY: TEXT" as ERR_INPUT. */
int job_fail(struct eval_job *, const char *key, const char *fmt, ...) MOE_PRINTF(3, 4);
int job_whole(struct eval_job *, const char *key, int32_t def, int32_t min, int32_t max, int32_t *out);
int job_real(struct eval_job *, const char *key, double def, double min, double max, double *out);
/* A file that the input names: beside the input, else as given. */
const char *job_path(const struct eval_job *, const char *name, char *path, size_t room);

/* Arrays: `shape` holds n_dims entries, -1 for any; what was found comes back in it. Every element is finite and
 * within [min, max]. A missing key, another shape, a bad element: NULL and a message. */
double *job_reals(struct eval_job *, const char *key, int n_dims, int64_t *shape, double min, double max);
float *job_floats(struct eval_job *, const char *key, int n_dims, int64_t *shape);
int64_t *job_wholes(struct eval_job *, const char *key, int n_dims, int64_t *shape, int64_t min, int64_t max);
int32_t *job_ids(struct eval_job *, const char *key, int n_dims, int64_t *shape, int64_t min, int64_t max);
/* Dimensions of an array before it is read, for inputs that may have several forms; -1 after a message. */
int job_n_dims(struct eval_job *, const char *key);

/* {offsets [T+1], experts [n], weights [n]}: unique ids below max_experts per token. weights: 1/k without. Freed by
 * routes_free(). n_tokens: -1 for any. */
int job_routes(struct eval_job *, const char *key, int32_t n_tokens, int32_t max_experts, struct moe_routes *);

/* "bound", "flow", ... (eval_machine.c) */
int job_tier(struct eval_job *, const char *name, enum net_tier *);

/* ---- surroundings of a lone policy (eval_policy.c) ---- */

/* The machine that the input names, else one as plain as the shape allows, of n_devices on n_nodes. 0: what `devices`
 * and `nodes` in the input or the machine's own file say, else 1. */
int job_machine(struct eval_job *, int32_t n_devices);
/* Description of a machine with n_devices (0: as it is) spread over whole nodes of its own size, or over n_nodes. */
int job_topology(struct eval_job *, const char *machine, int32_t n_devices, int32_t n_nodes);
/* `devices` [T] or a number, `device` [T]: where tokens are; without: contiguous. Comes after job_machine. */
int32_t *job_token_devices(struct eval_job *, int32_t n_tokens);
/* How many devices `devices` or `device` speak of; 0: neither is there; < 0: error. */
int32_t job_n_devices(struct eval_job *);
/* One layer's batch from logits, token_ids, positions, ...; fills in the model's experts, top_k and width. */
int job_batch(struct eval_job *, struct moe_batch *, struct moe_routes *recorded, struct moe_routes *previous);
/* That the batch holds what a policy needs. */
int job_check_needs(struct eval_job *, const struct moe_plugin *, const struct moe_batch *);

/* Model and topology must be there. */
int job_context(struct eval_job *);
bool job_takes(const struct eval_job *, const char *param);
/* A parameter from the input; `set` must not give it too. */
int job_param(struct eval_job *, const char *param, const char *key, json_t *value);
/* `tensors` of the input: learned arrays, files beside it. */
int job_tensors(struct eval_job *);
int job_open_policy(struct eval_job *, struct policy *);

/* ---- small things ---- */

double job_clock(void); /* s, monotonic */
void *job_alloc(struct eval_job *, size_t n, size_t size); /* zeroed; NULL after a message */
double job_max_vio(const int64_t *load, int32_t n);
json_t *job_list(const int32_t *, int64_t n);
json_t *job_list_wide(const int64_t *, int64_t n);
json_t *job_list_floats(const float *, int64_t n);
json_t *job_list_reals(const double *, int64_t n);
/* offsets, experts and weights, added to `out`. */
void job_put_routes(json_t *out, const struct moe_routes *);

#endif

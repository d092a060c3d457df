/* SPDX-License-Identifier: Apache-2.0
 * policy.h - a loaded policy with its parameters, its state and the services it may call. */
#ifndef POLICY_H
#define POLICY_H

#include "err.h"
#include "graph.h"
#include "machine.h"
#include "moelab.h"
#include "param.h"

/* Memory handed out piece by piece and taken back at once. Blocks are kept for reuse by arena_reset. */
struct arena { struct arena_block *first, *current; };
void *arena_take(struct arena *, size_t bytes); /* 16-byte aligned; NULL when there is none */
void arena_reset(struct arena *);
void arena_free(struct arena *);

/* Of a device's memory, for what stays there; the rest is for activations and rows on their way. */
static const double ROOM_SHARE = 0.9;

/* What the run knows and services need; env->core of every policy points into it. */
struct policy_context {
    const struct moe_model *model;
    const struct topology *topology;
    struct moe_topology view;     /* what policies see of it; arrays owned here */
    int32_t stride;               /* device d of the view begins at the topology's d x stride; 0 is 1 */
    struct machine *machine;      /* for host->estimate; NULL where nothing runs */
    struct tally *tally;          /* counts exchanges that are laid out; NULL: nobody asks */
    uint64_t seed;
    uint32_t n_objects;
    int64_t cache_objects;
    struct err *err;
};
/* fixed_bytes: of each device's memory, for what is not experts. */
int policy_context_init(struct policy_context *, const struct moe_model *, const struct topology *, enum precision,
                        double fixed_bytes, uint64_t seed, struct err *);
void policy_context_free(struct policy_context *);

struct policy {
    const struct moe_plugin *plugin;
    struct param_set params;
    struct moe_env env;
    void *self;
    struct policy_context *context;
    struct arena run, scratch;
    struct moe_graph trial;       /* host->graph_try */
};

/* Fills parameters, allocates state, calls init. The policy must not move afterwards. */
int policy_open(struct policy *, struct policy_context *, const struct moe_plugin *, const json_t *params,
                const char *who, struct err *);
void policy_close(struct policy *);

/* Around every hook call: `policy_enter` frees the scratch of the call before and notes who runs (for the report if
 * it never comes back); `policy_leave` turns the hook's return value into an error that names policy and hook. */
void policy_enter(struct policy *, const char *hook);
int policy_leave(struct policy *, const char *hook, int code);

/* HOOK(p, router.select, args...) calls the hook between the two; the value is 0 or an error code. */
#define HOOK(p, kind, hook, ...)                                                                                      \
    (policy_enter((p), #hook), policy_leave((p), #hook, (p)->plugin->ops.kind.hook((p)->self, __VA_ARGS__)))

/* Whether what balancers add to scores reaches a router's choice. */
static inline bool policy_heeds_bias(const struct moe_plugin *router)
{
    return (router->ops.router.score && router->ops.router.select) || (router->needs & MOE_HEEDS_BIAS);
}

/* Experts of a layer that cost nothing, as a router says; 0 without its hook. */
int policy_n_free(struct policy *, int32_t layer, int32_t *n_free);

/* Where a child process leaves a note of what it is doing, so that its parent can say whose fault a crash or a
 * loop was. The parent maps it shared; NULL: nobody wants to know. */
struct policy_note { char kind[16], name[64], hook[32]; };
void policy_note_to(volatile struct policy_note *);

/* ---- placements under construction ---- */

struct placement {
    struct moe_placement view; /* first: a moe_placement * handed to a plugin is a struct placement * */
    struct moe_replica *replica;
    int32_t room;
    int32_t *layer_first, *expert_first, *by_expert;
    int32_t *instead; /* [L*E] or NULL: nothing left out */
};
void placement_reset(struct placement *);
void placement_free(struct placement *);
/* Sorts by layer (stable), builds the views, checks that every expert of every layer is somewhere, wholly. */
int placement_finish(struct placement *, const struct moe_model *, const char *who, struct err *);

/* ---- routes ---- */

int routes_reserve(struct moe_routes *, int64_t n, struct err *);
/* Empty routes for n_tokens: offsets present, nothing routed. */
int routes_begin(struct moe_routes *, int32_t n_tokens, int32_t *room_tokens, struct err *);
void routes_free(struct moe_routes *);
/* Offsets monotone, ids unique per token and in range, weights finite. */
int routes_check(const struct moe_routes *, int32_t n_experts, const char *who, struct err *);
/* What is checked of slots, merged experts and halves of a layer alone; rows that each expert computes, or each merged
 * expert (routes_forms.c). */
int routes_check_forms(const struct moe_routes *, const char *who, struct err *);
int routes_rows(const struct moe_routes *, int32_t n_experts, int64_t *rows, struct err *);
const char *routes_form_name(enum moe_form);

#endif

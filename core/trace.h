/* SPDX-License-Identifier: Apache-2.0
 * trace.h - recorded routing: a directory of .npy files and a trace.json. Read-only once opened. */
#ifndef TRACE_H
#define TRACE_H

#include "npy.h"
#include <jansson.h>
#include <stdbool.h>

struct trace {
    char dir[512];
    int32_t n_layers, n_experts, top_k, n_requests;
    int64_t n_tokens;
    json_t *meta;        /* the whole trace.json */
    struct npy experts;  /* u1|u2 [tokens, layers, k] */
    struct npy offsets;  /* i8 [requests + 1] */
    /* optional: data is NULL when the file is absent */
    struct npy weights;    /* f2|f4 [tokens, layers, k] */
    struct npy logits;     /* f2|f4 [tokens, layers, experts] */
    struct npy token_ids;  /* i4 [tokens] */
    struct npy positions;  /* i4 [tokens] */
    struct npy importance; /* f4|f2 [tokens] */
    struct npy hidden;     /* f2|f4 [tokens_h <= tokens, layers, d] */
    struct npy gate;       /* f4 [layers, experts, d] */
    struct npy domains;    /* u1 [requests] */
};

/* Opens and checks everything: dtypes, shapes against trace.json, ids in range, an expert twice in a row's k,
 * offsets that start at 0, never decrease and end at tokens, finite weights and logits. Errors name the file and
 * the element. A trace without trace.json, experts.npy or offsets.npy is refused. */
int trace_open(struct trace *, const char *dir, struct err *);
void trace_close(struct trace *);

/* Has the cache fetch what trace_experts will soon be asked for. */
void trace_fetch(const struct trace *, int64_t token, int32_t layer);
/* Experts of (token, layer): k ids into out. */
void trace_experts(const struct trace *, int64_t token, int32_t layer, int32_t *out);
/* Their weights; 1/k each when the trace has none. */
void trace_weights(const struct trace *, int64_t token, int32_t layer, float *out);
/* Request of a token (binary search in offsets). */
int32_t trace_request(const struct trace *, int64_t token);
/* SHA-256 over the trace's files in name order, as 64 hex digits: that of the text which
 * `sha256sum FILE...` prints, run in the trace's directory. */
int trace_checksum(const struct trace *, char hex[65], struct err *);

/* Whether a trace may hold a file of this name. */
bool trace_has_part(const char *file);

/* ---- writing ---- */

/* Files are written to DIR.part through trace_out_path(); trace_out_commit() writes trace.json, opens the result with
 * all checks and renames it to DIR. DIR may exist if it is empty or a trace and nothing else (it is replaced).
 * trace_out_abandon() removes what is there, may be called at any time and twice. */
struct trace_out { char dir[400], part[416], path[512]; bool open; };
int trace_out_begin(struct trace_out *, const char *dir, struct err *);
const char *trace_out_path(struct trace_out *, const char *file); /* valid until the next call */
int trace_out_commit(struct trace_out *, const json_t *meta, struct err *);
void trace_out_abandon(struct trace_out *);
/* What every trace.json needs; more may be added. NULL without memory. */
json_t *trace_meta(int32_t n_layers, int32_t n_experts, int32_t top_k, int32_t n_requests, int64_t n_tokens);

/* Synthetic routing with physical parameters; see doc/traces.md for what each does. Writes a trace directory. */
struct trace_synth {
    int32_t n_layers, n_experts, top_k, n_requests, tokens_per_request;
    double skew;       /* [0, 10]: popularity within a layer: sigma of log-normal weights; 0 = uniform */
    double stickiness; /* [0, 1): chance that a token keeps the previous token's expert in a slot */
    double affinity;   /* [0, 1): chance that another slot follows the layer-to-layer map instead of popularity */
    double drift;      /* [0, 1]: how far popularity moves per request: 0 = never, 1 = independent every request */
    bool logits;       /* also write router logits whose top-k are the experts */
    uint64_t seed;
};
int trace_synthesise(const struct trace_synth *, const char *dir, struct err *);
/* The same routes in memory: [requests * tokens_per_request][layers][k]. */
int trace_synth_routes(const struct trace_synth *, uint16_t *experts, struct err *);
/* Sets skew, stickiness, affinity and, if it is negative, drift, so that synthetic routing of the parameters' shape
 * measures as the trace does. The shape (layers, experts, top_k, requests and their length) is the caller's.
 * *report: {"target": {...}, "reached": {...}}; report may be NULL. */
int trace_synth_like(struct trace_synth *, const struct trace *, json_t **report, struct err *);

/* Importers; each writes a checked trace directory. */
struct trace_import {
    const char *format, *input, *offsets, *model; /* offsets, model: NULL when not given */
    int32_t n_experts;    /* 0: the largest id + 1 */
    int32_t first_layer;  /* layers before it are left out: dense layers, for which engines record zeros */
    bool drop_padding;    /* leave out tokens whose ids are all negative */
};
/* What the importer's user should know. */
struct trace_import_report {
    int64_t n_tokens, n_dropped;
    int32_t n_experts;
    int64_t longest_run, longest_run_at; /* identical consecutive tokens: profiling rows repeat */
};
int trace_import_vllm(const struct trace_import *, const char *dir, struct trace_import_report *, struct err *);

#endif

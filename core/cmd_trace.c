/* SPDX-License-Identifier: Apache-2.0
 * cmd_trace.c - `moelab trace info|check|import|synth`. */
#include "config.h"

#include "cmd.h"
#include "cmd_options.h"
#include "moelab.h"
#include "routing.h"

#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- info ---- */

static json_t *describe_files(const struct trace *t)
{
    const struct npy *arrays[] = { &t->domains, &t->experts, &t->gate,      &t->hidden,    &t->importance,
                                   &t->logits,  &t->offsets, &t->positions, &t->token_ids, &t->weights };
    json_t *files = json_object();
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) {
        const struct npy *a = arrays[i];
        if (!a->data)
            continue;
        char dtype[3] = { a->kind, (char)('0' + a->item_bytes), '\0' };
        json_t *shape = json_array();
        for (int d = 0; d < a->n_dims; d++)
            json_array_append_new(shape, json_integer(a->shape[d]));
        json_object_set_new(files, strrchr(a->path, '/') + 1, json_pack("{s:s, s:o}", "dtype", dtype, "shape", shape));
    }
    return files;
}

/* Requests per domain, under the names that trace.json gives, else their numbers. NULL without domains. */
static json_t *describe_domains(const struct trace *t)
{
    if (!t->domains.data)
        return NULL;
    json_t *out = json_object();
    const json_t *names = json_object_get(t->meta, "domains");
    for (int32_t r = 0; r < t->n_requests; r++) {
        char number[16];
        int64_t id = npy_int(&t->domains, r);
        const char *name = json_string_value(json_array_get(names, (size_t)id));
        snprintf(number, sizeof number, "%" PRId64, id);
        name = name ? name : number;
        json_object_set_new(out, name, json_integer(json_integer_value(json_object_get(out, name)) + 1));
    }
    return out;
}

static int describe(const struct trace *t, json_t **out, struct err *err)
{
    struct routing r = routing_of(t);
    double max_vio, all, within, overlap, chance, affinity = 0, affinity_chance = 0;
    char hex[65];
    int64_t longest = 0;
    int rc;
    if ((rc = routing_max_vio(&r, -1, 0, &max_vio, err)) < 0 ||
        (rc = routing_unevenness(&r, -1, &all, &within, err)) < 0 ||
        (rc = routing_overlap(&r, -1, &overlap, &chance, err)) < 0 ||
        (rc = r.n_layers > 1 ? routing_affinity(&r, -1, &affinity, &affinity_chance, err) : 0) < 0 ||
        (rc = trace_checksum(t, hex, err)) < 0)
        return rc;
    for (int32_t q = 0; q < r.n_requests; q++)
        longest = r.offsets[q + 1] - r.offsets[q] > longest ? r.offsets[q + 1] - r.offsets[q] : longest;
    const char *model = json_string_value(json_object_get(t->meta, "model"));
    *out = json_pack("{s:s, s:s, s:i, s:i, s:i, s:i, s:I, s:I}", "dir", t->dir, "model", model ? model : "unknown",
                     "layers", t->n_layers, "experts", t->n_experts, "top_k", t->top_k, "requests", t->n_requests,
                     "tokens", (json_int_t)t->n_tokens, "longest_request", (json_int_t)longest);
    if (!*out)
        return err_set(err, ERR_MEMORY, "%s: no memory to describe it", t->dir);
    json_object_set_new(*out, "max_over_mean", json_real(max_vio + 1));
    json_object_set_new(*out, "unevenness", json_real(all));
    json_object_set_new(*out, "unevenness_within", json_real(within));
    json_object_set_new(*out, "overlap", json_real(overlap));
    json_object_set_new(*out, "overlap_chance", json_real(chance));
    if (r.n_layers > 1) {
        json_object_set_new(*out, "affinity", json_real(affinity));
        json_object_set_new(*out, "affinity_chance", json_real(affinity_chance));
    }
    json_object_set_new(*out, "files", describe_files(t));
    json_t *domains = describe_domains(t);
    if (domains)
        json_object_set_new(*out, "domains", domains);
    json_object_set_new(*out, "sha256", json_string(hex));
    return 0;
}

static double real_of(const json_t *j, const char *key)
{
    return json_number_value(json_object_get(j, key));
}

static int64_t int_of(const json_t *j, const char *key)
{
    return json_integer_value(json_object_get(j, key));
}

static void print_table(json_t *d)
{
    const char *key, *separator = "";
    json_t *value;
    int64_t requests = int_of(d, "requests"), tokens = int_of(d, "tokens");
    printf("trace       %s\n", json_string_value(json_object_get(d, "dir")));
    printf("model       %s: %" PRId64 " layers x %" PRId64 " experts, top %" PRId64 "\n",
           json_string_value(json_object_get(d, "model")), int_of(d, "layers"), int_of(d, "experts"),
           int_of(d, "top_k"));
    printf("tokens      %" PRId64 " in %" PRId64 " requests (mean %.0f, longest %" PRId64 ")\n", tokens, requests,
           requests ? (double)tokens / (double)requests : 0.0, int_of(d, "longest_request"));
    printf("files      ");
    json_object_foreach(json_object_get(d, "files"), key, value)
        printf(" %.*s(%s)", (int)strcspn(key, "."), key, json_string_value(json_object_get(value, "dtype")));
    printf("\npopularity  largest load %.2f of the mean; squared variation %.3f, within a request %.3f\n",
           real_of(d, "max_over_mean"), real_of(d, "unevenness"), real_of(d, "unevenness_within"));
    printf("overlap     %.3f of a token's experts are the token before's; chance %.3f\n", real_of(d, "overlap"),
           real_of(d, "overlap_chance"));
    if (json_object_get(d, "affinity"))
        printf("affinity    %.3f of routes go on to the likeliest expert of the next layer; chance %.3f\n",
               real_of(d, "affinity"), real_of(d, "affinity_chance"));
    if (json_object_get(d, "domains")) {
        printf("domains     ");
        json_object_foreach(json_object_get(d, "domains"), key, value)
        {
            printf("%s%s %" PRId64, separator, key, (int64_t)json_integer_value(value));
            separator = ", ";
        }
        printf("\n");
    }
    printf("sha256      %s\n", json_string_value(json_object_get(d, "sha256")));
}

static int run_info(int argc, char **argv, const struct verb *v, struct err *err)
{
    bool as_json = false;
    const char *dir = NULL;
    struct option options[] = { FLAG("json", "one JSON object", &as_json), { .type = OPTION_END } };
    struct trace t;
    json_t *d = NULL;
    int rc = options_parse(argc, argv, v, options, &dir, err);
    if (rc != 0)
        return rc;
    if ((rc = trace_open(&t, dir, err)) < 0)
        return rc;
    if ((rc = describe(&t, &d, err)) == 0) {
        if (as_json) {
            json_dumpf(d, stdout, JSON_INDENT(1) | JSON_REAL_PRECISION(9));
            printf("\n");
        } else {
            print_table(d);
        }
    }
    json_decref(d);
    trace_close(&t);
    return rc;
}

/* ---- check ---- */

/* Rows whose recorded experts are the logits' top k, in any order. Other rules than plain top-k differ by right. */
static int count_agreeing(const struct trace *t, int64_t *n_agree, struct err *err)
{
    int32_t n = t->n_experts, k = t->top_k;
    float *logit = malloc((size_t)n * sizeof *logit);
    int32_t *top = malloc((size_t)k * sizeof *top), *chosen = malloc((size_t)k * sizeof *chosen);
    int rc = logit && top && chosen ? 0 : err_set(err, ERR_MEMORY, "%s: no memory", t->dir);
    *n_agree = 0;
    for (int64_t row = 0; rc == 0 && row < t->n_tokens * t->n_layers; row++) {
        int32_t shared = 0;
        npy_floats(&t->logits, row * n, n, logit);
        moe_top_k(logit, n, k, top);
        trace_experts(t, row / t->n_layers, (int32_t)(row % t->n_layers), chosen);
        for (int32_t i = 0; i < k; i++)
            for (int32_t j = 0; j < k; j++)
                shared += top[i] == chosen[j];
        *n_agree += shared == k;
    }
    free(logit);
    free(top);
    free(chosen);
    return rc;
}

static int run_check(int argc, char **argv, const struct verb *v, struct err *err)
{
    const char *dir = NULL;
    struct option options[] = { { .type = OPTION_END } };
    struct trace t;
    int64_t n_agree;
    int rc = options_parse(argc, argv, v, options, &dir, err);
    if (rc != 0)
        return rc;
    if ((rc = trace_open(&t, dir, err)) < 0)
        return rc;
    printf("%s: ok: %" PRId64 " tokens x %d layers x top %d of %d experts\n", t.dir, t.n_tokens, t.n_layers, t.top_k,
           t.n_experts);
    if (t.logits.data && (rc = count_agreeing(&t, &n_agree, err)) == 0)
        printf("%s: %" PRId64 " of %" PRId64 " rows hold the top %d of their logits\n", t.dir, n_agree,
               t.n_tokens * t.n_layers, t.top_k);
    DIR *d = opendir(t.dir);
    for (struct dirent *entry; d && (entry = readdir(d));) {
        size_t n = strlen(entry->d_name);
        if (n > 4 && !strcmp(entry->d_name + n - 4, ".npy") && !trace_has_part(entry->d_name))
            fprintf(stderr, "moelab: note: %s/%s is not a file of a trace and is not read\n", t.dir, entry->d_name);
    }
    if (d)
        closedir(d);
    trace_close(&t);
    return rc;
}

/* ---- import ---- */

static int run_import(int argc, char **argv, const struct verb *v, struct err *err)
{
    enum { SUSPICIOUS_RUN = 64 }; /* identical consecutive tokens that no text makes */
    struct trace_import how = { .format = "vllm" };
    struct trace_import_report report;
    const char *out = NULL;
    struct option options[] = {
        TEXT("format", "NAME", "vllm (the default): int16 ids [tokens, layers, k]", &how.format),
        TEXT("out", "DIR", "the trace to write (required)", &out),
        TEXT("offsets", "FILE.npy", "first token of each request, and the total; default: one request", &how.offsets),
        INT("experts", "E", "experts per layer; default: the largest id + 1", &how.n_experts, 1, 65536),
        INT("first-layer", "L", "leave out layers before it (dense layers)", &how.first_layer, 0, 65535),
        FLAG("drop-padding", "leave out tokens whose ids are all negative", &how.drop_padding),
        TEXT("model", "NAME", "the model's name, for trace.json", &how.model),
        { .type = OPTION_END },
    };
    int rc = options_parse(argc, argv, v, options, &how.input, err);
    if (rc != 0)
        return rc;
    if (strcmp(how.format, "vllm"))
        return err_set(err, ERR_INPUT, "--format: found \"%s\", expected vllm", how.format);
    if (!out)
        return err_set(err, ERR_INPUT, "--out DIR is required");
    if ((rc = trace_import_vllm(&how, out, &report, err)) < 0)
        return rc;
    if (!how.n_experts)
        fprintf(stderr, "moelab: note: %d experts, from the largest id; give --experts if there are more\n",
                report.n_experts);
    if (report.longest_run > SUSPICIOUS_RUN)
        fprintf(stderr,
                "moelab: warning: %s: %" PRId64 " identical tokens from token %" PRId64 " on; rows that an engine "
                "records while profiling look so\n",
                how.input, report.longest_run, report.longest_run_at);
    printf("%s: %" PRId64 " tokens, %" PRId64 " of padding left out\n", out, report.n_tokens, report.n_dropped);
    return 0;
}

/* ---- synth ---- */

/* Takes from a trace what was not given: the shape, and the parameters that make it alike. */
static int imitate(struct trace_synth *p, const char *like, const struct option *options, struct err *err)
{
    struct trace t;
    json_t *report = NULL;
    int rc = trace_open(&t, like, err);
    if (rc < 0)
        return rc;
    if (!options_given(options, "layers"))
        p->n_layers = t.n_layers;
    if (!options_given(options, "experts"))
        p->n_experts = t.n_experts;
    if (!options_given(options, "top-k"))
        p->top_k = t.top_k;
    if (!options_given(options, "requests"))
        p->n_requests = t.n_requests;
    if (!options_given(options, "tokens") && t.n_requests)
        p->tokens_per_request = (int32_t)((t.n_tokens + t.n_requests - 1) / t.n_requests);
    if (!options_given(options, "drift"))
        p->drift = -1;
    rc = trace_synth_like(p, &t, &report, err);
    trace_close(&t);
    if (rc < 0)
        return rc;
    const json_t *target = json_object_get(report, "target"), *reached = json_object_get(report, "reached");
    printf("like %s: skew %.4f, stickiness %.4f, affinity %.4f, drift %.4f\n%-20s %9s %9s\n", like, p->skew,
           p->stickiness, p->affinity, p->drift, "", "target", "reached");
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)target, key, value)
        printf("%-20s %9.4f %9.4f\n", key, json_number_value(value), real_of(reached, key));
    json_decref(report);
    return 0;
}

static int run_synth(int argc, char **argv, const struct verb *v, struct err *err)
{
    struct trace_synth p = { .n_layers = 24,
                             .n_experts = 64,
                             .top_k = 4,
                             .n_requests = 32,
                             .tokens_per_request = 256,
                             .skew = 0.9,
                             .stickiness = 0.2,
                             .affinity = 0.5,
                             .seed = 1 };
    const char *out = NULL, *like = NULL;
    struct option options[] = {
        TEXT("out", "DIR", "the trace to write (required)", &out),
        TEXT("like", "DIR", "measure this trace; what is not given is set so as to match it", &like),
        INT("layers", "L", "default 24", &p.n_layers, 1, 65536),
        INT("experts", "E", "default 64", &p.n_experts, 1, 65536),
        INT("top-k", "K", "default 4", &p.top_k, 1, 65536),
        INT("requests", "R", "default 32", &p.n_requests, 0, 1e9),
        INT("tokens", "T", "per request; default 256", &p.tokens_per_request, 0, 1e9),
        REAL("skew", "X", "sigma of log-normal popularity, 0 to 10; default 0.9", &p.skew),
        REAL("stickiness", "X", "chance to keep the last token's expert, below 1; default 0.2", &p.stickiness),
        REAL("affinity", "X", "chance to follow the layer-to-layer map, below 1; default 0.5", &p.affinity),
        REAL("drift", "X", "how far popularity moves per request, 0 to 1; default 0", &p.drift),
        SEED("seed", "N", "default 1", &p.seed),
        FLAG("logits", "also write router logits and weights", &p.logits),
        { .type = OPTION_END },
    };
    static const char *const fitted[] = { "skew", "stickiness", "affinity" };
    int rc = options_parse(argc, argv, v, options, NULL, err);
    if (rc != 0)
        return rc;
    if (!out)
        return err_set(err, ERR_INPUT, "--out DIR is required");
    for (size_t i = 0; like && i < sizeof fitted / sizeof *fitted; i++)
        if (options_given(options, fitted[i]))
            return err_set(err, ERR_INPUT, "--%s: --like sets it; give one or the other", fitted[i]);
    if (like && options_given(options, "drift") && !(p.drift >= 0)) /* -1 would ask trace_synth_like to choose */
        return err_set(err, ERR_INPUT, "--drift: found %g, expected 0 to 1", p.drift);
    if (like && (rc = imitate(&p, like, options, err)) < 0)
        return rc;
    if ((rc = trace_synthesise(&p, out, err)) < 0)
        return rc;
    printf("%s: %" PRId64 " tokens x %d layers x top %d of %d experts\n", out,
           (int64_t)p.n_requests * p.tokens_per_request, p.n_layers, p.top_k, p.n_experts);
    return 0;
}

/* ---- verbs ---- */

static const struct verb verbs[] = {
    { "info", "DIR", "Says what a trace holds and how it routes.", "moelab trace info scenarios/traces/tiny-moe",
      run_info },
    { "check", "DIR", "Checks every file and element of a trace; exit 2 and a reason if one is wrong.",
      "moelab trace check scenarios/traces/tiny-moe", run_check },
    { "import", "FILE", "Makes a trace of what a serving engine recorded.",
      "moelab trace import routed_experts.npy --offsets offsets.npy --experts 256 --out traces/mine", run_import },
    { "synth", "", "Writes synthetic routing with physical parameters (doc/traces.md).",
      "moelab trace synth --layers 58 --experts 256 --top-k 8 --skew 0.8 --out traces/synth", run_synth },
};
enum { N_VERBS = sizeof verbs / sizeof *verbs };

static void print_verbs(FILE *to)
{
    fprintf(to, "usage: moelab trace VERB [options]\n");
    for (int i = 0; i < N_VERBS; i++)
        fprintf(to, "  %-8s %s\n", verbs[i].name, verbs[i].summary);
    fprintf(to, "`moelab trace VERB --help` tells more. Example: %s\n", verbs[0].example);
}

int cmd_trace(int argc, char **argv)
{
    struct err err = { 0 };
    const struct verb *v = NULL;
    if (argc < 2 || !strcmp(argv[1], "--help")) {
        print_verbs(argc < 2 ? stderr : stdout);
        return argc < 2 ? 2 : 0;
    }
    if (cmd_is_option(argv[1]))
        return cmd_unknown_option("trace", argv[1], (const char *const[]){ "--help", NULL });
    const char *names[N_VERBS];
    for (int i = 0; i < N_VERBS; i++) {
        names[i] = verbs[i].name;
        if (!strcmp(argv[1], verbs[i].name))
            v = &verbs[i];
    }
    if (!v) {
        const char *near = err_nearest(argv[1], names, N_VERBS);
        fprintf(stderr, "moelab trace: unknown verb \"%s\"%s%s\n", argv[1],
                near ? "; did you mean " : ", expected info, check, import or synth", near ? near : "");
        return 2;
    }
    int rc = v->run(argc - 1, argv + 1, v, &err);
    if (rc >= 0 && (fflush(stdout) != 0 || ferror(stdout)))
        rc = err_set(&err, ERR_IO, "standard output: cannot write: %s", strerror(errno));
    if (rc < 0)
        fprintf(stderr, "moelab trace %s: %s\n", v->name, err.text);
    return rc < 0 ? err_exit_code(rc) : 0;
}

/* SPDX-License-Identifier: Apache-2.0
 * cmd_plugins.c - moelab plugins: what can be named in a scenario. */
#include "config.h"

#include "cmd.h"
#include "metrics.h"
#include "param.h"
#include "registry.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct { uint32_t bit; const char *name; } needs_name[] = {
    { MOE_NEEDS_LOGITS, "logits" },         { MOE_NEEDS_RECORDED, "recorded" }, { MOE_NEEDS_HIDDEN, "hidden" },
    { MOE_NEEDS_IMPORTANCE, "importance" }, { MOE_NEEDS_TOKEN_ID, "token-id" }, { MOE_NEEDS_PREVIOUS, "previous" },
    { MOE_NEEDS_LABEL, "label" },           { MOE_NEEDS_TENSORS, "tensors" },   { MOE_NEEDS_NEXT_USE, "next-use" },
    { MOE_NEEDS_SCORES, "scores" },         { MOE_AHEAD, "ahead" },             { MOE_CROSS_BATCH, "cross-batch" },
    { MOE_LOCAL, "local" },                 { MOE_NEEDS_PREVIOUS_LOGITS, "previous-logits" },
    { MOE_NEEDS_TRANSITIONS, "transitions" }, { MOE_NEEDS_COACTIVATION, "coactivation" },
    { MOE_NEEDS_SALIENCY, "saliency" },     { MOE_NEEDS_SIMILARITY, "similarity" }, { MOE_OWN_GATE, "own-gate" },
    { MOE_HEEDS_BIAS, "heeds-bias" },
};

/* What is built into the core rather than loaded. */
static const struct { const char *kind, *name, *summary, *source; } builtin[] = {
    { "workload", "decode", "continuous batching over recorded requests, one token per request and step",
      "field practice" },
    { "workload", "prefill", "whole prompts, a fixed number of tokens per device and step", "field practice" },
    { "workload", "train", "forward and backward pass, reduction of gradients, optimiser", "field practice" },
    { "workload", "synth", "made-up routing: popularity skew, stickiness, layer affinity, drift", "doc/traces.md" },
    { "metric", "routing-consistency",
      "SRP and SCH of a trace, with what unrelated routing would give (eval metric srp|sch)",
      "moe-lrc, 2025, arXiv 2505.16056" },
    { "metric", "overlap", "experts shared by consecutive tokens (eval metric overlap)", "field practice" },
    { "metric", "max-vio", "largest / mean load - 1 (eval metric max-vio)", "Wang et al., 2024, arXiv 2408.15664" },
    { "metric", "affinity", "how far a layer's experts tell the next layer's (eval metric affinity)",
      "field practice" },
};

enum { N_BUILTIN = sizeof builtin / sizeof *builtin };

static json_t *needs_of(uint32_t needs)
{
    json_t *list = json_array();
    for (size_t i = 0; i < sizeof needs_name / sizeof *needs_name; i++)
        if (needs & needs_name[i].bit)
            json_array_append_new(list, json_string(needs_name[i].name));
    return list;
}

static json_t *describe(const char *kind, const char *name, const char *summary, const char *source,
                        const struct moe_plugin *p)
{
    return json_pack("{s:s, s:s, s:s, s:s, s:o, s:o}", "kind", kind, "name", name, "summary", summary, "source", source,
                     "needs", p ? needs_of(p->needs) : json_array(), "params", p ? param_describe(p) : json_array());
}

static json_t *everything(void)
{
    const struct registry_entry *entry;
    int n;
    json_t *list = json_array();
    registry_list(&entry, &n);
    for (int i = 0; i < n; i++)
        json_array_append_new(list, describe(kind_name[entry[i].kind], entry[i].name, entry[i].plugin->summary,
                                             entry[i].plugin->source, entry[i].plugin));
    for (int i = 0; i < N_BUILTIN; i++)
        json_array_append_new(list, describe(builtin[i].kind, builtin[i].name, builtin[i].summary, builtin[i].source,
                                             NULL));
    for (int i = 0; i < N_METRICS; i++) {
        json_t *o = describe("metric", metric_info[i].name, metric_info[i].help, "core/metrics.h", NULL);
        json_object_set_new(o, "unit", json_string(metric_info[i].unit));
        json_array_append_new(list, o);
    }
    return list;
}

static const char *text_of(const json_t *o, const char *key)
{
    const char *s = json_string_value(json_object_get(o, key));
    return s ? s : "";
}

static bool leaks(const json_t *o)
{
    const json_t *needs = json_object_get(o, "needs");
    for (size_t i = 0; i < json_array_size(needs); i++)
        if (!strcmp(json_string_value(json_array_get(needs, i)), "cross-batch"))
            return true;
    return false;
}

static void print_list(const json_t *list)
{
    const char *kind = "";
    bool any = false;
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *o = json_array_get(list, i);
        if (strcmp(kind, text_of(o, "kind"))) {
            kind = text_of(o, "kind");
            printf("%s%s\n", i ? "\n" : "", kind);
        }
        printf("  %-22s%s %s\n", text_of(o, "name"), leaks(o) ? "*" : " ", text_of(o, "summary"));
        any |= leaks(o);
    }
    if (any)
        printf("\n* another request in the batch may change a request's experts; "
               "that none does without it is tested\n");
}

static void print_one(const json_t *o)
{
    const json_t *params = json_object_get(o, "params"), *needs = json_object_get(o, "needs");
    printf("%s %s\n  %s\n  Source: %s\n", text_of(o, "kind"), text_of(o, "name"), text_of(o, "summary"),
           text_of(o, "source"));
    for (size_t i = 0; i < json_array_size(needs); i++)
        printf("%s%s", i ? ", " : "  Needs: ", json_string_value(json_array_get(needs, i)));
    if (json_array_size(needs))
        putchar('\n');
    for (size_t i = 0; i < json_array_size(params); i++) {
        const json_t *p = json_array_get(params, i);
        char *def = json_dumps(json_object_get(p, "default"), JSON_ENCODE_ANY | JSON_REAL_PRECISION(6));
        printf("  %-16s %-6s default %s", text_of(p, "name"), text_of(p, "type"), def ? def : "");
        free(def);
        if (json_object_get(p, "min") && json_object_get(p, "max"))
            printf(", %g to %g", json_number_value(json_object_get(p, "min")),
                   json_number_value(json_object_get(p, "max")));
        if (*text_of(p, "choices"))
            printf(", one of %s", text_of(p, "choices"));
        if (*text_of(p, "unit"))
            printf(" %s", text_of(p, "unit"));
        printf("\n  %-16s %s\n", "", text_of(p, "help"));
    }
}

static int show(const json_t *list, const char *name, bool as_json)
{
    json_t *found = json_array();
    size_t n = json_array_size(list);
    for (size_t i = 0; i < n; i++)
        if (!strcmp(text_of(json_array_get(list, i), "name"), name))
            json_array_append(found, json_array_get(list, i));
    int code = 0;
    if (json_array_size(found) == 0) {
        const char *names[n + 1];
        for (size_t i = 0; i < n; i++)
            names[i] = text_of(json_array_get(list, i), "name");
        const char *near = err_nearest(name, names, (int)n);
        fprintf(stderr, "moelab: nothing is named \"%s\"%s%s%s\n", name, near ? "; did you mean \"" : "",
                near ? near : "", near ? "\"?" : " (see: moelab plugins)");
        code = 2;
    } else if (as_json) {
        json_dumpf(found, stdout, JSON_INDENT(1));
        putchar('\n');
    } else {
        for (size_t i = 0; i < json_array_size(found); i++)
            print_one(json_array_get(found, i));
    }
    json_decref(found);
    return code;
}

int cmd_plugins(int argc, char **argv)
{
    bool as_json = false;
    const char *word[2];
    int n_words = 0;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) {
            puts("usage: moelab plugins [show NAME] [--json]\n\n"
                 "Lists every policy, workload and metric by kind; `show` gives one's parameters.\n"
                 "Searched: $MOELAB_PLUGIN_PATH (DIR/NAME.so, DIR/KIND/NAME.so), the build tree,\n"
                 "the install directory.\n\n"
                 "Example:\n  moelab plugins show eplb");
            return 0;
        }
        if (!strcmp(argv[i], "--json"))
            as_json = true;
        else if (cmd_is_option(argv[i]))
            return cmd_unknown_option("plugins", argv[i], (const char *const[]){ "--help", "--json", NULL });
        else if (n_words == 2)
            return cmd_usage("plugins", "unexpected argument \"%s\"", argv[i]);
        else
            word[n_words++] = argv[i];
    }
    if (n_words > 0 && (strcmp(word[0], "show") || n_words != 2))
        return cmd_usage("plugins", "expected nothing or \"show NAME\", found \"%s\"", word[0]);
    json_t *list = everything();
    int code = 0;
    if (n_words == 2) {
        code = show(list, word[1], as_json);
    } else if (as_json) {
        json_dumpf(list, stdout, JSON_INDENT(1));
        putchar('\n');
    } else {
        print_list(list);
    }
    json_decref(list);
    return code;
}

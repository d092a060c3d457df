/* SPDX-License-Identifier: Apache-2.0
 * record_spec.c - specifications of runs as the manifest keeps them: machines and traces by name, and what all runs of
 * an experiment share only once. */
#include "config.h"

#include "record.h"
#include "trace.h"

#include <stdio.h>
#include <string.h>

/* The trace's key in the manifest, where its checksum is: its last name, and "NAME (2)" for the second so called. */
static const char *trace_name(struct record *r, const char *dir, struct err *e)
{
    const char *known = json_string_value(json_object_get(r->trace_names, dir));
    char name[300], hex[65] = "";
    struct trace t;
    if (known || trace_open(&t, dir, e) < 0)
        return known;
    snprintf(name, sizeof name, "%.250s", record_base_name(dir));
    for (int i = 2; json_object_get(r->traces, name); i++)
        snprintf(name, sizeof name, "%.250s (%d)", record_base_name(dir), i);
    trace_checksum(&t, hex, e);
    json_object_set_new(r->traces, name,
                        json_pack("{s:s, s:i, s:i, s:i, s:I}", "sha256", hex, "layers", t.n_layers, "experts",
                                  t.n_experts, "top_k", t.top_k, "tokens", (json_int_t)t.n_tokens));
    trace_close(&t);
    json_object_set_new(r->trace_names, dir, json_string(name));
    return json_string_value(json_object_get(r->trace_names, dir));
}

json_t *record_spec(struct record *r, const json_t *spec, struct err *e)
{
    json_t *s = json_deep_copy(spec);
    json_t *machine = json_object_get(s, "machine"), *w = json_object_get(s, "workload");
    json_t *description = json_object_get(machine, "description");
    const char *file = json_string_value(json_object_get(machine, "file"));
    const char *trace = json_string_value(json_object_get(w, "trace"));
    if (description) {
        char key[200];
        json_t *nodes = json_object_get(description, "nodes");
        for (int i = 0;; i++) { /* one file may appear with several sets of figures */
            snprintf(key, sizeof key, "%s, %lld nodes%.*s", file ? record_base_name(file) : "machine",
                     (long long)json_integer_value(nodes), i, "''''''''''''''''");
            json_t *known = json_object_get(r->machines, key);
            if (!known)
                json_object_set(r->machines, key, description);
            if (!known || json_equal(known, description) || i == 16)
                break;
        }
        json_object_set_new(machine, "description", json_string(key));
        if (file)
            json_object_set_new(machine, "file", json_string(record_base_name(file)));
    }
    if (trace) {
        const char *known = trace_name(r, trace, e);
        if (known)
            json_object_set_new(w, "trace", json_string(known));
    }
    json_t *synth = json_object_get(w, "synth");
    const char *like = json_string_value(json_object_get(synth, "like"));
    const char *name = like ? trace_name(r, like, e) : NULL;
    if (name)
        json_object_set_new(synth, "like", json_string(name));
    const char *where = json_string_value(json_object_get(s, "where"));
    if (where)
        json_object_set_new(s, "where", json_string(record_base_name(where)));
    return s;
}

/* Takes `key` out of every table if it is the same in all. What differs and is a table everywhere is taken apart. */
static void share(json_t *list, const char *key, json_t *common)
{
    size_t i, n_equal = 0, n_tables = 0, n = json_array_size(list);
    json_t *one, *first = json_object_get(json_array_get(list, 0), key), *inner = json_array();
    json_array_foreach(list, i, one) {
        json_t *v = json_object_get(one, key);
        n_equal += v && json_equal(v, first);
        n_tables += json_is_object(v);
        if (v)
            json_array_append(inner, v);
    }
    json_t *shared = n_equal == n ? json_incref(first) : n_tables == n ? record_common(inner) : NULL;
    if (shared && (n_equal == n || json_object_size(shared) > 0)) {
        json_object_set(common, key, shared);
        json_array_foreach(list, i, one)
            if (n_equal == n || json_object_size(json_object_get(one, key)) == 0)
                json_object_del(one, key);
    }
    json_decref(shared);
    json_decref(inner);
}

json_t *record_common(json_t *list)
{
    json_t *common = json_object(), *keys = json_copy(json_array_get(list, 0)), *value;
    const char *key;
    json_object_foreach(keys, key, value)
        share(list, key, common);
    json_decref(keys);
    return common;
}

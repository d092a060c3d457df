/* SPDX-License-Identifier: Apache-2.0
 * script_native.c - what core/moelab.lua cannot do in Lua: files, runs, checks against the plugins, gnuplot. */
#include "config.h"

#include "eval.h"
#include "machine.h"
#include "machine_validate.h"
#include "metrics.h"
#include "param.h"
#include "registry.h"
#include "script_internal.h"
#include "sweep.h"
#include "trace.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

void script_where(lua_State *L, int level, const char **file, int *line)
{
    lua_Debug ar;
    for (; lua_getstack(L, level, &ar); level++) {
        lua_getinfo(L, "Sl", &ar);
        if (ar.currentline > 0 && !strstr(ar.short_src, "core/moelab")) {
            *file = ar.source[0] == '@' ? ar.source + 1 : ar.source; /* held by the function on the call stack */
            *line = ar.currentline;
            return;
        }
    }
    *file = script_of(L)->path;
    *line = 0;
}

/* Raises the error of what the scenario asked for here: its file and line come first. */
static int raise_here(lua_State *L, struct err *e)
{
    const char *file;
    int line;
    script_where(L, 0, &file, &line);
    if (line > 0)
        err_prefix(e, "%s:%d", file, line);
    return script_raise(L, e);
}

int script_error(lua_State *L, const char *fmt, ...)
{
    struct err e = { 0 };
    char text[800];
    const char *file;
    int line;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    script_where(L, 0, &file, &line);
    if (line > 0)
        err_set(&e, ERR_INPUT, "%s:%d: %s", file, line, text);
    else /* of what a machine file returned: nothing runs */
        err_set(&e, ERR_INPUT, "%s", text);
    return script_raise(L, &e);
}

const char *script_text(lua_State *L, int index)
{
    size_t length;
    const char *text = luaL_checklstring(L, index, &length);
    if (strlen(text) != length)
        script_error(L, "\"%s\" goes on after a NUL: a string with a NUL in it is no name", text);
    return text;
}

/* Whether a message begins with a script's file and line; `after` is then what follows them. */
static bool has_place(const struct script *s, const char *text, const char **after)
{
    size_t n = strlen(s->path);
    const char *at = !strncmp(text, s->path, n) && text[n] == ':' ? text + n : strstr(text, ".lua:");
    if (!at)
        return false;
    at = strchr(at, ':') + 1;
    size_t digits = strspn(at, "0123456789");
    *after = at + digits + 2;
    return digits > 0 && !strncmp(at + digits, ": ", 2);
}

int script_place_error(lua_State *L)
{
    const char *text = lua_type(L, 1) == LUA_TSTRING ? lua_tostring(L, 1) : NULL, *file, *after;
    int line;
    if (!text)
        text = lua_pushfstring(L, "raised a %s, expected a message", luaL_typename(L, 1));
    else if (has_place(script_of(L), text, &after)) {
        const char *prelude = strstr(text, "core/moelab");
        if (!prelude || prelude > after)
            return 1;
        text = after;
    }
    script_where(L, 1, &file, &line);
    if (line > 0)
        lua_pushfstring(L, "%s:%d: %s", file, line, text);
    else
        lua_pushfstring(L, "%s: %s", file, text); /* a tail call left nothing of the script */
    return 1;
}

/* where(level): file and line of the caller's caller..., as in messages. */
static int n_where(lua_State *L)
{
    const char *file;
    int line;
    script_where(L, (int)luaL_checkinteger(L, 1), &file, &line);
    lua_pushstring(L, file);
    lua_pushinteger(L, line);
    return 2;
}

/* key_line(file, line, key): the first line from `line` on where `key` is set in a table, else `line`. Lua keeps no
 * line per key; a search of the text from the call on finds it. */
static int n_key_line(lua_State *L)
{
    const char *file = luaL_checkstring(L, 1), *key = luaL_checkstring(L, 3);
    lua_Integer line = luaL_checkinteger(L, 2), at = 0, found = line;
    char text[4096];
    FILE *f = fopen(file, "r");
    size_t n = strlen(key);
    while (f && found == line && fgets(text, sizeof text, f)) {
        if (++at < line)
            continue;
        for (const char *c = text; (c = strstr(c, key)); c += n) {
            bool starts = c == text || !(c[-1] == '_' || c[-1] == '.' || (c[-1] >= 'a' && c[-1] <= 'z'));
            const char *after = c + n + strspn(c + n, " \t\"]");
            if (starts && after[0] == '=' && after[1] != '=') {
                found = at;
                break;
            }
        }
        if (at > line + 200)
            break;
    }
    if (f)
        fclose(f);
    lua_pushinteger(L, found);
    return 1;
}

/* nearest(name, list) */
static int n_nearest(lua_State *L)
{
    const char *name = luaL_checkstring(L, 1);
    int n = (int)lua_rawlen(L, 2);
    const char **candidate = lua_newuserdatauv(L, sizeof *candidate * (size_t)(n + 1), 0);
    for (int i = 0; i < n; i++) {
        bool text = lua_rawgeti(L, 2, i + 1) == LUA_TSTRING;
        candidate[i] = text ? lua_tostring(L, -1) : "";
        lua_pop(L, 1); /* the list keeps the string */
    }
    lua_pushstring(L, err_nearest(name, candidate, n));
    return 1;
}

/* fail(message): ends the scenario with exit code 2. */
static int n_fail(lua_State *L)
{
    struct err e = { 0 };
    err_set(&e, ERR_INPUT, "%s", luaL_checkstring(L, 1));
    return script_raise(L, &e);
}

/* machine(name, like) -> description, file; like: nil, or whose devices a platform has */
static int n_machine(lua_State *L)
{
    json_t *o = NULL;
    char file[600];
    struct err e = { 0 };
    if (script_machine(luaL_checkstring(L, 1), &o, file, sizeof file, &e) < 0 ||
        (!lua_isnoneornil(L, 2) && script_machine_like(o, lua_tostring(L, 2), file, &e) < 0)) {
        json_decref(o);
        lua_pushnil(L);
        lua_pushstring(L, e.text);
        return 2;
    }
    script_push_json(L, o);
    json_decref(o);
    lua_pushstring(L, file);
    return 2;
}

/* policy(kind, name, params, where): that the policy exists and takes these parameters, before anything runs. */
static int n_policy(lua_State *L)
{
    int kind = kind_of(luaL_checkstring(L, 1));
    const char *name = luaL_checkstring(L, 2);
    char who[600];
    struct err e = { 0 };
    const struct moe_plugin *plugin;
    struct param_set set;
    snprintf(who, sizeof who, "%s: %s %s", luaL_checkstring(L, 4), kind_name[kind], name);
    json_t *params = script_to_json(L, 3);
    if (registry_load((enum moe_kind)kind, name, who, &plugin, &e) == 0 &&
        param_fill(&set, plugin, params, who, &e) == 0)
        param_free(&set);
    json_decref(params);
    return e.code ? script_raise(L, &e) : 0;
}

/* trace(path): where the trace is: as given, beside the scenario, under scenarios/; nil if nowhere. */
static int n_trace(lua_State *L)
{
    const char *name = luaL_checkstring(L, 1), *scenario = script_of(L)->path;
    char path[900], probe[920];
    const char *slash = strrchr(scenario, '/');
    for (int i = 0; i < 3; i++) {
        char sub[500];
        if (i == 0)
            snprintf(path, sizeof path, "%s", name);
        else if (i == 1)
            snprintf(path, sizeof path, "%.*s%s", slash ? (int)(slash - scenario + 1) : 0, scenario, name);
        else if (snprintf(sub, sizeof sub, "scenarios/%s", name) < 0 || registry_data(sub, path, sizeof path) < 0)
            break;
        snprintf(probe, sizeof probe, "%s/trace.json", path);
        if (access(probe, R_OK) == 0) {
            lua_pushstring(L, path);
            return 1;
        }
    }
    return 0;
}

static double field_number(lua_State *L, int table, const char *key, double def, double min, double max)
{
    struct err e = { 0 };
    lua_getfield(L, table, key);
    const char *text = lua_type(L, -1) == LUA_TSTRING ? lua_tostring(L, -1) : NULL; /* the table keeps it */
    const bool number = lua_isnumber(L, -1);
    double x = lua_isnil(L, -1) ? def : number ? lua_tonumber(L, -1) : min - 1;
    char found[80];
    if (number)
        snprintf(found, sizeof found, "%g", x);
    else
        snprintf(found, sizeof found, text ? "\"%s\"" : "a %s", text ? text : luaL_typename(L, -1));
    lua_pop(L, 1);
    if (x >= min && x <= max)
        return x;
    lua_getfield(L, table, "where");
    err_set(&e, ERR_INPUT, "%s: moe.synth: %s: expected a number from %g to %g, found %s", lua_tostring(L, -1), key,
            min, max, found);
    script_raise(L, &e);
    return 0;
}

/* Pushes what a synthetic trace was made of, defaults and what was fitted filled in. */
static void push_synth(lua_State *L, const struct trace_synth *t, const char *like)
{
    json_t *o = json_pack("{s:i, s:i, s:i, s:i, s:i, s:f, s:f, s:f, s:f, s:b, s:I}", "layers", t->n_layers, "experts",
                          t->n_experts, "top_k", t->top_k, "requests", t->n_requests, "tokens_per_request",
                          t->tokens_per_request, "skew", t->skew, "stickiness", t->stickiness, "affinity", t->affinity,
                          "drift", t->drift, "logits", t->logits, "seed", (json_int_t)t->seed);
    if (like)
        json_object_set_new(o, "like", json_string(like));
    script_push_json(L, o);
    json_decref(o);
}

/* synth(table) -> directory of a trace that lives as long as the scenario, what it was made of. table.where starts
 * messages; with table.like (a trace directory) skew, stickiness, affinity and drift are fitted to it. */
static int n_synth(lua_State *L)
{
    struct script *s = script_of(L);
    struct err e = { 0 };
    char dir[400];
    luaL_checktype(L, 1, LUA_TTABLE);
    struct trace like = { 0 };
    lua_getfield(L, 1, "like");
    const char *model = lua_tostring(L, -1);
    if (model && trace_open(&like, model, &e) < 0)
        return raise_here(L, &e);
    lua_getfield(L, 1, "logits");
    struct trace_synth t = {
        .n_layers = (int32_t)field_number(L, 1, "layers", like.n_layers, 1, 1000),
        .n_experts = (int32_t)field_number(L, 1, "experts", like.n_experts, 1, 65535),
        .top_k = (int32_t)field_number(L, 1, "top_k", like.top_k, 1, 1024),
        .n_requests = (int32_t)field_number(L, 1, "requests", 64, 1, 1e6),
        .tokens_per_request = (int32_t)field_number(L, 1, "tokens_per_request", 128, 1, 1e6),
        .skew = field_number(L, 1, "skew", 0.5, 0, 10), .stickiness = field_number(L, 1, "stickiness", 0.25, 0, 1),
        .affinity = field_number(L, 1, "affinity", 0.25, 0, 1),
        .drift = field_number(L, 1, "drift", model ? -1 : 0, -1, 1),
        .logits = lua_toboolean(L, -1), .seed = (uint64_t)field_number(L, 1, "seed", 1, 0, 9e15),
    };
    lua_pop(L, 2); /* the table keeps the string */
    if (model) {
        trace_synth_like(&t, &like, NULL, &e);
        trace_close(&like);
        if (e.code)
            return raise_here(L, &e);
    }
    if (!s->synth_dir[0]) {
        const char *tmp = getenv("TMPDIR");
        snprintf(s->synth_dir, sizeof s->synth_dir, "%s/moelab-synth-XXXXXX", tmp && *tmp ? tmp : "/tmp");
        if (!mkdtemp(s->synth_dir)) {
            err_set(&e, ERR_IO, "cannot make %s for synthetic traces: %s", s->synth_dir, strerror(errno));
            s->synth_dir[0] = '\0';
            return raise_here(L, &e);
        }
        script_watch_synth(s->synth_dir);
    }
    snprintf(dir, sizeof dir, "%s/%d", s->synth_dir, s->n_synth);
    if (trace_synthesise(&t, dir, &e) < 0)
        return raise_here(L, &e);
    s->n_synth++;
    lua_pushstring(L, dir);
    push_synth(L, &t, model);
    return 2;
}

/* eval(kind, name, options) -> what `moelab eval` prints, as a table */
static int n_eval(lua_State *L)
{
    struct err e = { 0 };
    const char *kind = luaL_checkstring(L, 1), *name = luaL_checkstring(L, 2);
    json_t *options = script_to_json(L, 3);
    json_t *result = eval(kind, name, options, script_of(L)->options->unsafe, &e);
    json_decref(options);
    if (!result)
        return raise_here(L, &e);
    script_push_json(L, result);
    json_decref(result);
    return 1;
}

/* validate(name) -> rows of hw/published/NAME.csv against the models */
static int n_validate(lua_State *L)
{
    struct err e = { 0 };
    const char *name = luaL_checkstring(L, 1);
    char sub[128], file[1024];
    snprintf(sub, sizeof sub, "hw/published/%s.csv", name);
    json_t *rows = json_array();
    if (strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789-") != strlen(name) ||
        registry_data(sub, file, sizeof file) < 0)
        err_set(&e, ERR_INPUT, "moe.validate: no published table named \"%.64s\"", name);
    else
        machine_validate_table(file, NULL, rows, &e);
    if (e.code) {
        json_decref(rows);
        return raise_here(L, &e);
    }
    script_push_json(L, rows);
    json_decref(rows);
    return 1;
}

/* run(name, specs, axes) -> results. Runs are recorded as they come back. */
static int n_run(lua_State *L)
{
    struct script *s = script_of(L);
    struct err e = { 0 };
    const char *name = luaL_checkstring(L, 1);
    json_t *specs = script_to_json(L, 2), *axes = script_to_json(L, 3), *results = NULL;
    struct sweep_options o = { s->options->jobs, s->options->timeout_s, s->options->progress, s->options->team };
    script_clock_pause(); /* runs have their own */
    if (sweep(specs, &o, &results, &e) == 0)
        record_runs(&s->record, name, specs, axes, results, &e);
    script_clock_resume();
    json_decref(specs);
    json_decref(axes);
    if (e.code) {
        json_decref(results);
        return e.code == ERR_INPUT ? script_raise(L, &e) : raise_here(L, &e); /* a run's input says where it is from */
    }
    for (size_t i = 0; i < json_array_size(results); i++) {
        json_t *result = json_array_get(results, i);
        const char *error = json_string_value(json_object_get(result, "error"));
        if (!s->options->against) /* which tells what was simulated from it */
            json_object_del(result, "spec");
        if (!error)
            continue;
        s->some_failed = true;
        fprintf(stderr, "moelab: run %zu of \"%s\" failed: %s\n", i + 1, name, error);
    }
    script_push_json(L, results);
    json_decref(results);
    return 1;
}

/* write(name, text) */
static int n_write(lua_State *L)
{
    size_t n;
    struct err e = { 0 };
    const char *name = script_text(L, 1), *text = luaL_checklstring(L, 2, &n);
    return record_file(&script_of(L)->record, name, text, n, &e) < 0 ? raise_here(L, &e) : 0;
}

/* draw(stem): STEM.gp by gnuplot, if there is one that works; else a note, once, and the data are left. */
static int n_draw(lua_State *L)
{
    enum { LIMIT_S = 60 };
    struct script *s = script_of(L);
    const char *stem = luaL_checkstring(L, 1);
    char why[700] = "gnuplot is not installed";
    const double timeout = s->options->timeout_s;
    if (s->no_gnuplot)
        return 0;
    script_clock_pause();
    enum drawn drawn = record_draw(&s->record, stem, timeout > 0 && timeout < LIMIT_S ? timeout : LIMIT_S, why,
                                   sizeof why);
    script_clock_resume();
    s->no_gnuplot = drawn == NO_GNUPLOT || drawn == GNUPLOT_HANGS; /* nor would the next one be drawn */
    if (drawn != DRAWN && !s->no_gnuplot_told)
        fprintf(stderr, "moelab: %s: pictures are left as .gp and .dat; with %s, run \"gnuplot NAME.gp\" in %s\n", why,
                drawn == NO_GNUPLOT ? "it" : "one that works", s->record.out);
    s->no_gnuplot_told |= drawn != DRAWN;
    return 0;
}

/* differ(message): two executions of a run cannot be compared; the scenario goes on and ends with exit code 1. */
static int n_differ(lua_State *L)
{
    fprintf(stderr, "moelab: %s\n", luaL_checkstring(L, 1));
    script_of(L)->some_differ = true;
    return 0;
}

/* claim(table): one row of published against ours, for `moelab reproduce`. */
static int n_claim(lua_State *L)
{
    json_array_append_new(script_of(L)->claims, script_to_json(L, 1));
    return 0;
}

/* overrides() -> the --set pairs as a table */
static int n_overrides(lua_State *L)
{
    script_push_json(L, script_of(L)->overrides);
    return 1;
}

/* metrics() -> { name = unit } */
static int n_metrics(lua_State *L)
{
    lua_newtable(L);
    for (int i = 0; i < N_METRICS; i++) {
        lua_pushstring(L, metric_info[i].unit);
        lua_setfield(L, -2, metric_info[i].name);
    }
    return 1;
}

static int n_option(lua_State *L)
{
    const struct script_options *o = script_of(L)->options;
    const char *name = luaL_checkstring(L, 1);
    if (!strcmp(name, "executor"))
        lua_pushstring(L, o->executor);
    else if (!strcmp(name, "against"))
        lua_pushstring(L, o->against);
    else if (!strcmp(name, "mpirun"))
        lua_pushstring(L, getenv("MOELAB_MPIRUN"));
    else if (!strcmp(name, "allow_extrapolation"))
        lua_pushboolean(L, o->extrapolate);
    else if (!strcmp(name, "quiet"))
        lua_pushboolean(L, o->quiet);
    else
        lua_pushnil(L);
    return 1;
}

/* has(executor) */
static int n_has(lua_State *L)
{
    const char *name = luaL_checkstring(L, 1);
    lua_pushboolean(L, !strcmp(name, "flow") || (!strcmp(name, "simgrid") && net_simgrid_available()) ||
                           (!strcmp(name, "host") && machine_host_available()) ||
                           (!strcmp(name, "cuda") && machine_cuda_available()));
    return 1;
}

static int n_add_policy(lua_State *L)
{
    lua_pushinteger(L, script_policy_add(L));
    return 1;
}

void script_push_natives(lua_State *L)
{
    static const luaL_Reg all[] = {
        { "part", script_part }, { "where", n_where }, { "key_line", n_key_line }, { "nearest", n_nearest },
        { "fail", n_fail }, { "machine", n_machine }, { "policy", n_policy }, { "trace", n_trace },
        { "synth", n_synth }, { "run", n_run }, { "eval", n_eval }, { "write", n_write }, { "draw", n_draw },
        { "claim", n_claim }, { "differ", n_differ }, { "overrides", n_overrides }, { "option", n_option },
        { "metrics", n_metrics }, { "has", n_has }, { "validate", n_validate }, { "add_policy", n_add_policy },
        { NULL, NULL },
    };
    luaL_newlib(L, all);
}

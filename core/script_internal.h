/* SPDX-License-Identifier: Apache-2.0
 * script_internal.h - shared by core/script*.c alone. */
#ifndef SCRIPT_INTERNAL_H
#define SCRIPT_INTERNAL_H

#include "record.h"
#include "script.h"

#include <lauxlib.h>
#include <lua.h>
#include <lualib.h>

struct script {
    const struct script_options *options;
    const char *path;
    struct record record;
    json_t *overrides;    /* --set, as an object */
    json_t *claims;
    bool some_failed;     /* a run failed: exit 1 */
    bool some_differ;     /* decisions of a run differ between two executors: exit 1 */
    struct err err;       /* of a native function, on its way through Lua */
    char synth_dir[300];   /* synthetic traces of this scenario, removed at the end */
    int n_synth;
    bool no_gnuplot, no_gnuplot_told;
    size_t bytes;         /* memory the script holds */
};

struct script *script_of(lua_State *);
/* Raises err->text as a Lua error; err->code becomes the scenario's. Does not return. */
int script_raise(lua_State *, struct err *);

/* Lua value at `index` <-> JSON. A table with t[1] is a list, any other an object. What JSON cannot hold (functions,
 * NaN, circles, lists with holes) is an error that names the key. */
json_t *script_to_json(lua_State *, int index);
void script_push_json(lua_State *, const json_t *);

/* The table of functions that core/moelab.lua is built on: script_native.c. Leaves it on the stack. */
void script_push_natives(lua_State *);
int script_part(lua_State *);
/* moe.policy: registers the table at the top of the stack, returns its id. script_policy.c */
int script_policy_add(lua_State *);
void script_policy_forget(void);

/* Raises an error that begins with the scenario's file and line, if one is running. Does not return. */
int script_error(lua_State *, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* Handler of a pcall, while the call that failed is still there: every message begins with the file and line of the
 * scenario, or of its module, whatever C function raised it and wherever in the prelude. */
int script_place_error(lua_State *);
/* The string argument at `index`; one with a NUL in it, which would end a path early, is an error. */
const char *script_text(lua_State *, int index);
/* File and line of the innermost function from `level` on that is not the prelude's. */
void script_where(lua_State *, int level, const char **file, int *line);

/* ---- script_signal.c ---- */

/* From here to script_watch(NULL) an interrupt or a crash leaves nothing half-written: neither this directory nor the
 * one of script_watch_synth. Whoever has a handler of his own (nohup, a sanitizer) keeps it. */
void script_watch(const char *part);
void script_watch_synth(const char *dir);
/* The clock on a script's own time. Where one runs already, its time goes on, on this state: the state it ran on is
 * returned, to be given back to script_clock_stop. */
lua_State *script_clock_start(lua_State *, double seconds);
void script_clock_stop(lua_State *, lua_State *before);
void script_clock_pause(void); /* while runs go on */
void script_clock_resume(void);

/* A machine file in Lua as it is written. */
int script_machine_file(const char *name, json_t **description, char *file, size_t room, struct err *);

#endif

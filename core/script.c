/* SPDX-License-Identifier: Apache-2.0
 * script.c - the sandbox that scenarios live in.
 *
 * A scenario is text, never bytecode. It gets the base, string, table, math and utf8 libraries without load, dofile,
 * string.dump and finalizers (which no clock can stop), and `require` for "moelab" and for Lua files beside it or
 * under scenarios/. No processes, network, native libraries, debug access or files; what it writes goes through
 * moe.write into the results directory. --unsafe gives it everything. Loops end after --run-timeout.
 *
 * The prelude holds what a scenario must not (core/script_native.c), so it runs on copies of the libraries that the
 * scenario cannot reach: replacing string.format or table.concat changes nothing there. */
#include "config.h"

#include "script_internal.h"
#include "registry.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_SCRIPT_BYTES = 1 << 30, MAX_TEXT_BYTES = 1 << 26 };

/* ---- the sandbox ---- */

struct script *script_of(lua_State *L)
{
    return *(struct script **)lua_getextraspace(L);
}

int script_raise(lua_State *L, struct err *e)
{
    struct script *s = script_of(L);
    if (e != &s->err) {
        s->err = *e;
        memset(e, 0, sizeof *e);
    }
    lua_pushstring(L, s->err.text);
    return lua_error(L); /* not luaL_error: the text already says where */
}

static void *allocate(void *ud, void *p, size_t old, size_t bytes)
{
    struct script *s = ud;
    if (!p)
        old = 0;
    if (bytes == 0) {
        s->bytes -= old;
        free(p);
        return NULL;
    }
    if (bytes > old && s->bytes + (bytes - old) > MAX_SCRIPT_BYTES)
        return NULL;
    void *q = realloc(p, bytes);
    if (q)
        s->bytes = s->bytes - old + bytes;
    return q;
}

static char *read_text(const char *path, size_t *n, struct err *e)
{
    FILE *f = fopen(path, "rb");
    char *text = NULL;
    if (!f) {
        err_set(e, ERR_INPUT, "%s: cannot be read: %s", path, strerror(errno));
        return NULL;
    }
    size_t room = 0;
    *n = 0;
    for (size_t got = 1; got > 0; *n += got) {
        if (*n == room) {
            char *grown = room < MAX_TEXT_BYTES ? realloc(text, room = room ? 2 * room : 65536) : NULL;
            if (!grown) {
                err_set(e, ERR_INPUT, "%s: more than %d bytes, too large for a script", path, MAX_TEXT_BYTES);
                break;
            }
            text = grown;
        }
        got = fread(text + *n, 1, room - *n, f);
    }
    if (ferror(f))
        err_set(e, ERR_INPUT, "%s: cannot be read: %s", path, strerror(errno));
    fclose(f);
    if (e->code) {
        free(text);
        return NULL;
    }
    return text;
}

/* Loads a file as a function on the stack; or leaves Lua's message there, which starts with the path as the user gave
 * it, and returns Lua's status. A file that Lua did not get to see is an error. */
static int load_chunk(lua_State *L, const char *path, struct err *e)
{
    size_t n;
    int status = LUA_OK;
    char *text = read_text(path, &n, e);
    if (!text)
        return status;
    char name[600];
    snprintf(name, sizeof name, "@%s", path);
    if (n > 0 && text[0] == LUA_SIGNATURE[0])
        err_set(e, ERR_INPUT, "%s: is Lua bytecode, expected text", path);
    else
        status = luaL_loadbufferx(L, text, n, name, "t");
    free(text);
    return status;
}

static int load_text(lua_State *L, const char *path, struct err *e)
{
    if (load_chunk(L, path, e) != LUA_OK)
        err_set(e, ERR_INPUT, "%s", lua_tostring(L, -1));
    return e->code;
}

/* NAME or DIR.NAME: beside the scenario, then under scenarios/. */
static int find_module(const char *scenario, const char *name, char *path, size_t room)
{
    char file[200];
    size_t n = 0;
    for (const char *c = name; *c; c++) {
        bool ok = *c == '_' || *c == '-' || *c == '.' || (*c >= '0' && *c <= '9') || (*c >= 'a' && *c <= 'z') ||
                  (*c >= 'A' && *c <= 'Z');
        if (!ok || (*c == '.' && (c == name || c[1] == '.' || !c[1])) || n + 8 >= sizeof file)
            return -1;
        file[n++] = *c == '.' ? '/' : *c;
    }
    snprintf(file + n, sizeof file - n, ".lua");
    const char *slash = strrchr(scenario, '/');
    snprintf(path, room, "%.*s%s", slash ? (int)(slash - scenario + 1) : 0, scenario, file);
    if (access(path, R_OK) == 0)
        return 0;
    char sub[220];
    snprintf(sub, sizeof sub, "scenarios/%s", file);
    return registry_data(sub, path, room);
}

/* Loads a file of the prelude as a function on the stack: its globals are the private copies. */
static int load_own(lua_State *L, const char *sub, struct err *e)
{
    char path[800];
    if (registry_data(sub, path, sizeof path) < 0)
        return err_set(e, ERR_IO, "%s: not found beside moelab's data", sub);
    if (load_text(L, path, e) < 0)
        return e->code;
    lua_getfield(L, LUA_REGISTRYINDEX, "moelab.own");
    lua_setupvalue(L, -2, 1);
    return 0;
}

/* part(name, ...): what core/moelab_NAME.lua returns when it is called with the rest. For the prelude alone. */
int script_part(lua_State *L)
{
    struct err e = { 0 };
    char sub[100];
    snprintf(sub, sizeof sub, "core/moelab_%s.lua", luaL_checkstring(L, 1));
    if (load_own(L, sub, &e) < 0)
        return script_raise(L, &e);
    lua_replace(L, 1);
    lua_call(L, lua_gettop(L) - 1, 1);
    return 1;
}

static int l_require(lua_State *L)
{
    const char *name = script_text(L, 1);
    struct script *s = script_of(L);
    struct err e = { 0 };
    char path[800];
    luaL_getsubtable(L, LUA_REGISTRYINDEX, "moelab.loaded");
    int known = lua_getfield(L, -1, name);
    if (known == LUA_TLIGHTUSERDATA)
        return luaL_error(L, "module \"%s\" requires itself, or could not be loaded before", name);
    if (known != LUA_TNIL)
        return 1;
    lua_pop(L, 1);
    lua_pushlightuserdata(L, s); /* until it is there */
    lua_setfield(L, -2, name);
    bool prelude = !strcmp(name, "moelab");
    if (!prelude && find_module(s->path, name, path, sizeof path) < 0)
        return luaL_error(L, "module \"%s\" not found beside the scenario or under scenarios/", name);
    if ((prelude ? load_own(L, "core/moelab.lua", &e) : load_text(L, path, &e)) < 0)
        return script_raise(L, &e);
    if (prelude)
        script_push_natives(L);
    lua_call(L, prelude ? 1 : 0, 1);
    if (lua_isnil(L, -1)) {
        lua_pop(L, 1);
        lua_pushboolean(L, 1);
    }
    lua_pushvalue(L, -1);
    lua_setfield(L, -3, name);
    return 1;
}

/* setmetatable without finalizers: hooks, and so the clock, do not work while one runs. */
static int l_setmetatable(lua_State *L)
{
    luaL_checktype(L, 1, LUA_TTABLE);
    luaL_argexpected(L, lua_isnoneornil(L, 2) || lua_istable(L, 2), 2, "nil or table");
    lua_settop(L, 2);
    if (lua_istable(L, 2)) {
        lua_pushliteral(L, "__gc");
        if (lua_rawget(L, 2) != LUA_TNIL)
            return luaL_error(L, "setmetatable: __gc is not available without --unsafe");
        lua_pop(L, 1);
    }
    if (luaL_getmetafield(L, 1, "__metatable") != LUA_TNIL)
        return luaL_error(L, "cannot change a protected metatable");
    lua_setmetatable(L, 1);
    return 1;
}

/* Copies the globals, and the libraries among them, as they are now. */
static void push_own_globals(lua_State *L)
{
    lua_newtable(L);
    lua_pushglobaltable(L);
    lua_pushnil(L);
    while (lua_next(L, -2)) { /* own, globals, key, value */
        if (lua_istable(L, -1) && !lua_rawequal(L, -1, -3)) {
            lua_newtable(L);
            lua_pushnil(L);
            while (lua_next(L, -3)) {
                lua_pushvalue(L, -2);
                lua_insert(L, -2);
                lua_rawset(L, -4);
            }
            lua_remove(L, -2);
        }
        lua_pushvalue(L, -2);
        lua_insert(L, -2);
        lua_rawset(L, -5);
    }
    lua_pop(L, 1);
}

/* The libraries that every script gets. */
static void open_libraries(lua_State *L, bool unsafe)
{
    if (unsafe) {
        luaL_openlibs(L);
    } else {
        static const luaL_Reg safe[] = { { LUA_GNAME, luaopen_base }, { LUA_STRLIBNAME, luaopen_string },
                                         { LUA_TABLIBNAME, luaopen_table }, { LUA_MATHLIBNAME, luaopen_math },
                                         { LUA_UTF8LIBNAME, luaopen_utf8 } };
        for (size_t i = 0; i < sizeof safe / sizeof *safe; i++) {
            luaL_requiref(L, safe[i].name, safe[i].func, 1);
            lua_pop(L, 1);
        }
        static const char *const gone[] = { "load", "loadfile", "dofile", "collectgarbage" };
        for (size_t i = 0; i < sizeof gone / sizeof *gone; i++) {
            lua_pushnil(L);
            lua_setglobal(L, gone[i]);
        }
        lua_getglobal(L, "string");
        lua_pushnil(L);
        lua_setfield(L, -2, "dump");
        lua_pop(L, 1);
        lua_pushcfunction(L, l_setmetatable);
        lua_setglobal(L, "setmetatable");
    }
    /* Lua seeds its generator from time and addresses; a scenario's numbers depend on the scenario alone. */
    lua_getglobal(L, "math");
    lua_getfield(L, -1, "randomseed");
    lua_pushinteger(L, 1);
    lua_call(L, 1, 0);
    lua_pop(L, 1);
}

/* What a scenario has beyond a machine file: modules. */
static void open_modules(lua_State *L, bool unsafe)
{
    lua_pushcfunction(L, l_require);
    lua_setglobal(L, "require");
    push_own_globals(L);
    if (!unsafe) { /* methods of strings come from the prelude's own library, which nothing leads to */
        lua_pushliteral(L, "");
        lua_getmetatable(L, -1);
        lua_getfield(L, -3, LUA_STRLIBNAME);
        lua_setfield(L, -2, "__index");
        lua_pushboolean(L, false);
        lua_setfield(L, -2, "__metatable");
        lua_pop(L, 2);
    }
    lua_setfield(L, LUA_REGISTRYINDEX, "moelab.own");
}

static lua_State *new_state(struct script *s, bool unsafe)
{
    lua_State *L = lua_newstate(allocate, s);
    if (L) {
        *(struct script **)lua_getextraspace(L) = s;
        open_libraries(L, unsafe);
    }
    return L;
}

/* ---- running ---- */

static int read_overrides(struct script *s)
{
    s->overrides = json_object();
    for (int i = 0; i < s->options->n_set; i++) {
        const char *pair = s->options->set[i], *eq = strchr(pair, '=');
        char key[200];
        if (!eq || eq == pair || (size_t)(eq - pair) >= sizeof key)
            return err_set(&s->err, ERR_INPUT, "--set %s: expected KEY=VALUE", pair);
        snprintf(key, sizeof key, "%.*s", (int)(eq - pair), pair);
        /* A value that reads as JSON is that, anything else a string: steps=5, placement=eplb, profile=0.5. */
        json_t *v = json_loads(eq + 1, JSON_DECODE_ANY, NULL);
        json_object_set_new(s->overrides, key, v ? v : json_string(eq + 1));
    }
    return 0;
}

static void remove_synthetic(const struct script *s)
{
    static const char *const files[] = { "experts.npy", "offsets.npy", "weights.npy", "logits.npy", "trace.json" };
    char path[400];
    for (int i = 0; i < s->n_synth; i++) {
        for (size_t f = 0; f < sizeof files / sizeof *files; f++) {
            snprintf(path, sizeof path, "%s/%d/%s", s->synth_dir, i, files[f]);
            unlink(path);
        }
        snprintf(path, sizeof path, "%s/%d", s->synth_dir, i);
        rmdir(path);
    }
    if (s->synth_dir[0])
        rmdir(s->synth_dir);
}

/* Where the error arose is in front of every message by now; keep the code of what a native function said. */
static int fail_from_lua(struct script *s, lua_State *L)
{
    const char *text = lua_tostring(L, -1);
    int code = s->err.code ? s->err.code : ERR_INPUT;
    memset(&s->err, 0, sizeof s->err);
    return err_set(&s->err, code, "%s", text ? text : "an error while the script's last one was reported");
}

int script_run(const char *path, const struct script_options *options, json_t **claims, struct err *e)
{
    struct script s = { .options = options, .path = path, .claims = json_array() };
    char out[500];
    const char *slash = strrchr(path, '/'), *stem = slash ? slash + 1 : path;
    size_t n_stem = strcspn(stem, ".");
    snprintf(out, sizeof out, "results/%.*s", (int)n_stem, stem);
    lua_State *L = NULL;
    if (access(path, R_OK) < 0)
        err_set(&s.err, ERR_INPUT, "%s: cannot be read", path);
    else if (read_overrides(&s) == 0 && record_open(&s.record, options->out ? options->out : out, &s.err) == 0) {
        script_watch(s.record.part);
        s.record.executor = options->executor;
        s.record.against = options->against;
        L = new_state(&s, options->unsafe);
        if (!L)
            err_set(&s.err, ERR_MEMORY, "out of memory for Lua");
        else if (open_modules(L, options->unsafe), lua_pushcfunction(L, script_place_error),
                 load_text(L, path, &s.err) == 0) {
            script_clock_start(L, options->timeout_s);
            int status = lua_pcall(L, 0, 0, -2);
            script_clock_stop(L, NULL);
            if (status == LUA_ERRMEM)
                err_set(&s.err, ERR_MEMORY, "%s: the script holds more than %d MiB", path, MAX_SCRIPT_BYTES >> 20);
            else if (status != LUA_OK)
                fail_from_lua(&s, L);
            else {
                memset(&s.err, 0, sizeof s.err); /* of natives, caught by the script */
                record_commit(&s.record, path, s.overrides, &s.err);
            }
        }
    }
    record_abandon(&s.record);
    script_policy_forget();
    if (L)
        lua_close(L);
    remove_synthetic(&s);
    script_watch(NULL);
    json_decref(s.overrides);
    if (claims)
        *claims = json_incref(s.claims);
    json_decref(s.claims);
    if (!s.err.code && s.some_failed)
        err_set(&s.err, ERR_RUN, "some runs failed; the others are in %s", s.record.out);
    if (!s.err.code && s.some_differ)
        err_set(&s.err, ERR_RUN, "some runs cannot be compared; all are in %s", s.record.out);
    *e = s.err;
    return e->code;
}

/* (value, json_t **): what the chunk returned, converted. */
static int l_table_of(lua_State *L)
{
    json_t **out = lua_touserdata(L, 2);
    if (!lua_istable(L, 1))
        return luaL_error(L, "returns a %s, expected a table", luaL_typename(L, 1));
    *out = script_to_json(L, 1);
    return 0;
}

/* Lua's error about a machine file, when it was read or when it ran. A scenario may name any file as one, so of the
 * message remain the line and what Lua expected, not the words that it found there. */
static int fail_unquoted(const char *file, const char *text, bool ran, struct err *e)
{
    static const char *const plain[] = { "'", "<name>", "unexpected symbol", "unfinished ", "malformed ",
                                         "syntax error" };
    const char *rest = text ? text : "";
    size_t n = strlen(file) < LUA_IDSIZE ? strlen(file) : LUA_IDSIZE - 1; /* Lua shortens the names of chunks */
    int line = 0, at = 0;
    bool known = false;
    char what[200];
    if (strlen(rest) > n && sscanf(rest + n, ":%d: %n", &line, &at) == 1 && at > 0)
        rest += n + (size_t)at;
    for (size_t i = 0; !ran && i < sizeof plain / sizeof *plain; i++)
        known |= !strncmp(rest, plain[i], strlen(plain[i]));
    known |= ran && !strncmp(rest, "attempt to ", strlen("attempt to "));
    snprintf(what, sizeof what, "%s", known ? rest : ran ? "raises an error" : "is no table in Lua");
    err_unquote(what);
    n = ran ? strcspn(what, "('") : strlen(what); /* without the variable */
    while (n > 0 && what[n - 1] == ' ')
        n--;
    return line > 0 ? err_set(e, ERR_INPUT, "%s:%d: %.*s", file, line, (int)n, what)
                    : err_set(e, ERR_INPUT, "%s: %.*s", file, (int)n, what);
}

/* Runs a loaded machine file, which is at the top of the stack. */
static int run_machine(struct script *s, lua_State *L, const char *file, json_t **description, struct err *e)
{
    if (lua_pcall(L, 0, 1, 0) != LUA_OK)
        return s->err.code ? err_set(e, ERR_INPUT, "%s", s->err.text)
                           : fail_unquoted(file, lua_tostring(L, -1), true, e);
    lua_pushcfunction(L, l_table_of);
    lua_insert(L, -2);
    lua_pushlightuserdata(L, description);
    if (lua_pcall(L, 2, 0, 0) != LUA_OK)
        return err_set(e, ERR_INPUT, "%s: %s", file, lua_tostring(L, -1));
    return 0;
}

static int no_machine(const char *name, struct err *e)
{
    char near[64];
    registry_nearest_data("hw/machines", name, near, sizeof near);
    if (*near)
        return err_set(e, ERR_INPUT, "no machine named \"%s\"; did you mean \"%s\"?", name, near);
    return err_set(e, ERR_INPUT, "no machine named \"%s\" (hw/machines/%s.lua)", name, name);
}

int script_machine_file(const char *name, json_t **description, char *file, size_t room, struct err *e)
{
    struct script s = { .path = "" };
    char sub[300];
    snprintf(sub, sizeof sub, "hw/machines/%s.lua", name);
    bool is_path = strchr(name, '/') || (strlen(name) > 4 && !strcmp(name + strlen(name) - 4, ".lua"));
    if (is_path)
        snprintf(file, room, "%s", name);
    else if (registry_data(sub, file, room) < 0)
        return no_machine(name, e);
    lua_State *L = new_state(&s, false);
    if (!L)
        return err_set(e, ERR_MEMORY, "out of memory for Lua");
    static const struct script_options none = { .timeout_s = 5 };
    s.options = &none;
    int status = load_chunk(L, file, e);
    if (status != LUA_OK) {
        fail_unquoted(file, lua_tostring(L, -1), false, e);
    } else if (!e->code) {
        lua_State *caller = script_clock_start(L, none.timeout_s);
        run_machine(&s, L, file, description, e);
        script_clock_stop(L, caller);
    }
    lua_close(L);
    return e->code;
}

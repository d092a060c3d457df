/* SPDX-License-Identifier: Apache-2.0
 * script.c - the sandbox that scenarios live in.
 *
 * A scenario is text, never bytecode. It gets the base, string, table, math, utf8 and coroutine libraries without
 * load, dofile and string.dump, and `require` for "moelab" and for Lua files beside it or under scenarios/. No
 * processes, network, native libraries, debug access or files; what it writes goes through moe.write into the
 * results directory. --unsafe gives it everything. Loops end after --run-timeout. */
#include "config.h"

#include "script_internal.h"
#include "registry.h"

#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <unistd.h>

enum { MAX_SCRIPT_BYTES = 1 << 30 };

/* ---- time ---- */

static lua_State *volatile clocked;
static volatile sig_atomic_t clock_rings;

static void on_clock(lua_State *L, lua_Debug *ar)
{
    (void)ar;
    lua_sethook(L, NULL, 0, 0);
    luaL_error(L, "the script did not end within %f s (--run-timeout)", script_of(L)->options->timeout_s);
}

/* First ring: stop at the next Lua instruction. Second: the script is inside one long call of a library. */
static void ring(int signal_number)
{
    (void)signal_number;
    if (clock_rings++ == 0 && clocked) {
        lua_sethook(clocked, on_clock, LUA_MASKCOUNT | LUA_MASKCALL | LUA_MASKRET, 1);
    } else {
        static const char text[] = "moelab: the script did not end within --run-timeout\n";
        if (write(STDERR_FILENO, text, sizeof text - 1) < 0) {
            /* nobody to tell */
        }
        _exit(2);
    }
}

void script_clock_start(lua_State *L, double seconds)
{
    struct sigaction action = { .sa_handler = ring, .sa_flags = SA_RESTART };
    if (!(seconds > 0))
        return;
    clocked = L;
    clock_rings = 0;
    sigaction(SIGALRM, &action, NULL);
    struct itimerval t = { .it_value = { (time_t)seconds, (suseconds_t)(fmod(seconds, 1) * 1e6) + 1 },
                           .it_interval = { 2, 0 } };
    setitimer(ITIMER_REAL, &t, NULL);
}

void script_clock_stop(void)
{
    setitimer(ITIMER_REAL, &(struct itimerval){ 0 }, NULL);
    clocked = NULL;
}

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
        err_set(e, ERR_INPUT, "%s: cannot be read", path);
        return NULL;
    }
    size_t room = 0;
    *n = 0;
    for (size_t got = 1; got > 0; *n += got) {
        if (*n == room) {
            char *grown = room < (1 << 26) ? realloc(text, room = room ? 2 * room : 65536) : NULL;
            if (!grown)
                break;
            text = grown;
        }
        got = fread(text + *n, 1, room - *n, f);
    }
    if (ferror(f) || !text)
        err_set(e, ERR_INPUT, "%s: cannot be read", path);
    fclose(f);
    if (e->code) {
        free(text);
        return NULL;
    }
    return text;
}

/* Loads a file as a function on the stack. Messages start with the path as the user gave it. */
static int load_text(lua_State *L, const char *path, struct err *e)
{
    size_t n;
    char *text = read_text(path, &n, e);
    if (!text)
        return e->code;
    char name[600];
    snprintf(name, sizeof name, "@%s", path);
    if (n > 0 && text[0] == LUA_SIGNATURE[0])
        err_set(e, ERR_INPUT, "%s: is Lua bytecode, expected text", path);
    else if (luaL_loadbufferx(L, text, n, name, "t") != LUA_OK)
        err_set(e, ERR_INPUT, "%s", lua_tostring(L, -1));
    free(text);
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

static int l_require(lua_State *L)
{
    const char *name = luaL_checkstring(L, 1);
    struct script *s = script_of(L);
    char path[800];
    luaL_getsubtable(L, LUA_REGISTRYINDEX, "moelab.loaded");
    if (lua_getfield(L, -1, name) != LUA_TNIL)
        return 1;
    lua_pop(L, 1);
    bool prelude = !strcmp(name, "moelab");
    if (prelude ? registry_data("core/moelab.lua", path, sizeof path) < 0
                : find_module(s->path, name, path, sizeof path) < 0)
        return luaL_error(L, "module \"%s\" not found beside the scenario or under scenarios/", name);
    if (load_text(L, path, &s->err) < 0)
        return script_raise(L, &s->err);
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

static void open_libraries(lua_State *L, bool unsafe)
{
    if (unsafe) {
        luaL_openlibs(L);
    } else {
        static const luaL_Reg safe[] = { { LUA_GNAME, luaopen_base }, { LUA_STRLIBNAME, luaopen_string },
                                         { LUA_TABLIBNAME, luaopen_table }, { LUA_MATHLIBNAME, luaopen_math },
                                         { LUA_UTF8LIBNAME, luaopen_utf8 }, { LUA_COLIBNAME, luaopen_coroutine } };
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
    }
    lua_pushcfunction(L, l_require);
    lua_setglobal(L, "require");
    /* Lua seeds its generator from time and addresses; a scenario's numbers depend on the scenario alone. */
    lua_getglobal(L, "math");
    lua_getfield(L, -1, "randomseed");
    lua_pushinteger(L, 1);
    lua_call(L, 1, 0);
    lua_pop(L, 1);
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

/* ---- JSON ---- */

static json_t *table_to_json(lua_State *L, int index)
{
    index = lua_absindex(L, index);
    luaL_checkstack(L, 4, "tables nested too deeply");
    lua_Integer n = (lua_Integer)lua_rawlen(L, index);
    json_t *o = n > 0 ? json_array() : json_object();
    for (lua_Integer i = 1; i <= n; i++) {
        lua_rawgeti(L, index, i);
        json_array_append_new(o, script_to_json(L, -1));
        lua_pop(L, 1);
    }
    if (n > 0)
        return o;
    lua_pushnil(L);
    while (lua_next(L, index)) {
        if (lua_type(L, -2) != LUA_TSTRING)
            luaL_error(L, "a table's keys must be names or 1, 2, 3, ...");
        json_object_set_new(o, lua_tostring(L, -2), script_to_json(L, -1));
        lua_pop(L, 1);
    }
    return o;
}

json_t *script_to_json(lua_State *L, int index)
{
    switch (lua_type(L, index)) {
    case LUA_TNIL: return json_null();
    case LUA_TBOOLEAN: return json_boolean(lua_toboolean(L, index));
    case LUA_TNUMBER: {
        if (lua_isinteger(L, index))
            return json_integer(lua_tointeger(L, index));
        double x = lua_tonumber(L, index);
        if (!isfinite(x))
            luaL_error(L, "a number is not finite: %f", x);
        return json_real(x);
    }
    case LUA_TSTRING: {
        json_t *o = json_string(lua_tostring(L, index));
        if (!o)
            luaL_error(L, "a string is not UTF-8");
        return o;
    }
    case LUA_TTABLE: return table_to_json(L, index);
    default: luaL_error(L, "expected a number, string, boolean or table, found a %s", luaL_typename(L, index));
    }
    return NULL;
}

void script_push_json(lua_State *L, const json_t *o)
{
    luaL_checkstack(L, 4, "results nested too deeply");
    switch (o ? json_typeof(o) : JSON_NULL) {
    case JSON_NULL: lua_pushnil(L); break;
    case JSON_TRUE: lua_pushboolean(L, 1); break;
    case JSON_FALSE: lua_pushboolean(L, 0); break;
    case JSON_INTEGER: lua_pushinteger(L, json_integer_value(o)); break;
    case JSON_REAL: lua_pushnumber(L, json_real_value(o)); break;
    case JSON_STRING: lua_pushstring(L, json_string_value(o)); break;
    case JSON_ARRAY:
        lua_createtable(L, (int)json_array_size(o), 0);
        for (size_t i = 0; i < json_array_size(o); i++) {
            script_push_json(L, json_array_get(o, i));
            lua_rawseti(L, -2, (lua_Integer)i + 1);
        }
        break;
    case JSON_OBJECT: {
        const char *key;
        json_t *value;
        lua_newtable(L);
        json_object_foreach((json_t *)(uintptr_t)o, key, value) {
            script_push_json(L, value);
            lua_setfield(L, -2, key);
        }
    }
    }
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
    char path[200];
    for (int i = 0; i < s->n_synth; i++) {
        for (size_t f = 0; f < sizeof files / sizeof *files; f++) {
            snprintf(path, sizeof path, "%s/%d/%s", s->synth_dir, i, files[f]);
            unlink(path);
        }
        snprintf(path, sizeof path, "%s/%d", s->synth_dir, i);
        rmdir(path);
    }
    if (s->n_synth)
        rmdir(s->synth_dir);
}

/* Where the error arose is in front of every message that Lua makes; keep what a native function said of its own. */
static int fail_from_lua(struct script *s, lua_State *L)
{
    const char *text = lua_tostring(L, -1);
    int code = s->err.code ? s->err.code : ERR_INPUT;
    memset(&s->err, 0, sizeof s->err);
    return err_set(&s->err, code, "%s", text ? text : "the script raised something that is not a message");
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
        L = new_state(&s, options->unsafe);
        if (!L)
            err_set(&s.err, ERR_MEMORY, "out of memory for Lua");
        else if (load_text(L, path, &s.err) == 0) {
            script_clock_start(L, options->timeout_s);
            int status = lua_pcall(L, 0, 0, 0);
            script_clock_stop();
            if (status != LUA_OK)
                fail_from_lua(&s, L);
            else
                record_commit(&s.record, path, s.overrides, &s.err);
        }
    }
    record_abandon(&s.record);
    script_policy_forget();
    if (L)
        lua_close(L);
    remove_synthetic(&s);
    json_decref(s.overrides);
    if (claims)
        *claims = json_incref(s.claims);
    json_decref(s.claims);
    if (!s.err.code && s.some_failed)
        err_set(&s.err, ERR_RUN, "some runs failed; the others are in %s", s.record.out);
    *e = s.err;
    return e->code;
}

/* (chunk, json_t **): calls the chunk and converts what it returns. */
static int l_table_of(lua_State *L)
{
    json_t **out = lua_touserdata(L, 2);
    lua_pushvalue(L, 1);
    lua_call(L, 0, 1);
    if (!lua_istable(L, -1))
        return luaL_error(L, "returns a %s, expected a table", luaL_typename(L, -1));
    *out = script_to_json(L, -1);
    return 0;
}

int script_machine(const char *name, json_t **description, char *file, size_t room, struct err *e)
{
    struct script s = { .path = "" };
    char sub[300];
    snprintf(sub, sizeof sub, "hw/machines/%s.lua", name);
    bool is_path = strchr(name, '/') || (strlen(name) > 4 && !strcmp(name + strlen(name) - 4, ".lua"));
    if (is_path)
        snprintf(file, room, "%s", name);
    else if (registry_data(sub, file, room) < 0)
        return err_set(e, ERR_INPUT, "no machine named \"%s\" (hw/machines/%s.lua)", name, name);
    lua_State *L = new_state(&s, false);
    if (!L)
        return err_set(e, ERR_MEMORY, "out of memory for Lua");
    static const struct script_options none = { .timeout_s = 5 };
    s.options = &none;
    if (load_text(L, file, e) == 0) {
        bool nested = clocked != NULL; /* called from a scenario, whose clock goes on */
        if (!nested)
            script_clock_start(L, none.timeout_s);
        lua_pushcfunction(L, l_table_of);
        lua_insert(L, -2);
        lua_pushlightuserdata(L, description);
        if (lua_pcall(L, 2, 0, 0) != LUA_OK)
            err_set(e, ERR_INPUT, "%s%s%s", strstr(lua_tostring(L, -1), file) ? "" : file,
                    strstr(lua_tostring(L, -1), file) ? "" : ": ", lua_tostring(L, -1));
        if (!nested)
            script_clock_stop();
    }
    lua_close(L);
    return e->code;
}

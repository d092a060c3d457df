/* SPDX-License-Identifier: Apache-2.0
 * script_json.c - Lua values to JSON and back. */
#include "config.h"

#include "script_internal.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { MAX_NESTED = 32 };

/* Raises an error unless the value has a JSON form: asked before anything is allocated that the error would leak.
 * path: of the keys that lead to the value; "" at first. */
static void check_json(lua_State *L, int index, int depth, const char *path)
{
    char sub[200];
    size_t length;
    const char *at = *path ? path : "value";
    switch (lua_type(L, index)) {
    case LUA_TNIL:
    case LUA_TBOOLEAN: return;
    case LUA_TNUMBER:
        if (!isfinite(lua_tonumber(L, index)))
            script_error(L, "%s: %s is not a finite number", at, /* of NaN printf may show a sign */
                         isnan(lua_tonumber(L, index)) ? "nan" : lua_tonumber(L, index) > 0 ? "inf" : "-inf");
        return;
    case LUA_TSTRING: {
        const char *text = lua_tolstring(L, index, &length);
        json_t *o = strlen(text) == length ? json_string(text) : NULL;
        if (!o)
            script_error(L, "%s: a string is not UTF-8 text", at);
        json_decref(o);
        return;
    }
    case LUA_TTABLE: break;
    default: script_error(L, "%s: expected a number, string, boolean or table, found a %s", at,
                          luaL_typename(L, index));
    }
    if (depth == MAX_NESTED)
        script_error(L, "%s: tables nested more than %d deep", at, MAX_NESTED);
    luaL_checkstack(L, 8, "tables nested too deeply");
    index = lua_absindex(L, index);
    lua_Integer n = (lua_Integer)lua_rawlen(L, index), n_seen = 0;
    lua_pushnil(L);
    while (lua_next(L, index)) {
        bool listed = lua_isinteger(L, -2) && lua_tointeger(L, -2) >= 1 && lua_tointeger(L, -2) <= n;
        if (lua_type(L, -2) == LUA_TSTRING)
            snprintf(sub, sizeof sub, "%s%s%s", path, *path ? "." : "", lua_tostring(L, -2));
        else
            snprintf(sub, sizeof sub, "%s[%lld]", path, (long long)lua_tointeger(L, -2));
        if (n > 0 ? !listed : lua_type(L, -2) != LUA_TSTRING)
            script_error(L, "%s: a table's keys must be all names or all 1, 2, 3, ...", *sub ? sub : at);
        check_json(L, -1, depth + 1, sub);
        n_seen++;
        lua_pop(L, 1);
    }
    if (n > 0 && n_seen != n)
        script_error(L, "%s: a list with holes", at);
}

static json_t *to_json(lua_State *L, int index)
{
    switch (lua_type(L, index)) {
    case LUA_TBOOLEAN: return json_boolean(lua_toboolean(L, index));
    case LUA_TNUMBER:
        return lua_isinteger(L, index) ? json_integer(lua_tointeger(L, index)) : json_real(lua_tonumber(L, index));
    case LUA_TSTRING: return json_string(lua_tostring(L, index));
    case LUA_TTABLE: break;
    default: return json_null();
    }
    index = lua_absindex(L, index);
    lua_Integer n = (lua_Integer)lua_rawlen(L, index);
    json_t *o = n > 0 ? json_array() : json_object();
    for (lua_Integer i = 1; i <= n; i++) {
        lua_rawgeti(L, index, i);
        json_array_append_new(o, to_json(L, -1));
        lua_pop(L, 1);
    }
    lua_pushnil(L);
    while (n == 0 && lua_next(L, index)) {
        json_object_set_new(o, lua_tostring(L, -2), to_json(L, -1));
        lua_pop(L, 1);
    }
    if (n > 0)
        lua_pop(L, 1);
    return o;
}

json_t *script_to_json(lua_State *L, int index)
{
    check_json(L, index, 0, "");
    return to_json(L, index);
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

/* SPDX-License-Identifier: Apache-2.0
 * script_policy.c - policies written in Lua: a plugin whose hooks call functions of the scenario.
 *
 * Ids count from 0 as everywhere, so tables given to and taken from hooks are indexed from 0 where the index is an
 * id. A Lua error becomes the run's error, with the script's line; it never jumps across frames of the core. */
#include "config.h"

#include "policy.h"
#include "script_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct lua_policy { struct moe_plugin plugin; int ref; char name[64]; };
struct lua_self { lua_State *L; int ref; const struct moe_env *env; };

/* Of the one scenario that runs in this process. */
static struct lua_policy *policies[64];
static int n_policies;
static lua_State *home;

const struct moe_plugin *script_policy(int id)
{
    return id >= 0 && id < n_policies ? &policies[id]->plugin : NULL;
}

void script_policy_forget(void)
{
    for (int i = 0; i < n_policies; i++)
        free(policies[i]);
    n_policies = 0;
}

static int self_init(void *self, const void *conf, const struct moe_env *env)
{
    struct lua_self *s = self;
    const struct moe_plugin *plugin = ((const struct policy *)env->core)->plugin;
    (void)conf;
    for (int i = 0; i < n_policies; i++)
        if (&policies[i]->plugin == plugin)
            *s = (struct lua_self){ home, policies[i]->ref, env };
    return s->L ? 0 : env->host->fail(env, MOE_EFAIL, "belongs to no running scenario");
}

/* t[key] of the table at the top of the stack, without metamethods: their errors would have nobody to catch them. */
static int raw_field(lua_State *L, int index, const char *key)
{
    index = lua_absindex(L, index);
    lua_pushstring(L, key);
    return lua_rawget(L, index);
}

/* Puts the hook on the stack, to be followed by its arguments. */
static lua_State *begin(struct lua_self *s, const char *hook)
{
    lua_rawgeti(s->L, LUA_REGISTRYINDEX, s->ref);
    raw_field(s->L, -1, hook);
    lua_remove(s->L, -2);
    return s->L;
}

static int call(struct lua_self *s, int n_args, int n_results)
{
    if (lua_pcall(s->L, n_args, n_results, 0) == LUA_OK)
        return 0;
    const char *text = lua_tostring(s->L, -1);
    int code = s->env->host->fail(s->env, MOE_EFAIL, "%s", text ? text : "error without a message");
    lua_settop(s->L, 0);
    return code;
}

/* The id at the top of the stack, popped; what an int32_t cannot hold becomes one that no id is. */
static int32_t pop_id(lua_State *L, int *whole)
{
    lua_Integer x = lua_tointegerx(L, -1, whole);
    lua_pop(L, 1);
    return x < 0 ? -1 : x > INT32_MAX ? INT32_MAX : (int32_t)x;
}

static void set_int(lua_State *L, const char *key, int64_t v)
{
    lua_pushinteger(L, v);
    lua_setfield(L, -2, key);
}

static void push_loads(lua_State *L, const int64_t *load, int32_t n)
{
    lua_createtable(L, n, 1);
    for (int32_t e = 0; e < n; e++) {
        lua_pushinteger(L, load[e]);
        lua_rawseti(L, -2, e);
    }
}

static void push_floats(lua_State *L, const float *x, int32_t n)
{
    lua_createtable(L, n, 1);
    for (int32_t i = 0; i < n; i++) {
        lua_pushnumber(L, (double)x[i]);
        lua_rawseti(L, -2, i);
    }
}

static void push_ints(lua_State *L, const int32_t *x, int32_t n)
{
    lua_createtable(L, n, 1);
    for (int32_t i = 0; i < n; i++) {
        lua_pushinteger(L, x[i]);
        lua_rawseti(L, -2, i);
    }
}

/* { step, layer, n_tokens, n_experts, top_k, device = {[t]}, logits = {[t] = {[e]}} or nil } */
static void push_batch(lua_State *L, const struct moe_batch *b)
{
    lua_newtable(L);
    set_int(L, "step", b->step);
    set_int(L, "layer", b->layer);
    set_int(L, "n_tokens", b->n_tokens);
    set_int(L, "n_experts", b->n_experts);
    set_int(L, "top_k", b->top_k);
    push_ints(L, b->device, b->n_tokens);
    lua_setfield(L, -2, "device");
    if (!b->router_logits)
        return;
    lua_createtable(L, b->n_tokens, 1);
    for (int32_t t = 0; t < b->n_tokens; t++) {
        push_floats(L, b->router_logits + (size_t)t * (size_t)b->n_experts, b->n_experts);
        lua_rawseti(L, -2, t);
    }
    lua_setfield(L, -2, "logits");
}

/* route(batch) -> { [t] = { experts = {e, ...}, weights = {w, ...} } }; weights absent: equal. */
static int router_route(void *self, const struct moe_batch *b, const struct moe_bias *bias, struct moe_routes *out,
                        struct moe_cost *own)
{
    struct lua_self *s = self;
    lua_State *L = begin(s, "route");
    (void)bias;
    (void)own;
    push_batch(L, b);
    if (call(s, 1, 1) < 0)
        return MOE_EFAIL;
    int code = 0;
    for (int32_t t = 0; t < b->n_tokens && !code; t++) {
        if (!lua_istable(L, -1) || lua_rawgeti(L, -1, t) != LUA_TTABLE || raw_field(L, -1, "experts") != LUA_TTABLE) {
            code = s->env->host->fail(s->env, MOE_EINVAL, "route: token %d: expected { experts = {...} }", t);
            break;
        }
        int32_t n = (int32_t)lua_rawlen(L, -1);
        bool weighted = raw_field(L, -2, "weights") == LUA_TTABLE;
        if (s->env->host->routes_reserve(s->env, out, out->n + n) < 0)
            code = MOE_ENOMEM;
        for (int32_t i = 1; i <= n && !code; i++) {
            int whole, number = 1;
            lua_rawgeti(L, -2, i);
            out->expert[out->n] = pop_id(L, &whole);
            double w = 1.0 / n;
            if (weighted) {
                lua_rawgeti(L, -1, i);
                w = lua_tonumberx(L, -1, &number);
                lua_pop(L, 1);
            }
            out->weight[out->n++] = (float)w;
            if (!whole || !number)
                code = s->env->host->fail(s->env, MOE_EINVAL, "route: token %d: %s %d of its list is not a %snumber",
                                          t, whole ? "weight" : "expert", i, whole ? "" : "whole ");
        }
        out->offset[t + 1] = out->n;
        lua_pop(L, 3);
    }
    lua_settop(L, 0);
    return code;
}

/* adjust(batch) -> { [e] = added to the score } */
static int balancer_adjust(void *self, const struct moe_batch *b, const float *scores, struct moe_bias *bias,
                           struct moe_cost *own)
{
    (void)own;
    struct lua_self *s = self;
    lua_State *L = begin(s, "adjust");
    (void)scores;
    push_batch(L, b);
    if (call(s, 1, 1) < 0)
        return MOE_EFAIL;
    int code = lua_istable(L, -1) ? 0 : s->env->host->fail(s->env, MOE_EINVAL, "adjust: expected a table of numbers");
    for (int32_t e = 0; e < b->n_experts && !code; e++) {
        int type = lua_rawgeti(L, -1, e);
        if (type == LUA_TNUMBER)
            bias->add[e] += (float)lua_tonumber(L, -1);
        else if (type != LUA_TNIL) /* nil: nothing added */
            code = s->env->host->fail(s->env, MOE_EINVAL, "adjust: expert %d: expected a number, found %s", e,
                                      lua_typename(L, type));
        lua_pop(L, 1);
    }
    lua_settop(L, 0);
    return code;
}

/* observe(layer, load) */
static int balancer_observe(void *self, int32_t layer, const int64_t *load)
{
    struct lua_self *s = self;
    lua_State *L = begin(s, "observe");
    lua_pushinteger(L, layer);
    push_loads(L, load, s->env->model->n_experts);
    return call(s, 2, 0);
}

/* One entry of place's answer, at the top of the stack: a device or a list of devices. */
static int place_entry(struct lua_self *s, struct moe_placement *out, int32_t layer, int32_t expert)
{
    lua_State *L = s->L;
    int code = 0;
    int whole;
    if (lua_isinteger(L, -1)) {
        lua_pushvalue(L, -1);
        return s->env->host->place(s->env, out, layer, expert, pop_id(L, &whole), 1);
    }
    if (!lua_istable(L, -1))
        return s->env->host->fail(s->env, MOE_EINVAL, "place: layer %d, expert %d: expected a device or a list of "
                                  "devices, found %s", layer, expert, luaL_typename(L, -1));
    for (lua_Integer i = 1; i <= (lua_Integer)lua_rawlen(L, -1) && !code; i++) {
        lua_rawgeti(L, -1, i);
        int32_t device = pop_id(L, &whole);
        code = whole ? s->env->host->place(s->env, out, layer, expert, device, 1)
                     : s->env->host->fail(s->env, MOE_EINVAL, "place: layer %d, expert %d: a device is not a whole "
                                          "number", layer, expert);
    }
    return code;
}

/* place(load, topology) -> { [layer] = { [expert] = device or {device, ...} } }
 * load = {[layer] = {[expert] = tokens}}; topology = { n_devices, n_nodes, node = {[device]} } */
static int placement_place(void *self, const struct moe_stats *stats, struct moe_placement *out)
{
    struct lua_self *s = self;
    const struct moe_model *m = s->env->model;
    lua_State *L = begin(s, "place");
    lua_createtable(L, m->n_layers, 1);
    for (int32_t l = 0; l < m->n_layers; l++) {
        lua_createtable(L, m->n_experts, 1);
        for (int32_t e = 0; e < m->n_experts; e++) {
            lua_pushnumber(L, stats->load[(size_t)l * (size_t)m->n_experts + (size_t)e]);
            lua_rawseti(L, -2, e);
        }
        lua_rawseti(L, -2, l);
    }
    lua_newtable(L);
    set_int(L, "n_devices", s->env->topology->n_devices);
    set_int(L, "n_nodes", s->env->topology->n_nodes);
    push_ints(L, s->env->topology->node, s->env->topology->n_devices);
    lua_setfield(L, -2, "node");
    if (call(s, 2, 1) < 0)
        return MOE_EFAIL;
    int code = 0;
    for (int32_t l = 0; l < m->n_layers && !code; l++) {
        if (!lua_istable(L, -1) || lua_rawgeti(L, -1, l) != LUA_TTABLE) {
            code = s->env->host->fail(s->env, MOE_EINVAL, "place: layer %d: expected a table of devices by expert", l);
            break;
        }
        for (int32_t e = 0; e < moe_experts_of(m, l) && !code; e++) {
            lua_rawgeti(L, -1, e);
            code = place_entry(s, out, l, e);
            lua_pop(L, 1);
        }
        lua_pop(L, 1);
    }
    lua_settop(L, 0);
    return code;
}

static void push_access(lua_State *L, const struct moe_access *a)
{
    lua_newtable(L);
    set_int(L, "index", a->index);
    set_int(L, "step", a->step);
    set_int(L, "layer", a->layer);
    set_int(L, "expert", a->expert);
    set_int(L, "n_tokens", a->n_tokens);
    if (a->next_use >= 0)
        set_int(L, "next_use", a->next_use);
}

/* hit(device, object, access), insert(device, object, access) -> false to let it pass through */
static int offload_event(struct lua_self *s, const char *hook, int32_t device, uint32_t object,
                         const struct moe_access *a, int n_results)
{
    lua_State *L = begin(s, hook);
    lua_pushinteger(L, device);
    lua_pushinteger(L, object);
    push_access(L, a);
    return call(s, 3, n_results);
}

static int offload_hit(void *self, int32_t device, uint32_t object, const struct moe_access *a)
{
    return offload_event(self, "hit", device, object, a, 0);
}

static int offload_insert(void *self, int32_t device, uint32_t object, const struct moe_access *a)
{
    struct lua_self *s = self;
    if (offload_event(s, "insert", device, object, a, 1) < 0)
        return MOE_EFAIL;
    bool bypass = lua_isboolean(s->L, -1) && !lua_toboolean(s->L, -1);
    lua_settop(s->L, 0);
    return bypass ? MOE_BYPASS : 0;
}

static int l_is_pinned(lua_State *L)
{
    const struct moe_pinned *p = lua_touserdata(L, lua_upvalueindex(1));
    lua_Integer object = luaL_checkinteger(L, 1), n = lua_tointeger(L, lua_upvalueindex(2));
    lua_pushboolean(L, object >= 0 && object < n && moe_is_pinned(p, (uint32_t)object));
    return 1;
}

/* evict(device, access, is_pinned) -> object */
static int offload_evict(void *self, int32_t device, const struct moe_access *cause, const struct moe_pinned *pinned,
                         uint32_t *victim)
{
    struct lua_self *s = self;
    lua_State *L = begin(s, "evict");
    lua_pushinteger(L, device);
    push_access(L, cause);
    lua_pushlightuserdata(L, (void *)(uintptr_t)pinned);
    lua_pushinteger(L, s->env->n_objects);
    lua_pushcclosure(L, l_is_pinned, 2);
    if (call(s, 3, 1) < 0)
        return MOE_EFAIL;
    int whole;
    lua_Integer object = lua_tointegerx(L, -1, &whole);
    lua_settop(L, 0);
    if (!whole || object < 0 || object >= s->env->n_objects)
        return s->env->host->fail(s->env, MOE_EINVAL, "evict: expected an object's id");
    *victim = (uint32_t)object;
    return 0;
}

static bool has(lua_State *L, const char *hook)
{
    bool is = raw_field(L, -1, hook) == LUA_TFUNCTION;
    lua_pop(L, 1);
    return is;
}

int script_policy_add(lua_State *L)
{
    luaL_checktype(L, -1, LUA_TTABLE);
    if (n_policies == (int)(sizeof policies / sizeof *policies))
        return luaL_error(L, "more than %d policies in one scenario", n_policies);
    raw_field(L, -1, "kind");
    raw_field(L, -2, "name");
    const char *kind = luaL_checkstring(L, -2), *name = luaL_checkstring(L, -1);
    lua_pop(L, 2); /* the table keeps both strings */
    struct lua_policy *p = calloc(1, sizeof *p);
    if (!p)
        return luaL_error(L, "out of memory");
    snprintf(p->name, sizeof p->name, "%s", name);
    p->plugin = (struct moe_plugin){ .abi = MOE_ABI, .size = sizeof p->plugin, .name = p->name,
                                     .summary = "written in the scenario", .source = "the scenario",
                                     .state_size = sizeof(struct lua_self), .init = self_init };
    if (!strcmp(kind, "router")) {
        p->plugin.kind = MOE_ROUTER;
        p->plugin.needs = MOE_NEEDS_LOGITS;
        p->plugin.ops.router.route = router_route;
    } else if (!strcmp(kind, "balancer")) {
        p->plugin.kind = MOE_BALANCER;
        p->plugin.ops.balancer.adjust = has(L, "adjust") ? balancer_adjust : NULL;
        p->plugin.ops.balancer.observe = has(L, "observe") ? balancer_observe : NULL;
    } else if (!strcmp(kind, "placement")) {
        p->plugin.kind = MOE_PLACEMENT;
        p->plugin.ops.placement.place = placement_place;
    } else {
        p->plugin.kind = MOE_OFFLOAD;
        p->plugin.ops.offload = (struct moe_offload_ops){ .hit = has(L, "hit") ? offload_hit : NULL,
                                                          .insert = offload_insert, .evict = offload_evict };
    }
    lua_pushvalue(L, -1);
    p->ref = luaL_ref(L, LUA_REGISTRYINDEX);
    lua_rawgeti(L, LUA_REGISTRYINDEX, LUA_RIDX_MAINTHREAD);
    home = lua_tothread(L, -1); /* L may be a coroutine, and gone when the runs begin */
    lua_pop(L, 1);
    policies[n_policies] = p;
    return n_policies++;
}

/* SPDX-License-Identifier: Apache-2.0
 * param.c - parameter tables: one source for Lua keys, --set, listings, the man page and the manifest. */
#include "config.h"

#include "param.h"
#include "npy.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const type_name[] = { "int", "real", "bool", "string", "enum", "tensor" };

static const double MAX_WHOLE = 0x1p53; /* beyond it a double skips integers */

static int n_params(const struct moe_plugin *p)
{
    int n = 0;
    while (p->params && p->params[n].name)
        n++;
    return n;
}

static size_t field_bytes(enum moe_type t)
{
    switch (t) {
    case MOE_INT: return sizeof(int64_t);
    case MOE_REAL: return sizeof(double);
    case MOE_BOOL: return sizeof(bool);
    case MOE_STRING: return sizeof(char *);
    case MOE_ENUM: return sizeof(int32_t);
    case MOE_TENSOR: return sizeof(struct moe_tensor);
    }
    return 0;
}

/* The i-th of "a|b|c" into out; false when there are fewer. */
static bool choice_at(const char *choices, int i, char *out, size_t room)
{
    for (; i > 0; i--) {
        choices = strchr(choices, '|');
        if (!choices)
            return false;
        choices++;
    }
    size_t n = strcspn(choices, "|");
    snprintf(out, room, "%.*s", (int)n, choices);
    return true;
}

int param_check_table(const struct moe_plugin *p, const char *path, struct err *e)
{
    for (int i = 0; i < n_params(p); i++) {
        const struct moe_param *q = &p->params[i];
        char text[64];
        if ((unsigned)q->type > MOE_TENSOR)
            return err_set(e, ERR_INPUT, "%s: parameter %s has an unknown type %d", path, q->name, (int)q->type);
        if (q->offset + field_bytes(q->type) > p->conf_size)
            return err_set(e, ERR_INPUT, "%s: parameter %s lies outside conf (offset %zu, conf_size %zu)", path,
                           q->name, q->offset, p->conf_size);
        if ((q->type == MOE_INT || q->type == MOE_REAL) && !(q->def >= q->min && q->def <= q->max))
            return err_set(e, ERR_INPUT, "%s: parameter %s: default %g is not within [%g, %g]", path, q->name,
                           q->def, q->min, q->max);
        if ((q->type == MOE_ENUM || q->type == MOE_TENSOR) && !q->def_text)
            return err_set(e, ERR_INPUT, "%s: parameter %s of type %s needs def_text", path, q->name,
                           type_name[q->type]);
        if (q->type == MOE_INT && (q->def != nearbyint(q->def) || fabs(q->def) > MAX_WHOLE))
            return err_set(e, ERR_INPUT, "%s: parameter %s: default %g is not a whole number", path, q->name, q->def);
        if (q->type == MOE_ENUM && !(q->def >= 0 && q->def < 1000 &&
                                     choice_at(q->def_text, (int)q->def, text, sizeof text)))
            return err_set(e, ERR_INPUT, "%s: parameter %s: default %g is not one of %s", path, q->name, q->def,
                           q->def_text);
        for (int j = 0; j < i; j++)
            if (!strcmp(q->name, p->params[j].name))
                return err_set(e, ERR_INPUT, "%s: parameter %s appears twice", path, q->name);
    }
    return 0;
}

/* A bound may be beyond what an integer holds: "no limit". */
static json_int_t as_whole(double x)
{
    return (json_int_t)fmin(fmax(x, -MAX_WHOLE), MAX_WHOLE);
}

json_t *param_describe(const struct moe_plugin *p)
{
    json_t *list = json_array();
    for (int i = 0; i < n_params(p); i++) {
        const struct moe_param *q = &p->params[i];
        json_t *o = json_pack("{s:s, s:s}", "name", q->name, "type", type_name[q->type]);
        char text[64];
        switch (q->type) {
        case MOE_INT:
            json_object_set_new(o, "default", json_integer((json_int_t)q->def));
            json_object_set_new(o, "min", json_integer(as_whole(q->min)));
            json_object_set_new(o, "max", json_integer(as_whole(q->max)));
            break;
        case MOE_REAL:
            json_object_set_new(o, "default", json_real(q->def));
            if (isfinite(q->min))
                json_object_set_new(o, "min", json_real(q->min));
            if (isfinite(q->max))
                json_object_set_new(o, "max", json_real(q->max));
            break;
        case MOE_BOOL:
            json_object_set_new(o, "default", json_boolean(q->def != 0));
            break;
        case MOE_STRING:
            json_object_set_new(o, "default", json_string(q->def_text ? q->def_text : ""));
            break;
        case MOE_ENUM:
            choice_at(q->def_text, (int)q->def, text, sizeof text);
            json_object_set_new(o, "default", json_string(text));
            json_object_set_new(o, "choices", json_string(q->def_text));
            break;
        case MOE_TENSOR:
            json_object_set_new(o, "default", json_null());
            json_object_set_new(o, "shape", json_string(q->def_text));
            break;
        }
        json_object_set_new(o, "unit", json_string(q->unit ? q->unit : ""));
        json_object_set_new(o, "help", json_string(q->help ? q->help : ""));
        json_array_append_new(list, o);
    }
    return list;
}

static const char *json_kind(const json_t *v)
{
    static const char *const kind[] = { "a table", "a list", "a string", "a whole number", "a number", "true",
                                        "false", "nil" };
    return kind[json_typeof(v)];
}

const char *param_found(const json_t *v, char text[PARAM_FOUND])
{
    if (!json_is_number(v) && !(json_is_string(v) && json_string_length(v) + 3 <= PARAM_FOUND))
        return json_kind(v);
    if (json_is_string(v))
        snprintf(text, PARAM_FOUND, "\"%s\"", json_string_value(v));
    else if (json_is_integer(v))
        snprintf(text, PARAM_FOUND, "%lld", (long long)json_integer_value(v));
    else
        snprintf(text, PARAM_FOUND, "%g", json_real_value(v));
    return text;
}

static int own(struct param_set *s, void *memory, struct err *e)
{
    void **grown = memory ? realloc(s->owned, sizeof *grown * (size_t)(s->n_owned + 1)) : NULL;
    if (!grown) {
        free(memory);
        return err_set(e, ERR_MEMORY, "out of memory for parameters");
    }
    s->owned = grown;
    s->owned[s->n_owned++] = memory;
    return 0;
}

/* Numbers of a nested list of the tensor's shape, row-major. Returns what is wrong, or NULL. */
static const char *fill_level(const json_t *v, const struct moe_tensor *x, int32_t level, float **to)
{
    const char *wrong = NULL;
    if (level == x->n_dims) {
        const double number = json_number_value(v);
        const bool fits = fabs(number) <= (double)FLT_MAX;
        *(*to)++ = fits ? (float)number : 0;
        return !json_is_number(v) ? "an element is no number" : !fits ? "an element is no 32-bit number" : NULL;
    }
    if (!json_is_array(v) || (int64_t)json_array_size(v) != x->shape[level])
        return "rows are not all as long";
    for (size_t i = 0; i < json_array_size(v) && !wrong; i++)
        wrong = fill_level(json_array_get(v, i), x, level + 1, to);
    return wrong;
}

/* A tensor written out, as scenarios draw them. */
static int fill_list(struct param_set *s, const struct moe_param *q, const json_t *v, struct moe_tensor *out,
                     const char *who, struct err *e)
{
    struct moe_tensor x = { .n_dims = 1 };
    size_t count = 1;
    for (const char *c = q->def_text; *c; c++)
        x.n_dims += *c == ',';
    const json_t *inner = v;
    for (int32_t i = 0; i < x.n_dims; i++, inner = json_array_get(inner, 0)) {
        if (!json_is_array(inner) || json_array_size(inner) == 0)
            return err_set(e, ERR_INPUT, "%s: %s: has %d dimensions, expected [%s]", who, q->name, i, q->def_text);
        x.shape[i] = (int64_t)json_array_size(inner);
        if (__builtin_mul_overflow(count, json_array_size(inner), &count) || count > SIZE_MAX / sizeof(float))
            return err_set(e, ERR_MEMORY, "%s: %s: more elements than memory holds", who, q->name);
    }
    float *data = malloc(sizeof *data * count), *to = data;
    if (own(s, data, e) < 0)
        return e->code;
    const char *wrong = fill_level(v, &x, 0, &to);
    if (wrong)
        return err_set(e, ERR_INPUT, "%s: %s: [%s]: %s", who, q->name, q->def_text, wrong);
    x.data = data;
    *out = x;
    return 0;
}

static int fill_tensor(struct param_set *s, const struct moe_param *q, const char *path, struct moe_tensor *out,
                       const char *who, struct err *e)
{
    struct npy a;
    if (npy_open(&a, path, e) < 0)
        return err_prefix(e, "%s: %s", who, q->name);
    static const int64_t any_shape[NPY_MAX_DIMS] = { -1, -1, -1, -1 };
    int code = 0;
    int n_declared = 1;
    for (const char *c = q->def_text; *c; c++)
        n_declared += *c == ',';
    if (a.n_dims != n_declared)
        code = err_set(e, ERR_INPUT, "%s: %s: %s has %d dimensions, expected [%s]", who, q->name, path, a.n_dims,
                       q->def_text);
    else if ((code = npy_expect(&a, "f2|f4|f8", a.n_dims, any_shape, e)) < 0)
        err_prefix(e, "%s: %s", who, q->name);
    float *data = code ? NULL : malloc(sizeof *data * (size_t)(a.count ? a.count : 1));
    if (!code)
        code = own(s, data, e);
    if (!code) {
        npy_floats(&a, 0, a.count, data);
        for (int64_t i = 0; i < a.count && !code; i++)
            if (!isfinite(data[i]))
                code = err_set(e, ERR_INPUT, "%s: %s: %s: element %lld is not finite", who, q->name, path,
                               (long long)i);
    }
    if (!code) {
        out->n_dims = a.n_dims;
        memcpy(out->shape, a.shape, sizeof out->shape);
        out->data = data;
    }
    npy_close(&a);
    return code;
}

static int fill_one(struct param_set *s, const struct moe_param *q, const json_t *v, const char *who, struct err *e)
{
    char *at = (char *)s->conf + q->offset;
    const char *unit = q->unit ? q->unit : "";
    char text[64];
    json_t *kept = NULL;
    switch (q->type) {
    case MOE_INT: {
        if (v && json_is_real(v) && json_real_value(v) == nearbyint(json_real_value(v)) &&
            fabs(json_real_value(v)) <= MAX_WHOLE)
            ; /* 8.0 is a whole number that took a detour */
        else if (v && !json_is_integer(v))
            return err_set(e, ERR_INPUT, "%s: %s: expected a whole number, found %s", who, q->name, json_kind(v));
        int64_t x = v ? (int64_t)json_number_value(v) : (int64_t)q->def;
        if (v && json_is_integer(v))
            x = json_integer_value(v);
        if ((double)x < q->min || (double)x > q->max)
            return err_set(e, ERR_INPUT, "%s: %s: %lld is out of range, expected %.0f to %.0f%s%s", who, q->name,
                           (long long)x, q->min, q->max, *unit ? " " : "", unit);
        memcpy(at, &x, sizeof x);
        kept = json_integer(x);
        break;
    }
    case MOE_REAL: {
        if (v && !json_is_number(v))
            return err_set(e, ERR_INPUT, "%s: %s: expected a number, found %s", who, q->name, json_kind(v));
        double x = v ? json_number_value(v) : q->def;
        if (!(x >= q->min && x <= q->max))
            return err_set(e, ERR_INPUT, "%s: %s: %g is out of range, expected %g to %g%s%s", who, q->name, x,
                           q->min, q->max, *unit ? " " : "", unit);
        memcpy(at, &x, sizeof x);
        kept = isfinite(x) ? json_real(x) : json_string(x > 0 ? "inf" : "-inf");
        break;
    }
    case MOE_BOOL: {
        if (v && !json_is_boolean(v))
            return err_set(e, ERR_INPUT, "%s: %s: expected true or false, found %s", who, q->name, json_kind(v));
        bool x = v ? json_is_true(v) : q->def != 0;
        memcpy(at, &x, sizeof x);
        kept = json_boolean(x);
        break;
    }
    case MOE_STRING: {
        if (v && !json_is_string(v))
            return err_set(e, ERR_INPUT, "%s: %s: expected a string, found %s", who, q->name, json_kind(v));
        char *x = strdup(v ? json_string_value(v) : q->def_text ? q->def_text : "");
        if (own(s, x, e) < 0)
            return e->code;
        memcpy(at, &x, sizeof x);
        kept = json_string(x);
        break;
    }
    case MOE_ENUM: {
        int32_t x = (int32_t)q->def;
        if (v) {
            if (!json_is_string(v))
                return err_set(e, ERR_INPUT, "%s: %s: expected one of %s, found %s", who, q->name, q->def_text,
                               json_kind(v));
            for (x = 0; choice_at(q->def_text, x, text, sizeof text) && strcmp(text, json_string_value(v)); x++)
                ;
        }
        if (!choice_at(q->def_text, x, text, sizeof text))
            return err_set(e, ERR_INPUT, "%s: %s: expected one of %s, found \"%s\"", who, q->name, q->def_text,
                           json_string_value(v));
        memcpy(at, &x, sizeof x);
        kept = json_string(text);
        break;
    }
    case MOE_TENSOR: {
        struct moe_tensor x = { 0 };
        if (v) {
            if (!json_is_string(v) && !json_is_array(v))
                return err_set(e, ERR_INPUT, "%s: %s: expected the path of a .npy file, found %s", who, q->name,
                               json_kind(v));
            if (json_is_array(v) ? fill_list(s, q, v, &x, who, e) < 0
                                 : fill_tensor(s, q, json_string_value(v), &x, who, e) < 0)
                return e->code;
        }
        memcpy(at, &x, sizeof x);
        kept = v ? json_incref((json_t *)(uintptr_t)v) : json_null();
        break;
    }
    }
    json_object_set_new(s->values, q->name, kept);
    return 0;
}

int param_fill(struct param_set *s, const struct moe_plugin *p, const json_t *given, const char *who, struct err *e)
{
    memset(s, 0, sizeof *s);
    int n = n_params(p);
    if (given && !json_is_object(given))
        return err_set(e, ERR_INPUT, "%s: parameters must be a table, found %s", who, json_kind(given));
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)given, key, value) {
        int i = 0;
        while (i < n && strcmp(p->params[i].name, key))
            i++;
        if (i < n)
            continue;
        const char *names[n ? n : 1];
        for (i = 0; i < n; i++)
            names[i] = p->params[i].name;
        const char *near = err_nearest(key, names, n);
        if (near)
            return err_set(e, ERR_INPUT, "%s: unknown parameter \"%s\"; did you mean \"%s\"?", who, key, near);
        return err_set(e, ERR_INPUT, "%s: unknown parameter \"%s\" (see: moelab plugins show %s)", who, key, p->name);
    }
    s->conf = calloc(1, p->conf_size ? p->conf_size : 1);
    s->values = json_object();
    if (!s->conf || !s->values)
        err_set(e, ERR_MEMORY, "out of memory for parameters");
    for (int i = 0; i < n && !e->code; i++)
        fill_one(s, &p->params[i], given ? json_object_get(given, p->params[i].name) : NULL, who, e);
    if (e->code)
        param_free(s);
    return e->code;
}

void param_free(struct param_set *s)
{
    for (int i = 0; i < s->n_owned; i++)
        free(s->owned[i]);
    free(s->owned);
    free(s->conf);
    json_decref(s->values);
    memset(s, 0, sizeof *s);
}

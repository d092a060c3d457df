/* SPDX-License-Identifier: Apache-2.0
 * policy_test.h - what tests of policies share: cmocka, the test host, golden files and recorded ones. */
#ifndef POLICY_TEST_H
#define POLICY_TEST_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "policy_host.h"

/* A plugin of the build tree; the test fails without it. */
static inline const struct moe_plugin *test_plugin(const char *kind, const char *name)
{
    const struct moe_plugin *plugin = policy_find(kind, name);
    if (plugin == NULL)
        fail_msg("%s/%s.so is not on MOELAB_PLUGIN_PATH", kind, name);
    return plugin;
}

/* tests/golden/NAME; the test fails without it. */
static inline json_t *test_golden(const char *name)
{
    const char *top = getenv("top_srcdir");
    char path[1024];
    json_error_t why;
    snprintf(path, sizeof path, "%s/tests/golden/%s", top != NULL ? top : ".", name);
    json_t *all = json_load_file(path, 0, &why);
    if (all == NULL)
        fail_msg("%s:%d: %s", path, why.line, why.text);
    return all;
}

/* Path of a file in the shared folder ($MOELAB_SHARED, or ../shared from the source tree); the test is skipped where
 * it is absent. */
static inline void test_shared_path(const char *name, char path[1024])
{
    const char *top = getenv("top_srcdir"), *shared = getenv("MOELAB_SHARED");
    if (shared != NULL)
        snprintf(path, 1024, "%s/%s", shared, name);
    else
        snprintf(path, 1024, "%s/../shared/%s", top != NULL ? top : ".", name);
    FILE *there = fopen(path, "rb");
    if (there == NULL)
        skip();
    fclose(there);
}

static inline json_t *test_shared(const char *name)
{
    char path[1024];
    json_error_t why;
    test_shared_path(name, path);
    json_t *all = json_load_file(path, 0, &why);
    if (all == NULL)
        fail_msg("%s:%d: %s", path, why.line, why.text);
    return all;
}

static inline int32_t test_int(const json_t *object, const char *key)
{
    return (int32_t)json_integer_value(json_object_get(object, key));
}

static inline const char *test_text(const json_t *object, const char *key)
{
    return json_string_value(json_object_get(object, key));
}

static inline double test_at(const json_t *array, int32_t i)
{
    return json_number_value(json_array_get(array, (size_t)i));
}

#endif

/* SPDX-License-Identifier: Apache-2.0
 * script_machine.c - machines by name: files in Lua, platforms in SimGrid's XML, and devices like another machine's. */
#include "config.h"

#include "platform.h"
#include "script_internal.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* platform = "FILE.xml" in a machine file, beside it or anywhere, stands for what is in FILE. */
static int import_named(json_t *description, const char *file, struct err *e)
{
    const char *name = json_string_value(json_object_get(description, "platform")), *slash = strrchr(file, '/');
    json_t *imported = NULL;
    char path[1200];
    if (!name)
        return 0;
    if (!platform_is_xml(name))
        return err_set(e, ERR_INPUT, "%s: platform: found \"%.60s\", expected a table or the name of a .xml file", file,
                       name);
    const int folder = slash && *name != '/' && access(name, F_OK) != 0 ? (int)(slash + 1 - file) : 0;
    snprintf(path, sizeof path, "%.*s%s", folder, file, name);
    if (platform_import(path, &imported, e) < 0)
        return err_prefix(e, "%s: platform", file);
    json_object_set(description, "platform", json_object_get(imported, "platform"));
    json_decref(imported);
    return 0;
}

/* As script_machine, without what `like` stands for. */
static int load(const char *name, json_t **description, char *file, size_t room, struct err *e)
{
    *description = NULL;
    if (platform_is_xml(name)) {
        snprintf(file, room, "%s", name);
        return platform_import(name, description, e);
    }
    if (script_machine_file(name, description, file, room, e) < 0 || import_named(*description, file, e) == 0)
        return e->code;
    json_decref(*description);
    *description = NULL;
    return e->code;
}

int script_machine_like(json_t *description, const char *like, const char *file, struct err *e)
{
    json_t *other = NULL, *device;
    char from[600];
    if (!like)
        like = json_string_value(json_object_get(description, "like"));
    if (!like)
        return err_set(e, ERR_INPUT, "%s: like: expected the name of a machine", file);
    if (!json_object_get(description, "platform"))
        return err_set(e, ERR_INPUT, "%s: like: the machine has devices of its own: it belongs to a platform", file);
    if (load(like, &other, from, sizeof from, e) < 0)
        return err_prefix(e, "%s: like", file);
    device = json_object_get(other, "device");
    if (!json_is_object(device)) {
        err_set(e, ERR_INPUT, "%s: like: machine \"%s\" has no table `device`", file, like);
    } else {
        json_t *own = json_object_get(description, "device");
        if (json_is_object(own)) /* what is there goes before */
            json_object_update_recursive(device, own);
        json_object_set(description, "device", device);
        json_object_del(description, "like");
    }
    json_decref(other);
    return e->code;
}

int script_machine(const char *name, json_t **description, char *file, size_t room, struct err *e)
{
    if (load(name, description, file, room, e) < 0 || !json_object_get(*description, "like") ||
        script_machine_like(*description, NULL, file, e) == 0)
        return e->code;
    json_decref(*description);
    *description = NULL;
    return e->code;
}

/* SPDX-License-Identifier: Apache-2.0
 * registry.h - finds, checks and loads policies. */
#ifndef REGISTRY_H
#define REGISTRY_H

#include "err.h"
#include "moelab.h"

extern const char *const kind_name[MOE_N_KINDS]; /* "router", ... */
/* -1 if there is no such kind. */
int kind_of(const char *name);

struct registry_entry { enum moe_kind kind; char name[64]; char path[1024]; const struct moe_plugin *plugin; };

/* Opens (or returns the already open) policy. Searched in order: each directory of $MOELAB_PLUGIN_PATH (as
 * DIR/NAME.so and DIR/KIND/NAME.so), the build tree the program runs from, the install directory. Everything about
 * the file is checked before any of its code is called: ABI, size, kind, name against the file's stem, required
 * hooks, parameter table. `who` starts the message. */
int registry_load(enum moe_kind, const char *name, const char *who, const struct moe_plugin **, struct err *);
/* The file of a policy that is not moelab's own, from $MOELAB_PLUGIN_PATH; NULL for those of the build tree, of the
 * install directory, and for policies that have no file. */
const char *registry_foreign(const struct moe_plugin *);
/* Every policy that can be found, by kind and name; the first on the search path wins. A file that cannot be loaded
 * is reported on stderr and left out. Entries stay valid until exit. */
void registry_list(const struct registry_entry **, int *n);
/* Directories of data files: machine descriptions, scenario libraries, traces. Build tree first, then install.
 * sub: "hw/machines/dgx-h100.lua". Returns 0 and the path, or -1. */
int registry_data(const char *sub, char *path, size_t room);
/* The names of the files NAME.lua in a data directory, sorted; returns how many, at most `room`. */
int registry_data_names(const char *sub, char (*names)[64], int room);
/* Of the files NAME.lua in a data directory, the name nearest to this one; "" if none is near. */
void registry_nearest_data(const char *sub, const char *name, char *near, size_t room);
/* Directory of the running executable. */
const char *registry_exe_dir(void);

#endif

/* SPDX-License-Identifier: Apache-2.0
 * platform.h - machines whose links and routes are written down one by one, by hand or by SimGrid, because no kind of
 * fabric describes them. */
#ifndef PLATFORM_H
#define PLATFORM_H

#include "machine.h"

#include <stdbool.h>
#include <stdio.h>

/* Routes are stored, one for every pair of hosts. */
#define PLATFORM_MAX_HOSTS 256

struct platform;

/* ---- descriptions: platform_import.c ---- */

bool platform_is_xml(const char *name);
/* A file in SimGrid's XML as a description without devices. */
int platform_import(const char *file, json_t **description, struct err *);

/* ---- topologies: platform.c ---- */

/* Checks description.platform, that nothing else describes links, and fills in `nodes` and `devices`. */
int platform_check(json_t *description, const char *file, struct err *);
/* Of a topology whose description was checked and whose devices are counted: t->link and t->platform. */
int platform_build(struct topology *, const char *file, struct err *);
void platform_free(struct platform *);
/* As topology_route; there is no way but between devices. */
int platform_route(const struct topology *, int32_t src, int32_t dst, int32_t *link, double *latency);

/* ---- pictures: platform_draw.c ---- */

/* As topology_draw. */
void platform_draw(const struct topology *, const char *stem, FILE *);

#endif

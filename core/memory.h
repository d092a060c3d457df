/* SPDX-License-Identifier: Apache-2.0
 * memory.h - how much memory there is, and how much a process holds. In bytes; 0 where the system does not say. */
#ifndef MEMORY_H
#define MEMORY_H

#include "err.h"

#include <stddef.h>

/* Memory that processes may still take. */
struct memory_left {
    double bytes;     /* < 0: nothing says so */
    char source[400]; /* where it stands: "MemAvailable of /proc/meminfo", or the cgroup's limit */
};

/* The least of MemAvailable and what is left under the memory limits of this process's cgroup and of those above it
 * (versions 1 and 2). `root` goes before every path: "" but in tests. */
void memory_left(const char *root, struct memory_left *);
/* What this process holds that is not a file's: now, and at most so far. */
double memory_own(void);
double memory_peak(void);
/* For large arrays that are read and written in one go, before they are: pages of 2 MB where the system has some, which
 * spares a translation every 4 KB. Does nothing for small ones. Returns p. */
void *memory_large(void *p, size_t bytes);
/* "23.1 GB"; returns text. */
const char *memory_text(double bytes, char *text, size_t room);

#endif

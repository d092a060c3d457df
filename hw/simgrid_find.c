/* SPDX-License-Identifier: Apache-2.0
 * simgrid_find.c - where moelab-simgrid lies, and about how long it takes. */
#include "config.h"

#include "net.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SERVER "moelab-simgrid"

/* Where the server may lie, in order; NULL ends the list. Each path is returned in `path`. */
static const char *candidate(int i, char *path, size_t size)
{
    const char *given = getenv("MOELAB_LIBEXEC");
    char self[4096];
    if (given && *given) { /* who names a place means it: nothing else is tried */
        snprintf(path, size, "%s/" SERVER, given);
        return i == 0 ? path : NULL;
    }
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    self[n > 0 ? n : 0] = '\0';
    char *slash = strrchr(self, '/');
    if (slash)
        *slash = '\0';
    switch (i) {
    case 0:
        snprintf(path, size, "%s/hw/" SERVER, self);
        return path; /* in the build tree */
    case 1:
        snprintf(path, size, "%s/../hw/" SERVER, self);
        return path; /* libtool's .libs/ */
    case 2:
        snprintf(path, size, "%s/" SERVER, MOELAB_LIBEXECDIR);
        return path;
    default:
        return NULL;
    }
}

bool net_simgrid_server(char *path, size_t size, char *tried, size_t room)
{
    *tried = '\0';
    for (int i = 0; candidate(i, path, size); i++) {
        if (access(path, X_OK) == 0)
            return true;
        snprintf(tried + strlen(tried), room - strlen(tried), "%s%.200s", i ? ", " : "", path);
    }
    return false;
}

int net_simgrid_find(char *path, size_t size, struct err *err)
{
    char tried[700];
    if (net_simgrid_server(path, size, tried, sizeof tried))
        return 0;
    return err_set(err, ERR_INPUT,
                   "tier simgrid: no " SERVER " (looked for %s): it is not built --without-simgrid; "
                   "use tier exact, which shares its model, or set MOELAB_LIBEXEC",
                   tried);
}

bool net_simgrid_available(void)
{
    char path[1024];
    struct err why = { 0 };
    return net_simgrid_find(path, sizeof path, &why) == 0;
}

/* Fitted to one exchange of uneven sizes among 8 to 96 devices, all pairs, on star-50GBps and dgx-h100 (SimGrid 3.32,
 * one core of a server): 1.5 ms, 8 ms, 69 ms, 0.28 s, 1.1 s and 6.4 s for 8, 16, 32, 48, 64 and 96. Where few routes
 * make many flows equal, down to a fifth of it was seen. */
double net_simgrid_seconds(double n_flows)
{
    return 3e-5 * n_flows + 7e-8 * n_flows * n_flows;
}

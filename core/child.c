/* SPDX-License-Identifier: Apache-2.0
 * child.c - see child.h. */
#include "config.h"

#include "child.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

void child_begin(volatile struct policy_note *note)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    dup2(STDERR_FILENO, STDOUT_FILENO);
    policy_note_to(note);
}

bool child_write(int fd, const char *text, size_t n)
{
    for (size_t at = 0; at < n;) {
        ssize_t w = write(fd, text + at, n - at);
        if (w < 0 && errno != EINTR)
            return false;
        at += w > 0 ? (size_t)w : 0;
    }
    return true;
}

void child_fault(const volatile struct policy_note *n, int status, double timeout_s, char *text, size_t room)
{
    char kind[sizeof n->kind], name[sizeof n->name], hook[sizeof n->hook], who[160];
    for (size_t i = 0; i < sizeof kind; i++)
        kind[i] = n->kind[i];
    for (size_t i = 0; i < sizeof name; i++)
        name[i] = n->name[i];
    for (size_t i = 0; i < sizeof hook; i++)
        hook[i] = n->hook[i];
    if (hook[0])
        snprintf(who, sizeof who, "%s %s, in %s", kind, name, hook);
    else
        snprintf(who, sizeof who, "the core%s%s", name[0] ? ", after " : "", name);
    if (timeout_s > 0)
        snprintf(text, room, "%s: did not end within %g s (--run-timeout)", who, timeout_s);
    else if (WIFSIGNALED(status))
        snprintf(text, room, "%s: crashed: %s", who, strsignal(WTERMSIG(status)));
    else
        snprintf(text, room, "%s: ended with exit code %d and no result", who, WEXITSTATUS(status));
}
